"""Float8 linears beside the run's own precision: loss curves of the same weights, samples and rates.

A few steps of samples come again and again, at a rate far above the recipe's, so that the loss falls within seconds;
on random words it would stay where it is. On a CPU float8 is emulated: its losses count, its time does not.
"""

from __future__ import annotations

import dataclasses
import gc
import tempfile
from pathlib import Path

from benchmarking.cards import table, write_card
from benchmarking.training import How, add_work_arguments, begin, card_name, run_steps
from llava_next.training.devices.parallel import finish
from llava_next.training.recipe.optim import Rates

DISTINCT = 4  # steps of samples, which come in turns


def add_arguments(parser) -> None:
    """Options of `benchmark.py float8`."""
    add_work_arguments(parser)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of everything but the tower")


def run(args) -> None:
    """Trains twice and writes both curves."""
    work, config, policy, accelerator = begin(args)
    distinct = [work.step(config, number)[1] for number in range(DISTINCT)]
    steps = [distinct[number % DISTINCT] for number in range(args.steps)]
    precision = "float32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    curves, rates = {}, faster(work.rates, args.rate)
    for name, how in ((precision, How(policy)), ("float8", How(policy, float8=True))):
        with tempfile.TemporaryDirectory() as scratch:
            records, _ = run_steps(accelerator, config, how, work, rates, steps, Path(scratch))
        curves[name] = [record["loss"] for record in records]
        accelerator.free_memory()
        gc.collect()
    figures = {
        "layers": config.text_config.num_hidden_layers,
        "samples_a_step": work.samples,
        "rate": args.rate,
        "emulated": args.device == "cpu",
        "losses": curves,
        "largest_distance": distance(*curves.values()),
    }
    shown = sorted({*range(0, args.steps, max(args.steps // 8, 1)), args.steps - 1})
    print(table(("step", *curves), ((n + 1, *(f"{curve[n]:.4f}" for curve in curves.values())) for n in shown)))
    print(f"largest relative distance of a step's loss: {figures['largest_distance']:.2e}", flush=True)
    write_card(card_name("float8", work, args.device), figures, args.out)
    finish(accelerator)


def faster(rates: Rates, rate: float) -> Rates:
    """`rate` for all that trains but the tower."""
    names = [f.name for f in dataclasses.fields(rates) if f.name != "vision" and getattr(rates, f.name) is not None]
    return dataclasses.replace(rates, **dict.fromkeys(names, rate))


def distance(plain: list[float], other: list[float]) -> float:
    """Largest relative distance of two loss curves, step by step."""
    return max(abs(b / a - 1) for a, b in zip(plain, other, strict=True))
