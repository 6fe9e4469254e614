"""Devices: what they can compute at most, how much memory they have, and the machine that a plan is made for."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import torch

# Peak dense bf16 FLOP/s with fp32 accumulation, by words of `torch.cuda.get_device_name()`; the first entry whose words
# all occur wins. From NVIDIA's data sheets (A100, A10, A30, A40, H100, H200, L4, L40, L40S; HGX B200 and GB200) and
# architecture white papers (GA102, Ada, Blackwell RTX); where a sheet states the figure with sparsity, half of it.
PEAKS: tuple[tuple[str, float], ...] = (
    ("gb200", 2500e12),
    ("b200", 2250e12),
    ("gh200", 989.4e12),
    ("h200 nvl", 835.5e12),
    ("h200", 989.4e12),
    ("h100 nvl", 835.5e12),
    ("h100 pcie", 756e12),
    ("h100", 989.4e12),
    ("h800", 989.4e12),
    ("a100", 312e12),
    ("a800", 312e12),
    ("a40", 149.7e12),
    ("a30", 165e12),
    ("a10g", 70e12),
    ("a10", 125e12),
    ("l40s", 362e12),
    ("l40", 181e12),
    ("l4", 121e12),
    ("rtx 6000 ada", 364.2e12),
    ("rtx a6000", 154.8e12),
    ("rtx 5090", 209.5e12),
    ("rtx 4090", 165.2e12),
    ("rtx 3090", 71e12),
)
# the same name with one of these words is another, slower device, or a slice of one
OTHER_DEVICES = {"laptop", "mig", "max", "d", "ti"}

# what --as_if knows: device name for `peak_flops`, and the GiB that PyTorch reports as its total memory, rounded down
KINDS: dict[str, tuple[str, float]] = {
    "a100-40g": ("A100", 39.4),
    "a100-80g": ("A100", 79.1),
    "h100-80g": ("H100", 79.1),
    "h100-94g": ("H100 NVL", 93.0),
    "h200-141g": ("H200", 139.8),
    "b200-180g": ("B200", 178.3),
    "l40s-48g": ("L40S", 44.4),
    "a10g-24g": ("A10G", 22.0),
    "rtx4090-24g": ("RTX 4090", 23.5),
}
GPUS_PER_NODE = 8


def peak_flops(device_name: str) -> float | None:
    """Peak dense bf16 FLOP/s of a device; None when it is not in the table, and MFU is then left out.

    Args:
        device_name: as `torch.cuda.get_device_name()` gives it.
    """
    words = set(re.split(r"[\s-]+", device_name.lower()))
    if words & OTHER_DEVICES:
        return None
    return next((peak for name, peak in PEAKS if set(name.split()) <= words), None)


@dataclass(frozen=True)
class Hardware:
    """What a run has.

    Args:
        name: for people.
        world: ranks; per_node: of them in one node.
        memory: bytes that a rank has.
        peak: FLOP/s of a rank; None when unknown.
        on_gpu: false on CPUs, where everything is float32 and attention runs segment by segment.
    """

    name: str
    world: int
    per_node: int
    memory: float
    peak: float | None
    on_gpu: bool = True


def parse_hardware(text: str) -> Hardware:
    """The machine that `--as_if 8xh100-80g` means: a number of GPUs of one kind, in nodes of 8.

    Raises:
        ValueError: naming the kinds that are known.
    """
    count, _, kind = text.lower().partition("x")
    if not count.isdigit() or kind not in KINDS:
        raise ValueError(
            f"--as_if {text}: give a number of GPUs and their kind, as 8xh100-80g; kinds: {', '.join(KINDS)}"
        )
    world = int(count)
    if world < 1 or (world > GPUS_PER_NODE and world % GPUS_PER_NODE):
        raise ValueError(f"--as_if {text}: give 1 to {GPUS_PER_NODE} GPUs, or whole nodes of {GPUS_PER_NODE}")
    device, gib = KINDS[kind]
    per_node = min(world, GPUS_PER_NODE)
    nodes = f", {world // per_node} nodes" if world > per_node else ""
    return Hardware(f"{world} x {kind}{nodes}", world, per_node, gib * 2**30, peak_flops(device))


def present_hardware() -> Hardware:
    """The machine at hand, shared by the processes of this launch."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(torch.cuda.current_device())
        return Hardware(f"{world} x {device.name}", world, per_node, device.total_memory, peak_flops(device.name))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / per_node
    return Hardware(f"{world} CPU process(es)", world, per_node, memory, None, on_gpu=False)
