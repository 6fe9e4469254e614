"""Tiny models of every pairing, exported as training exports them: true tokenizers, thin layers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from unittest import mock

import torch
from safetensors import safe_open
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from llava_next.model.folders import compose as composing
from llava_next.model.folders.compose import random_part
from llava_next.model.folders.dry import architecture, scaled
from llava_next.model.folders.export import save_model
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration
from support import real_tokenizers
from support.kinds import CLIP, KINDS

PINPOINTS = ((56, 28), (28, 56), (56, 56), (28, 84), (84, 28))
WIDTHS = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
TOWERS = {"clip": CLIPVisionConfig(**TOWER, projection_dim=32), "siglip": SiglipVisionConfig(**TOWER)}


def _rope(theta: float) -> dict:
    return {"rope_type": "default", "rope_theta": theta}


# name -> (config, chat template, tokenizer as published, base of the rotary embedding)
LLMS = {
    "llama": (LlamaConfig, {"vocab_size": 32000, "num_key_value_heads": 4}, "vicuna_v1", "vicuna", 10000.0),
    "llama3": (LlamaConfig, {"vocab_size": 128256}, "llama_3", "llama3", 500000.0),
    "qwen2": (Qwen2Config, {"vocab_size": 152064}, "qwen", "qwen2", 1000000.0),
    "qwen2_tied": (Qwen2Config, {"vocab_size": 151936, "tie_word_embeddings": True}, "qwen", "qwen2", 1000000.0),
    "mistral": (MistralConfig, {"vocab_size": 32000, "sliding_window": None}, "mistral", "mistral", 1000000.0),
}
PAIRINGS = [(vision, llm) for llm in LLMS for vision in TOWERS if (vision, llm) != ("siglip", "qwen2_tied")]


def llm_config(name: str) -> PretrainedConfig:
    kind, changes, _, _, theta = LLMS[name]
    return kind(**{**WIDTHS, **changes}, rope_parameters=_rope(theta))


@cache
def _tokenizer(name: str):
    return getattr(real_tokenizers, name)()


def compose_pairing(folder: Path, vision: str, llm: str) -> Path:
    """The pairing with seeded float32 weights; what is exported of it is checked, not this."""
    _, _, template, tokenizer, _ = LLMS[llm]
    parts = random_part(TOWERS[vision], 0), random_part(llm_config(llm), 1)
    with mock.patch.object(composing, "check_folder", return_value=[]):
        return composing.compose(*parts, _tokenizer(tokenizer), template, folder, PINPOINTS, dtype=torch.float32)


def compose_kind(folder: Path, name: str) -> Path:
    """A row of `KINDS` as `compose_pairing` makes one, with Qwen2's tokenizer and template."""
    llm, tower, changes = KINDS[name]
    text = scaled(architecture(llm), "tiny")
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # the tokenizer's take their place
    text = text.to_dict() | changes | ids | {"vocab_size": 152064, "initializer_range": 0.1}
    text = architecture(llm).from_dict(text)
    parts = random_part(TOWERS["clip" if tower == CLIP else "siglip"], 0), random_part(text, 1)
    return composing.compose(*parts, _tokenizer("qwen2"), "qwen", folder, PINPOINTS, dtype=torch.float32)


def export_pairing(base: Path, folder: Path, dtype: torch.dtype) -> LlavaNextForConditionalGeneration:
    """Exports a composed folder in several files, as after a training; returns the float32 model."""
    model = LlavaNextForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    save_model(model, folder, base, dtype=dtype, max_file_bytes=10**6)
    return model


def assert_stock_export(folder, base, stock) -> None:
    """The export has the names and shapes of the folder it began as, other values, and stock transformers loads it."""
    exported, before = (safe_open(f / "model.safetensors", "pt") for f in (folder, base))
    assert list(exported.keys()) == list(before.keys())
    assert all(exported.get_slice(k).get_shape() == before.get_slice(k).get_shape() for k in before.keys())  # noqa: SIM118
    key = "language_model.model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(exported.get_tensor(key), before.get_tensor(key))
    loaded, report = type(stock).from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded.model.language_model.layers[0].self_attn.q_proj.weight, exported.get_tensor(key))
