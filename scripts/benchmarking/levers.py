"""The levers: what is different in the step for a row of the table.

`SWITCHES` change the step in place and back again, inside of a `with`; `REBUILT` need a model of their own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from unittest import mock

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from benchmarking.samples import PADDED_BATCH, Samples, supervised
from llava_next.data.loading.batch import IGNORE, Example, PackedBatch, pack
from llava_next.model.forward import head, modeling
from llava_next.model.forward.attention import KERNEL_NAMES, attention_names, choose_attention
from llava_next.model.forward.fused import fuse_layers, load_kernels
from llava_next.training.devices.agreement import slot_weights
from support.tiny import geometry

Micros = list[PackedBatch]


class Unavailable(RuntimeError):
    """A lever that cannot be measured here; the message says why."""


@dataclass
class Bench:
    """The step that is measured: model, samples of the step, its micro-batches, weighted."""

    accelerator: Accelerator
    model: nn.Module
    samples: Samples
    micros: Micros

    @property
    def weights(self) -> torch.Tensor:
        """Weight of a supervised token by slot."""
        return slot_weights(supervised(self.samples), "token")


@contextlib.contextmanager
def padding(bench: Bench) -> Iterator[Micros]:
    """Samples in groups, each padded to its group's longest, as a batch of the stock way."""
    anyres, packed = geometry(bench.model.config), []
    for start in range(0, len(bench.samples), PADDED_BATCH):
        group = [example for example, _ in bench.samples[start : start + PADDED_BATCH]]
        longest = max(len(example.input_ids) for example in group)
        examples = [padded(example, longest) for example in group]
        packed.append(pack(examples, anyres.tile_size, anyres.patches_per_tile).weighted(bench.weights))
    yield ready(packed, bench.accelerator.device)


def padded(example: Example, length: int) -> Example:
    """The sample with unsupervised words at its end: under the causal mask they change nothing before them."""
    more = (0, length - len(example.input_ids))
    ids, labels = np.pad(example.input_ids, more), np.pad(example.labels, more, constant_values=IGNORE)
    return replace(example, input_ids=ids, labels=labels)


@contextlib.contextmanager
def all_logits(bench: Bench) -> Iterator[Micros]:
    """The head at every position, those without a label at weight 0."""
    yield ready([everywhere(batch) for batch in bench.micros], bench.accelerator.device)


def everywhere(batch: PackedBatch) -> PackedBatch:
    """The micro-batch with a target at each of its positions."""
    changes = {"target_positions": torch.arange(len(batch.input_ids))}
    for name in ("target_ids", "target_weights", "target_source", "target_slot"):
        values = getattr(batch, name)
        changes[name] = values.new_zeros(len(batch.input_ids)).index_put((batch.target_positions,), values)
    return replace(batch, **changes)


@contextlib.contextmanager
def one_chunk(bench: Bench) -> Iterator[Micros]:
    """Logits of all supervised positions at once."""
    with mock.patch.object(head, "CHUNK", 1 << 30):
        yield bench.micros


@contextlib.contextmanager
def every_vision_layer(bench: Bench) -> Iterator[Micros]:
    """The tower to its end, features taken from before: transformers' own way."""

    def whole_tower(tower, pixels, feature_layer, run_tower=modeling.run_tower):
        hidden = features = run_tower(tower, pixels, feature_layer)
        for layer in tower.encoder.layers[modeling.used_layers(len(tower.encoder.layers), feature_layer) :]:
            hidden = layer(hidden, attention_mask=None)
        return features

    with mock.patch.object(modeling, "run_tower", whole_tower):
        yield bench.micros


@contextlib.contextmanager
def float_tiles(bench: Bench) -> Iterator[Micros]:
    """Tiles normalised on the host and copied as float32."""
    kind = modeling.tower_kind(bench.model.config.vision_config)
    micros = [replace(batch, tiles=modeling.normalise(batch.tiles, kind.mean, kind.std)) for batch in bench.micros]
    with mock.patch.object(modeling, "normalise", lambda tiles, *_: tiles):
        yield ready(micros, bench.accelerator.device)


