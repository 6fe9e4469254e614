"""Trains a small sharded model with checkpoints, in processes that are forked, so that many starts cost little.

Reads one JSON job a line from standard input and answers each with one JSON line. The modules are imported once; every
job forks `world` processes that train from the newest checkpoint to `steps`; with `kill_after` they are killed so many
seconds after their first step. Keys of a job: world, folder, steps, every, and optionally kill_after, `OPTIONS` of
CheckpointConfig, width (of the layers), pause (seconds a step), fault (see `apply_fault`), environment (variables),
export (`full`: the end writes a model to a full disk), low_memory (moments in 8 bits, and bf16 parameters), replicate
(copies of the model).
"""

import gc
import hashlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from llava_next.model.folders import export
from llava_next.training.checkpoints import recovery
from llava_next.training.checkpoints.exports import export_model
from llava_next.training.checkpoints.recovery import checkpoint_name, find_resume
from llava_next.training.checkpoints.same_run import run_facts
from llava_next.training.checkpoints.saving import Checkpoints
from llava_next.training.checkpoints.sharded import Layout
from llava_next.training.checkpoints.verifying import verified
from llava_next.training.devices.parallel import sum_gradients_in_fp32
from llava_next.training.recipe.config import CheckpointConfig, RunConfig
from llava_next.training.recipe.low_memory import LowMemoryAdamW, quantile_maps
from llava_next.training.watch.metrics import JsonLines
from support.tracing import find_torchao

BATCH = 8
WRITE = Layout.write
OPTIONS = ("keep_last", "keep_every", "asynchronous", "dir", "resume")


def build(width: int, world: int, low_memory: bool = False, replicate: int = 1):
    """The model, its last layer frozen and sharded over all ranks, and its optimizer; the same on every start."""
    torch.manual_seed(0)
    # 5 rows: nothing on some of 4 ranks
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 5), nn.Tanh(), nn.Linear(5, 1))
    model[4].requires_grad_(False)
    sizes = (replicate, world // replicate) if replicate > 1 else (world,)
    how = {"mesh": init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])}
    if low_memory:
        model.bfloat16()
        how["mp_policy"] = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for layer in (model[0], model[2]):
        fully_shard(layer, **how)
    fully_shard(model, **how)
    if low_memory:
        sum_gradients_in_fp32(model)
        group = {"params": [p for p in model.parameters() if p.requires_grad], "name": "llm", "lr": 1e-2}
        return model, LowMemoryAdamW([group | {"weight_decay": 0.0}], (0.9, 0.999), 1e-8, eight_bit=True, seed=0)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def loss_of(model: nn.Module, step: int, rank: int, world: int, width: int) -> torch.Tensor:
    """Of this rank's share of the step's samples; the mean over ranks is the loss of the step."""
    batch = torch.randn(BATCH, width, generator=torch.Generator().manual_seed(step))
    mine = batch[rank::world].to(model[4].weight.dtype)
    return (model(mine).squeeze(1) - mine.mean(dim=1)).square().sum() / BATCH * world


def apply_fault(fault: str, checkpoints: Checkpoints, rank: int, step: int) -> None:
    """`full:STEP`: the disk is full for rank 1's file of that step; `read-only`: the folder is; `slow`: the disk is.

    `apart`: every two ranks are a node with a run folder of its own.
    """
    kind, _, number = fault.partition(":")
    if kind == "slow":
        Layout.write = lambda *arguments: (time.sleep(0.1), WRITE(*arguments))[1]
    if kind == "full" and rank == 1 and step == int(number) - 1:
        aside = checkpoints.folder / (checkpoint_name(int(number)) + ".tmp")
        aside.mkdir(exist_ok=True)
        (aside / "rank-00001.safetensors").symlink_to("/dev/full")
    if kind == "read-only" and step == 3:
        checkpoints.settle()
        os.chmod(checkpoints.folder, 0o555)
        if os.geteuid() == 0:
            os.setuid(65534)  # root may write anywhere


