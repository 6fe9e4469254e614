"""Low-rank adapters (LoRA, DoRA) in the model that is trained: peft's own layers in place of chosen linear ones.

They are injected, not wrapped around: the model stays what it is, and its parameters keep their names but for
`.base_layer` before a weight that has an adapter. peft is imported only when adapters are asked for.

Dropout is not peft's: its random numbers would depend on how samples are dealt to ranks and micro-batches, and
recomputed activations would draw others. Here a mask is a function of the run's seed, the layer, the step, the sample's
place in it, the token and the feature.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from importlib.metadata import version
from importlib.util import find_spec
from typing import Literal

import torch
from torch import nn

from llava_next.model.forward.modeling import used_layers
from llava_next.model.forward.nf4 import bitsandbytes, quantise
from llava_next.versions import unfit

LEAST_PEFT = (0, 18)
ADAPTER = "default"  # peft's name of the one adapter
MARK, BASE = ".lora_", ".base_layer."  # in names of adapters' parameters, and of those that have one
WHOLE = {"lm_head", "embed_tokens"}  # what nothing is put in place of: tied in some models, and looked up by its rows
# group of layers -> their names in our model, and in the trees of all transformers releases
GROUPS = {
    "llm": ("model.language_model.layers.", r"(?:model\.)?language_model\.(?:model\.)?layers\."),
    "vision": (
        "model.vision_tower.encoder.layers.",
        r"(?:model\.)?vision_tower\.(?:vision_model\.)?encoder\.layers\.",
    ),
    "projector": ("model.multi_modal_projector.", r"(?:model\.)?multi_modal_projector\."),
}


@dataclass
class Lora:
    """Training by low-rank adapters: a target matrix W stays as it is and becomes W + scale * B A.

    Defaults: the published recipe of LLaVA-1.5.

    Args:
        r: rank of every adapter: A is [r, inputs], B [outputs, r].
        alpha: scale * r.
        dropout: share of an adapter's inputs that is left out, drawn by seed, step and sample.
        targets: which linear layers: `llm` (those of the language model's layers; never the head), `vision` (of the
            tower's layers that are used), `projector`; or some of them, as `llm.*.q_proj` or `vision.layers.3.*`.
        rank_scaling: `lora`: scale = alpha / r; `rslora`: alpha / sqrt(r).
        dora: train every row's length apart from its direction (DoRA).
        start: adapter folder to start from, with a new optimizer; it must be of the model given.
        copy_base: the base that a run leaves beside its adapter has copies of the start model's files, not links.
    """

    r: int = 128
    alpha: int = 256
    dropout: float = 0.05
    targets: list[str] = field(default_factory=lambda: ["llm"])
    rank_scaling: Literal["lora", "rslora"] = "lora"
    dora: bool = False
    start: str | None = None
    copy_base: bool = False

    @property
    def scale(self) -> float:
        """What the product of B and A is multiplied by."""
        return self.alpha / (self.r**0.5 if self.rank_scaling == "rslora" else self.r)

    @property
    def modules(self) -> set[str]:
        """Of llm, vision and projector those that have a target."""
        return {target.partition(".")[0] for target in self.targets}


def check_lora(lora: Lora) -> None:
    """Refuses what no model could train with. Raises ValueError naming the key."""
    for key, value in (("r", lora.r), ("alpha", lora.alpha)):
        if value <= 0:
            raise ValueError(f"lora.{key}: must be positive, not {value}")
    if not 0 <= lora.dropout < 1:
        raise ValueError(f"lora.dropout: must be in [0, 1), not {lora.dropout}")
    if not lora.targets:
        raise ValueError("lora.targets: names no layer; give one or more of llm, vision, projector")
    for target in lora.targets:
        group, *rest = target.split(".")
        if group not in GROUPS:
            near = [".".join([name, *rest]) for name in get_close_matches(group, GROUPS, 1)] or [f"llm.*.{target}"]
            advice = "head and embeddings get no adapters" if WHOLE & set(target.split(".")) else f"try {near[0]!r}"
            raise ValueError(f"lora.targets: {target!r} begins with none of {', '.join(GROUPS)}; {advice}")
    if obstacle := unfit("peft", LEAST_PEFT, "lora"):
        raise ValueError(f"lora: {obstacle}, or leave lora out to train in full")


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name (`model.language_model.layers.0.mlp.up_proj`) -> module of all that an adapter can be for."""
    tower, (prefix, _) = model.vision_tower.encoder.layers, GROUPS["vision"]
    used = used_layers(len(tower), model.config.vision_feature_layer)
    found = {}
    for name, module in model.named_modules():
        if name.startswith("model.vision_tower."):
            name = name.replace("vision_tower.vision_model.", "vision_tower.")
            if not name.startswith(prefix) or int(name.removeprefix(prefix).split(".")[0]) >= used:
                continue
        if isinstance(module, nn.Linear) and name.startswith(tuple(prefix for prefix, _ in GROUPS.values())):
            found[name] = module
    return found


def short_name(name: str) -> str:
    """`llm.layers.0.mlp.up_proj` for a layer's whole name: what targets are written as."""
    for group, (prefix, _) in GROUPS.items():
        if name.startswith(prefix):
            return f"{group}.{'layers.' if prefix.endswith('layers.') else ''}{name.removeprefix(prefix)}"
    raise ValueError(f"{name} is no layer that an adapter can be for")


def chosen_layers(model: nn.Module, lora: Lora) -> list[str]:
    """Whole names of the layers that get an adapter.

    Raises:
        ValueError: a target that is no layer, or a rank larger than a matrix.
    """
    layers = linear_layers(model)
    found = set()
    for target in lora.targets:
        pattern = f"{target}.*" if target in GROUPS else target
        matches = {name for name in layers if fnmatchcase(short_name(name), pattern)}
        if not matches:
            kinds = sorted({re.sub(r"\.\d+\.", ".*.", short_name(name)) for name in layers})
            raise ValueError(f"lora.targets: {target!r} is no layer of this model; there are {', '.join(kinds)}")
        found |= matches
    for name in sorted(found):
        rows, columns = layers[name].out_features, layers[name].in_features
        if lora.r > min(rows, columns):
            raise ValueError(
                f"lora.r: {lora.r} is more than the rank that {short_name(name)} can have ({rows} x {columns}); give "
                f"{min(rows, columns)} at most, or other lora.targets"
            )
    return [name for name in layers if name in found]


def target_pattern(names: Iterable[str]) -> str:
    """One regular expression for exactly these layers, in the module trees of all transformers releases.

    Bare names of layers would fit the tower's attention as well as the language model's.
    """
    parts = []
    for prefix, pattern in GROUPS.values():
        rests = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        if prefix.endswith("layers."):
            numbers: dict[str, list[str]] = {}
            for number, _, rest in (rest.partition(".") for rest in rests):
                numbers.setdefault(rest, []).append(number)
            alike: dict[tuple[str, ...], list[str]] = {}
            for rest, where in numbers.items():
                alike.setdefault(tuple(where), []).append(rest)
            for where, kinds in alike.items():
                parts.append(f"{pattern}(?:{'|'.join(where)})\\.(?:{'|'.join(map(re.escape, kinds))})")
        elif rests:
            parts.append(f"{pattern}(?:{'|'.join(map(re.escape, rests))})")
    return "|".join(parts)


def quantise_under(model: nn.Module, lora: Lora, dtype: torch.dtype, device: torch.device | None = None) -> None:
    """Puts the matrices of the language model that `add_adapters` will be for in 4 bits, in place.

    Args:
        dtype: in which the model computes; device: that quantises.

    Raises:
        ValueError: see `chosen_layers` and `quantise`.
    """
    quantise(model, [name for name in chosen_layers(model, lora) if name.startswith(GROUPS["llm"][0])], dtype, device)


def add_adapters(model: nn.Module, lora: Lora, seed: int) -> None:
    """Puts adapters into the model, in place: A drawn by the seed, B zero, both float32.

    Raises:
        ValueError: see `chosen_layers`.
    """
    if find_spec("bitsandbytes"):
        bitsandbytes()  # peft imports it wherever it is installed: in the way that takes no seconds

    from peft import LoraConfig, inject_adapter_in_model

    names = chosen_layers(model, lora)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=target_pattern(names),
        use_rslora=lora.rank_scaling == "rslora",
        use_dora=lora.dora,
        bias="none",
    )
    on_meta = model.lm_head.weight.is_meta
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, ADAPTER, low_cpu_mem_usage=on_meta)
    layers = adapter_layers(model)
    if set(layers) != set(names):
        raise ValueError(f"lora: peft {version('peft')} put adapters elsewhere than asked: {sorted(layers)[:3]}")
    model.dropout_keys = DropoutKeys()
    for name, layer in layers.items():
        for parameter in adapter_parameters(layer).values():
            parameter.data = parameter.data.float()
        if lora.dropout:
            by_tile = not name.startswith(GROUPS["llm"][0])
            layer.lora_dropout[ADAPTER] = SampleDropout(lora.dropout, f"{seed} {name}", model.dropout_keys, by_tile)


