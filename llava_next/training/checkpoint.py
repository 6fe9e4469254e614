"""Checkpoints of a run: what is trained and how far the run is, for any world size to continue.

A checkpoint is written under a temporary name by torch's distributed checkpoint (each rank its shards), gets its
manifest last, and is renamed: a folder named `step-...` is complete. Only trainable parameters are in it; the frozen
ones are in the model that the run started from.

torch keeps part of a distributed checkpoint's metadata as a pickle, so checkpoints are read from the run's own folder
or a path the user names, and never from the network.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

MANIFEST = "manifest.json"
FORMAT = 1
OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


def checkpoint_name(step: int) -> str:
    """`step-00000500`"""
    return f"step-{step:08d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints in a folder, oldest first."""
    return sorted(p.parent for p in folder.glob(f"step-*/{MANIFEST}") if p.parent.suffix != ".tmp")


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict, keep_last: int
) -> Path:
    """Writes `folder/step-N` and removes the oldest beyond `keep_last`. A collective.

    Args:
        optimizer: the plain torch optimizer, not Accelerate's wrapper.
        state: JSON-serialisable state of the run (plan, counters), the same on all ranks.
    """
    path = folder / checkpoint_name(step)
    aside = path.with_name(path.name + ".tmp")
    main = dist.get_rank() == 0
    if main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    tensors = {
        "model": get_model_state_dict(model, options=OPTIONS),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=OPTIONS),
    }
    dcp.save(tensors, checkpoint_id=aside)
    if main:
        sizes = {p.name: p.stat().st_size for p in sorted(aside.iterdir())}
        manifest = {"format": FORMAT, "step": step, "state": state, "files": sizes}
        with open(aside / MANIFEST, "w") as file:
            json.dump(manifest, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(path, ignore_errors=True)
        os.replace(aside, path)
        for old in complete_checkpoints(folder)[:-keep_last]:
            shutil.rmtree(old)
    dist.barrier()
    return path


def read_manifest(path: Path) -> dict:
    """The manifest of a checkpoint, its files checked against it.

    Raises:
        ValueError: not a complete checkpoint of this format.
    """
    if not (path / MANIFEST).exists():
        raise ValueError(f"{path} is not a complete checkpoint: no {MANIFEST}")
    manifest = json.loads((path / MANIFEST).read_text())
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: checkpoint format {manifest.get('format')}, this release reads {FORMAT}")
    for name, size in manifest["files"].items():
        file = path / name
        if not file.exists() or file.stat().st_size != size:
            raise ValueError(f"{file} is missing or not {size} bytes; the checkpoint is damaged, resume from another")
    return manifest


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Loads weights and optimizer state in place, at any world size. A collective."""
    tensors = {
        "model": get_model_state_dict(model, options=OPTIONS),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=OPTIONS),
    }
    dcp.load(tensors, checkpoint_id=path)
    set_model_state_dict(model, tensors["model"], options=OPTIONS)
    set_optimizer_state_dict(model, optimizer, tensors["optimizer"], options=OPTIONS)


def checkpoint_to_resume(folder: Path, resume: str) -> Path | None:
    """The checkpoint that `checkpoint.resume` means; None for a fresh start.

    Args:
        folder: the run's checkpoint folder.
        resume: `auto`, `never` or a path.

    Raises:
        ValueError: `never` with checkpoints present, or a path without a complete checkpoint.
    """
    found = complete_checkpoints(folder)
    if resume == "auto":
        return found[-1] if found else None
    if resume == "never":
        if found:
            raise ValueError(f"checkpoint.resume: never, but {folder} holds {found[-1].name}; choose another run_dir")
        return None
    path = Path(resume)
    read_manifest(path)
    return path
