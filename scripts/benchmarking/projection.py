"""From a step measured on one GPU to a node of eight: arithmetic, and marked as such wherever it is printed.

FSDP2 gathers every layer's weights twice a micro-batch (forward and backward) in bf16 and reduces its gradients in
fp32. How much of that hides behind computation is not known from one GPU, so both ends are given: all of it, and none.
"""

from __future__ import annotations

from dataclasses import dataclass

from llava_next.training.forecast.budget import Unit


@dataclass(frozen=True)
class Node:
    """What a node is taken to be.

    Args:
        gpus: ranks.
        bandwidth: bytes/s at which a rank receives in a collective (NVLink of an H100: 450e9 by data sheet, some
            three quarters of it in NCCL's tests). An assumption.
        balance: mean cost of a rank over that of the slowest, see `benchmark.py deal`.
    """

    gpus: int = 8
    bandwidth: float = 340e9
    balance: float = 0.985


def communication_bytes(weights: Unit, node: Node, reshard: bool = True) -> float:
    """Bytes that a rank receives in one micro-batch."""
    others = (node.gpus - 1) / node.gpus
    return others * ((2 + 2 * reshard) * weights.parameters + 4 * weights.trainable)


def project(compute_s: float, optimizer_s: float, micro_batches: float, weights: Unit, node: Node) -> dict:
    """Seconds of a step on a node.

    Args:
        compute_s: forward and backward of a rank's share of the step at full depth.
        optimizer_s: the update on one GPU with everything on it, at full depth; a rank updates its share.
        micro_batches: of the step.
        weights: of the whole model at full depth.
    """
    compute = compute_s / node.balance
    communication = micro_batches * communication_bytes(weights, node) / node.bandwidth
    update = optimizer_s / node.gpus
    return {
        "is": "a projection from one GPU, not a measurement",
        "gpus": node.gpus,
        "bandwidth_gb_s": node.bandwidth / 1e9,
        "balance": node.balance,
        "communication_s": communication,
        "step_s_all_hidden": max(compute, communication) + update,
        "step_s_none_hidden": compute + communication + update,
    }
