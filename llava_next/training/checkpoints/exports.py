"""The model written in the middle and at the end of a run: whole, or not there and said why on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from llava_next.model.folders.adapters import save_adapter, tensors_of
from llava_next.model.folders.export import save_model
from llava_next.training.checkpoints.recovery import CheckpointError, complete_checkpoints
from llava_next.training.checkpoints.saving import ADVICE
from llava_next.training.recipe.config import RunConfig

COMPANIONS = "companions"  # folder in the run folder: what goes beside the weights, made before the first step


def export_run(
    model: nn.Module,
    config: RunConfig,
    checkpoints: Path,
    ending: str = "",
    check: Callable[[Path], None] = lambda folder: None,
    tell: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Writes what a run has made so far: `model/`, with adapters `adapter/` and `base/` before it. A collective.

    Args:
        ending: of these names; checkpoints, tell: see `export_model`; check: so too, and of the adapter's folder.

    Returns:
        The model's folder.

    Raises:
        CheckpointError: as `export_model`.
    """
    run_dir = Path(config.run_dir)
    folder, companions, start = run_dir / f"model{ending}", run_dir / COMPANIONS, Path(config.model)
    adapter = run_dir / f"adapter{ending}"

    def write(is_main_process: bool) -> None:
        save_adapter(model, adapter, config.lora, start, companions, is_main_process, tell)

    def prove(is_main_process: bool) -> None:
        if is_main_process:
            check(adapter)

    if config.lora:
        _write_together(write, adapter, checkpoints)
    export_model(model, folder, companions, checkpoints, check, tell, start)
    if config.lora:
        _write_together(prove, adapter, checkpoints)
    return folder


def export_model(
    model: nn.Module,
    folder: Path,
    companions: Path,
    checkpoints: Path,
    check: Callable[[Path], None] = lambda folder: None,
    tell: Callable[[Path], None] = lambda folder: None,
    start: Path | None = None,
) -> None:
    """Writes a model folder that stock transformers loads. A collective.

    Args:
        companions: folder with what goes beside the weights.
        checkpoints: the run's checkpoints, which the message names.
        check: called on rank 0 with the finished folder; raises ValueError when it cannot be used.
        tell: called on rank 0 with the folder before it gets its name, to write the card.
        start: model folder that training started from, where matrices in 4 bits are as they were.

    Raises:
        CheckpointError: on all ranks: it could not be written, or does not pass the check.
    """

    def write(is_main_process: bool) -> None:
        unquantised = tensors_of(start) if start and is_main_process else None
        save_model(model, folder, companions, is_main_process=is_main_process, unquantised=unquantised, tell=tell)
        if is_main_process:
            check(folder)

    _write_together(write, folder, checkpoints)


def _write_together(write: Callable[[bool], None], folder: Path, checkpoints: Path) -> None:
    """Calls `write` on all ranks, with whether it is the one that writes; an error of that one is an error on all."""
    answer = [""]
    try:
        write(dist.get_rank() == 0)
    except ValueError as error:
        answer = [str(error)]
    except OSError as error:
        found = complete_checkpoints(checkpoints)
        usable = f"{found[-1].name} is complete and will be continued from" if found else "there is no checkpoint"
        advice = ADVICE.get(error.errno, "See that files can be written there")
        answer = [f"model {folder} could not be written ({error}); {usable}. {advice}, then start the run again"]
    dist.broadcast_object_list(answer, device=torch.device("cpu"))
    if answer[0]:
        raise CheckpointError(answer[0])
