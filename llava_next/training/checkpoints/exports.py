"""The model written in the middle and at the end of a run: whole, or not there and said why on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from llava_next.model.folders.export import save_model
from llava_next.training.checkpoints.recovery import CheckpointError, complete_checkpoints
from llava_next.training.checkpoints.saving import ADVICE

COMPANIONS = "companions"  # folder in the run folder: what goes beside the weights, made before the first step


def export_model(
    model: nn.Module,
    folder: Path,
    companions: Path,
    checkpoints: Path,
    check: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes a model folder that stock transformers loads. A collective.

    Args:
        companions: folder with what goes beside the weights.
        checkpoints: the run's checkpoints, which the message names.
        check: called on rank 0 with the finished folder; raises ValueError when it cannot be used.

    Raises:
        CheckpointError: on all ranks: it could not be written, or does not pass the check.
    """
    answer = [""]
    try:
        save_model(model, folder, companions, is_main_process=dist.get_rank() == 0)
        if dist.get_rank() == 0:
            check(folder)
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
