"""Activation checkpointing and budgets of a micro-batch that take the least time of those that fit.

A pure function of the model, the machine and the sizes of the plan's first steps, so every rank picks the same. Larger
micro-batches are fewer, fuller and better balanced, but what they keep for backward must fit; recomputing more makes
room for them and costs time. On CPUs, whose time no model here tells, the budgets are fixed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from transformers import PretrainedConfig

from llava_next.data.plan.dealing import CostModel, deal
from llava_next.data.plan.mixture import Mixture
from llava_next.training.devices.hardware import Hardware
from llava_next.training.forecast.budget import POLICIES, Estimate, Layout, Units, estimate
from llava_next.training.forecast.flops import Checkpointing, cost_model
from llava_next.training.forecast.speed import micro_batch_flops, step_seconds
from llava_next.training.recipe.optim import Rates

MARGIN = 1.05  # what an estimate of memory is multiplied with: an assumption, until a run has measured more
ACCURACY = 1.1  # an estimate beyond the memory by more than this is not a matter of its accuracy (see tests/forecast)
SEARCHED_STEPS = 4  # of the plan, dealt for each candidate
GRAIN = 256  # tokens between two budgets
# Tiles of a micro-batch for each of its tokens, over their share in the data: with few, tokens stay unused where
# pictures are many; with many, memory waits for tiles that do not come.
TILE_SHARES = (1.0, 1.2, 1.5, 2.0)
EIGHTHS = 8  # of the language model's layers, tried as `full` before `selective` ones
CPU_TOKENS = 8192


def default_budgets(max_length: int) -> tuple[int, int]:
    """Tokens and tiles of a micro-batch where no machine is planned for: two of the longest samples at least."""
    tokens = max(CPU_TOKENS, 2 * max_length)
    return tokens, 3 * tokens // 1024


@dataclass(frozen=True)
class Wanted:
    """What the user has decided; None is left to the plan."""

    policy: Checkpointing | None = None
    tokens: int | None = None
    tiles: int | None = None


@dataclass(frozen=True)
class Steps:
    """Some steps of a plan.

    Args:
        sizes: (lengths, tiles) of the samples of each, int64 [B] both.
        longest: tokens that a sample may have; most_tiles: tiles that one has.
    """

    sizes: list[tuple[np.ndarray, np.ndarray]]
    longest: int
    most_tiles: int
    _dealt: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def density(self) -> float:
        """Tiles for each token."""
        return sum(int(tiles.sum()) for _, tiles in self.sizes) / sum(int(lengths.sum()) for lengths, _ in self.sizes)

    def dealt(self, world: int, tokens: int, tiles: int, cost: CostModel) -> list[tuple[np.ndarray, ...]]:
        """By step: tokens, squared lengths and tiles of every micro-batch on every rank, [micro-batches, ranks]."""
        key = (world, tokens, tiles, cost)
        if key not in self._dealt:
            found = []
            for lengths, counts in self.sizes:
                bins = deal(lengths, counts, world, tokens, tiles, cost)
                values = (lengths, lengths.astype(float) ** 2, counts)
                found.append(tuple(np.array([[v[m].sum() for m in ranks] for ranks in bins]) for v in values))
            self._dealt[key] = found
        return self._dealt[key]


def first_steps(mixture: Mixture) -> Steps:
    """The first steps of the present plan; a data set read window by window counts by them alone."""
    first, last = mixture.first_step, min(mixture.first_step + SEARCHED_STEPS, mixture.total_steps)
    sizes = [mixture.step_sizes(step) for step in range(first, last)]
    return Steps(sizes, mixture.max_length, max([mixture.most_tiles, *(int(tiles.max()) for _, tiles in sizes)]))


@dataclass(frozen=True)
class Candidate:
    """A policy with its budgets: memory at the peak and, where there is a model of it, time.

    Args:
        need: bytes that must be there: the estimate times the margin.
        seconds: of a step; micro_batches: mean of a step; filled: mean share of the token budget. None on a CPU.
        computed, moved: of the seconds, what the slowest rank computes and what it moves.
    """

    policy: Checkpointing
    tokens: int
    tiles: int
    estimate: Estimate
    need: float
    memory: float
    seconds: float | None = None
    micro_batches: float | None = None
    filled: float | None = None
    computed: float = 0.0
    moved: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether the memory holds it with the margin."""
        return self.need <= self.memory

    @property
    def options(self) -> str:
        """As command line options."""
        return (
            f"--activation_checkpointing {self.policy} --data.token_budget {self.tokens} --data.tile_budget "
            f"{self.tiles}"
        )


@dataclass(frozen=True)
class Choice:
    """What was picked, and the best of each other policy, cheapest recomputation first."""

    picked: Candidate
    rows: list[Candidate]


