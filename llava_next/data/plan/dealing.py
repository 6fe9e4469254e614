"""Dealing: how the samples of one step are spread over ranks and micro-batches so that no rank waits long for another.

Every rank computes the same answer without a collective: costs are integers, and the search ends after a number of
looks, not after a time.
"""

import heapq
import itertools
import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CostModel:
    """What a sample costs in FLOPs, forward and backward, as integers so that every machine gets the same sums.

    The defaults are Vicuna-7B with CLIP-L/336, everything trained. Only ratios matter to `deal`.

    Args:
        flops_per_token: 6 per weight in the decoder layers (32 x 202.4 M = 6.48 B). The LM head is left out: it runs
            on supervised positions only.
        flops_per_token_squared: of a segment's length. Scores and values take 2 x 2 x hidden a layer, half of it under
            the causal mask, three times with the backward pass: 6 x 4,096 x 32 layers.
        flops_per_tile: 23 CLIP layers of 12.6 M weights on 577 tokens, their attention, and the projector.
        flops_per_micro_step: the price of one micro-step more (launch gaps, the part of FSDP's gathers that nothing
            hides), put at 20 ms of 500 TFLOP/s. An assumption, not a measurement; it decides near ties only.
    """

    flops_per_token: int = 38_860_000_000
    flops_per_token_squared: int = 786_432
    flops_per_tile: int = 1_170_000_000_000
    flops_per_micro_step: int = 10_000_000_000_000

    def sample_cost(self, lengths, tiles) -> np.ndarray:
        """FLOPs of samples of `lengths` tokens (each one attention segment) and `tiles` tiles: int64, as broadcast."""
        lengths, tiles = np.asarray(lengths, np.int64), np.asarray(tiles, np.int64)
        linear = lengths * self.flops_per_token + tiles * self.flops_per_tile
        return linear + lengths * lengths * self.flops_per_token_squared


# Refining ends at this share of the ideal, or after this many looks over all candidates. The bound is in work, not in
# time, because all ranks must stop at the same place; 80 looks take about 3 ms at B = 128.
_GOOD_ENOUGH = 0.997
_LOOKS = 80
_CANDIDATES = 3  # values of n_micro tried, from the smallest that fits: few large bins can be balanced best


