"""What the ranks tell each other about a step before they compute it: one small message between the hosts.

Nothing on the GPU waits for it. It carries the number of supervised tokens of every sample (the weights of the loss
follow from them), counts for the log, and the flags that must never be seen by one rank alone: that a rank was asked
to stop, that a rank has no data, and that a rank knows of a checkpoint that failed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from llava_next.data.loading.batch import PackedBatch
from llava_next.data.loading.feed import Feed, NotWaitedFor
from llava_next.model.forward.head import chunked_targets

GROUP = 8  # samples of a group in `micro_batch_mean`: one micro-batch of the original runs
COUNTS = ("samples", "tokens", "squared_lengths", "tiles", "chunked", "truncated", "unsupervised", "holes")
IO = ("requests", "retries", "bytes", "cache_hits")


class RunStopped(RuntimeError):
    """The run cannot go on; the message says why, and what to do."""


class RanksDisagree(ValueError):
    """Ranks were started with different things."""


@dataclass
class StepCounts:
    """A step as all ranks know it, summed over them.

    Args:
        supervised: float64 `[B]`, supervised tokens of the sample in each slot.
        counts: `COUNTS`; squared_lengths is the sum of the samples' lengths in tokens, squared; chunked the targets
            whose logits backward computes again.
        io: `IO`, of all reads since the step before.
        data_wait_s: mean over ranks of the seconds that the loop waited for its data.
        stop: a rank was asked to stop; failed: a rank could not get its data; unsaved: the last checkpoint failed.
    """

    supervised: torch.Tensor
    counts: dict[str, int]
    io: dict[str, int]
    data_wait_s: float
    stop: bool
    failed: bool
    unsaved: bool


def agree(values: torch.Tensor) -> torch.Tensor:
    """Sums a small host tensor over all ranks, in place (gloo)."""
    dist.all_reduce(values)
    return values


def same_on_all_ranks(what: str, text: str) -> None:
    """Refuses to start when ranks were given different things (another file on one node, say). A collective.

    Raises:
        RanksDisagree: on all ranks.
    """
    word = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    largest = torch.tensor([word, -word])
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    if largest.sum() != 0:
        raise RanksDisagree(
            f"the ranks have different {what}: all nodes must start with the same command and see the same files"
        )


def agree_on_step(
    micros: list[PackedBatch],
    batch_size: int,
    stop: bool = False,
    failed: bool = False,
    waited: float = 0.0,
    unsaved: bool = False,
) -> StepCounts:
    """Sums what the ranks hold of a step: one message of B + 17 numbers.

    Args:
        micros: this rank's micro-batches.
        stop: this rank was asked to stop.
        failed: this rank could not get its data; then all ranks learn it here instead of waiting for it for ever.
        waited: seconds this rank waited for them.
        unsaved: this rank knows that the last checkpoint failed.
    """
    supervised = torch.zeros(batch_size, dtype=torch.float64)
    sums = torch.zeros(len(COUNTS) + len(IO), dtype=torch.float64)
    for batch in micros:
        if batch.slots:
            supervised[torch.tensor(batch.slots)] = torch.tensor(batch.supervised, dtype=torch.float64)
        squared = int(batch.cu_seqlens.diff().double().square().sum()) if batch.slots else 0
        work = (len(batch.slots), batch.num_tokens, squared, batch.num_tiles, chunked_targets(len(batch.target_ids)))
        counts = (*work, batch.num_truncated, batch.supervised.count(0), len(batch.holes))
        sums += torch.tensor([*counts, *(batch.io.get(name, 0) for name in IO)], dtype=torch.float64)
    message = torch.cat([supervised, sums, torch.tensor([waited, stop, failed, unsaved, 1], dtype=torch.float64)])
    supervised, sums, (waited, stops, failures, lost, ranks) = agree(message).split([batch_size, len(sums), 5])
    totals = [int(x) for x in sums]
    return StepCounts(
        supervised=supervised,
        counts=dict(zip(COUNTS, totals, strict=False)),
        io=dict(zip(IO, totals[len(COUNTS) :], strict=True)),
        data_wait_s=float(waited / ranks),
        stop=bool(stops > 0),
        failed=bool(failures > 0),
        unsaved=bool(lost > 0),
    )


def any_rank(flag: bool) -> bool:
    """Whether the flag is up on one of the ranks. A collective."""
    return bool(agree(torch.tensor([float(flag)])) > 0)


def take_step(
    feed: Feed, step: int, batch_size: int, stop: Callable[[], bool] = lambda: False, unsaved: bool = False
) -> tuple[list[PackedBatch], StepCounts]:
    """This rank's micro-batches of a step, and what all ranks have of it. A collective.

    Args:
        feed: gives the steps in their order.
        step: that is due.
        stop: whether this rank was asked to stop, also while it waits for its data: then it waits no longer. When one
            rank was, none is to compute the step, whose data may be incomplete.
        unsaved: see `agree_on_step`.

    Raises:
        Exception: what the loader raised, here or (as RunStopped) on another rank.
    """
    micros, error, begin = [], None, time.monotonic()
    try:
        given, micros = feed.take(unless=stop)
        if given != step:
            raise RuntimeError(f"the loader gave step {given} where {step} was due")
    except NotWaitedFor:
        pass
    except Exception as caught:
        error = caught
    waited = time.monotonic() - begin
    counts = agree_on_step(micros, batch_size, stop(), error is not None, waited, unsaved)
    if counts.stop:
        return [], counts
    if error is not None:
        raise error
    if counts.failed:
        raise RunStopped("another rank could not load its data; its own message says what and where")
    return micros, counts


def slot_weights(supervised: torch.Tensor, weighting: str) -> torch.Tensor:
    """Weight of each supervised token, by the slot of its sample in the step; a step's weights sum to 1.

    Args:
        supervised: float64 `[B]`, supervised tokens of the sample in each slot (0: none, or a hole).
        weighting: `token`, `sample` or `micro_batch_mean` (see `OptimConfig`).

    Returns:
        float32 `[B]`; zeros when nothing is supervised.
    """
    if weighting == "token":
        weights = torch.full_like(supervised, 1.0) / supervised.sum()
    elif weighting == "sample":
        weights = 1.0 / supervised / (supervised > 0).sum()
    elif weighting == "micro_batch_mean":
        group = torch.arange(len(supervised)) // GROUP
        totals = torch.zeros(int(group[-1]) + 1, dtype=supervised.dtype).index_add(0, group, supervised)
        weights = (1.0 / totals / (totals > 0).sum())[group]
    else:
        raise ValueError(f"loss_weighting {weighting!r} is not token, sample or micro_batch_mean")
    return torch.where(supervised > 0, weights, 0.0).float()
