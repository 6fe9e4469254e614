"""Cards: what was measured, with all that is needed to measure it again, as small JSON files."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarking.serving import ROOT
from llava_next.paths import output_folder
from llava_next.versions import installed

CARDS = ROOT / "scripts" / "benchmarks"
PACKAGES = ("torch", "transformers", "accelerate", "torchao", "liger-kernel")
PACKAGES += ("obstore", "webdataset", "pillow", "numpy", "pyarrow")


def add_out(parser, default: Path = CARDS) -> None:
    """The option `--out`."""
    parser.add_argument("--out", type=output_folder, default=default, help="folder for the cards")


def write_card(name: str, figures: dict, out: Path = CARDS) -> Path:
    """Writes `NAME.json` with the figures, and hardware, load, versions, commit, date and command beside them.

    Args:
        figures: JSON; nested dictionaries and lists are fine.
        out: folder of the cards.
    """
    card = {
        "command": command_line(sys.argv[1:]),
        "hardware": hardware(),
        "load_average": [round(x, 2) for x in os.getloadavg()],  # of the machine, when the card was written
        "versions": {"python": platform.python_version(), **installed(PACKAGES)},
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "figures": rounded(figures),
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps(card, indent=1) + "\n")
    print(f"card: {path}", flush=True)
    return path


def hardware() -> dict:
    """Processor, cores that this process may use, memory in GB, and the GPU if there is one."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.machine())
    found = {"cpu": processor, "cores": len(os.sched_getaffinity(0)), "memory_gb": round(memory, 1)}
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        found |= {"gpu": device.name, "gpu_memory_gb": round(device.total_memory / 1e9, 1), "cuda": torch.version.cuda}
    return found


def commit() -> str | None:
    """The commit that is checked out, with `+` when files differ from it; None outside of a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    head = git("rev-parse", "--short", "HEAD")
    return f"{head}{'+' if git('status', '--porcelain', '-uno') else ''}" if head else None


def command_line(arguments: list[str]) -> str:
    """How the figures were made; without `--out` and its folder, which say nothing of them."""
    kept, rest = [], iter(arguments)
    for argument in rest:
        if argument == "--out":
            next(rest, None)
        elif not argument.startswith("--out="):
            kept.append(argument)
    return shlex.join(["python", "scripts/benchmark.py", *kept])


def rounded(value, digits: int = 4):
    """Floats to so many significant digits, in any nesting; not-a-number and infinity, which JSON lacks, as None."""
    if isinstance(value, dict):
        return {str(key): rounded(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if abs(value) < float("inf") else None
    return value


def table(head: Iterable[str], rows: Iterable[Iterable]) -> str:
    """Rows as a Markdown table with aligned columns."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)
