"""The levers: what is different in the step for a row of the table.

`SWITCHES` change the step in place and back again, inside of a `with`; `REBUILT` need a model of their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from benchmarking.samples import geometry, supervised
from llava_next.data.loading.batch import IGNORE, Example, PackedBatch, pack
from llava_next.model.forward import head, modeling
from llava_next.model.forward.attention import attention_names, choose_attention
from llava_next.training.devices.agreement import slot_weights
from llava_next.training.devices.launch import layer_stacks

Micros = list[PackedBatch]


class Unavailable(RuntimeError):
    """A lever that cannot be measured here; the message says why."""


@dataclass
class Bench:
    """The step that is measured: model, samples of the step, its micro-batches, weighted, and checkpointing policy."""

    accelerator: Accelerator
    model: nn.Module
    samples: list
    micros: Micros
    padded_batch: int
    policy: str = "none"

    @property
    def weights(self) -> torch.Tensor:
        """Weight of a supervised token by slot."""
        return slot_weights(supervised(self.samples), "token")


@contextlib.contextmanager
def padding(bench: Bench) -> Iterator[Micros]:
    """Samples in groups, each padded to its group's longest, as a batch of the stock way."""
    groups = [bench.samples[i : i + bench.padded_batch] for i in range(0, len(bench.samples), bench.padded_batch)]
    anyres = geometry(bench.model.config)
    packed = []
    for group in groups:
        longest = max(len(example.input_ids) for example, _ in group)
        examples = [padded(example, longest) for example, _ in group]
        packed.append(pack(examples, anyres.tile_size, anyres.patches_per_tile).weighted(bench.weights))
    yield ready(packed, bench.accelerator.device)


def padded(example: Example, length: int) -> Example:
    """The sample with unsupervised words at its end: under the causal mask they change nothing before them."""
    more = length - len(example.input_ids)
    ids = np.concatenate([example.input_ids, np.zeros(more, np.int64)])
    return dataclasses.replace(
        example, input_ids=ids, labels=np.concatenate([example.labels, np.full(more, IGNORE, np.int64)])
    )


@contextlib.contextmanager
def all_logits(bench: Bench) -> Iterator[Micros]:
    """The head at every position, those without a label at weight 0."""
    yield ready([everywhere(batch) for batch in bench.micros], bench.accelerator.device)


