"""Two cards as ratios."""

from __future__ import annotations

import json
from collections.abc import Iterator

from benchmarking.cards import table
from llava_next.paths import local_path


def add_arguments(parser) -> None:
    """Options of `benchmark.py compare`."""
    parser.add_argument("first", type=local_path)
    parser.add_argument("second", type=local_path)


def run(args) -> None:
    """Prints what differs in how they were measured, then every number of both."""
    first, second = (json.loads(path.read_text()) for path in (args.first, args.second))
    for name in ("command", "hardware", "load_average", "versions", "commit", "date"):
        if first.get(name) != second.get(name):
            print(f"{name}: {first.get(name)} | {second.get(name)}")
    rows = [(name, f"{a:.4g}", f"{b:.4g}", f"{b / a:.3f}") for name, a, b in shared(first, second)]
    print(table(("figure", args.first.stem, args.second.stem, "second / first"), rows))


def shared(first: dict, second: dict) -> list[tuple[str, float, float]]:
    """(name, first, second) of every number that two cards share and that is not 0 in the first."""
    theirs = dict(numbers(second["figures"]))
    return [(name, value, theirs[name]) for name, value in numbers(first["figures"]) if value and name in theirs]


def numbers(value, prefix: str = "") -> Iterator[tuple[str, float]]:
    """(dotted name, value) of the numbers in nested dictionaries and lists."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        yield from numbers(item, f"{prefix}.{key}" if prefix else str(key))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield prefix, float(value)
