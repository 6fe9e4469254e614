"""Imported last by the process that worker processes are forked from: makes once what every worker needs.

A fork shares memory until one side writes to it. LLaMA3's tokenizer takes half a second and 160 MB to unpickle: here
once a rank, not once a worker.
"""

import atexit
import contextlib
import gc
import os
from pathlib import Path

from llava_next.data.loading.encode import ENCODER_VARIABLE, load_encoder

# Not as the user has it: a fork has none of the threads that a tokenizer has started, and would wait for them.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if path := os.environ.get(ENCODER_VARIABLE):
    # This process ends after its workers and its rank, however that ended.
    atexit.register(Path(path).unlink, missing_ok=True)
    with contextlib.suppress(Exception):  # a worker meets the same error, and there it reaches the rank
        encoder = load_encoder(path)
        encoder.template.check_tokenizer(encoder.tokenizer)  # what that finds out is remembered
# A worker's collections would write a mark beside each of these objects.
gc.collect()
gc.freeze()
