"""Two cards as ratios."""

from __future__ import annotations

import json

from benchmarking.cards import compare, table
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
    rows = [(name, f"{a:.4g}", f"{b:.4g}", f"{ratio:.3f}") for name, a, b, ratio in compare(first, second)]
    print(table(("figure", args.first.stem, args.second.stem, "second / first"), rows))
