"""Dealing steps of mix665K's profile: mean cost of a rank over the slowest one's, and CPU time of a step."""

from __future__ import annotations

import time

import numpy as np

from benchmarking.cards import CARDS, table, write_card
from benchmarking.samples import LLMS, STAGES, TOWERS, geometry, model_config, profile_sizes
from llava_next.data.plan.dealing import deal
from llava_next.paths import local_path
from llava_next.training.forecast.flops import cost_model

GOALS = {8: 0.985, 16: 0.97, 64: 0.93}  # for 128 samples a step


def add_arguments(parser) -> None:
    """Options of `benchmark.py deal`."""
    parser.add_argument("--model", default="vicuna-7b", choices=list(LLMS))
    parser.add_argument("--tower", default="clip-336", choices=list(TOWERS))
    parser.add_argument("--worlds", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--token_budget", type=int, default=8192)
    parser.add_argument("--tile_budget", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=local_path, default=CARDS)


def run(args) -> None:
    """Deals and writes the card."""
    config = model_config(args.model, args.tower)
    anyres, cost = geometry(config), cost_model(config, STAGES[2].rates)
    figures, rows = {}, []
    for world in args.worlds:
        balances, seconds, micros = [], [], []
        for step in range(args.steps):
            sizes = profile_sizes(args.batch_size, step)
            lengths = np.array([text + (anyres.num_tokens(*size) if size else 0) for text, size in sizes])
            tiles = np.array([anyres.num_tiles(*size) if size else 0 for _, size in sizes])
            begin = time.process_time()
            bins = deal(lengths, tiles, world, args.token_budget, args.tile_budget, cost)
            seconds.append(time.process_time() - begin)
            costs = cost.sample_cost(lengths, tiles)
            slowest = sum(max(int(costs[members].sum()) for members in ranks) for ranks in bins)
            balances.append(costs.sum() / world / slowest)
            micros.append(len(bins))
        found = {"balance": np.mean(balances).item(), "ms": 1000 * np.median(seconds).item()}
        figures[str(world)] = found | {"worst": min(balances).item(), "micro_batches": np.mean(micros).item()}
        goal = f">= {100 * GOALS[world]:.1f} %" if world in GOALS and args.batch_size == 128 else ""
        rows.append((world, goal, f"{100 * found['balance']:.2f} %", "< 5 ms", f"{found['ms']:.2f} ms"))
    print(table(("ranks", "goal", "balance", "goal", "a step"), rows), flush=True)
    write_card("deal", figures, args.out)
