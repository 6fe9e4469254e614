"""An adapter put into its base: in memory, or as the model folder that training itself writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from llava_next.model.folders.adapters import check_of_base, read_adapter
from llava_next.model.folders.card import CARD, read_story, write_card
from llava_next.model.folders.check import ModelFolder
from llava_next.model.folders.companions import copy_companions
from llava_next.model.folders.export import MAX_FILE_BYTES, file_key, made_aside, write_config, write_weights
from llava_next.model.folders.starting import own_key
from llava_next.model.forward.lora import merged_weight
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration


def with_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """A base as stock transformers has loaded it, with the adapter of a folder put into its weights, in place.

    Raises:
        ValueError: a tensor of the adapter finds no place.
    """
    adapter = read_adapter(folder)
    left = set(adapter.tensors)
    for name, parameter in model.named_parameters():
        layer = _layer(name)
        if layer in left:
            left.remove(layer)
            parameter.data = merged_weight(parameter.data, adapter.lora.scale, **adapter.load(layer)).to(
                parameter.dtype
            )
    if left:
        raise ValueError(f"{folder}: adapters of {sorted(left)[:3]} have no place in the base")
    return model


def _layer(name: str) -> str:
    """Name of the layer that an adapter's tensors are under, of one of our model's parameters."""
    return name.removesuffix(".weight").replace("vision_tower.vision_model.", "vision_tower.")


def merge_adapter(base: Path, folder: Path, out: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes the model folder of a base with an adapter in it, tensor by tensor.

    Raises:
        ValueError: the adapter is another base's, or a tensor of it finds no place.
        OSError: `out` cannot be written.
    """
    adapter, subject = read_adapter(folder), ModelFolder(base)
    check_of_base(adapter, base, "--model")
    left = set(adapter.tensors)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        with torch.device("meta"):
            names = {file_key(n): n for n, _ in LlavaNextForConditionalGeneration(subject.config).named_parameters()}
        for key, (file, *_) in subject.tensors.items():
            if own_key(key) not in names:  # a tied head
                continue
            with safe_open(base / file, "pt") as opened:
                tensor = opened.get_tensor(key)
            layer = _layer(names[own_key(key)])
            if layer in left:
                left.remove(layer)
                tensor = merged_weight(tensor, adapter.lora.scale, **adapter.load(layer))
            yield own_key(key), tensor
        if left:
            raise ValueError(f"{folder}: adapters of {sorted(left)[:3]} have no place in {base}")

    with made_aside(out) as aside:
        write_weights(tensors(), aside, MAX_FILE_BYTES, dtype)
        write_config(subject.config, aside, dtype)
        copy_companions(folder if (folder / "tokenizer.json").exists() else base, aside)
        if (folder / CARD).exists():
            write_card(aside, read_story(folder))
