"""AdamW in less memory: moments in 8 bits, and parameters in bf16 without fp32 masters.

Moments are stored as torchao's AdamW8bit stores them: blocks of values as 8-bit codes of its map, one scale a block.
Blocks lie within a row of the whole matrix, so codes and scales are plain tensors sharded as the parameter is, the same
on any number of ranks: they are saved, resharded and continued from exactly. torchao's own class makes its blocks of
what a rank holds, as tensor subclasses; cannot skip an update by a flag on the device; and rounds stochastically by the
process' generator, so that copies of the model (HSDP) drift apart and a resumed run draws otherwise.

A parameter in bf16 is updated in fp32 and rounded up or down at random, so that the expectation is the exact value:
updates smaller than half a bf16 step, nearly all of them, are not lost. The random bits are a function of the seed, the
parameter, its number of updates and the place in the whole tensor: the same on any number of ranks.
"""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from llava_next.model.forward.lora import mix
from llava_next.training.devices.float8 import LEAST_TORCHAO
from llava_next.versions import unfit

BLOCK = 256  # values that share a scale, where a row is a multiple of it; as in torchao and bitsandbytes
LEAST_BLOCK, MOST_BLOCK = 16, 512
LEAST_VALUES = 4096  # of a parameter whose moments are stored in 8 bits, as in torchao
PIECE = 2**23  # values that are updated at a time, which bounds what is needed besides
MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names, in checkpoints too
SCALE = "_scale"


def check_torchao() -> None:
    """Raises ValueError: torchao is missing or too old."""
    if obstacle := unfit("torchao", LEAST_TORCHAO, "adamw8bit"):
        raise ValueError(f"optim.name: adamw8bit needs torchao: {obstacle}, or set adamw")


def block_length(shape: torch.Size) -> int | None:
    """Values that share a scale in the moments of a parameter, or None where these stay fp32.

    A divisor of the row's length, the one nearest to 256. Vectors, small parameters and rows without one stay fp32.
    """
    row = math.prod(shape[1:])
    if len(shape) < 2 or shape[0] * row < LEAST_VALUES:
        return None
    lengths = (n for n in range(LEAST_BLOCK, min(row, MOST_BLOCK) + 1) if row % n == 0)
    return min(lengths, key=lambda n: abs(n - BLOCK), default=None)