@contextlib.contextmanager
def pageable(bench: Bench) -> Iterator[Micros]:
    """Copies to the device from memory that is not page-locked: each waits (GPU only)."""
    tensors = [f.name for f in fields(PackedBatch) if torch.is_tensor(getattr(bench.micros[0], f.name))]
    yield [replace(batch, **{name: getattr(batch, name).clone() for name in tensors}) for batch in bench.micros]


@contextlib.contextmanager
def attention_by(kernel: str, bench: Bench) -> Iterator[Micros]:
    """Another kernel in place of the one that was picked. Raises Unavailable where it cannot run, or is that one."""
    before = bench.model.config.text_config._attn_implementation
    if before == KERNEL_NAMES[kernel]:
        raise Unavailable("the step as it is has that kernel")
    try:
        choose_attention(kernel, bench.accelerator.device)
    except ValueError as error:
        raise Unavailable(str(error)) from error
    bench.model.set_attn_implementation(attention_names(kernel))
    try:
        yield bench.micros
    finally:
        bench.model.set_attn_implementation({"text_config": before, "vision_config": "sdpa"})
        if before == KERNEL_NAMES["fa3"]:
            choose_attention("fa3", bench.accelerator.device)  # in torch again


def ready(micros: Micros, device: torch.device) -> Micros:
    """Page-locked where there is a GPU."""
    return [batch.pin_memory() for batch in micros] if device.type == "cuda" else micros


@contextlib.contextmanager
def liger(operation: str, bench: Bench) -> Iterator[Micros]:
    """One operation of the decoder layers by Liger's kernel; nothing of it stays.

    Args:
        operation: of `fused.FUNCTIONS`.

    Raises:
        Unavailable: the package is not there, nothing that runs its kernels, or no layer that they are for.
    """
    if bench.accelerator.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise Unavailable("Liger's kernels need a GPU, or TRITON_INTERPRET=1")
    try:
        kernels = load_kernels()
    except ImportError as error:
        package = (error.name or "liger_kernel").partition(".")[0].replace("_", "-")
        raise Unavailable(f"{package} is not installed") from error
    decoder = bench.model.model.language_model
    before = [(module, type(module)) for module in decoder.modules()]
    try:
        if left := fuse_layers(decoder, kernels, (operation,)):
            raise Unavailable(f"not for {', '.join(left)}")
        yield bench.micros
    finally:
        for module, kind in before:
            module.__class__ = kind


# name: (what is different, how), in the order of the table
SWITCHES: dict[str, tuple[str, Callable]] = {
    "packing": ("padded to the longest of a group", padding),
    "supervised_logits": ("logits at all positions", all_logits),
    "chunked_loss": ("logits in one piece", one_chunk),
    "unused_layer": ("the tower's last layer is computed", every_vision_layer),
    "uint8_tiles": ("tiles copied as float32", float_tiles),
    "pinned": ("copies from pageable memory", pageable),
    "varlen": ("one SDPA call a segment", partial(attention_by, "sdpa")),
    "fa3": ("attention by torch's own FlashAttention 2", partial(attention_by, "varlen")),
    "varlen_or_flash": ("attention by flash-attn", partial(attention_by, "flash")),
    "liger_norm": ("RMSNorm by Liger's kernel", partial(liger, "norm")),
    "liger_swiglu": ("SwiGLU by Liger's kernel", partial(liger, "swiglu")),
    "liger_rope": ("rotary embedding by Liger's kernel", partial(liger, "rope")),
}
LIGER = ("liger_norm", "liger_swiglu", "liger_rope")
GPU_ONLY = ("pinned", "varlen", "fa3", "varlen_or_flash")
# name: changes to `training.How`
REBUILT: dict[str, dict] = {
    "compile": {"compiled": True},
    "compile_float8": {"compiled": True, "float8": True},
    "float8": {"float8": True},
    "checkpointing_none": {"policy": "none"},
    "checkpointing_selective": {"policy": "selective"},
    "checkpointing_full": {"policy": "full"},
    "no_reshard": {"reshard": False},
    "prefetch_2": {"prefetch": 2},  # of the other ranks' weights: gives nothing on a single one
}