def deal(
    lengths,
    tiles,
    world: int,
    token_budget: int,
    tile_budget: int,
    cost: CostModel | None = None,
) -> list[list[np.ndarray]]:
    """Spread the samples of one step over micro-batches so that no rank waits long for another.

    All ranks run micro-step m together, so it takes as long as its slowest rank. The number of micro-steps and the
    assignment are chosen to make the sum of those times small: longest first into the cheapest bin with room, bins of
    like cost put side by side in a micro-step, then swaps and moves out of the slowest bins while they help.
    `CostModel.flops_per_micro_step` is charged for each micro-step: of two near-equal answers the one with fewer wins.

    Args:
        lengths: tokens of each sample, image tokens included, int [B].
        tiles: tiles of each sample, int [B].
        world: ranks.
        token_budget, tile_budget: the most one micro-batch may hold. A sample beyond a budget gets a bin of its own.
        cost: what a sample costs; default: the 7B model's `CostModel`.

    Returns:
        bins[micro][rank]: positions in `lengths`, int64, ascending. Each position occurs once; a bin may be empty.

    Raises:
        ValueError: sizes that do not match, a negative length or tile count, or a world or budget below 1.
    """
    lengths, tiles = np.asarray(lengths, np.int64), np.asarray(tiles, np.int64)
    _check_step(lengths, tiles, world, token_budget, tile_budget)
    cost = cost or CostModel()
    samples = _Samples(cost.sample_cost(lengths, tiles), lengths, tiles, token_budget, tile_budget)
    ideal = int(samples.costs.sum()) / world
    best_price, best, looks, tried = math.inf, None, _LOOKS, 0
    for candidate in itertools.count(max(1, -(-samples.fewest_bins() // world))):
        overhead = candidate * cost.flops_per_micro_step
        if tried == _CANDIDATES or ideal + overhead >= best_price:
            break
        where = _longest_first(samples, candidate * world)
        if where is not None:
            tried += 1
            where, slowest, looks = _refine(samples, where, candidate, world, ideal / _GOOD_ENOUGH, looks)
            if slowest + overhead < best_price:
                best_price, best = slowest + overhead, (candidate, where)
    n_micro, where = best
    by_bin = np.split(np.argsort(where, kind="stable"), np.cumsum(np.bincount(where, minlength=n_micro * world))[:-1])
    return [by_bin[micro * world : (micro + 1) * world] for micro in range(n_micro)]


def _check_step(lengths, tiles, world, token_budget, tile_budget):
    if lengths.ndim != 1 or lengths.shape != tiles.shape:
        raise ValueError(f"lengths {lengths.shape} and tiles {tiles.shape} must be two vectors of one size.")
    if lengths.size and (lengths.min() < 0 or tiles.min() < 0):
        raise ValueError("a sample has a negative number of tokens or tiles.")
    for name, value in (("world", world), ("token_budget", token_budget), ("tile_budget", tile_budget)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more.")


@dataclass(frozen=True, eq=False)
class _Samples:
    """The samples of one step, and the limits of a bin."""

    costs: np.ndarray  # int64 [B]
    lengths: np.ndarray  # int64 [B]
    tiles: np.ndarray  # int64 [B]
    token_budget: int
    tile_budget: int

    def fewest_bins(self) -> int:
        """A lower bound on the number of bins: sums spread perfectly, samples beyond a budget cut down to it."""
        tokens = np.minimum(self.lengths, self.token_budget).sum()
        tiles = np.minimum(self.tiles, self.tile_budget).sum()
        return max(-(-int(tokens) // self.token_budget), -(-int(tiles) // self.tile_budget))


def _longest_first(samples: _Samples, num_bins: int) -> np.ndarray | None:
    """Each sample, dearest first, into the cheapest bin with room: its bin, int64 [B]; None when one finds no room."""
    lengths, tiles, costs = samples.lengths.tolist(), samples.tiles.tolist(), samples.costs.tolist()
    heap = [(0, number, 0, 0, 0) for number in range(num_bins)]  # cost, bin, samples, tokens, tiles
    where = np.empty(len(costs), np.int64)
    for sample in np.argsort(-samples.costs, kind="stable").tolist():
        full = []
        while heap:
            bin_cost, number, count, tokens, bin_tiles = heapq.heappop(heap)
            new_tokens, new_tiles = tokens + lengths[sample], bin_tiles + tiles[sample]
            if count == 0 or (new_tokens <= samples.token_budget and new_tiles <= samples.tile_budget):
                where[sample] = number
                heapq.heappush(heap, (bin_cost + costs[sample], number, count + 1, new_tokens, new_tiles))
                break
            full.append((bin_cost, number, count, tokens, bin_tiles))
        else:
            return None
        for entry in full:
            heapq.heappush(heap, entry)
    return where


def _refine(
    samples: _Samples, where: np.ndarray, n_micro: int, world: int, goal: float, looks: int
) -> tuple[np.ndarray, int, int]:
    """Local search from `where` until the sum of slowest bins is at most `goal`, nothing helps, or `looks` are spent.

    Each look takes the slowest bin of the micro-step that wastes most, and makes the one swap (or move) with another
    bin that lowers the sum of slowest bins most. When no micro-step has one, bins are sorted into micro-steps again.

    Returns:
        the assignment (bin = micro * world + rank), its sum of slowest bins, the looks left.
    """
    bins = _Bins(samples, where, n_micro, world)
    stuck = np.zeros(n_micro, bool)
    while looks > 0 and (slowest := bins.grouped.max(1)).sum() > goal:
        waste = np.where(stuck, 0, slowest * world - bins.grouped.sum(1))
        micro = int(waste.argmax())
        if waste[micro] > 0:
            looks -= 1
            stuck[micro] = True
            if not bins.improve(micro):
                continue
        elif not bins.sort():
            break
        stuck[:] = False
    bins.sort()
    return bins.where[: len(samples.costs)], int(bins.grouped.max(1).sum()), looks


class _Bins:
    """Bins of samples under local search. Micro-step m owns the bins [m * world, (m + 1) * world).

    An imaginary sample of size zero stands in every bin, so that a move is a swap with one.
    """

    def __init__(self, samples: _Samples, where: np.ndarray, n_micro: int, world: int):
        self.n_micro, self.world, self.limits = n_micro, world, (samples.token_budget, samples.tile_budget)
        num_bins = n_micro * world
        zeros = np.zeros(num_bins, np.int64)
        self.num_samples = len(samples.costs)
        self.item_costs = np.concatenate([samples.costs, zeros])
        self.item_sizes = [np.concatenate([sizes, zeros]) for sizes in (samples.lengths, samples.tiles)]
        self.where = np.concatenate([where, np.arange(num_bins)])
        self.costs, *self.sizes = (self._sum(items) for items in (self.item_costs, *self.item_sizes))
        self.sort()

    @property
    def grouped(self) -> np.ndarray:
        """The bins' costs as [n_micro, world]."""
        return self.costs.reshape(self.n_micro, self.world)

    def _sum(self, items: np.ndarray) -> np.ndarray:
        total = np.zeros(self.n_micro * self.world, np.int64)
        np.add.at(total, self.where, items)  # bincount would sum in floating point
        return total

    def sort(self) -> bool:
        """Put bins of like cost into the same micro-step, dearest first. True when that lowers the sum of slowest."""
        before = self.grouped.max(1).sum()
        ranking = np.argsort(-self.costs, kind="stable")
        place = np.empty_like(ranking)
        place[ranking] = np.arange(len(ranking))
        self.where[: self.num_samples] = place[self.where[: self.num_samples]]
        self.costs, *self.sizes = (values[ranking] for values in (self.costs, *self.sizes))
        return bool(self.grouped.max(1).sum() < before)

    def improve(self, micro: int) -> bool:
        """Make the best swap out of the slowest bin of a micro-step. False when none lowers the sum of slowest bins."""
        grouped = self.grouped
        slow = micro * self.world + int(grouped[micro].argmax())
        slowest = self.costs[slow]
        second = np.partition(grouped[micro], -2)[-2] if self.world > 1 else 0
        members = np.flatnonzero(self.where[: self.num_samples] == slow)
        # Rows: samples of the slow bin. Columns: all samples, real and imaginary, as partners.
        shed = self.item_costs[members][:, None] - self.item_costs
        left = np.maximum(slowest - shed, second)  # what the micro-step takes when the partner is not part of it
        partner_micro = self.where // self.world
        reference = np.where(partner_micro == micro, left, grouped.max(1)[partner_micro])
        outcome = left + np.maximum(self.costs[self.where] - reference + shed, 0)
        allowed = (shed > 0) & (outcome < slowest)
        for items, sizes, limit in zip(self.item_sizes, self.sizes, self.limits, strict=True):
            own = items[members][:, None]
            allowed &= own <= limit - sizes[self.where] + items
            allowed &= own >= sizes[slow] + items - limit
        rows, partners = np.nonzero(allowed)
        if not len(rows):
            return False
        best = int(outcome[rows, partners].argmin())
        self._swap(int(members[rows[best]]), int(partners[best]), slow)
        return True

    def _swap(self, item: int, partner: int, slow: int):
        target = self.where[partner]
        for items, totals in zip((self.item_costs, *self.item_sizes), (self.costs, *self.sizes), strict=True):
            difference = items[item] - items[partner]
            totals[slow] -= difference
            totals[target] += difference
        self.where[item] = target
        if partner < self.num_samples:
            self.where[partner] = slow
