"""Frozen matrices in 4 bits (NF4 with double quantisation, as in QLoRA), by bitsandbytes, in a form that FSDP2 shards.

bitsandbytes' own parameter loses its quantisation state when FSDP2 puts a shard in its place. Here a matrix is two
plain frozen parameters, its 4-bit values and their scales. Both are seen as the dtype that FSDP2 gathers in: nothing is
cast on the way, and a layer's gather stays one transfer. A matrix is quantised once, when the model is loaded; its
products, forward and backward, are bitsandbytes' own.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Collection
from contextlib import contextmanager
from importlib.metadata import version

import torch
from torch import nn

from llava_next.versions import unfit

LEAST = (0, 50)  # whose products of 4-bit matrices are one operation, see `parallel.KEPT`
BLOCK, GROUP = 64, 256  # values that share a scale, and scales that share theirs: bitsandbytes' own
PIECE = 2**23  # values that are quantised at a time: what that takes is beyond what malloc keeps for itself
ALIGNED = 16  # bytes: where the parts of the scales begin
# what is made once; functools' caches would be traced anew by torch.compile
_packages: list = []
_codes: dict[torch.device, torch.Tensor] = {}
PACKED, SCALES = ".packed", ".scales"  # ends of the parameters' names


class Nf4Linear(nn.Linear):
    """A linear layer whose frozen matrix `[out_features, in_features]` lies in 4 bits.

    Args:
        dtype: that the parameters are seen as and products are computed in: FSDP2's `param_dtype`.

    Attributes:
        packed: `[out_features, in_features / (2 * bytes of dtype)]`, the 4-bit values.
        scales: `[S]`: a byte for each block of 64 values, then float32: one for each 256 of these bytes, and the mean.
        bias: `[out_features]` or None, as it was.
    """

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, bias: nn.Parameter | None = None):
        nn.Module.__init__(self)  # without nn.Linear's matrix
        self.in_features, self.out_features, self.bias = in_features, out_features, bias
        columns = in_features // (2 * dtype.itemsize)
        for name, shape in (("packed", (out_features, columns)), ("scales", (self.floats[1] // dtype.itemsize,))):
            setattr(self, name, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False))

    @classmethod
    def of(cls, linear: nn.Linear, dtype: torch.dtype, device: torch.device | str | None = None) -> Nf4Linear:
        """The layer with its matrix quantised on `device` (default: where it is), and put where it was."""
        matrix, made = linear.weight.detach(), cls(linear.in_features, linear.out_features, dtype, linear.bias)
        if matrix.is_meta:
            return made
        # what `compress_statistics=True` does, in pieces: on CPUs a value takes 25 bytes while it is quantised
        functional, how = bitsandbytes().functional, {"blocksize": BLOCK, "quant_type": "nf4", "quant_storage": dtype}
        pieces = matrix.split(max(1, PIECE // linear.in_features))
        values, states = zip(*(functional.quantize_4bit(piece.to(device), **how) for piece in pieces), strict=True)
        packed, largest = torch.cat(values), torch.cat([state.absmax for state in states])
        mean = largest.mean()
        coarse, state = functional.quantize_blockwise(largest - mean, blocksize=GROUP)
        begin, end = made.floats
        scales = torch.zeros(end, dtype=torch.uint8, device=packed.device)
        scales[: len(coarse)] = coarse
        floats = torch.cat([state.absmax, mean[None]])
        scales[begin : begin + 4 * len(floats)] = floats.view(torch.uint8)
        for name, tensor in (("packed", packed.view(made.packed.shape)), ("scales", scales.view(dtype))):
            setattr(made, name, nn.Parameter(tensor.to(matrix.device), requires_grad=False))
        return made

    @property
    def blocks(self) -> int:
        """Of 64 values."""
        return self.out_features * self.in_features // BLOCK

    @property
    def floats(self) -> tuple[int, int]:
        """Bytes of the scales at which their float32 part begins and ends, padding included."""
        begin = _aligned(self.blocks)
        return begin, begin + _aligned(4 * (-(-self.blocks // GROUP) + 1))

    @property
    def state(self):
        """bitsandbytes' `QuantState`, over the memory of `scales`."""
        scales, (begin, _), groups = self.scales.view(torch.uint8), self.floats, -(-self.blocks // GROUP)
        floats = scales[begin : begin + 4 * (groups + 1)].view(torch.float32)
        kind = bitsandbytes().functional.QuantState
        code = dynamic_code(scales.device)
        return kind(
            scales[: self.blocks],
            shape=torch.Size((self.out_features, self.in_features)),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=self.packed.dtype,
            offset=floats[groups],
            state2=kind(floats[:groups], code=code, blocksize=GROUP, dtype=torch.float32),
        )

    @property
    def weight(self) -> torch.Tensor:
        """What peft looks at for device and dtype."""
        return self.packed

    W_q = weight  # peft asks layers that have it to `dequantize`, where DoRA needs the matrix

    def dequantize(self) -> torch.Tensor:
        """The matrix that products are made with: `[out_features, in_features]`."""
        if self.packed.is_meta:
            return self.packed.new_empty(self.out_features, self.in_features)
        return bitsandbytes().functional.dequantize_4bit(self.packed.view(-1, 1), self.state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`. For the backward only the 4-bit matrix is kept."""
        return bitsandbytes().matmul_4bit(x, self.packed.view(-1, 1), self.state, bias=self.bias)


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def dynamic_code(device: torch.device) -> torch.Tensor:
    """What the 256 bytes of a scale stand for, float32 `[256]`."""
    if device not in _codes:
        _codes[device] = bitsandbytes().functional.create_dynamic_map().to(device)
    return _codes[device]


def quantise(
    model: nn.Module, names: Collection[str], dtype: torch.dtype, device: torch.device | str | None = None
) -> None:
    """Puts linear layers in 4 bits, in place and one after the other, so that never two matrices are there twice.

    Args:
        names: of the layers; dtype: see `Nf4Linear`; device: that computes.

    Raises:
        ValueError: none is named, or one has rows that are no whole blocks, which bitsandbytes gets wrong on CPUs.
    """
    if not names:
        raise ValueError("quantize: no linear layer of the language model has an adapter; name some in lora.targets")
    for name in names:
        if (columns := model.get_submodule(name).in_features) % BLOCK:
            raise ValueError(
                f"quantize: {name} has {columns} inputs, and nf4 needs a multiple of {BLOCK}; leave it out of "
                "lora.targets, or train without quantize"
            )
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Nf4Linear.of(model.get_submodule(name), dtype, device))


def check_nf4() -> None:
    """Raises ValueError unless a bitsandbytes that can do it is installed; does not import it."""
    if obstacle := unfit("bitsandbytes", LEAST, "qlora"):
        raise ValueError(f"quantize: {obstacle}, or leave quantize out")


def check_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError unless bitsandbytes computes on the device: there and back, and a product."""
    try:
        layer = nn.Linear(BLOCK, BLOCK, bias=False, device=device, dtype=dtype)
        made = Nf4Linear.of(layer, dtype)
        far = (made.dequantize() - layer.weight).abs().max() / layer.weight.abs().max()
        product = made(layer.weight.detach())
        if not (far < 0.2 and torch.isfinite(product).all()):
            raise RuntimeError(f"a matrix comes back wrong by {far:.2g} of its largest value")
    except Exception as error:
        words = " ".join(str(error).split())[:400]
        raise ValueError(
            f"quantize: bitsandbytes {version('bitsandbytes')} cannot compute on {device}: {words}. See `python -m "
            "bitsandbytes`, or leave quantize out"
        ) from error


def bitsandbytes():
    """The package, imported when first asked for.

    Kept out of its import: products for some CPUs that it would fetch from the hub and run, and the compilation of its
    optimizers, which nothing here uses and which takes seconds.
    """
    if not _packages:
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # would miss those products
        with _without_hub_kernels(), _without_compilation():
            _packages.append(importlib.import_module("bitsandbytes"))
    return _packages[0]


@contextmanager
def _without_hub_kernels():
    kept = {"kernels": sys.modules["kernels"]} if "kernels" in sys.modules else {}
    sys.modules["kernels"] = None  # an import of it fails, which bitsandbytes takes for its absence
    try:
        yield
    finally:
        del sys.modules["kernels"]
        sys.modules.update(kept)


@contextmanager
def _without_compilation():
    kept, torch.compile = torch.compile, lambda function=None, **_: function or (lambda function: function)
    try:
        yield
    finally:
        torch.compile = kept
