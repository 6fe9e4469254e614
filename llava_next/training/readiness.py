"""What the end of a run needs, checked or made before its first step: it must not fail after days.

A start model whose result would be whole, a place that the result can take, and room on the disk.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from llava_next.data.plan.mixture import Mixture
from llava_next.model.folders.card import CARD
from llava_next.model.folders.export import made_aside
from llava_next.model.folders.starting import check_weights, make_companions, must_be_anew
from llava_next.paths import PathError, output_folder
from llava_next.training.checkpoints.exports import COMPANIONS
from llava_next.training.checkpoints.recovery import LEFTOVERS, Resume, checkpoint_places, complete_checkpoints
from llava_next.training.forecast.budget import units
from llava_next.training.pushing import check_push
from llava_next.training.recipe.config import RunConfig
from llava_next.training.recipe.optim import freeze
from llava_next.training.scores import jobs_of
from llava_next.training.scoring import WAITING
from llava_next.training.setup import Parts, empty_model, excused_checks
from llava_next.training.watch.metrics import si


def check_places(config: RunConfig) -> None:
    """Looks whether the run folder and that of the checkpoints can be written to, before anything is read. Raises
    ValueError."""
    for key, place in (("run_dir", config.run_dir), ("checkpoint.dir", checkpoint_places(config)[0])):
        try:
            output_folder(place)
        except PathError as error:
            raise ValueError(f"{key}: {error}") from error


def check_ready(config: RunConfig, parts: Parts, mixture: Mixture, resume: Resume) -> list[str]:
    """Looks for everything that would end the run late. Writes nothing to the run folder.

    Returns:
        What a person should know, one a line.

    Raises:
        ValueError: what is missing, where, and what to do.
    """
    for name in ("model", *(("adapter", "base") if config.lora else ())):
        result = Path(config.run_dir) / name
        if result.resolve() in (Path(config.model).resolve(), *_start_of(config)):
            key = "lora.start" if name == "adapter" else "model"
            raise ValueError(
                f"{key}: {result} is the place of this run's own result, which would replace it; give another run_dir"
            )
        if os.path.ismount(result) or result.is_file():
            raise ValueError(f"run_dir: the result cannot be put at {result}, which is no plain folder; move it away")
    check_weights(config.model)
    keep = config.data.keep_template
    model = (parts.model_config, parts.encoder.tokenizer)
    parts.made = must_be_anew(config.model, *model, excused=excused_checks(keep), keep_template=keep)
    check_room(config, parts, mixture, resume)
    notes = check_push(config)
    if not parts.made:
        return notes
    return [*notes, f"{config.model}: written anew for the result, as every release reads it: {', '.join(parts.made)}"]


def _start_of(config: RunConfig) -> tuple[Path, ...]:
    """Folder of the adapter that a run starts from."""
    return (Path(config.lora.start).resolve(),) if config.lora and config.lora.start else ()


def keep_companions(config: RunConfig, parts: Parts) -> None:
    """Puts what goes beside the result's weights into the run folder, where no later change of the start model reaches
    it. Comes after `check_ready`."""
    with made_aside(Path(config.run_dir) / COMPANIONS) as aside:
        model = (parts.model_config, parts.encoder.tokenizer)
        make_companions(config.model, aside, *model, anew=bool(parts.made), keep_template=config.data.keep_template)
        if (card := Path(config.model) / CARD).exists():  # what the result's own will go on from
            shutil.copyfile(card, aside / CARD)


def check_room(config: RunConfig, parts: Parts, mixture: Mixture, resume: Resume) -> None:
    """Refuses disks that cannot hold what the run is certain to write: checkpoints that are kept, exports, the result.

    Raises:
        ValueError: how much is free and needed, and where.
    """
    model = empty_model(parts)
    freeze(model, config.optim.rates)
    counts, options = units(model), config.checkpoint
    checkpoint, result, adapter = counts.disk_bytes(config.optim.name, config.optim.master)
    if config.lora:  # its folder, and a base with what trained in full, or all where it cannot be linked
        linked = _device(Path(config.run_dir)) == _device(Path(config.model)) and not config.lora.copy_base
        result += adapter + (2 * (counts.whole.trainable - counts.adapters) if linked else result)
    last = config.last_step(mixture.total_steps)
    done = resume.state["step"]
    there = len(complete_checkpoints(resume.folder))
    every = options.every or last + 1
    saves = last // every - done // every + bool(last % every) if done < last else 0
    kept = max(0, min(there + saves, options.keep_last) - there)  # more than now, at the end
    most = max(kept, min(there + saves, options.keep_last + 1) - there, int(saves > 0))  # the oldest goes last
    every = options.export_every or last + 1
    exports = max(0, (last - 1) // every - done // every)
    run_dir = Path(config.run_dir)
    if config.evaluate.every:  # exports that are for their scores alone: the best, the one that is scored, those behind
        due = sum(step % config.evaluate.every == 0 and step % every > 0 for step in range(done + 1, last))
        most_scored = 2 if config.evaluate.devices is None else 2 + WAITING
        scored = sum(
            job["passing"] and (run_dir / f"model-step-{step}").exists() for step, job in jobs_of(run_dir).items()
        )
        exports += max(0, min(scored + due, most_scored) - scored)
    if _device(run_dir) == _device(resume.folder):
        places = [(run_dir, exports * result + max(most * checkpoint, kept * checkpoint + result))]
    else:
        places = [(run_dir, (exports + 1) * result), (resume.folder, most * checkpoint)]
    for place, need in places:
        free = shutil.disk_usage(_existing(place)).free + _leftovers(place)
        if free < need:
            raise ValueError(
                f"{'run_dir' if place == run_dir else 'checkpoint.dir'}: {place} has {si(free, 'B')} free, and this "
                f"run needs {si(need, 'B')} at least: a checkpoint is {si(checkpoint, 'B')}, the result "
                f"{si(result, 'B')}. Make room there, keep fewer (checkpoint.keep_last), or give another place"
            )


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)


def _device(path: Path) -> int:
    return _existing(path).stat().st_dev


def _leftovers(place: Path) -> int:
    """Bytes of what a kill left half-written there, which goes before the run begins."""
    found = [path for suffix in LEFTOVERS for path in place.glob(f"**/*{suffix}") if path.is_dir()]
    return sum(file.stat().st_size for path in found for file in path.glob("*") if file.is_file())