class LowMemoryAdamW(torch.optim.Optimizer):
    """AdamW for sharded and plain parameters; those in bf16 are rounded stochastically.

    Args:
        groups: as of `torch.optim.AdamW`, each with `name`, `lr` and `weight_decay`; gradients may be fp32 where
            parameters are bf16.
        eight_bit: moments in 8 bits where `block_length` has one; else fp32.
        seed: of the rounding.

    Attributes:
        found_inf: float32 `[]`, as of torch's fused AdamW: 1 skips the coming update, on the device.
    """

    def __init__(self, groups: list[dict], betas: tuple[float, float], eps: float, eight_bit: bool, seed: int):
        super().__init__(groups, {"betas": betas, "eps": eps})
        self.eight_bit, self.seed, self.found_inf = eight_bit, seed, None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            rate = torch.tensor(group["lr"], dtype=torch.float32)
            for position, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    name = f"{self.seed} {group['name']} {position}"
                    self._update(parameter, rate, group, zlib.crc32(name.encode()) - 2**31)

    def _update(self, parameter: nn.Parameter, rate: torch.Tensor, group: dict, salt: int) -> None:
        state = self.state[parameter]
        if not state:
            state.update(self._zeros(parameter))
        weights, gradient = _local(parameter), _local(parameter.grad)
        skip = torch.zeros(()) if self.found_inf is None else self.found_inf
        skip = skip.to(weights.device)
        state["step"] += 1 - skip
        block = block_length(parameter.shape) if self.eight_bit else None
        width = block or math.prod(parameter.shape[1:])
        tensors = [weights, gradient, *(_local(state[key]) for key in MOMENTS)]
        scales = [_local(state[key + SCALE]) for key in MOMENTS] if block else []
        maps = quantile_maps(weights.device) if block else ()
        how = (state["step"], skip, rate, salt, group["betas"], group["eps"], group["weight_decay"])
        for begin, rows in _pieces(weights.numel() // width, width):
            # `data`: no view of anything, whose shape the compiler would make a graph of its own for
            parts = [t.view(-1, width)[rows].data for t in tensors] + [s.view(-1)[rows].data for s in scales]
            update_on(weights.device)(*parts[:4], tuple(parts[4:]), maps, _offset(parameter) + begin, *how)

    def _zeros(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """State before the first update: `step` `[]`, moments of the parameter's shape, scales `[rows, blocks]`."""
        local = _local(parameter)
        state = {"step": torch.zeros((), device=local.device)}
        block = block_length(parameter.shape) if self.eight_bit else None
        for key in MOMENTS:
            state[key] = torch.zeros_like(parameter, dtype=torch.uint8 if block else torch.float32)
            if block:
                # code 0 of both maps is the most negative value or the least: under a scale of 0 each is 0
                shape = (len(local), math.prod(parameter.shape[1:]) // block)
                state[key + SCALE] = _sharded_like(parameter, torch.zeros(shape, device=local.device))
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Takes states as they are: torch's own would turn codes, and fp32 moments, into the parameter's type."""
        super().load_state_dict({**state_dict, "state": {}})
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        states = state_dict["state"]
        found = {p: dict(states[n]) for n, p in zip(numbers, parameters, strict=True) if n in states}
        self.state = defaultdict(dict, found)


def update(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    scales: tuple[torch.Tensor, ...],
    maps: tuple[torch.Tensor, ...],
    first: int,
    step: torch.Tensor,
    skip: torch.Tensor,
    rate: torch.Tensor,
    salt: int,
    betas: tuple[float, float],
    eps: float,
    decay: float,
) -> None:
    """AdamW on blocks, in place and in fp32; operations in torchao's order.

    Args:
        weights, gradient, exp_avg, exp_avg_sq: `[blocks, width]`.
        scales: of the moments' codes, `[blocks]` each; none where moments are fp32. maps: see `quantile_maps`.
        first: place of the first value in the whole parameter.
        step: `[]`, updates with this one; skip: `[]`, 1 leaves all as it is; rate: `[]`.
        salt: int32, of the parameter's random bits.
    """
    from_codes, to_codes = _codec(scales, maps)
    before, slope = weights.float(), gradient.float()
    mean = from_codes(exp_avg, 0).lerp(slope, 1 - betas[0])
    square = from_codes(exp_avg_sq, 1).lerp(slope.square(), 1 - betas[1])
    deviation = square.sqrt() / (1 - betas[1] ** step).sqrt() + eps
    after = before - rate * decay * before
    after = after - rate * (mean / (1 - betas[0] ** step)) / deviation
    if weights.dtype == torch.bfloat16:
        after = round_stochastically(after, random_bits(weights, first, step, salt))
    changed = [(weights, after)]
    for number, (moment, value) in enumerate(((exp_avg, mean), (exp_avg_sq, square))):
        changed += zip((moment, *scales[number : number + 1]), to_codes(value, number), strict=True)
    for target, value in changed:
        target.copy_(torch.where(skip > 0, target, value))


def _codec(scales: tuple[torch.Tensor, ...], maps: tuple[torch.Tensor, ...]) -> tuple[Callable, Callable]:
    """What reads a moment, by its number, as fp32, and what makes of fp32 the tensors that are stored."""
    if not scales:
        return lambda moment, number: moment, lambda value, number: (value,)
    from torchao.optim.quant_utils import dequant_with_qmap, quantize_8bit_with_qmap, scale_tensor

    def to_codes(value: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        scaled, scale = scale_tensor(value, value.shape[1])
        return quantize_8bit_with_qmap(scaled, maps[number]), scale

    return lambda moment, number: dequant_with_qmap(moment, maps[number], scales[number]), to_codes


@cache
def quantile_maps(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of the 256 codes of a signed and of an unsigned moment, float32, by torchao."""
    from torchao.optim.quant_utils import create_dynamic_map

    return tuple(torch.tensor(create_dynamic_map(signed), device=device) for signed in (True, False))


@cache
def update_on(device: torch.device) -> Callable:
    """`update` as a few fused kernels where there is a GPU; its many passes over memory would cost a second for 7B."""
    return torch.compile(update, dynamic=True) if device.type == "cuda" else update


def random_bits(like: torch.Tensor, first: int, step: torch.Tensor, salt: int) -> torch.Tensor:
    """int32 of the shape of `like`, a function of each value's place in the whole, the update's number and the salt."""
    places = torch.arange(like.numel(), dtype=torch.int32, device=like.device).view(like.shape) + first
    return mix(mix(places) ^ mix(step.to(torch.int32) ^ salt))


def round_stochastically(values: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """float32 to one of the two bf16 neighbours, by the low 16 of random bits: to the next one with the probability
    that makes the expectation the value itself. What is a bf16 value stays."""
    return ((values.view(torch.int32) + (bits & 0xFFFF)) & -0x10000).view(torch.float32).bfloat16()


def _pieces(rows: int, width: int) -> Iterator[tuple[int, slice]]:
    """Place of the first value, and rows, of pieces that are updated one by one."""
    step = max(1, PIECE // width)
    for begin in range(0, rows, step):
        yield begin * width, slice(begin, begin + step)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _offset(parameter: torch.Tensor) -> int:
    """Place of this rank's first value in the whole parameter; FSDP2 shards rows."""
    if not isinstance(parameter, DTensor):
        return 0
    placed = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return placed[1][0] * math.prod(parameter.shape[1:])


def _sharded_like(parameter: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """`[rows, n]` of this rank as part of a tensor that is sharded as the parameter is."""
    if not isinstance(parameter, DTensor):
        return local
    shape = (parameter.shape[0], local.shape[1])
    placed = {"device_mesh": parameter.device_mesh, "placements": parameter.placements, "run_check": False}
    made = DTensor.from_local(local, **placed, shape=torch.Size(shape), stride=(shape[1], 1))
    return made.to(local.device)  # else on the mesh's device, also where weights wait in host memory
