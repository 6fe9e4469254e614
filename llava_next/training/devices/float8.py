"""Linear layers in float8: their matrix products run on twice as fast tensor cores, by torchao.

Each tensor that enters a product is scaled by its largest value and rounded to 8 bits, in forward (e4m3) and backward
(e5m2 for gradients); products are summed up and handed on in the dtype of the run. Weights stay what they were, bf16
gathered from fp32 masters: names, dtypes, checkpoints and exports know nothing of float8, and a run can be continued
with or without it. MFU and HFU in the log stay shares of the bf16 peak.

The scale is one a tensor, so what a token is rounded to depends on its micro-batch: a loss differs within float8's
rounding between token budgets, where without float8 it differs within float32's.
"""

from __future__ import annotations

import torch
from torch import nn

from llava_next.training.devices.launch import layer_stacks
from llava_next.versions import unfit

LEAST_TORCHAO = (0, 18)  # see setup.cfg
LEAST_CAPABILITY = (8, 9)  # Ada, Hopper, Blackwell
MULTIPLE = 16  # of both sides of a matrix, for the hardware's products


def use_float8(model: nn.Module, emulate: bool = False) -> int:
    """Swaps the linear layers of the language model's decoder layers, in place; parameters are the same objects.

    Embeddings, head, projector and tower stay as they are, and so do matrices with a side that is no multiple of 16.
    Comes before `shard`. Meant to go with `compile_layers`: without it every cast is several kernels of its own.

    Args:
        model: with `requires_grad` set.
        emulate: round the same way but multiply in float32, which any machine can.

    Returns:
        Number of layers swapped.

    Raises:
        ValueError: see `check_float8` and `check_device`; or no matrix fits.
    """
    decoder = layer_stacks(model)[1]
    check_float8(any(p.requires_grad for p in decoder.parameters()))
    if not emulate:
        check_device(torch.device("cuda"))
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    linears = {name for name, module in decoder.named_modules() if _fits(module)}
    if not linears:
        raise ValueError(
            f"float8: no linear layer of the language model has both sides a multiple of {MULTIPLE}; set it to false"
        )
    # Scales a tensor: the fastest of torchao's recipes. Gathering in float8 would make the weights a tensor class of
    # torchao's, in every checkpoint too, so FSDP2 gathers bf16 as always. Padded are the tokens of a micro-batch,
    # which the gradient of a weight sums over. Accelerate's own `mixed_precision: fp8` would convert tower and
    # projector as well, and decide about precision a second time, beside FSDP2's policy.
    config = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
    convert_to_float8_training(decoder, config=config, module_filter_fn=lambda _, name: name in linears)
    return len(linears)


def check_float8(llm_trains: bool = True) -> None:
    """Refuses what could run on no machine.

    Raises:
        ValueError: torchao is missing or too old, or the language model is frozen.
    """
    if obstacle := unfit("torchao", LEAST_TORCHAO, "float8"):
        raise ValueError(f"float8: {obstacle}, or set it to false")
    if not llm_trains:
        # torchao computes the gradient of every weight, wanted or not, and keeps the inputs that takes: a frozen model
        # would multiply three times where bf16 does twice, in memory that no plan counted.
        raise ValueError(
            "float8: the language model is frozen (optim.rates.llm: null), where it gains nothing; set it to false"
        )


def check_device(device: torch.device) -> None:
    """Raises ValueError unless the device multiplies in float8."""
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ValueError("float8: needs a GPU of compute capability 8.9 or newer, there is none here; set it to false")
    if (found := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        raise ValueError(
            "float8: needs compute capability 8.9 or newer (Ada, Hopper, Blackwell), "
            f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}; set it to false"
        )


def _fits(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not (module.in_features % MULTIPLE or module.out_features % MULTIPLE)
