"""A path as steps: each is a command, skipped when what it makes is there and whole."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
COLUMNS = 110
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Step:
    """A step of a path.

    Args:
        part: what it belongs to, see `--step`.
        about: lines for people: what it makes, what is expected of it.
        command: `python ...` or `accelerate launch ...`, below the repository.
        there: what is there already and whole, in words; empty: the command has to run. A command that looks for itself
            has none.
        result: model folder that the command must leave; it may end well without, when it was asked to stop.
    """

    part: str
    about: tuple[str, ...]
    command: tuple[str, ...]
    there: Callable[[], str] = str
    result: Path | None = None


class Stopped(Exception):
    """A step ended before it had made what it is for; the message says what to do."""


def script(
    steps: Sequence[Step], environment: dict[str, str], head: Sequence[str] = (), foot: Sequence[str] = ()
) -> str:
    """The path as a shell script."""
    lines = ["#!/usr/bin/env bash", "set -euo pipefail", *_comments(head)]
    lines += [f"export {name}=${{{name}:-{value}}}" for name, value in environment.items()]
    for number, step in enumerate(steps, 1):
        there = step.there()
        lines += ["", *_comments([f"{number}. {step.part}: {step.about[0]}", *step.about[1:]])]
        lines += _comments([f"there already: {there}"] if there else [])
        lines += shown(step.command)
    return "\n".join([*lines, *([""] if foot else []), *_comments(foot)])


def _comments(lines: Sequence[str]) -> list[str]:
    wrapped = (textwrap.wrap(line, COLUMNS - 2, subsequent_indent="   ", break_on_hyphens=False) for line in lines)
    return [f"# {part}" for line in wrapped for part in line]


def shown(command: Sequence[str]) -> list[str]:
    """A command in lines that a shell takes; an option and its value stand in one."""
    lines = [""]
    for number, word in enumerate(map(shlex.quote, command)):
        takes_it = number and command[number - 1].startswith("--") and not word.startswith("--")
        begins = lines[-1] and not takes_it
        if begins and len(lines[-1]) + len(f" {word} {' '.join(command[number + 1 : number + 2])}") > COLUMNS - 2:
            lines.append("   ")
        lines[-1] = f"{lines[-1]} {word}" if lines[-1] else word
    return [*(f"{line} \\" for line in lines[:-1]), lines[-1]]


def run_steps(steps: Sequence[Step], environment: dict[str, str], headings: bool = True) -> None:
    """Runs what is not there yet.

    Args:
        headings: print one for each step, and at the end how long each took.

    Raises:
        Stopped: a command failed, or stopped before its end.
    """
    times = []
    for step in steps:
        start = time.monotonic()
        if headings:
            print(f"\n== {step.part}: {step.about[0]}", flush=True)
        if there := step.there():
            print(f"{there} is there already", flush=True)
        else:
            run_step(step, environment)
        times.append((step.part, time.monotonic() - start))
    if headings:
        print("\n" + "\n".join(f"{part:<12} {seconds:6.0f} s" for part, seconds in times), flush=True)


def run_step(step: Step, environment: dict[str, str]) -> None:
    """Runs a step's command. Raises Stopped."""
    again = "the same command goes on from there"
    status, number = run(step.command, environment)
    if number is not None:
        raise Stopped(f"{step.part}: stopped by {signal.Signals(number).name}; {again}")
    if status:
        raise Stopped(f"{step.part}: ended with exit status {status}, see above; when that is mended, {again}")
    if step.result is not None and not whole_model(step.result):
        raise Stopped(f"{step.part}: stopped in {step.result.parent}; {again}")


def run(command: Sequence[str], environment: dict[str, str]) -> tuple[int, int | None]:
    """Exit status of a command, and the first signal that came meanwhile, which it was sent once and could end by."""
    launcher = ("accelerate", "launch")
    words = [sys.executable, "-m", "accelerate.commands.launch", *command[2:]]
    words = words if tuple(command[:2]) == launcher else [sys.executable, *command[1:]]
    # a group of its own: what Ctrl-C sends to the group would reach ranks twice, and a second signal ends them at once
    process = subprocess.Popen(words, cwd=ROOT, env={**environment, **os.environ}, start_new_session=True)
    with passing_on(process) as came:
        status = process.wait()
    return status, came[0] if came else None


@contextmanager
def passing_on(process: subprocess.Popen):
    """Gives the signals that ask this process to stop to another one; yields those that came."""
    came: list[int] = []

    def handle(number: int, frame) -> None:
        came.append(number)
        process.send_signal(number)

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def whole_model(folder: Path) -> str:
    """The folder, when config, tokenizer and weights are there and no weight file is cut off; else nothing."""
    index = folder / "model.safetensors.index.json"
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        beside = all((folder / name).is_file() for name in ("config.json", "tokenizer.json"))
        return str(folder) if beside and all(_whole_file(folder / name) for name in names) else ""
    except (OSError, ValueError, KeyError):
        return ""


def _whole_file(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length)) if length < path.stat().st_size else {}
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return bool(ends) and path.stat().st_size == 8 + length + max(ends)


def whole_dataset(place: str) -> dict | None:
    """`dataset.json` of a local data set whose files have the sizes it states; None: not there, not whole, a URL."""
    folder = Path(place)
    try:
        found = json.loads((folder / "dataset.json").read_bytes())
        sizes = {shard["name"]: shard["bytes"] for shard in found["shards"]}
        sizes["index.parquet"] = found["index_bytes"]
        return found if all((folder / name).stat().st_size == size for name, size in sizes.items()) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def told_dataset(place: str) -> str:
    """A whole data set in words; else nothing."""
    if (found := whole_dataset(place)) is None:
        return ""
    digest = hashlib.sha256((Path(place) / "dataset.json").read_bytes()).hexdigest()[:16]
    return f"{place}: {found['samples']:,} samples, sha256 of its dataset.json: {digest}"
