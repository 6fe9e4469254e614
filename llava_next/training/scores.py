"""Scores in the run folder: what is to be scored and how that ended, `best/`, and the exports made for it.

All of it lies on disk, so that a run that goes on knows it: `scores/step-N/job.json` beside what scripts/evaluate.py
writes there, and `best/best.json`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from contextlib import suppress
from pathlib import Path

from llava_next.data.storage.client import written_aside
from llava_next.model.folders.export import made_aside

EXPORTS = ("model", "adapter", "base")  # of a step
SCORES, JOB, BEST = "scores", "job.json", "best"


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the scores of a step lie."""
    return run_dir / SCORES / f"step-{step}"


def jobs_of(run_dir: Path) -> dict[int, dict]:
    """Step -> its job, in order: `passing` (see `Scoring.submit`), `outcome` (None, `done`, or how it failed)."""
    found = {}
    for path in (run_dir / SCORES).glob(f"step-*/{JOB}"):
        with suppress(ValueError):
            found[int(path.parent.name.removeprefix("step-"))] = json.loads(path.read_bytes())
    return dict(sorted(found.items()))


def write_job(run_dir: Path, step: int, job: dict) -> None:
    folder = folder_of(run_dir, step)
    folder.mkdir(parents=True, exist_ok=True)
    with written_aside(folder / JOB) as temporary:
        temporary.write_text(json.dumps(job) + "\n")


def is_scored(run_dir: Path, step: int) -> bool:
    """Whether a step's scores are there."""
    return jobs_of(run_dir).get(step, {}).get("outcome") == "done"


def read_scores(path: Path) -> dict[str, dict]:
    """The scores of a scores.json; none when it is not there or says nothing."""
    try:
        return json.loads(path.read_bytes())["scores"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def read_best(run_dir: Path) -> dict:
    """What `best/` says of itself: `step`, `by`, `scores`; nothing when there is none, or it is not of a run."""
    try:
        best = json.loads((run_dir / BEST / f"{BEST}.json").read_bytes())
        return best if isinstance(best["step"], int) and isinstance(best["scores"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def in_the_way(run_dir: Path) -> str:
    """What lies where scores would be written and is not of a run, with what to do; nothing when all is well."""
    best, scores = run_dir / BEST, run_dir / SCORES
    if os.path.lexists(best) and not read_best(run_dir):
        return f"{best} is not one that a run has written ({BEST}.json says so), and would be replaced: rename it"
    if os.path.lexists(scores) and not scores.is_dir():
        return f"{scores} is not a folder: rename it"
    return ""


def keep_best(run_dir: Path, step: int, name: str, scores: dict[str, dict]) -> bool:
    """Puts `model-step-N` in the place of `best/` if its score `name` is better; returns whether it did.

    Higher is better, unless the score says `lower_is_better`. Of equal ones the earlier stays. A score of another
    number of samples cannot be compared: then the later stays.
    """
    ours = scores.get(name, {})
    if not math.isfinite(ours.get("value", math.nan)):
        return False
    theirs = read_best(run_dir).get("scores", {}).get(name, {})
    if theirs.get("samples") == ours.get("samples"):
        sign = -1 if ours.get("lower_is_better") else 1
        if sign * ours["value"] <= sign * theirs["value"]:
            return False
    with made_aside(run_dir / BEST) as aside:
        link_files(run_dir / f"model-step-{step}", aside)
        told = {"step": step, "by": name, "scores": scores}
        (aside / f"{BEST}.json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return True


def put_back_best(run_dir: Path) -> None:
    """Undoes a replacement of `best/` that was cut short between its two renames."""
    old = run_dir / f"{BEST}.old"
    if old.exists() and not (run_dir / BEST).exists():
        os.replace(old, run_dir / BEST)


def link_files(folder: Path, to: Path) -> None:
    """The files of a folder in another one, at no cost where the file system has hard links. Raises OSError."""
    for path in folder.iterdir():
        try:
            os.link(path, to / path.name)
        except OSError:
            shutil.copy2(path, to / path.name)


def remove_exports(run_dir: Path, step: int) -> None:
    """Removes what was exported after a step; a kill in between leaves nothing that looks whole."""
    for kind in EXPORTS:
        folder = run_dir / f"{kind}-step-{step}"
        gone = folder.with_name(f"{folder.name}.old")
        shutil.rmtree(gone, ignore_errors=True)
        with suppress(FileNotFoundError):
            os.replace(folder, gone)
            shutil.rmtree(gone)


def forget_later(run_dir: Path, step: int, is_scored: bool = True) -> None:
    """Removes the jobs of steps that will be done again, with exports that were made for them. Before the run begins;
    one that begins anew has no best either.

    Args:
        is_scored: whether the run has scores now; if not, exports that wait for theirs are named.
    """
    for later, job in jobs_of(run_dir).items():
        if later > step:
            if job["passing"]:
                remove_exports(run_dir, later)
            shutil.rmtree(folder_of(run_dir, later))
    waiting = [later for later, job in jobs_of(run_dir).items() if job["passing"] and job["outcome"] != "done"]
    left = [str(path) for path in (run_dir / f"model-step-{later}" for later in waiting) if path.exists()]
    if left and not is_scored:
        print(f"note       without evaluate.every {', '.join(left)} get no scores: remove them, or give it", flush=True)
    put_back_best(run_dir)
    if step == 0 and (best := read_best(run_dir)):
        print(f"note       {run_dir / BEST} of step {best['step']} is removed: the run begins anew", flush=True)
        shutil.rmtree(run_dir / BEST)
