"""Scoring while a run trains, as configured."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

# options of scripts/evaluate.py that a run sets; it takes shortened ones too
GIVEN_TO_EVALUATE = ("--model", "--out", "--tasks", "--json", "--images", "--metric", "--limit", "--device")
GIVEN_TO_EVALUATE += ("--keep_template", "--check_only")


@dataclass
class EvaluateConfig:
    """Scores of the model while it trains, made by scripts/evaluate.py in a process of its own.

    Args:
        every: steps between scorings, besides the one at the end; 0: none at all.
        tasks: benchmarks by their names in lmms-eval, a list or separated by commas (extra `eval`).
        json: held-out records in any form; images: folder that their image paths are relative to.
        metric: what scores them, see evaluate.py; null counts exact answers.
        limit: questions of each benchmark and of the records; 0: all.
        options: more of evaluate.py's options, as on its command line.
        devices: where it runs while training goes on: GPUs that the run does not use, numbered as in
            CUDA_VISIBLE_DEVICES (`7`, `6,7`), or `cpu`; null: on the run's own, and training waits.
        best: name of the score by which `best/` is kept; null: the first.
        max_hours: a scoring that takes longer is ended and has failed.
    """

    every: int = 0
    tasks: str | list[str] = field(default_factory=list)
    json: str | None = None
    images: str | None = None
    metric: str | None = None
    limit: int = 0
    options: str = ""
    devices: int | str | None = None
    best: str | None = None
    max_hours: float = 12.0

    @property
    def task_names(self) -> list[str]:
        """Names of the benchmarks."""
        given = self.tasks.split(",") if isinstance(self.tasks, str) else self.tasks
        return [name.strip() for name in given if name.strip()]

    @property
    def gpus(self) -> list[str] | None:
        """GPUs that `devices` names, none for the CPU; None: the run's own device."""
        if self.devices is None:
            return None
        names = str(self.devices).replace(" ", "").split(",")
        return [] if names == ["cpu"] else [name.removeprefix("cuda:") for name in names]


def check_evaluate(evaluate: EvaluateConfig, dry_run: bool) -> None:
    """Refuses scorings that say nothing, or of files and devices that cannot be. Raises ValueError."""
    if evaluate.every < 0 or evaluate.limit < 0 or evaluate.max_hours <= 0:
        raise ValueError("evaluate: every and limit must be 0 or more, max_hours positive")
    asked = bool(evaluate.task_names or evaluate.json)
    if asked != bool(evaluate.every):
        missing = "evaluate.every: give the steps between scorings" if asked else "evaluate: give tasks or json"
        raise ValueError(f"{missing}; one says nothing without the other")
    for key in ("images", "metric"):
        if getattr(evaluate, key) and not evaluate.json:
            raise ValueError(f"evaluate.{key}: says nothing without evaluate.json; benchmarks have their own")
    for key, kind in (("json", Path.is_file), ("images", Path.is_dir)):
        value = getattr(evaluate, key)
        if value and not kind(Path(value)) and not dry_run:  # a plan does without
            raise ValueError(f"evaluate.{key}: {value} is not a {'file' if key == 'json' else 'folder'}")
    if not all(name.isdecimal() for name in evaluate.gpus or ()):
        raise ValueError(f"evaluate.devices: {evaluate.devices!r}: give numbers of GPUs as 7 or 6,7, or cpu, or null")
    try:
        words = shlex.split(evaluate.options)
    except ValueError as error:
        raise ValueError(f"evaluate.options: {evaluate.options!r} cannot be split into words ({error})") from None
    names = [word.partition("=")[0] for word in words if len(word) > 2 and word.startswith("--")]
    if given := [name for name in names if any(full.startswith(name) for full in GIVEN_TO_EVALUATE)]:
        raise ValueError(f"evaluate.options: {', '.join(given)} is what the run gives scripts/evaluate.py by itself")
