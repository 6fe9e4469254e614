"""The quickstart's path: scanned digits, both stages on the machine at hand, held-out pictures read."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from evaluation.published import standard_error
from reproducing.ledger import LEDGER, known_index
from reproducing.steps import ROOT, Step, whole_model

RECIPES = "scripts/recipes/digits"
TRAIN, HELD_OUT, SEED = 16000, 500, 0
# of a row in scripts/benchmarks/README.md, where what was measured stands
MEASURED = re.compile(r"^\| with AnyRes tiles \|.*?([\d.]+) % of (\d+)", re.M)
NOISES = 2  # standard errors that runs may differ by
# one thread for each of the two processes; nothing is fetched
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def digits_steps(folder: Path, gpus: int, pinpoints: str | None = None, ledger: Path = LEDGER) -> list[Step]:
    """The path into a folder.

    Args:
        gpus: of this machine; 0: two processes on its CPU.
        pinpoints: canvases as `[[height, width], ...]`; None: the demo's.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    data, base, shards = folder / "digits", folder / "base", folder / "shards"
    pretrain, finetune = folder / "pretrain", folder / "finetune"
    canvases = ("--pinpoints", pinpoints) if pinpoints else ()
    compose = ("--demo", data / "train.json", "--template", "mistral", "--out", base, *canvases)
    numbers = ("--train", TRAIN, "--held_out", HELD_OUT, "--seed", SEED)
    answers = (
        "--images",
        data / "images",
        "--show",
        8,
        "--out",
        folder / "answers.json",
        "--sheet",
        folder / "answers.png",
    )
    about = f"{TRAIN:,} training samples, {HELD_OUT} held out"
    return [
        Step("data", (about,), python("data_tools/make_digits.py", "--out", data, *numbers, "--workers", cores)),
        Step(
            "compose",
            ("a tiny CLIP + Llama from random weights",),
            python("scripts/compose.py", *compose),
            lambda: whole_model(base),
            base,
        ),
        *(build(name, data, base, shards, cores, ledger) for name in ("captions", "train")),
        stage("stage-1", "pretrain", pretrain, base, shards / "captions", gpus),
        stage("stage-2", "finetune", finetune, pretrain / "model", shards / "train", gpus),
        Step(
            "answers",
            (f"{HELD_OUT} held-out pictures are read; {told_expected()}",),
            python("scripts/evaluate.py", "--model", finetune / "model", "--json", data / "held_out.json", *answers),
        ),
    ]


def python(*words) -> tuple[str, ...]:
    """A command."""
    return ("python", *map(str, words))


def build(name: str, data: Path, base: Path, shards: Path, cores: int, ledger: Path) -> Step:
    """The shards of a file of records; the tool looks whether they are there."""
    words = ("--json", data / f"{name}.json", "--images", data / "images", "--out", shards / name, "--model", base)
    command = python("data_tools/build_shards.py", *words, "--codec", "webp", "--workers", cores)
    index = known_index(ledger, "digits", name) or "unknown until built"
    return Step("shards", (f"{name} cut into tiles; sha256 of its dataset.json: {index}",), command)


def stage(part: str, name: str, run: Path, model: Path, data: Path, gpus: int) -> Step:
    """A training."""
    file, processes = ("h100x8_fsdp", ("--num_processes", str(gpus))) if gpus else ("cpu2_fsdp", ())
    # one FSDP2 unit: with 2 M parameters a gather for each layer costs more than it saves
    launch = ("--config_file", f"accelerate_configs/{file}.yaml", "--fsdp_auto_wrap_policy", "NO_WRAP", *processes)
    words = ("--run_dir", run, "--config", f"{RECIPES}/{name}.yaml", "--model", model, "--data.sources", data)
    command = ("accelerate", "launch", *launch, f"scripts/{name}.py", *map(str, words))
    return Step(part, (f"{RECIPES}/{name}.yaml",), command, lambda: whole_model(run / "model"), run / "model")


def expected() -> tuple[float, int] | None:
    """(share of pictures read, of how many) as measured; None: no figure stands where it should."""
    found = MEASURED.search((ROOT / "scripts/benchmarks/README.md").read_text(encoding="utf-8"))
    return (float(found[1]) / 100, int(found[2])) if found else None


def tolerance(share: float, counts: tuple[int, int]) -> float:
    """How far two runs that read `share` may be apart: `NOISES` standard errors of the difference of two samples."""
    return NOISES * sum(standard_error(share, count) ** 2 for count in counts) ** 0.5


def told_expected() -> str:
    """What is expected, for people."""
    if (found := expected()) is None:
        return "no figure to compare with"
    share, count = found
    return f"expected {100 * share:.1f} % ± {100 * tolerance(share, (count, HELD_OUT)):.1f}"


def verdict(answers: Path) -> tuple[str, bool]:
    """The row of a run that has ended, and whether it is inside the tolerance."""
    found = json.loads(answers.read_bytes())
    share, count = found["exact"] / found["of"], found["of"]
    if (measured := expected()) is None:
        return f"read {100 * share:.1f} % of {count}; no figure to compare with", True
    within = tolerance(measured[0], (measured[1], count))
    is_inside = abs(share - measured[0]) <= within
    row = f"| digits | {100 * share:.1f} % of {count} | expected {100 * measured[0]:.1f} ± {100 * within:.1f} | "
    return row + ("inside |" if is_inside else "OUTSIDE |"), is_inside
