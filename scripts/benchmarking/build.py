"""Building shards by data_tools/build_shards.py, whole, from JPEG files: samples a second. For the parts of it see
data_tools/measure_build.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarking.cards import ROOT, add_out, write_card
from benchmarking.datasets import conversation, describe, photographs


def add_arguments(parser) -> None:
    """Options of `benchmark.py build`."""
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    add_out(parser)


def run(args) -> None:
    """Builds in a scratch folder and writes the card."""
    with tempfile.TemporaryDirectory(prefix="benchmark-build-") as scratch:
        source, out = Path(scratch) / "source", Path(scratch) / "shards"
        write_source(source, args.samples)
        command = [
            *(sys.executable, str(ROOT / "data_tools" / "build_shards.py"), "--json", str(source / "samples.json")),
            *("--images", str(source), "--out", str(out), "--tower", "clip-336", "--workers", str(args.workers)),
        ]
        begin = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        seconds = time.perf_counter() - begin
        rate = args.samples / seconds  # starting Python and checking the input included
        figures = {"workers": args.workers, "seconds": seconds, "samples_per_s": rate, "data": describe(out)}
    print(f"{rate:.1f} samples/s with {args.workers} workers", flush=True)
    write_card("build", figures, args.out)


def write_source(folder: Path, count: int) -> None:
    """LLaVA JSON and photographs of 640 x 480, a file each."""
    rng, records = np.random.default_rng(0), []
    folder.mkdir()
    for number, photo in enumerate(photographs(min(count, 100))):
        photo.save(folder / f"{number}.jpg", quality=92)
    for number in range(count):
        records.append({"id": str(number), "image": f"{number % 100}.jpg", "conversations": conversation(rng)})
    (folder / "samples.json").write_text(json.dumps(records))