def full_disk(tensors: dict, path: Path, **_) -> None:
    """What safetensors does when the disk is full."""
    path.write_bytes(b"half of it")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def train(job: dict, rank: int) -> dict:
    folder, world, width = Path(job["folder"]), job["world"], job.get("width", 32)
    run_dir = folder
    if job.get("fault") == "apart":
        run_dir, recovery.SHOW_SECONDS = folder / f"node-{rank // 2}", 0.2
        run_dir.mkdir(parents=True, exist_ok=True)
    options = CheckpointConfig(**{name: job[name] for name in OPTIONS if name in job})
    config = RunConfig(model=str(folder / "base"), run_dir=str(run_dir), checkpoint=options)
    said = []
    resume = verified(config, find_resume(config), lambda state: [], said.append)
    resume.prepare(run_dir)
    model, optimizer = build(width, world, job.get("low_memory", False), job.get("replicate", 1))
    begun = resume.state["step"]
    checkpoints = Checkpoints(resume.folder, model, optimizer, options, run_facts(config), resume.mirror, said.append)
    if resume.path:
        checkpoints.load(resume.path)
    metrics, waited, random_before = JsonLines(folder / "metrics.jsonl"), 0.0, torch.rand(1).item()
    for step in range(begun, job["steps"]):
        apply_fault(job.get("fault", ""), checkpoints, rank, step)
        loss = loss_of(model, step, rank, world, width)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(job.get("pause", 0.0))
        message = torch.tensor([loss.item() / world, checkpoints.failed])
        dist.all_reduce(message)
        if rank == 0:
            metrics.write({"step": step + 1, "loss": message[0].item()})
        if message[1] > 0:
            checkpoints.wait()
        if (step + 1) % job["every"] == 0:
            checkpoints.save(step + 1, {"step": step + 1, "counters": {}})
            waited += checkpoints.take_stalled()
    checkpoints.close()
    if job.get("export") == "full":
        export.save_file = full_disk
        export.write_config = export.file_key = lambda *arguments: "any"
        export_model(model, run_dir / "model", folder / "base", checkpoints.folder)
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, DTensor)]
    whole = [t.detach().full_tensor().reshape(-1) for t in (*model.parameters(), *tensors)]
    digest = hashlib.sha256(b"".join(t.view(torch.uint8).numpy().tobytes() for t in whole)).hexdigest()
    return {"digest": digest, "begun": begun, "waited": waited, "random": random_before, "said": said}


def child(job: dict, rank: int, store: str) -> None:
    """One rank; writes what came of it beside the store."""
    out = open(f"{store}.rank{rank}", "w")  # noqa: SIM115 (a fault may take the right to open it later)
    torch.set_num_threads(1)
    os.environ.update(job.get("environment", {}))
    try:
        dist.init_process_group("gloo", store=dist.FileStore(store, job["world"]), rank=rank, world_size=job["world"])
        answer = train(job, rank)
    except BaseException as error:
        answer = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-2000:]}
    out.write(json.dumps(answer))
    out.flush()
    os._exit(0)


def run(job: dict, number: int) -> dict:
    """Forks the ranks, kills them if the job says so, and collects their answers."""
    folder = Path(job["folder"])
    if job.get("low_memory"):  # torchao is imported once, here
        find_torchao()
        quantile_maps(torch.device("cpu"))
    (folder / "base").mkdir(parents=True, exist_ok=True)
    (folder / "base/config.json").write_text("{}")
    store = folder.parent / f"store-{os.getpid()}-{number}"
    metrics, pids = folder / "metrics.jsonl", []
    before, kill_at = size_of(metrics), float("inf")
    for rank in range(job["world"]):
        pid = os.fork()
        if pid == 0:
            child(job, rank, str(store))
        pids.append(pid)
    while pids and time.monotonic() < kill_at:
        pids = [pid for pid in pids if os.waitpid(pid, os.WNOHANG)[0] == 0]
        # the log shrinks when a run drops what it will do again
        before = min(before, size_of(metrics))
        if "kill_after" in job and kill_at == float("inf") and size_of(metrics) > before:
            kill_at = time.monotonic() + job["kill_after"]
        time.sleep(0.001)
    killed = len(pids)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)
    files = [Path(f"{store}.rank{rank}") for rank in range(job["world"])]
    answers = [json.loads(file.read_text()) if file.exists() and file.stat().st_size else {} for file in files]
    left = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    return {"killed": killed, "left": left, "ranks": answers}


def size_of(path: Path) -> int:
    """In bytes; 0 for a file that is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def main() -> None:
    gc.collect()
    gc.freeze()  # else a collection in a rank copies all that is shared with this process
    for number, line in enumerate(sys.stdin):
        print(json.dumps(run(json.loads(line), number)), flush=True)


if __name__ == "__main__":
    main()
