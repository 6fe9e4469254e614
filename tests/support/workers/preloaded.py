"""A process that has paid the imports of a rank once and forks ranks from itself; spoken to by support/launching.py.

Reads one JSON object a line: `{"start": {script, args, environment, folder, in, out, err}}` (the last three are files),
answered by its process id, or `{"poll": id}`, answered by its exit status (null while it runs; minus the signal's
number if one ended it).
A rank runs its script as `python -u script` does, on a process image in which only packages from outside this project
are loaded: none of its own modules, no group of processes, no thread.
"""

import gc
import json
import os
import runpy
import sys
import tempfile

# ruff: noqa: E402, F401  imported for the ranks
gc.disable()  # a sixth of the time that imports take
import accelerate
import einops
import jsonargparse
import obstore
import PIL.Image
import pyarrow.parquet
import safetensors.torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor._ops
import transformers.models.auto.modeling_auto
import transformers.models.auto.processing_auto
import transformers.models.clip.modeling_clip
import transformers.models.llama.modeling_llama
import transformers.models.llava_next.image_processing_pil_llava_next
import transformers.models.llava_next.modeling_llava_next
import transformers.models.llava_next.processing_llava_next
import transformers.tokenization_mistral_common

PIL.Image.init()
# else the first collection in a rank copies all of this memory, by writing a mark beside each object
gc.collect()
gc.freeze()
gc.enable()


def serve() -> dict:
    """Answers until its input ends; returns only in a forked rank, with what that has to run."""
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "start" in request:
            answer = os.fork()
            if answer == 0:
                return request["start"]
        else:
            ended, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        print(json.dumps(answer), flush=True)
    sys.exit()


if __name__ == "__main__":
    rank = serve()
    for number, (path, flags) in enumerate(
        [(rank["in"], os.O_RDONLY), (rank["out"], os.O_WRONLY | os.O_CREAT), (rank["err"], os.O_WRONLY | os.O_CREAT)]
    ):
        opened = os.open(path, flags | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdout.reconfigure(write_through=True)
    os.chdir(rank["folder"])
    os.environ.clear()
    os.environ.update(rank["environment"])
    tempfile.tempdir = None  # TMPDIR may be another
    sys.argv = [rank["script"], *rank["args"]]
    sys.path[0] = os.path.dirname(rank["script"])
    runpy.run_path(rank["script"], run_name="__main__")
