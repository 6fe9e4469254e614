"""Adapter folders: written in the one form that loads everywhere, and read.

peft reports keys that it misses, never those that it has no place for, so a wrong prefix is the base model without a
word. Every transformers release finds language model and tower under the names from before 4.52; the projector it
finds under its own release's names only, so that stands in the file twice. `target_modules` is one pattern that fits
the module trees of all releases. What peft cannot hold (a newline) or servers refuse (modules trained in full) lies in
a base folder of its own, which the adapter names.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import LlavaNextConfig

from llava_next.model.folders.card import TRAINED
from llava_next.model.folders.check import DTYPE_NAMES, ModelFolder
from llava_next.model.folders.companions import copy_companions
from llava_next.model.folders.export import (
    INDEX_NAME,
    file_key,
    flush_to_disk,
    made_aside,
    whole,
    write_config,
)
from llava_next.model.folders.starting import model_fingerprint, own_key
from llava_next.model.forward.lora import (
    ADAPTER,
    GROUPS,
    Lora,
    adapter_layers,
    adapter_parameters,
    is_adapter,
    target_pattern,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
DTYPES = {name: getattr(torch, dtype) for dtype, name in DTYPE_NAMES.items()}


@dataclass
class AdapterFolder:
    """An adapter as it lies on disk.

    Args:
        tensors: layer's name in our model -> `lora_A`, `lora_B`, `lora_magnitude_vector` -> key in the file.
        base: folder that it names; fingerprint: of that, "" where it was written elsewhere.
    """

    path: Path
    lora: Lora
    tensors: dict[str, dict[str, str]]
    base: Path
    fingerprint: str

    def load(self, layer: str) -> dict[str, torch.Tensor]:
        """The tensors of one layer's adapter, by kind."""
        with safe_open(self.path / WEIGHTS, "pt") as file:
            return {kind: file.get_tensor(key) for kind, key in self.tensors[layer].items()}


def adapter_keys(name: str) -> list[str]:
    """Keys in the file of an adapter's parameter, `model.language_model.layers.0.mlp.up_proj.lora_A.default.weight`."""
    plain = name.replace(f".{ADAPTER}.weight", ".weight").replace("vector.weight", "vector")
    keys = [PREFIX + file_key(plain)]
    return [*keys, PREFIX + plain] if plain.startswith(GROUPS["projector"][0]) else keys


def layer_and_kind(key: str) -> tuple[str, str]:
    """The reverse: (name of the layer, kind of tensor). Raises ValueError: a key that is no adapter's."""
    found = re.fullmatch(re.escape(PREFIX) + r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)", key)
    if not found:
        raise ValueError(f"{key} is no tensor of a LoRA adapter for this model")
    name, kind = found[1], found[2].removesuffix(".weight")
    name = re.sub(r"^(model\.)?language_model\.(model\.)?", "model.language_model.", name)
    name = re.sub(r"^(model\.)?vision_tower\.(vision_model\.)?", "model.vision_tower.", name)
    return re.sub(r"^(model\.)?multi_modal_projector\.", "model.multi_modal_projector.", name), kind


