"""The levers: what is different in the step for a row of the table.

`SWITCHES` change the step in place and back again, inside of a `with`; `REBUILT` need a model of their own.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
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
from llava_next.model.forward.attention import attention_names, choose_attention
from llava_next.training.devices.agreement import slot_weights
from llava_next.training.devices.launch import layer_stacks
from support.tiny import geometry

Micros = list[PackedBatch]


class Unavailable(RuntimeError):
    """A lever that cannot be measured here; the message says why."""


@dataclass
class Bench:
    """The step that is measured: model, samples of the step, its micro-batches, weighted, and checkpointing policy."""

    accelerator: Accelerator
    model: nn.Module
    samples: Samples
    micros: Micros
    policy: str = "none"

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
    """Another kernel in place of torch's variable-length one. Raises Unavailable where it cannot run."""
    try:
        choose_attention(kernel, bench.accelerator.device)
    except ValueError as error:
        raise Unavailable(str(error)) from error
    before = bench.model.config.text_config._attn_implementation
    bench.model.set_attn_implementation(attention_names(kernel))
    try:
        yield bench.micros
    finally:
        bench.model.set_attn_implementation({"text_config": before, "vision_config": "sdpa"})


def ready(micros: Micros, device: torch.device) -> Micros:
    """Page-locked where there is a GPU."""
    return [batch.pin_memory() for batch in micros] if device.type == "cuda" else micros


@contextlib.contextmanager
def liger(operation: str, bench: Bench) -> Iterator[Micros]:
    """One operation of the decoder layers by Liger's kernel; nothing of it stays.

    Args:
        operation: one of `LIGER`.

    Raises:
        Unavailable: the package is not there, or nothing that runs its kernels.
    """
    function, replaced = LIGER[operation]
    try:
        kernel = getattr(importlib.import_module("liger_kernel.ops"), function)
    except ImportError as error:
        package = (error.name or "liger_kernel").partition(".")[0].replace("_", "-")
        raise Unavailable(f"{package} is not installed") from error
    if bench.accelerator.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise Unavailable("Liger's kernels need a GPU, or TRITON_INTERPRET=1")
    with contextlib.ExitStack() as stack:
        for patch in replaced(bench, kernel.apply):
            stack.enter_context(patch)
        yield bench.micros


def norms(bench: Bench, kernel: Callable) -> Iterator:
    """RMSNorms of the language model: their input, weight and epsilon go to the kernel."""
    for module in bench.model.model.language_model.modules():
        if hasattr(module, "variance_epsilon"):
            call = lambda hidden, m=module: kernel(hidden, m.weight, m.variance_epsilon)  # noqa: E731
            yield mock.patch.object(module, "forward", call)


def gated_mlps(bench: Bench, kernel: Callable) -> Iterator:
    """MLPs of the decoder layers: gate and up go to the kernel."""
    for layer in layer_stacks(bench.model)[1]:
        call = lambda x, m=layer.mlp: m.down_proj(kernel(m.gate_proj(x), m.up_proj(x)))  # noqa: E731
        yield mock.patch.object(layer.mlp, "forward", call)


def rotations(bench: Bench, kernel: Callable) -> Iterator:
    """Attention of the decoder layers, by the name that it calls."""
    kind = type(layer_stacks(bench.model)[1][0].self_attn)
    if "apply_rotary_pos_emb" not in kind.forward.__code__.co_names:
        raise Unavailable(f"{kind.__name__} does not call apply_rotary_pos_emb")

    def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
        # The kernel writes into its input. Selective checkpointing keeps that and would rotate it a second time.
        return kernel(q.clone(), k.clone(), cos, sin) if bench.policy == "selective" else kernel(q, k, cos, sin)

    yield mock.patch.object(sys.modules[kind.__module__], "apply_rotary_pos_emb", rotate)


# name: (of Liger's autograd functions, what computes by it)
LIGER = {
    "liger_norm": ("LigerRMSNormFunction", norms),
    "liger_swiglu": ("LigerSiLUMulFunction", gated_mlps),
    "liger_rope": ("LigerRopeFunction", rotations),
}


# name: (what is different, how), in the order of the table
SWITCHES: dict[str, tuple[str, Callable]] = {
    "packing": ("padded to the longest of a group", padding),
    "supervised_logits": ("logits at all positions", all_logits),
    "chunked_loss": ("logits in one piece", one_chunk),
    "unused_layer": ("the tower's last layer is computed", every_vision_layer),
    "uint8_tiles": ("tiles copied as float32", float_tiles),
    "pinned": ("copies from pageable memory", pageable),
    "varlen": ("one SDPA call a segment", partial(attention_by, "sdpa")),
    "varlen_or_flash": ("attention by flash-attn", partial(attention_by, "flash")),
    "liger_norm": ("RMSNorm by Liger's kernel", partial(liger, "liger_norm")),
    "liger_swiglu": ("SwiGLU by Liger's kernel", partial(liger, "liger_swiglu")),
    "liger_rope": ("rotary embedding by Liger's kernel", partial(liger, "liger_rope")),
}
GPU_ONLY = ("pinned", "varlen", "varlen_or_flash")
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
