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
# What a GPU receives in a collective, bytes/s: from the GPUs of its node, and from other nodes. Data sheets' NVLink in
# one direction, PCIe 4.0 where there is none, and usual networks (400 Gb/s a GPU beside Hopper and Blackwell, 200
# beside Ampere, 100 a node else); three quarters of each, as NCCL's tests reach. Assumptions, by words as in `PEAKS`.
LINKS: tuple[tuple[str, float, float], ...] = (
    ("gb200", 675e9, 37e9),
    ("b200", 675e9, 37e9),
    ("h100 pcie", 24e9, 9e9),
    ("h200", 340e9, 37e9),
    ("h100", 340e9, 37e9),
    ("h800", 150e9, 37e9),
    ("a100", 225e9, 19e9),
    ("a800", 150e9, 19e9),
)
SLOW_LINKS = (18e9, 1.2e9)
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
    words = _words(device_name)
    if words & OTHER_DEVICES:
        return None
    return next((peak for name, peak in PEAKS if set(name.split()) <= words), None)


def links(device_name: str) -> tuple[float, float]:
    """Bytes/s that such a GPU receives from its node and from others (`LINKS`); an unknown one has PCIe."""
    words = _words(device_name)
    return next(((near, far) for name, near, far in LINKS if set(name.split()) <= words), SLOW_LINKS)


def _words(device_name: str) -> set[str]:
    return set(re.split(r"[\s-]+", device_name.lower()))


@dataclass(frozen=True)
class Hardware:
    """What a run has.

    Args:
        name: for people.
        world: ranks; per_node: of them in one node.
        memory: bytes that a rank has.
        peak: FLOP/s of a rank; None when unknown.
        on_gpu: false on CPUs, where everything is float32 and attention runs segment by segment.
        near, far: bytes/s that a rank receives in a collective from its node, and from other nodes.
    """

    name: str
    world: int
    per_node: int
    memory: float
    peak: float | None
    on_gpu: bool = True
    near: float = SLOW_LINKS[0]
    far: float = SLOW_LINKS[1]

    @property
    def nodes(self) -> int:
        """Machines of the launch."""
        return self.world // self.per_node


def parse_hardware(text: str, option: str = "--as_if") -> Hardware:
    """The machine that a text means: `8xh100-80g`, GPUs of one kind in nodes of 8, or `2x4xh100-80g`, 2 nodes of 4.

    Args:
        option: by which it was given.

    Raises:
        ValueError: naming the kinds that are known.
    """
    found = re.fullmatch(r"(?:(\d+)x)?(\d+)x([a-z].*)", text.lower())
    if not found or found[3] not in KINDS:
        raise ValueError(
            f"{option} {text}: give a number of GPUs and their kind, as 8xh100-80g, for several nodes 2x8xh100-80g; "
            f"kinds: {', '.join(KINDS)}"
        )
    count, (device, gib) = int(found[2]), KINDS[found[3]]
    per_node = count if found[1] else min(count, GPUS_PER_NODE)
    world = int(found[1] or 1) * count
    if not 1 <= per_node <= GPUS_PER_NODE or not world or world % per_node:
        raise ValueError(f"{option} {text}: give 1 to {GPUS_PER_NODE} GPUs, or whole nodes of {GPUS_PER_NODE}")
    nodes = f", {world // per_node} nodes" if world > per_node else ""
    near, far = links(device)
    return Hardware(
        f"{world} x {found[3]}{nodes}", world, per_node, gib * 2**30, peak_flops(device), near=near, far=far
    )


def prepare_allocator() -> None:
    """Has CUDA's allocator grow its segments: micro-batches differ in length, and fixed ones would leave gaps.

    torch reads this when CUDA starts and never again: it comes before anything asks for a device.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def present_hardware() -> Hardware:
    """The machine at hand, shared by the processes of this launch."""
    prepare_allocator()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(torch.cuda.current_device())
        # whole GB: cards of one kind differ by a few MB, and all ranks must plan alike
        memory, (near, far) = device.total_memory // 10**9 * 1e9, links(device.name)
        name = f"{world} x {device.name}"
        return Hardware(name, world, per_node, memory, peak_flops(device.name), near=near, far=far)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / per_node
    return Hardware(f"{world} CPU process(es)", world, per_node, memory, None, on_gpu=False)
