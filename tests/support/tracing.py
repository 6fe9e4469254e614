"""On a CPU, what torch.compile and torchao need in tests: attention that is traced as a GPU's kernel is, and a path."""

import os
import sys
from importlib.util import find_spec

import pytest
import torch
from torch.nn import functional as F

from llava_next.model.forward import attention
from llava_next.model.forward.attention import attention_names
from support.tiny import pack_tiny, random_samples


def dense_attention(query, key, value, cu_seqlens, max_length, scaling, window) -> torch.Tensor:
    """One SDPA call under a mask of segments, `[1, heads, T, head_dim]` to `[1, T, heads, head_dim]`."""
    assert window is None
    length = query.shape[2]
    segment = torch.bucketize(torch.arange(length), cu_seqlens, right=True)
    mask = (segment[:, None] == segment) & torch.ones(length, length, dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True).transpose(
        1, 2
    )


def use_dense_attention(model, patch: pytest.MonkeyPatch) -> None:
    """Lets the model's language model attend so until `patch` is undone."""
    patch.setitem(attention._KERNELS, "varlen", dense_attention)
    model.set_attn_implementation(attention_names("varlen"))


def find_torchao() -> None:
    """Lets this process import torchao from the folder that scripts/test.sh made for it."""
    if folder := os.environ.get("LLAVA_NEXT_TORCHAO"):
        sys.path.append(folder)


def has_torchao() -> bool:
    """Whether a process that calls `find_torchao` can import it."""
    return "LLAVA_NEXT_TORCHAO" in os.environ or find_spec("torchao") is not None


def micro_batch(seed: int, count: int, images=(0, 1, 2)) -> dict:
    """Inputs of a packed forward; without samples, those of an empty micro-batch."""
    packed = pack_tiny([example for example, _ in random_samples(seed, count, images=images)])
    return packed.weighted(torch.full((16,), 0.01)).model_inputs(torch.device("cpu")) | {"num_sources": 2}
