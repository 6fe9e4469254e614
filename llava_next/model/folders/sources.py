"""Where compose takes weights from: a checkpoint on disk or on the hub, or a seeded random generator.

Both give tensors one at a time under the checkpoint's own names, so that composing never holds a whole model.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from llava_next.model.forward.kinds import LANGUAGE_KINDS, TOWER_KINDS
from llava_next.repositories import cure


def read_config(folder: Path) -> PretrainedConfig:
    """The config of a checkpoint folder; code that comes with it is never run.

    Raises:
        ValueError: there is none, or no JSON, or one of a kind that only its own code or another transformers knows.
    """
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} has no config.json: give the folder of a transformers checkpoint")
    try:
        raw = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{folder}/config.json is damaged ({error}): {cure(folder)}") from error
    kind, why = raw.get("model_type"), "which this transformers does not know"
    try:
        if kind in CONFIG_MAPPING:
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if "auto_map" in raw:
            why = "which needs the code that came with it (auto_map); such code is never run"
    except (ValueError, KeyError) as error:
        why = f"but not a valid one ({error})"
    raise ValueError(
        f"{folder}: config.json is of the kind {kind!r}, {why}; vision towers are {', '.join(TOWER_KINDS)}, language "
        f"models {', '.join(LANGUAGE_KINDS)}"
    )


class CheckpointWeights:
    """Tensors of a checkpoint folder, read lazily.

    Safetensors files are memory-mapped. A folder that has only `pytorch_model*.bin` (Vicuna is published that way)
    goes through torch's weights-only reader, which builds tensors and runs nothing from the file.

    Every file's header is read at once, so that a missing or cut-off file is found before anything is written.

    Attributes:
        label: what errors call this checkpoint.
        shapes: shape of every tensor.

    Raises:
        ValueError: no weights, a file that the index names is missing or unreadable, or lacks a tensor it should have.
    """

    def __init__(self, folder: Path):
        self.folder, self.label = folder, str(folder)
        self._open: tuple[str, Callable[[str], torch.Tensor]] | None = None
        self._file_of = self._read_index()
        found = {file: self._header(file) for file in sorted(set(self._file_of.values()))}
        if missing := [(key, file) for key, file in self._file_of.items() if key not in found[file]]:
            raise ValueError(
                f"{folder}: {len(missing)} tensors are not in the files that the index names for them, e.g. "
                f"{missing[0][0]} in {missing[0][1]}; {cure(folder)}"
            )
        self.shapes = {key: found[file][key] for key, file in self._file_of.items()}

    def _read_index(self) -> dict[str, str]:
        for single in ("model.safetensors", "pytorch_model.bin"):
            index = self.folder / f"{single}.index.json"
            if index.exists():
                file_of = json.loads(index.read_text())["weight_map"]
                missing = sorted({f for f in file_of.values() if not (self.folder / f).exists()})
                if missing:
                    raise ValueError(
                        f"{self.folder}: {index.name} names {len(missing)} files that are not there: "
                        f"{', '.join(missing[:5])}; {cure(self.folder)}"
                    )
                return file_of
            if (self.folder / single).exists():
                return dict.fromkeys(self._header(single), single)
        raise ValueError(
            f"{self.folder}: no model.safetensors, no pytorch_model.bin and no index of either: {cure(self.folder)}"
        )

    def _header(self, file: str) -> dict[str, torch.Size]:
        path = self.folder / file
        try:
            if file.endswith(".safetensors"):
                with safe_open(path, "pt") as opened:
                    return {key: torch.Size(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
            tensors = torch.load(path, map_location="meta", weights_only=True)
        except (SafetensorError, RuntimeError, OSError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} cannot be read ({error}); {cure(self.folder)}") from error
        return {key: tensor.shape for key, tensor in tensors.items()}

    def names(self) -> list[str]:
        """Names in the order of the files, so that reading them in turn opens each file once."""
        return sorted(self._file_of, key=lambda key: (self._file_of[key], key))

    def get(self, key: str) -> torch.Tensor:
        """One tensor, in the dtype of the file."""
        file = self._file_of[key]
        if self._open is None or self._open[0] != file:
            path = self.folder / file
            if file.endswith(".safetensors"):
                self._open = (file, safe_open(path, "pt").get_tensor)
            else:
                self._open = (file, torch.load(path, map_location="cpu", mmap=True, weights_only=True).__getitem__)
        return self._open[1](key)


class RandomWeights:
    """Seeded random tensors with the names and shapes of an architecture.

    Norms change nothing, biases are zero, embeddings are normal with the config's `initializer_range`, and matrices
    and convolutions normal with 1/sqrt(fan-in), which keeps activations near unit size at any width. A tensor depends
    on the seed and its name only, so files, order and machine do not change it.
    """

    label = "random weights"

    def __init__(self, shapes: dict[str, torch.Size], seed: int, std: float = 0.02, norm: float = 1.0):
        self.shapes, self.seed, self.std, self.norm = shapes, seed, std, norm

    @classmethod
    def of(cls, config: PretrainedConfig, auto_class, seed: int) -> RandomWeights:
        """Weights of the model that `auto_class.from_config(config)` would build; nothing is allocated."""
        with torch.device("meta"):
            model = auto_class.from_config(config)
        tied = {id(p) for name, p in model.named_parameters() if name.endswith("embed_tokens.weight")}
        shapes = {
            name: p.shape
            for name, p in model.named_parameters(remove_duplicate=False)
            if not (name == "lm_head.weight" and id(p) in tied)
        }
        kind = LANGUAGE_KINDS.get(config.model_type)
        return cls(shapes, seed, getattr(config, "initializer_range", 0.02), kind.norm_weight if kind else 1.0)

    def names(self) -> list[str]:
        """Names in the architecture's order."""
        return list(self.shapes)

    def get(self, key: str) -> torch.Tensor:
        """One tensor, float32."""
        shape = self.shapes[key]
        if len(shape) == 1 and key.endswith("bias"):
            return torch.zeros(shape)
        if len(shape) == 1 and key.endswith("weight"):
            return torch.full(shape, self.norm)
        is_embedding = len(shape) == 1 or any(name in key for name in ("embed_tokens", "position_embedding"))
        std = self.std if is_embedding else shape[1:].numel() ** -0.5
        return torch.empty(shape).normal_(0.0, std, generator=seeded(self.seed, key))


def seeded(seed: int, name: str) -> torch.Generator:
    """A generator for one named tensor."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
