"""Stand-ins for Liger's kernels, which run on GPUs only: their signatures and their arithmetic, in torch."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama import modeling_llama

from llava_next.model.forward.attention import attention_names
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration
from support.published import CLIP
from support.tiny import geometry, gradients, pack_tiny, pairing_config, random_samples


def rms_norm(x, weight, eps, offset=0.0, casting_mode="llama", in_place=True):
    """As Liger's for `llama`: rounded to the input's dtype before the product. In place would write into gradients."""
    assert (offset, casting_mode, in_place) == (0.0, "llama", False)
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rope(query, key, cos, sin, rotate=modeling_llama.apply_rotary_pos_emb):
    """Turns what it gets in place, as Liger's does, and returns it."""
    for x, turned in zip((query, key), rotate(query, key, cos, sin), strict=True):
        x.copy_(turned)
    return query, key


def models_of(llm: str) -> list[LlavaNextForConditionalGeneration]:
    """A tiny model of the language model's kind with CLIP, twice the same."""
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(LlavaNextForConditionalGeneration(pairing_config(CLIP, llm)).train())
        found[-1].set_attn_implementation(attention_names("sdpa"))
    return found


def step(model, count: int = 3, **options) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of so many samples, see `random_samples`."""
    anyres = geometry(model.config)
    batch = pack_tiny([example for example, _ in random_samples(0, count, anyres=anyres, **options)], anyres)
    loss = model(**batch.weighted(torch.full((3,), 0.1)).model_inputs(torch.device("cpu")), num_sources=2).loss
    loss.backward()
    return loss.item(), gradients(model)


FUNCTIONS = {
    "LigerRMSNormFunction": rms_norm,
    "LigerSiLUMulFunction": lambda gate, up: F.silu(gate) * up,
    "LigerRopeFunction": rope,
}


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets `liger_kernel` be imported; the names of its functions, in the order of their calls."""
    found, operations = [], ModuleType("liger_kernel.ops")
    for name, function in FUNCTIONS.items():
        call = lambda *args, name=name, function=function: found.append(name) or function(*args)  # noqa: E731
        setattr(operations, name, SimpleNamespace(apply=call))
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", operations)
    return found
