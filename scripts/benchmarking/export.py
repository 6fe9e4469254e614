"""Writing a model folder in bf16: seconds and MB/s, random weights, one process."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from benchmarking.cards import add_out, write_card
from benchmarking.samples import LLMS, TOWERS, model_config
from llava_next.model.folders.export import save_model
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration


def add_arguments(parser) -> None:
    """Options of `benchmark.py export`."""
    parser.add_argument("--model", default="vicuna-7b", choices=list(LLMS))
    parser.add_argument("--tower", default="clip-336", choices=list(TOWERS))
    parser.add_argument("--scale", default="small")
    parser.add_argument("--repeats", type=int, default=3)
    add_out(parser)


def run(args) -> None:
    """Writes the folder some times, and the card."""
    model = LlavaNextForConditionalGeneration(model_config(args.model, args.tower, args.scale))
    seconds = []
    with tempfile.TemporaryDirectory(prefix="benchmark-export-") as scratch:
        for _ in range(args.repeats):
            begin = time.perf_counter()
            folder = save_model(model, Path(scratch) / "model", dtype=torch.bfloat16)
            seconds.append(time.perf_counter() - begin)
        megabytes = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
    figures = {"megabytes": megabytes, "seconds": min(seconds), "mb_per_s": megabytes / min(seconds)}
    print(f"{megabytes:,.0f} MB in {min(seconds):.2f} s: {figures['mb_per_s']:,.0f} MB/s", flush=True)
    write_card(f"export-{args.model}-{args.tower}-{args.scale}", figures, args.out)
