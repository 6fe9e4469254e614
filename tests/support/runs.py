"""Runs of the demo, launched as users launch them, and what a run folder says of a run."""

import json
from pathlib import Path

from support.launching import ROOT, launch


def run_demo(demo: Path, folder: Path, *options, processes: int = 1, check: bool = True):
    """A launched run of scripts/finetune.py: one epoch of the demo (see demo.py) by the quickstart's recipe.

    Returns:
        the finished process, and the lines of metrics.jsonl.
    """
    done = launch("scripts/finetune.py", *demo_arguments(demo, folder), *options, processes=processes, check=check)
    return done, read_lines(folder / "metrics.jsonl")


def demo_arguments(demo: Path, folder: Path) -> list[str]:
    """Of scripts/finetune.py, for a run into `folder`."""
    arguments = {
        "--config": ROOT / "scripts/recipes/digits/finetune.yaml",
        "--run_dir": folder,
        "--model": demo / "base",
        "--data.sources": demo / "shards",
        "--data.num_workers": 0,
        "--data.max_length": 300,
        "--data.epochs": 1,
        "--log_every": 1,
    }
    return [str(x) for pair in arguments.items() for x in pair]


def read_lines(path: Path) -> list[dict]:
    """A log's lines, by strict JSON; none when there is no log."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line, parse_constant=_refuse) for line in lines]


def _refuse(word: str):
    raise ValueError(f"{word} is not JSON")


def losses(folder: Path) -> list[float]:
    """Of steps 1, 2, ..., each of which stands in the log once."""
    records = read_lines(folder / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]
