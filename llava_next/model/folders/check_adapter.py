"""Proofs that an adapter folder loads everywhere and belongs to its base, without loading weights."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import safe_open

from llava_next.model.folders.adapters import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    AdapterFolder,
    adapter_keys,
    check_of_base,
    layer_and_kind,
    missing_base,
    read_adapter,
    read_config,
)
from llava_next.model.folders.check import Finding, ModelFolder, check_folder
from llava_next.model.folders.companions import COMPANION_FILES
from llava_next.model.folders.export import file_key
from llava_next.model.forward.lora import ADAPTER


def check_any(folder: Path) -> list[Finding]:
    """Proves a model or an adapter folder, whichever it is."""
    return check_adapter(folder) if (folder / CONFIG).exists() else check_folder(folder)


def check_adapter(folder: Path) -> list[Finding]:
    """Proves an adapter folder and the base that it names; loads no weights."""
    findings = []

    def check(name: str, found) -> bool:
        try:
            findings.append(Finding(name, True, found()))
        except Exception as error:  # whatever a damaged folder makes the libraries raise is a finding
            findings.append(Finding(name, False, " ".join(str(error).split())))
        return findings[-1].ok

    if not check("adapter", lambda: _check_form(folder)):
        return findings
    adapter = read_adapter(folder)
    if check("base", lambda: _check_base(adapter)):
        check("layers", lambda: _check_layers(adapter))
        check("beside", lambda: _check_beside(adapter))
        findings += check_folder(adapter.base)
    return findings


def _check_form(folder: Path) -> str:
    """One r and alpha, whole pairs, names that every release finds."""
    adapter, kinds = read_adapter(folder), {"lora_A", "lora_B"}
    kinds |= {"lora_magnitude_vector"} if adapter.lora.dora else set()
    with safe_open(folder / WEIGHTS, "pt") as file:
        there = set(file.keys())
    for layer, found in adapter.tensors.items():
        if set(found) != kinds:
            raise ValueError(f"{WEIGHTS}: {layer} has {sorted(found)}, it needs {sorted(kinds)}: export again")
        suffixes = [f"{kind}.{ADAPTER}.weight" for kind in kinds]
        due = {key for suffix in suffixes for key in adapter_keys(f"{layer}.{suffix}")}
        if missing := sorted(due - there):
            raise ValueError(f"{WEIGHTS}: {missing[0]} is missing, under which some releases look: export again")
    return f"r {adapter.lora.r}, scale {adapter.lora.scale:g}, {len(there)} tensors for {len(adapter.tensors)} layers"


def _check_base(adapter: AdapterFolder) -> str:
    if not adapter.base.is_dir():
        raise ValueError(missing_base(adapter))
    check_of_base(adapter, adapter.base, CONFIG)
    return f"{adapter.base}{'' if adapter.fingerprint else ' (no fingerprint in the adapter to compare it with)'}"


def _check_layers(adapter: AdapterFolder) -> str:
    """Shapes fit, and the pattern names exactly the layers that have tensors, in old trees and new ones."""
    base, r = ModelFolder(adapter.base), adapter.lora.r
    pattern = read_config(adapter.path).get("target_modules")
    if not isinstance(pattern, str):  # a list of names would fit the tower's attention as well
        raise ValueError(f"{CONFIG}: target_modules is {pattern!r}, not one pattern: export again")
    with safe_open(adapter.path / WEIGHTS, "pt") as file:
        for layer, found in adapter.tensors.items():
            rows, columns = base.shapes[file_key(f"{layer}.weight")]
            due = {"lora_A": [r, columns], "lora_B": [rows, r], "lora_magnitude_vector": [rows]}
            for kind, key in found.items():
                if file.get_slice(key).get_shape() != due[kind]:
                    raise ValueError(f"{WEIGHTS}: {key} is {file.get_slice(key).get_shape()}, not {due[kind]}")
    for key in base.shapes:
        old, _, kind = key.rpartition(".")
        if kind != "weight":
            continue
        layer = layer_and_kind(f"{PREFIX}{old}.lora_A.weight")[0]
        for tree in (old, layer):
            if bool(re.fullmatch(pattern, tree)) != (layer in adapter.tensors):
                raise ValueError(f"{CONFIG}: target_modules is wrong about {tree}: export again")
    return f"target_modules names these {len(adapter.tensors)} layers in every release's tree"


def _check_beside(adapter: AdapterFolder) -> str:
    """Tokenizer, processor and template are the base's."""
    names = [name for name in COMPANION_FILES if (adapter.base / name).exists()]
    for name in names:
        mine = adapter.path / name
        if not mine.exists() or mine.read_bytes() != (adapter.base / name).read_bytes():
            raise ValueError(f"{mine} is not the base's: copy it from {adapter.base}")
    return f"{len(names)} files as in the base"
