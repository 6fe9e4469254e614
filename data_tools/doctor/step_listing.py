"""Any step of a run, past or future, from the plan alone: which samples it holds, in which bins, at what cost."""

from collections.abc import Iterator

import numpy as np

from llava_next.data.format.tar import one_line
from llava_next.data.plan.dealing import CostModel
from llava_next.data.plan.mixture import Mixture
from llava_next.training.checkpoints.recovery import checkpoint_places, complete_checkpoints, read_manifest
from llava_next.training.recipe.config import RunConfig


def follow_run(config: RunConfig, mixture: Mixture) -> None:
    """Takes over what the run folder's newest checkpoint says of the plan, which may have changed on the way.

    Raises:
        ValueError: the checkpoint was made with another plan than the configuration's.
    """
    found = complete_checkpoints(checkpoint_places(config)[0])
    if found:
        mixture.resume(read_manifest(found[-1])["state"], config.data.allow_changed_plan)


def list_step(config: RunConfig, mixture: Mixture, step: int, ranks: int) -> Iterator[str]:
    """Lines of text: the step, then each bin and its samples. Steps count from 0, as in the plan.

    Raises:
        ValueError: no such step.
    """
    data, cost = config.data, mixture.cost or CostModel()
    ids, (lengths, tiles) = mixture.step_ids(step), mixture.step_sizes(step)
    costs = cost.sample_cost(lengths, tiles)
    bins = mixture.deal(step, ranks, data.token_budget, data.tile_budget)
    by_bin = np.array([[costs[members].sum() for members in micro] for micro in bins], np.int64)
    # with nothing in a step, nothing waits
    balance = by_bin.sum() / max(ranks * by_bin.max(axis=1).sum(), 1)
    exact = "exact" if mixture.exact_lengths else "estimated"
    yield (
        f"step {step} (steps 0 to {mixture.total_steps - 1}), epoch {mixture.epoch(step)}: {len(ids)} samples, "
        f"{lengths.sum():,} tokens ({exact}), {tiles.sum():,} tiles, {costs.sum() / 1e12:,.4g} TFLOP"
    )
    yield f"{len(bins)} micro-batches on {ranks} ranks, cost balanced to {100 * balance:.1f} %"
    for micro, by_rank in enumerate(bins):
        for rank, members in enumerate(by_rank):
            share = by_bin[micro, rank] / max(by_bin[micro].max(), 1)
            yield ""
            yield (
                f"micro-batch {micro} rank {rank}: {len(members)} samples, {lengths[members].sum():,} tokens, "
                f"{tiles[members].sum():,} tiles, {by_bin[micro, rank] / 1e12:,.4g} TFLOP, "
                f"{100 * share:.0f} % of the slowest"
            )
            if len(members):
                yield f"  {'slot':>5} {'id':>9} {'tokens':>7} {'tiles':>5} {'TFLOP':>8}  source, shard, key"
            for slot in members:
                ref = mixture.ref(ids[slot], slot)
                yield (
                    f"  {slot:>5} {ids[slot]:>9} {lengths[slot]:>7} {tiles[slot]:>5} {costs[slot] / 1e12:>8.3g}  "
                    + one_line(f"{mixture.names[ref.source]} {ref.shard} {ref.location.key}")
                )