@dataclass(frozen=True)
class Picking:
    """What a choice is made for.

    Args:
        config: of the whole model; counts: its `units`; rates: what is trained.
        factor: what estimates are multiplied with.
    """

    config: PretrainedConfig
    counts: Units
    rates: Rates
    layout: Layout
    hardware: Hardware
    steps: Steps
    wanted: Wanted = field(default_factory=Wanted)
    factor: float = MARGIN

    def choose(self) -> Choice:
        """The candidate with the least time that fits; where none does, the one that is too large by least."""
        rows = [self.best(policy) for policy in POLICIES]
        wanted = self.wanted.policy
        if isinstance(wanted, int):
            rows.insert(2, self.best(wanted))
        elif self.hardware.on_gpu and (mixed := self._best_mixed()) is not None:
            rows.insert(2, mixed)
        if wanted is not None:
            return Choice(next(row for row in rows if row.policy == wanted), rows)
        if not self.hardware.on_gpu:  # the cheapest that fits
            return Choice(next((row for row in rows if row.fits), rows[-1]), rows)
        return Choice(min(rows, key=_rank), rows)

    def best(self, policy: Checkpointing) -> Candidate:
        """The best budgets under a policy."""
        return min((self.candidate(policy, *pair) for pair in self._budgets(policy)), key=_rank)

    def _best_mixed(self) -> Candidate | None:
        """The best number of layers that keep their input only, the others being `selective`; None when none fits."""
        layers = self.config.text_config.num_hidden_layers
        counts = sorted({layers * eighths // EIGHTHS for eighths in range(1, EIGHTHS)} - {0})
        fitting = [found for count in counts if (found := self.best(count)).fits]
        return min(fitting, key=_rank, default=None)

    def candidate(self, policy: Checkpointing, tokens: int, tiles: int) -> Candidate:
        """A policy with given budgets."""
        found = self.estimate(policy, tokens, tiles)
        need, memory = self.factor * found.total, self.hardware.memory
        if not self.hardware.on_gpu:
            return Candidate(policy, tokens, tiles, found, need, memory)
        bins = self.steps.dealt(self.hardware.world, tokens, tiles, cost_model(self.config, self.rates))
        flops = [micro_batch_flops(self.config, self.rates, policy, *sums) for sums in bins]
        seconds, computed, moved = step_seconds(flops, self.counts.whole, self.layout, self.hardware)
        micros = sum(len(sums[0]) for sums in bins)
        filled = sum(float(sums[0].sum()) for sums in bins) / micros / self.hardware.world / tokens
        return Candidate(
            *(policy, tokens, tiles, found, need, memory, seconds, micros / len(bins), filled, computed, moved)
        )

    def estimate(self, policy: Checkpointing, tokens: int, tiles: int) -> Estimate:
        """Memory of a rank, without the margin: for full budgets, or for the sample with most tiles where that is more.

        A sample beyond a budget is a micro-batch of its own.
        """
        shape = (self.config, self.counts, self.rates, policy, self.layout)
        found, steps = estimate(*shape, tokens, tiles), self.steps
        if tiles >= steps.most_tiles:
            return found
        return max(found, estimate(*shape, steps.longest, steps.most_tiles), key=lambda e: e.total)

    def fits(self, policy: Checkpointing, tokens: int, tiles: int) -> bool:
        """Whether memory holds it with the margin."""
        return self.factor * self.estimate(policy, tokens, tiles).total <= self.hardware.memory

    def _budgets(self, policy: Checkpointing) -> Iterator[tuple[int, int]]:
        """Pairs of budgets to be tried: the most tokens that fit, for each number of tiles a token."""
        wanted, least = self.wanted, max(self.steps.longest, GRAIN)
        if not self.hardware.on_gpu:
            tokens, tiles = default_budgets(self.steps.longest)
            yield wanted.tokens or tokens, wanted.tiles or tiles
            return
        for share in TILE_SHARES:

            def tiles_of(tokens: int, share: float = share) -> int:
                tiles = math.ceil(tokens * self.steps.density * share)
                return wanted.tiles or max(tiles, 1)

            tokens = wanted.tokens or least
            if not wanted.tokens:  # the largest of an ordered range that fits
                low, high = 0, max(self._enough - least, 0) // GRAIN + 1
                while high - low > 1:
                    middle = (low + high) // 2
                    sizes = least + GRAIN * middle
                    low, high = (middle, high) if self.fits(policy, sizes, tiles_of(sizes)) else (low, middle)
                tokens = least + GRAIN * low
            yield tokens, tiles_of(tokens)
            if wanted.tiles:
                return

    @cached_property
    def _enough(self) -> int:
        """Tokens of a micro-batch from which on a step needs only one."""
        return self.steps.longest + max(int(lengths.sum() / self.hardware.world) for lengths, _ in self.steps.sizes)


def _rank(found: Candidate) -> tuple:
    """Smaller is better: what fits, by time and work; what does not, by its size.

    Rounded: processors may differ in a last bit.
    """
    if not found.fits:
        return (True, round(found.need / 1e6))
    return (False, round(found.seconds or 0.0, 4), round(found.computed, 4), round(found.need / 1e6))
