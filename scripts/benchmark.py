"""Measures, and writes what it measured, with hardware, versions and commit, to a card in scripts/benchmarks/.

    python scripts/benchmark.py gpu-all --out cards             # all that a GPU is wanted for, in ten minutes
    python scripts/benchmark.py truth float32                   # whether a step is right here, a part at a time
    python scripts/benchmark.py step --model vicuna-7b          # a training step: tokens/s, MFU, memory, parts
    python scripts/benchmark.py step --device cpu               # a tiny one, against padded stock transformers too
    python scripts/benchmark.py step --compile --float8         # the same, its layers compiled, linears in float8
    python scripts/benchmark.py ablate                          # what each lever of the step gives, in one run
    python scripts/benchmark.py float8                          # the losses that float8 linears give
    python scripts/benchmark.py loader                          # the stream of data, against webdataset too
    python scripts/benchmark.py deal | build | export           # dealing a step, building shards, writing a model
    python scripts/benchmark.py compare A.json B.json           # two cards as ratios

`python scripts/benchmark.py WHAT --help` lists the options of each.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))  # its servers that misbehave, its profile of mix665K, its real tokenizers
SUBJECTS = {
    "step": "a training step: speed, memory, time by part; on a CPU against padded stock transformers",
    "ablate": "what each lever of the training step gives",
    "float8": "loss curves with float8 linears and without",
    "gpu-all": "truth, then step for every model, stage 1 and the levers, within a time limit",
    "truth": "whether a step is right on this device: against stock transformers, and against runs on the CPU",
    "loader": "the stream of data: CPU, latency, memory, faults, against webdataset",
    "deal": "dealing a step to ranks: balance and time",
    "build": "building shards: samples a second",
    "export": "writing a model folder and checking it",
    "compare": "two cards as ratios",
}


def main(arguments: list[str] | None = None) -> None:
    args = parse(sys.argv[1:] if arguments is None else arguments)
    args.run(args)


def parse(arguments: list[str]) -> argparse.Namespace:
    """What is asked for, and `run`, the function that does it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    subparsers = parser.add_subparsers(dest="what", required=True)
    for name, what in SUBJECTS.items():
        subparser = subparsers.add_parser(name, help=what, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        if arguments[:1] == [name]:  # only what is asked for is imported
            subject = importlib.import_module(f"benchmarking.{name.replace('-', '_')}")
            subject.add_arguments(subparser)
            subparser.set_defaults(run=subject.run)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
