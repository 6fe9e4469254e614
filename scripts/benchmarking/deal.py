"""Dealing steps of mix665K's profile: mean cost of a rank over the slowest one's, and CPU time of a step."""

from __future__ import annotations

import time

import numpy as np

from benchmarking.cards import add_out, table, write_card
from llava_next.data.plan.dealing import deal
from llava_next.training.forecast.flops import cost_model
from llava_next.training.recipe.optim import Rates
from support.published import VICUNA, full_config, profile_samples

GOALS = {8: 0.985, 16: 0.97, 32: None, 64: 0.93}  # by ranks
BATCH_SIZE, TOKEN_BUDGET, TILE_BUDGET = 128, 8192, 64


def add_arguments(parser) -> None:
    """Options of `benchmark.py deal`."""
    parser.add_argument("--steps", type=int, default=200)
    add_out(parser)


def run(args) -> None:
    """Deals and writes the card."""
    cost, figures, rows = cost_model(full_config(VICUNA), Rates()), {}, []
    for world, goal in GOALS.items():
        balances, seconds, micros = [], [], []
        for step in range(args.steps):
            lengths, tiles = profile_samples(BATCH_SIZE, step)
            begin = time.process_time()
            bins = deal(lengths, tiles, world, TOKEN_BUDGET, TILE_BUDGET, cost)
            seconds.append(time.process_time() - begin)
            costs = cost.sample_cost(lengths, tiles)
            slowest = sum(max(int(costs[members].sum()) for members in ranks) for ranks in bins)
            balances.append(costs.sum() / world / slowest)
            micros.append(len(bins))
        found = {"balance": np.mean(balances).item(), "ms": 1000 * np.median(seconds).item()}
        figures[str(world)] = found | {"worst": min(balances).item(), "micro_batches": np.mean(micros).item()}
        rows.append(
            (
                world,
                f">= {100 * goal:.1f} %" if goal else "",
                f"{100 * found['balance']:.2f} %",
                "< 5 ms",
                f"{found['ms']:.2f} ms",
            )
        )
    print(table(("ranks", "goal", "balance", "goal", "a step"), rows), flush=True)
    write_card("deal", figures, args.out)
