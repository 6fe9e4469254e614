"""Trackers besides metrics.jsonl: started before the model loads, and never the end of a run unless asked for.

Accelerate's own classes speak to them. One that cannot be reached is named in one line, and the run goes on without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import filter_trackers

from llava_next.training.recipe.config import RunConfig
from llava_next.training.watch.metrics import flat

CURE = {
    "wandb": "see that WANDB_API_KEY and WANDB_BASE_URL are right; WANDB_MODE=offline keeps it on the disk",
    "tensorboard": "see that the run folder can be written",
}


class TrackerError(RuntimeError):
    """A tracker that the run must have (`log_required`) cannot be reached."""


def start_trackers(config: RunConfig, accelerator: Accelerator, say: Callable[[str], None] = print) -> None:
    """Starts what `log_with` names, on the main process. A collective where there are several processes.

    Args:
        say: called with a line about each that cannot be reached.

    Raises:
        TrackerError: on all ranks: one cannot be reached, and `log_required` is set.
    """
    failed = _start(config, accelerator) if accelerator.is_main_process else []
    if not config.log_required:
        for text in failed:
            say(f"warning: {text}. The run goes on without it; metrics.jsonl has everything")
        return
    answer = [". ".join(failed)]
    if dist.is_initialized():
        dist.broadcast_object_list(answer, device=torch.device("cpu"))
    if answer[0]:
        raise TrackerError(f"log_required: {answer[0]}")


def _start(config: RunConfig, accelerator: Accelerator) -> list[str]:
    """Returns what is to be said of those that failed; the others are the Accelerator's trackers."""
    run_dir, started, failed = Path(config.run_dir), [], []
    accelerator.project_configuration.set_directories(str(run_dir))
    for name in config.log_with:
        accelerator.log_with, accelerator.trackers = filter_trackers([name], str(run_dir)), []
        try:
            accelerator.init_trackers(
                "llava-next", config=flat(asdict(config)), init_kwargs={"wandb": {"name": run_dir.name, "dir": run_dir}}
            )
            started += accelerator.trackers
        except Exception as error:  # whatever the package raises: it must not end the run
            failed.append(cannot_be_used(name, error))
    accelerator.trackers = started
    return failed


def track(
    accelerator: Accelerator, values: dict, step: int, say: Callable[[str], None], now: int | None = None
) -> None:
    """Sends numbers to the trackers; one that fails is left out from then on.

    Args:
        now: step that the run has reached, where `values` are scores of `step`, which may lie behind it. wandb takes
            no step back: there they have `scores/step` as an axis of their own.
    """
    for tracker in [*accelerator.trackers]:
        try:
            if now is not None and tracker.name == "wandb":
                tracker.run.define_metric("scores/*", step_metric="scores/step")
                tracker.log({**values, "scores/step": step}, step=now)
            else:
                tracker.log(values, step=step)
        except Exception as error:
            accelerator.trackers.remove(tracker)
            say(f"warning: {cannot_be_used(tracker.name, error)}. It gets no more numbers; metrics.jsonl has them")


def cannot_be_used(name: str, error: Exception) -> str:
    """What happened to a tracker, and the cure."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return f"{name} cannot be used ({reason}): {CURE.get(name, 'see its own settings')}"
