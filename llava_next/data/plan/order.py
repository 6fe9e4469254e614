"""The order: which samples make up every optimizer step. Numpy only, no I/O.

`order` lists the samples of an epoch; step s takes samples [s * B, (s + 1) * B) of it. Nothing that happens later (the
number of ranks, workers, retries, broken samples) changes that list, so a run's position in the data is one integer.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from llava_next.shuffling import permutation

__all__ = ["Order", "Source", "num_steps", "order", "plan_hash"]

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

    @cached_property
    def num_samples(self) -> int:
        """Samples in the data set."""
        return int(self.shard_samples.sum())

    @property
    def epoch_samples(self) -> int:
        """Samples that an epoch takes: `num_samples * repeat`, rounded to the nearest whole number (halves up)."""
        return math.floor(self.num_samples * self.repeat + 0.5)


class Order:
    """The samples of one epoch in training order; any stretch of it without computing the rest.

    Sample i of source k has the id `offset_k + i`, where `offset_k` counts the samples of the sources before it and i
    is its row in the index. In each source the shards are permuted, cut into windows of `shuffle_shards`, and the
    samples of a window permuted; sources are interleaved evenly, each at its own constant rate. In memory are the
    windows in use (8 bytes a sample) and a permutation of each source's shards.

    Args:
        sources: the mixture; an id comes `repeat` times.
        seed: of the run, 0 or more.
        epoch: 0 for the first; every epoch has its own permutation.
        shuffle_shards: shards a window, which bounds how many are read from at a time; None permutes a whole source.

    Raises:
        ValueError: negative seed or epoch, or a window of less than one shard.
    """

    def __init__(self, sources: Sequence[Source], seed: int, epoch: int = 0, shuffle_shards: int | None = None):
        if seed < 0 or epoch < 0:
            raise ValueError(f"seed {seed} and epoch {epoch} must be 0 or more.")
        if shuffle_shards is not None and shuffle_shards < 1:
            raise ValueError(f"shuffle_shards is {shuffle_shards}; a window is 1 shard or more, None is all of them.")
        self._sources = [_SourceOrder(source, (seed, epoch, k), shuffle_shards) for k, source in enumerate(sources)]
        self._lengths = [source.epoch_samples for source in sources]
        self._offsets = list(itertools.accumulate((source.num_samples for source in sources), initial=0))

    def __len__(self) -> int:
        return sum(self._lengths)

    def ids(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Places [start, stop) of the order, clipped to its length: global ids, int64."""
        total = len(self)
        stop = total if stop is None else min(stop, total)
        if start >= stop:
            return np.zeros(0, np.int64)
        # Sample i of n sits at (i + 1/2) / n of the epoch. Neighbours of a source are exactly 1/n apart, so any stretch
        # of the merged list holds each source's share of it to within 1 + (number of sources x share) samples. Each
        # source can be half a sample early or late, so those before `first` surely come before `start`.
        places, ids, skipped = [], [], 0
        for source, length, offset in zip(self._sources, self._lengths, self._offsets, strict=False):
            slack = len(self._lengths)
            first = min(max(math.floor(length * (start - slack) / total - 0.5), 0), length)
            last = min(math.ceil(length * (stop + slack) / total + 0.5) + 1, length)
            places.append((np.arange(first, last) + 0.5) / max(length, 1))
            ids.append(offset + source.rows(first, last))
            skipped += first
        ranking = np.argsort(np.concatenate(places), kind="stable")
        return np.concatenate(ids)[ranking[start - skipped : stop - skipped]]


def order(sources: Sequence[Source], seed: int, epoch: int = 0, shuffle_shards: int | None = None) -> np.ndarray:
    """The samples of one epoch in training order: int64 [n], as global ids. Arguments and errors: see `Order`."""
    return Order(sources, seed, epoch, shuffle_shards).ids()


class _SourceOrder:
    """One source's rows in training order: whole passes, each with its own permutation, then the start of one more."""

    def __init__(self, source: Source, stream: tuple[int, ...], shuffle_shards: int | None):
        self._sizes, self._samples, self._stream = source.shard_samples, source.num_samples, stream
        self._width = shuffle_shards or max(len(self._sizes), 1)
        self._starts = np.cumsum(self._sizes) - self._sizes
        # Two of each: a stretch may reach over a border.
        self._pass = lru_cache(maxsize=2)(self._shards_of_pass)
        self._window = lru_cache(maxsize=2)(self._rows_of_window)

    def rows(self, first: int, last: int) -> np.ndarray:
        """Rows at places [first, last) of the source's own order: int64."""
        parts = [np.zeros(0, np.int64)]
        while first < last:
            number, place = divmod(first, self._samples)
            ends = self._pass(number)[1]
            window = int(np.searchsorted(ends, place, side="right"))
            begin = place - (int(ends[window - 1]) if window else 0)
            parts.append(self._window(number, window)[begin : begin + last - first])
            first += len(parts[-1])
        return np.concatenate(parts)

    def _shards_of_pass(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of a pass in its order, and where each of its windows ends, in samples."""
        shards = permutation(len(self._sizes), *self._stream, number, _SHARDS, 0)
        ends = np.cumsum(self._sizes[shards])
        return shards, ends[[*range(self._width - 1, len(ends) - 1, self._width), len(ends) - 1]]

    def _rows_of_window(self, number: int, window: int) -> np.ndarray:
        """The rows of a window, permuted: int64."""
        chosen = self._pass(number)[0][window * self._width : (window + 1) * self._width]
        sizes = self._sizes[chosen]
        # Rows of the chosen shards, one shard after the other, without a loop over shards.
        rows = np.repeat(self._starts[chosen] - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
        return rows[permutation(len(rows), *self._stream, number, _SAMPLES, window)]


def num_steps(num_samples: int, batch_size: int) -> int:
    """Optimizer steps of `num_samples` samples: ceil(n / B); the last one may be smaller."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be 1 or more.")
    return -(-num_samples // batch_size)


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
