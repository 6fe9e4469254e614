"""Seconds of a step before it runs: what is computed, what is moved between ranks, and a price for each micro-batch.

All ranks run a micro-batch together, so it takes as long as the slowest rank's, or as long as the weights and
gradients that it moves, whichever is more: FSDP2 moves one layer's while another computes. None of the assumed figures
was measured with this project.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PretrainedConfig

from llava_next.data.plan.dealing import CostModel
from llava_next.training.devices.hardware import Hardware
from llava_next.training.forecast.budget import Layout, Unit
from llava_next.training.forecast.flops import Checkpointing, by_stack, flops_model
from llava_next.training.recipe.optim import Rates

# Of the peak, for all that is computed: published 7B text runs on H100 reach 46 % without checkpointing and, what full
# checkpointing computes twice counted as well, 54 % with it (MosaicML's MPT-7B).
ASSUMED_HFU = 0.47
# Of a layer's forward, by policy, what checkpointing costs once more. Selective computes norms, rotary embedding and
# activations again: next to no operations, but memory traffic. An assumption.
AGAIN = {"none": 0.0, "selective": 0.1, "full": 1.0}
# launch gaps and the part of the gathers that nothing hides: what dealing charges for a micro-batch as well
MICRO_STEP_SECONDS = CostModel().flops_per_micro_step / 500e12
SUPERVISED_SHARE = 0.1  # of all tokens, assumed: it moves the FLOPs by 1 %
USUAL_PEAK = 300e12  # to compare plans on a device whose own peak is not known


def communication_bytes(weights: Unit, shard: int, gathers: int = 2, nbytes: int = 2) -> float:
    """Bytes that a rank receives in one micro-batch from those that it shares a copy with.

    Gradients are reduced in fp32.

    Args:
        weights: of the whole model; shard: ranks of a copy; nbytes: of a gathered weight.
        gathers: of weights: for the forward and, when they were freed, for the backward.
    """
    return (shard - 1) / shard * (nbytes * gathers * weights.parameters + 4 * weights.trainable)


def communication_seconds(weights: Unit, layout: Layout, hardware: Hardware, first: bool = True) -> float:
    """Seconds that a micro-batch moves weights and gradients: in a node by its links, else by the network.

    Args:
        first: of its step: weights that are not freed are gathered once a step.
    """
    near = layout.shard <= hardware.per_node
    own = communication_bytes(weights, layout.shard, 2 if layout.reshard else first, layout.compute.nbytes)
    copies = layout.replicate
    across = 2 * (copies - 1) / copies * 4 * weights.trainable / layout.shard  # a ring's all-reduce of its shard
    return own / (hardware.near if near else hardware.far) + across / hardware.far


def micro_batch_flops(
    config: PretrainedConfig, rates: Rates, policy: Checkpointing, tokens, squared_lengths, tiles
) -> np.ndarray:
    """What micro-batches cost in FLOPs, what is computed again at its price in time (`AGAIN`): float64, as broadcast.

    Args:
        tokens, squared_lengths, tiles: of each micro-batch, see `FlopsModel.step_flops`.
    """
    tokens = np.asarray(tokens, float)
    sizes = (tokens, np.asarray(squared_lengths, float), np.asarray(tiles, float), SUPERVISED_SHARE * tokens)
    model, everything_twice = flops_model(config, rates, "full").step_flops(*sizes)
    layers = config.text_config.num_hidden_layers
    decoder, tower = by_stack(policy, layers)
    share = sum(AGAIN[name] * count for name, count in decoder.items()) / layers
    again = share * (everything_twice.llm - model.llm) + AGAIN[tower] * (everything_twice.vision - model.vision)
    return model.total + again


def step_seconds(
    flops: Sequence[np.ndarray], weights: Unit, layout: Layout, hardware: Hardware
) -> tuple[float, float, float]:
    """Seconds of a step, and of these what a rank computes and what it moves.

    Args:
        flops: by step, of every micro-batch on every rank: [micro-batches, ranks].
    """
    peak = ASSUMED_HFU * (hardware.peak or USUAL_PEAK)
    first, later = (communication_seconds(weights, layout, hardware, first) for first in (True, False))
    total = computed = moved = 0.0
    for step in flops:
        slowest, moving = step.max(axis=1) / peak, np.full(len(step), later)
        moving[0] = first
        total += np.maximum(slowest, moving).sum() + MICRO_STEP_SECONDS * len(slowest)
        computed, moved = computed + slowest.sum(), moved + moving.sum()
    return total / len(flops), computed / len(flops), moved / len(flops)