def adapter_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name, as in a model without adapters -> peft's layer in its place."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    return {name.replace("vision_tower.vision_model.", "vision_tower."): layer for name, layer in layers.items()}


def adapter_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """`lora_A`, `lora_B` and, with DoRA, `lora_magnitude_vector` of one layer."""
    kinds = ("lora_A", "lora_B", "lora_magnitude_vector")
    return {kind: getattr(layer, kind)[ADAPTER].weight for kind in kinds if ADAPTER in getattr(layer, kind)}


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is one of an adapter."""
    return MARK in name


def plain_name(name: str) -> str:
    """A parameter's name in the model without adapters."""
    return name.replace(BASE, ".")


def merged_weight(
    weight: torch.Tensor,
    scale: float,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    lora_magnitude_vector: torch.Tensor | None = None,
) -> torch.Tensor:
    """A matrix with its adapter, float32: `[outputs, inputs]`."""
    merged = weight.float() + scale * (lora_B.float() @ lora_A.float())
    if lora_magnitude_vector is None:
        return merged
    return merged * (lora_magnitude_vector.float() / merged.norm(dim=1))[:, None]


class DropoutKeys:
    """What the rows of the micro-batch at work are, for all dropouts of a model: random bits of each token and tile.

    Attributes:
        tokens: int32 `[T]`; tiles: int32 `[N]`; None outside of the packed forward.
    """

    tokens: torch.Tensor | None = None
    tiles: torch.Tensor | None = None


