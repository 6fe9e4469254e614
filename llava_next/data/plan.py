"""The plan: which samples make up every optimizer step, and which rank computes them. Numpy only, no I/O.

`order` lists the samples of an epoch; step s takes samples [s * B, (s + 1) * B) of it. Nothing that happens later (the
number of ranks, workers, retries, broken samples) changes that list, so a run's position in the data is one integer.
`deal` spreads the samples of one step over `world x n_micro` bins of nearly equal cost. It runs on every rank and gives
the same answer there, without a collective: costs are integers, and random numbers are raw 64-bit words of a
counter-based generator, whose stream NumPy guarantees across versions and machines (that of `Generator.permutation`
it does not).
"""

import hashlib
import heapq
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

# Goes into `plan_hash`: raise it whenever `order` gives another list for the same arguments.
PLAN_FORMAT = 1

_SHARDS, _SAMPLES = 0, 1  # what a random stream permutes: the last but one word of its seed


@dataclass(frozen=True, eq=False)
class Source:
    """One data set of a mixture.

    Args:
        name: shown in messages and metrics.
        shard_samples: samples in each shard, int [K], in the order of the index.
        repeat: how often a sample comes in an epoch: 1.0 once, 0.5 a random half of them, 2.0 twice, 1.5 all of them
            and a random half again.

    Raises:
        ValueError: a negative or non-finite `repeat`, or a negative shard size.
    """

    name: str
    shard_samples: Sequence[int] | np.ndarray
    repeat: float = 1.0

    def __post_init__(self):
        if not (math.isfinite(self.repeat) and self.repeat >= 0):
            raise ValueError(f"source {self.name!r}: repeat is {self.repeat}; it must be 0 or more.")
        sizes = np.asarray(self.shard_samples, dtype=np.int64).reshape(-1)
        if (sizes < 0).any():
            raise ValueError(f"source {self.name!r}: a shard with {sizes.min()} samples.")
        object.__setattr__(self, "shard_samples", sizes)

    @property
    def num_samples(self) -> int:
        """Samples in the data set."""
        return int(self.shard_samples.sum())

    @property
    def epoch_samples(self) -> int:
        """Samples that an epoch takes: `num_samples * repeat`, rounded to the nearest whole number (halves up)."""
        return math.floor(self.num_samples * self.repeat + 0.5)


def permutation(n: int, *stream: int) -> np.ndarray:
    """A random permutation of range(n), int64 [n], the same for the same `stream` (non-negative integers) for ever."""
    words = np.random.Philox(np.random.SeedSequence(stream)).random_raw(n)
    return np.argsort(words, kind="stable")


def order(sources: Sequence[Source], seed: int, epoch: int = 0, shuffle_shards: int | None = None) -> np.ndarray:
    """The samples of one epoch in training order: int64 [n], as global ids.

    Sample i of source k has the id `offset_k + i`, where `offset_k` counts the samples of the sources before it and i
    is its row in the index. In each source the shards are permuted, cut into windows of `shuffle_shards`, and the
    samples of a window permuted; sources are interleaved evenly, each at its own constant rate.

    Args:
        sources: the mixture; an id comes `repeat` times.
        seed: of the run, 0 or more.
        epoch: 0 for the first; every epoch has its own permutation.
        shuffle_shards: shards a window, which bounds how many are read from at a time; None permutes a whole source.

    Raises:
        ValueError: negative seed or epoch, or a window of less than one shard.
    """
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed {seed} and epoch {epoch} must be 0 or more.")
    if shuffle_shards is not None and shuffle_shards < 1:
        raise ValueError(f"shuffle_shards is {shuffle_shards}; a window is 1 shard or more, None is all of them.")
    ids, positions, offset = [], [], 0
    for number, source in enumerate(sources):
        length = source.epoch_samples
        ids.append(offset + _source_order(source, (seed, epoch, number), shuffle_shards))
        # Sample i of n sits at (i + 1/2) / n of the epoch. Neighbours of a source are exactly 1/n apart, so any stretch
        # of the merged list holds each source's share of it to within 1 + (number of sources x share) samples.
        positions.append((np.arange(length) + 0.5) / max(length, 1))
        offset += source.num_samples
    if not ids:
        return np.zeros(0, np.int64)
    return np.concatenate(ids)[np.argsort(np.concatenate(positions), kind="stable")]


def _source_order(source: Source, stream: tuple[int, ...], shuffle_shards: int | None) -> np.ndarray:
    """One source's rows in training order, int64 [epoch_samples]: whole passes, then the start of one more."""
    parts, missing, number = [], source.epoch_samples, 0
    while missing > 0:
        for window in _windows(source, (*stream, number), shuffle_shards):
            parts.append(window[:missing])
            missing -= len(parts[-1])
            if missing <= 0:
                break
        number += 1
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _windows(source: Source, stream: tuple[int, ...], shuffle_shards: int | None) -> Iterator[np.ndarray]:
    """The rows of one pass over a source, window by window: each an int64 array of permuted rows."""
    sizes = source.shard_samples
    starts = np.cumsum(sizes) - sizes
    shards = permutation(len(sizes), *stream, _SHARDS, 0)
    width = shuffle_shards or max(len(sizes), 1)
    for number, first in enumerate(range(0, len(shards), width)):
        chosen = shards[first : first + width]
        # Rows of the chosen shards, one shard after the other, without a loop over shards.
        shift = np.repeat(starts[chosen] - (np.cumsum(sizes[chosen]) - sizes[chosen]), sizes[chosen])
        rows = shift + np.arange(len(shift))
        yield rows[permutation(len(rows), *stream, _SAMPLES, number)]


def num_steps(num_samples: int, batch_size: int) -> int:
    """Optimizer steps of `num_samples` samples: ceil(n / B); the last one may be smaller."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be 1 or more.")
    return -(-num_samples // batch_size)


def step_ids(ids: np.ndarray, step: int, batch_size: int) -> np.ndarray:
    """The global ids of step `step` (counted from 0): int64 [B], fewer in the last step of `ids` = `order(...)`."""
    if not 0 <= step < num_steps(len(ids), batch_size):
        raise ValueError(f"step {step} is not one of the {num_steps(len(ids), batch_size)} steps of the plan.")
    return ids[step * batch_size : (step + 1) * batch_size]


def plan_hash(
    index_hashes: Sequence[str],
    names: Sequence[str],
    repeats: Sequence[float],
    seed: int,
    batch_size: int,
    shuffle_shards: int | None = None,
) -> str:
    """Sha256 (hex) of everything that decides which samples a step holds.

    Ranks compare it at the start, and a checkpoint keeps it: resuming under another plan would silently repeat some
    samples and leave out others.
    """
    plan = {
        "format": PLAN_FORMAT,
        "sources": [list(row) for row in zip(index_hashes, names, map(float, repeats), strict=True)],
        "seed": seed,
        "batch_size": batch_size,
        "shuffle_shards": shuffle_shards,
    }
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


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