def everywhere(batch: PackedBatch) -> PackedBatch:
    """The micro-batch with a target at each of its positions."""
    length, positions = len(batch.input_ids), batch.target_positions

    def spread(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(length, dtype=values.dtype).index_put((positions,), values)

    names = ("target_ids", "target_weights", "target_source", "target_slot")
    return dataclasses.replace(
        batch, target_positions=torch.arange(length), **{name: spread(getattr(batch, name)) for name in names}
    )


@contextlib.contextmanager
def one_chunk(bench: Bench) -> Iterator[Micros]:
    """Logits of all supervised positions at once."""
    with patched(head, "CHUNK", 1 << 30):
        yield bench.micros


@contextlib.contextmanager
def every_vision_layer(bench: Bench) -> Iterator[Micros]:
    """The tower to its end, features taken from before: transformers' own way."""

    def whole_tower(tower, pixels, feature_layer):
        hidden = features = run_tower(tower, pixels, feature_layer)
        for layer in tower.encoder.layers[modeling.used_layers(len(tower.encoder.layers), feature_layer) :]:
            hidden = layer(hidden, attention_mask=None)
        return features

    run_tower = modeling.run_tower
    with patched(modeling, "run_tower", whole_tower):
        yield bench.micros


@contextlib.contextmanager
def float_tiles(bench: Bench) -> Iterator[Micros]:
    """Tiles normalised on the host and copied as float32."""
    mean, std = modeling.NORMALISATION[bench.model.config.vision_config.model_type]
    micros = [dataclasses.replace(b, tiles=modeling.normalise(b.tiles, mean, std)) for b in bench.micros]
    with patched(modeling, "normalise", lambda tiles, *_: tiles):
        yield ready(micros, bench.accelerator.device)


@contextlib.contextmanager
def pageable(bench: Bench) -> Iterator[Micros]:
    """Copies to the device from memory that is not page-locked: each waits (GPU only)."""
    tensors = [f.name for f in dataclasses.fields(PackedBatch) if torch.is_tensor(getattr(bench.micros[0], f.name))]
    yield [
        dataclasses.replace(batch, **{name: getattr(batch, name).clone() for name in tensors}) for batch in bench.micros
    ]


@contextlib.contextmanager
def attention_by(kernel: str, bench: Bench) -> Iterator[Micros]:
    """Another kernel in place of torch's variable-length one.

    Raises:
        Unavailable: it cannot run here.
    """
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


@contextlib.contextmanager
def patched(module, name: str, value) -> Iterator[None]:
    """`module.name` is `value` inside."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def ready(micros: Micros, device: torch.device) -> Micros:
    """Page-locked where there is a GPU."""
    return [batch.pin_memory() for batch in micros] if device.type == "cuda" else micros


def liger(operation: str, bench: Bench) -> contextlib.AbstractContextManager:
    """One operation of the decoder layers by Liger's kernel. Only modules of this model are changed, and changed back.

    Args:
        operation: one of `LIGER`.

    Raises:
        Unavailable: the package is not there, or nothing that runs its kernels.
    """
    function, forwards = LIGER[operation]
    try:
        kernel = getattr(importlib.import_module("liger_kernel.ops"), function)
    except ImportError as error:
        package = (error.name or "liger_kernel").partition(".")[0].replace("_", "-")
        raise Unavailable(f"{package} is not installed") from error
    if bench.accelerator.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise Unavailable("Liger's kernels need a GPU, or TRITON_INTERPRET=1")
    return replaced_forwards(bench, forwards(bench, kernel.apply))


@contextlib.contextmanager
def replaced_forwards(bench: Bench, forwards: list[tuple[nn.Module, Callable]]) -> Iterator[Micros]:
    """Each module computes by its function inside."""
    for module, forward in forwards:
        module.forward = forward
    try:
        yield bench.micros
    finally:
        for module, _ in forwards:
            del module.forward  # the class's own shows again


def norms(bench: Bench, kernel: Callable) -> list[tuple[nn.Module, Callable]]:
    """RMSNorms of the language model: their input, weight and epsilon go to the kernel."""
    modules = [module for module in bench.model.model.language_model.modules() if hasattr(module, "variance_epsilon")]
    return [(m, lambda hidden, m=m: kernel(hidden, m.weight, m.variance_epsilon)) for m in modules]


def gated_mlps(bench: Bench, kernel: Callable) -> list[tuple[nn.Module, Callable]]:
    """MLPs of the decoder layers: gate and up go to the kernel."""
    modules = [layer.mlp for layer in layer_stacks(bench.model)[1]]
    return [(m, lambda x, m=m: m.down_proj(kernel(m.gate_proj(x), m.up_proj(x)))) for m in modules]


def rotations(bench: Bench, kernel: Callable) -> list[tuple[nn.Module, Callable]]:
    """Attention of the decoder layers, with another `apply_rotary_pos_emb` among the globals of its forward."""

    def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
        # The kernel writes into its input. Selective checkpointing keeps that and would rotate it a second time.
        return kernel(q.clone(), k.clone(), cos, sin) if bench.policy == "selective" else kernel(q, k, cos, sin)

    found = []
    for layer in layer_stacks(bench.model)[1]:
        own = type(layer.self_attn).forward
        if "apply_rotary_pos_emb" not in own.__code__.co_names:
            raise Unavailable(f"{type(layer.self_attn).__name__} does not call apply_rotary_pos_emb")
        names = {**own.__globals__, "apply_rotary_pos_emb": rotate}
        copy = FunctionType(own.__code__, names, None, own.__defaults__, own.__closure__)
        found.append((layer.self_attn, MethodType(copy, layer.self_attn)))
    return found


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