class SampleDropout(nn.Module):
    """Dropout whose mask is a function of the seed, the layer, and what `DropoutKeys` says of a row.

    Args:
        p: share of the features that become 0; the others grow by 1 / (1 - p).
        name: of this dropout, with the run's seed.
        keys: shared with the model.
        by_tile: rows are a tile's patches `[N, patches, features]`, not tokens `[1, T, features]`.
    """

    def __init__(self, p: float, name: str, keys: DropoutKeys, by_tile: bool):
        super().__init__()
        self.p, self.keys, self.by_tile = p, keys, by_tile
        self.seed = zlib.crc32(name.encode()) - 2**31
        self.least = round(p * 2**32) - 2**31

    def extra_repr(self) -> str:
        return f"p={self.p}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The same shape. Raises ValueError in training outside of the packed forward, which alone knows the rows."""
        if not self.training:
            return x
        rows = self.keys.tiles if self.by_tile else self.keys.tokens
        if rows is None:
            raise ValueError("lora.dropout: only the packed forward knows which sample a row is of; call model.eval()")
        if self.by_tile:
            rows = mix(rows[:, None] + torch.arange(x.shape[1], dtype=torch.int32, device=x.device))
        else:
            rows = rows[None]
        columns = mix(torch.arange(x.shape[-1], dtype=torch.int32, device=x.device) + self.seed)
        kept = mix(rows[..., None] ^ columns) >= self.least
        return torch.where(kept, x / (1 - self.p), 0)


def mix(bits: torch.Tensor) -> torch.Tensor:
    """int32 -> int32 whose bits all depend on all bits (`lowbias32` by C. Wellons; products wrap around)."""
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * 0x7FEB352D
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return bits ^ ((bits >> 16) & 0xFFFF)
