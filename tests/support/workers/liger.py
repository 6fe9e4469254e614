"""Tiny models with Liger's kernels beside the same with stock layers, in one process, by triton's interpreter."""

import os
import sys
from pathlib import Path

sys.path += [os.environ["LLAVA_NEXT_LIGER"], str(Path(__file__).parents[2])]

import numpy as np
import torch
import triton.language as tl
from liger_kernel.ops import rms_norm
from triton.runtime import interpreter

from llava_next.model.forward.fused import fuse_layers, load_kernels
from llava_next.training.devices.parallel import apply_checkpointing
from support.kernels import models_of, step
from support.published import LLAMA3, QWEN2

convert = interpreter._implicit_cvt


def with_floats(value):
    """The interpreter leaves floats as they are, which on a GPU are scalars of the kernel."""
    if isinstance(value, float):
        return tl.tensor(interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
    return convert(value)


def main() -> None:
    interpreter._implicit_cvt = with_floats
    rms_norm.rsqrt = lambda x: tl.rsqrt(x)  # that of CUDA's library has no value here
    few = {"count": 2, "images": (0,), "max_text": 12}  # the interpreter takes a millisecond a row
    for llm, policy in ((LLAMA3, "selective"), (QWEN2, "none")):
        ours, plain = models_of(llm)
        assert fuse_layers(ours.model.language_model, load_kernels()) == {}
        for model in (ours, plain):
            apply_checkpointing(model, policy)
        (loss, found), (expected, wanted) = step(ours, **few), step(plain, **few)
        assert abs(loss / expected - 1) < 1e-5, (llm, loss, expected)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        print(llm, policy, loss, expected, flush=True)
    print("2 models the same")


if __name__ == "__main__":
    main()