def save_adapter(
    model: nn.Module,
    folder: Path,
    lora: Lora,
    start: Path,
    companions: Path,
    is_main_process: bool = True,
    tell: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes `folder`, and beside it a base where projector or newline trained in full. A collective.

    Args:
        folder: `adapter`, or `adapter` with an ending that its base, `base`, gets too.
        start: model folder that training started from.
        companions: folder with what goes beside weights.
        tell: called with each of the two before it gets its name, to write the card.

    Raises:
        OSError, ValueError: on the main process; the others gather to the end.
    """
    gathered, adapter, full = _trained(model), {}, {}
    try:
        if is_main_process:
            for name, tensor in gathered:
                if is_adapter(name):
                    adapter |= {key: tensor.float().cpu().contiguous() for key in adapter_keys(name)}
                else:
                    full[name] = tensor.cpu()
            base = start
            if full:
                base = folder.with_name("base" + folder.name.removeprefix("adapter"))
                write_base(base, start, full, model.config, companions, lora.copy_base, tell)
            write_adapter(folder, adapter, list(adapter_layers(model)), lora, base, companions, tell)
    finally:
        for _ in gathered:
            pass


def _trained(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, whole(parameter)


def write_adapter(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    layers: list[str],
    lora: Lora,
    base: Path,
    companions: Path,
    tell: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes an adapter folder: tensors by their keys, a config that every peft release reads, companions."""
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": str(base.resolve()),
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_scaling == "rslora",
        "use_dora": lora.dora,
        "target_modules": target_pattern(layers),
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    with made_aside(folder) as aside:
        shared = {key: tensor.clone() for key, tensor in tensors.items()}  # safetensors refuses shared memory
        save_file(shared, aside / WEIGHTS, metadata={"format": "pt", "base": model_fingerprint(base)})
        (aside / WEIGHTS).chmod(aside.stat().st_mode & 0o666)
        flush_to_disk(aside / WEIGHTS)
        (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        copy_companions(companions, aside)
        tell(aside)


def write_base(
    folder: Path,
    start: Path,
    trained: dict[str, torch.Tensor],
    config: LlavaNextConfig,
    companions: Path,
    copied: bool = False,
    tell: Callable[[Path], None] = lambda folder: None,
) -> None:
    """A model folder that is `start` but for some tensors, which lie in a small file; all others are linked, or copied
    where the file system has no links. That file's name sorts behind theirs: the last of a key's tensors counts.

    Args:
        trained: parameter's name -> tensor.
        copied: whether they are copied in any case; tell: see `save_adapter`.
    """
    found = ModelFolder(start).tensors
    keys = {own_key(key): key for key in found}
    replaced = {keys[file_key(name)]: tensor for name, tensor in trained.items()}
    names = {file: base_file(file) for file, *_ in found.values()}
    with made_aside(folder) as aside:
        for file, name in names.items():
            (shutil.copyfile if copied else link)(start / file, aside / name)
        tensors = {key: tensor.to(DTYPES[found[key][2]]).contiguous() for key, tensor in replaced.items()}
        save_file(tensors, aside / TRAINED, metadata={"format": "pt"})
        (aside / TRAINED).chmod(aside.stat().st_mode & 0o666)
        weight_map = {key: TRAINED if key in replaced else names[file] for key, (file, *_) in found.items()}
        size = sum(torch.Size(shape).numel() * DTYPES[dtype].itemsize for _, shape, dtype in found.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (aside / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
        write_config(config, aside, DTYPES[next(iter(found.values()))[2]])
        copy_companions(companions, aside)
        tell(aside)


def base_file(name: str) -> str:
    """Name of a start model's weight file in a base: one that loaders read before `TRAINED`, with the index."""
    return f"model-{name}"


def link(source: Path, target: Path) -> None:
    """A hard link, or a copy where there can be none."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def tensors_of(folder: Path) -> Callable[[str], torch.Tensor]:
    """Gives the tensor of a model folder that a parameter's name stands for, read when asked for."""
    found = ModelFolder(folder).tensors
    keys = {own_key(key): key for key in found}

    def read(name: str) -> torch.Tensor:
        key = keys[file_key(name)]
        with safe_open(folder / found[key][0], "pt") as file:
            return file.get_tensor(key)

    return read


def read_adapter(folder: Path) -> AdapterFolder:
    """Reads config and header of an adapter folder.

    Raises:
        ValueError: it is none, one of its files is damaged, or it is one that this model cannot have.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing; give an adapter folder, such as RUN_DIR/adapter")
    config = read_config(folder)
    try:
        weights = safe_open(folder / WEIGHTS, "pt")
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged ({error}): copy the folder again") from error
    tensors: dict[str, dict[str, str]] = {}
    with weights as file:
        fingerprint = (file.metadata() or {}).get("base", "")
        for key in file.keys():  # noqa: SIM118 - not a dict
            layer, kind = layer_and_kind(key)
            tensors.setdefault(layer, {})[kind] = key
    lora = Lora(
        r=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        rank_scaling="rslora" if config.get("use_rslora") else "lora",
        dora=bool(config.get("use_dora")),
    )
    return AdapterFolder(folder, lora, tensors, Path(config.get("base_model_name_or_path") or ""), fingerprint)


def read_config(folder: Path) -> dict:
    """`adapter_config.json` of a folder, with all that is needed of it.

    Raises:
        ValueError: it is damaged, or of a kind that cannot be read here.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): copy the folder again") from error
    for key, plain in (("peft_type", "LORA"), ("bias", "none"), ("modules_to_save", None)):
        if config.get(key, plain) != plain:
            raise ValueError(f"{path}: {key} is {config[key]!r}; only {plain!r} can be read here")
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise ValueError(f"{path}: {key} is given; only one r and one alpha for all can be read here")
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            said = f"{key} is {value!r}, no number above 0" if key in config else f"{key} is missing"
            raise ValueError(f"{path}: {said}: copy the folder again, or write what it was trained with")
    return config


def check_of_base(adapter: AdapterFolder, base: Path, key: str) -> None:
    """Refuses an adapter that was trained on another base. Raises ValueError.

    Args:
        key: option that named the base.
    """
    if adapter.fingerprint and adapter.fingerprint != model_fingerprint(base):
        named = base.resolve() == adapter.base.resolve()
        cure = "bring back its files as they were" if named else f"give the one that its {CONFIG} names: {adapter.base}"
        raise ValueError(
            f"{key}: {adapter.path} was not trained on {base} {'as it is now ' if named else ''}"
            f"(its config, sizes or weights are others); {cure}"
        )


def missing_base(adapter: AdapterFolder) -> str:
    """What to do about a base that is not where the adapter names it: a run folder's moves with the adapter."""
    beside = adapter.path.resolve().with_name("base" + adapter.path.name.removeprefix("adapter"))
    now = f"{beside}, which is beside it," if (beside / "config.json").is_file() else "where it is now"
    return f"its base {adapter.base} is not there: was it moved? Write {now} into {CONFIG} (base_model_name_or_path)"


def adapter_base(where: str | Path) -> Path | None:
    """The base that an adapter folder names; None for anything else. Raises ValueError: it is not the adapter's."""
    if not (Path(where) / CONFIG).is_file():
        return None
    adapter = read_adapter(Path(where))
    if not (adapter.base / "config.json").is_file():
        raise ValueError(f"{where}: {missing_base(adapter)}")
    check_of_base(adapter, adapter.base, CONFIG)
    return adapter.base


def check_start(lora: Lora, base: Path, layers: list[str]) -> None:
    """Refuses an adapter that training cannot start from (`lora.start`). Raises ValueError.

    Args:
        layers: of the model that get an adapter.
    """
    adapter = read_adapter(Path(lora.start))
    check_of_base(adapter, base, "model")
    for key in ("r", "alpha", "rank_scaling", "dora"):
        ours, theirs = getattr(lora, key), getattr(adapter.lora, key)
        if ours != theirs:
            raise ValueError(f"lora.{key}: {ours}, but {lora.start} has {theirs}: give that")
    if other := set(layers) ^ set(adapter.tensors):
        raise ValueError(f"lora.targets: not those of {lora.start}, which differ in {len(other)}: {sorted(other)[:3]}")


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Puts the adapter of a folder into a model that has its layers (see `check_start`)."""
    adapter = read_adapter(folder)
    with torch.no_grad():
        for name, layer in adapter_layers(model).items():
            tensors = adapter.load(name)
            for kind, parameter in adapter_parameters(layer).items():
                parameter.copy_(tensors[kind])
