"""What is trained, at which rate, and how the rate moves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from llava_next.model.forward.lora import Lora, is_adapter
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration, unused_parameters
from llava_next.training.recipe.low_memory import LowMemoryAdamW

# parameter-name prefix of each module that has a learning rate of its own
MODULES = {
    "llm": ("model.language_model.", "lm_head."),
    "projector": ("model.multi_modal_projector.",),
    "vision": ("model.vision_tower.",),
    "newline": ("model.image_newline",),
}


@dataclass
class Rates:
    """Peak learning rate per module; null freezes the module. Defaults: stage 2 as published.

    Args:
        llm: language model with embeddings and head.
        projector: the two-layer projector.
        vision: vision tower.
        newline: the image_newline embedding.
    """

    lora: ClassVar[None] = None  # see `AdaptedRates`
    quantize: ClassVar[None] = None

    llm: float | None = 2e-5
    projector: float | None = 2e-5
    vision: float | None = 2e-6
    newline: float | None = 2e-5

    def in_full(self, module: str) -> bool:
        """Whether a module's own matrices train, not adapters in their place."""
        return getattr(self, module) is not None and not (self.lora and module in self.lora.modules)


@dataclass
class AdaptedRates(Rates):
    """Rates of a run that may have adapters: a module with some trains by them alone, at the module's rate.

    Args:
        lora: the adapters.
        quantize: how the matrices of the language model that have one are kept, see `RunConfig`.
    """

    lora: Lora | None = None
    quantize: str | None = None


def module_of(name: str) -> str:
    """`llm`, `projector`, `vision` or `newline` for a parameter's name."""
    for module, prefixes in MODULES.items():
        if name.startswith(prefixes):
            return module
    raise ValueError(f"parameter {name!r} belongs to no module that has a learning rate")


def freeze(model: LlavaNextForConditionalGeneration, rates: Rates) -> None:
    """Sets `requires_grad`: on for modules with a rate, off for the others and for parameters no forward reads.

    Of a module with adapters, only these train.
    """
    unused = unused_parameters(model)
    adapted = {module_of(name) for name, _ in model.named_parameters() if is_adapter(name)}
    for name, parameter in model.named_parameters():
        module = module_of(name)
        trains = is_adapter(name) if module in adapted else name not in unused
        parameter.requires_grad_(getattr(rates, module) is not None and trains)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("nothing to train: every learning rate is null; set at least one of llm, projector, vision")


def trainable_table(model: nn.Module, rates: Rates) -> list[tuple[str, int, int, float | None]]:
    """(module, trainable parameters, all parameters, rate) for the plan's banner."""
    counts = {module: [0, 0] for module in MODULES}
    for name, parameter in model.named_parameters():
        counts[module_of(name)][0] += parameter.numel() * parameter.requires_grad
        counts[module_of(name)][1] += parameter.numel()
    return [(module, *counts[module], getattr(rates, module)) for module in MODULES]


def build_optimizer(
    model: nn.Module,
    rates: Rates,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    name: str = "adamw",
    seed: int = 0,
) -> torch.optim.AdamW | LowMemoryAdamW:
    """AdamW with one group per trainable module; call it before `accelerator.prepare`, together with the model.

    Each group has `name` and `initial_lr`. Weight decay spares biases, norms and the newline embedding, in a group of
    their own; with the published decay of 0 there is one group a module.

    Args:
        name: `adamw`, or `adamw8bit` for moments in 8 bits. Parameters in bf16 are rounded by random bits of the seed.
    """
    groups = []
    for module in MODULES:
        parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad and module_of(n) == module]
        decayed = [p for _, p in parameters if not weight_decay or p.ndim > 1]
        spared = [p for _, p in parameters if weight_decay and p.ndim <= 1]
        for suffix, chosen, decay in (("", decayed, weight_decay), ("_no_decay", spared, 0.0)):
            if chosen:
                rate = getattr(rates, module)
                groups.append(
                    {"params": chosen, "lr": rate, "initial_lr": rate, "weight_decay": decay, "name": module + suffix}
                )
    if name == "adamw8bit" or any(p.dtype == torch.bfloat16 for group in groups for p in group["params"]):
        return LowMemoryAdamW(groups, betas, eps, name == "adamw8bit", seed)
    # The fused kernel is the one that can skip an update by a flag on the device, see `health.NonFinite`.
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)


def warmup_steps(total_steps: int, warmup_ratio: float) -> int:
    """ceil(ratio * total), as in the published recipe (156 of 5,198)."""
    return math.ceil(warmup_ratio * total_steps)


def rate_multiplier(step: int, total_steps: int, warmup_ratio: float) -> float:
    """Linear warm-up from 0, then one half cosine to 0.

    Args:
        step: optimizer updates made before this one; the first update of a run has multiplier 0 when there is warm-up.
    """
    warmup = warmup_steps(total_steps, warmup_ratio)
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total_steps - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def set_rates(optimizer: torch.optim.Optimizer, multiplier: float) -> dict[str, float]:
    """Sets every group's rate to its initial one times `multiplier`; returns the rates by group name."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier
    return {group["name"]: group["lr"] for group in optimizer.param_groups}
