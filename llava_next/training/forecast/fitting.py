"""Other ways to train: all of them side by side, and what would fit where a plan does not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec

from llava_next.model.forward.lora import Lora
from llava_next.training.devices.hardware import GPUS_PER_NODE
from llava_next.training.forecast.budget import Layout, Units
from llava_next.training.forecast.picking import Candidate, Picking, Wanted
from llava_next.training.recipe.optim import AdaptedRates, Rates

FREEZABLE = ("vision", "llm")
# ways to train, by `OptimConfig.name` and `OptimConfig.master`, and by how matrices under adapters are kept
IN_FULL = {("adamw", "fp32"): "in full", ("adamw8bit", "fp32"): "adamw8bit"}
IN_FULL |= {("adamw", "bf16"): "bf16 master", ("adamw8bit", "bf16"): "both"}
ADAPTED = {None: "LoRA", "nf4": "QLoRA"}


def way_of(picking: Picking) -> str:
    """The way that a plan trains."""
    rates, layout = picking.rates, picking.layout
    return ADAPTED[rates.quantize] if rates.lora else IN_FULL[layout.optimizer, layout.master]


def ways_to_train(picking: Picking, counts_of: Callable[[Rates], Units]) -> dict[str, Candidate]:
    """The best budgets under each way to train but the plan's own: in full by each optimizer, by adapters, over 4 bits.

    Left out is what cannot be counted: adapters without peft; matrices that are no whole blocks; bf16 masters where
    all is computed in fp32.

    Args:
        picking: of the plan, in which the language model trains; counts_of: the model's units under other rates.
    """
    free, rates, found = replace(picking, wanted=Wanted()), picking.rates, {}
    if rates.lora:
        rates = AdaptedRates(**vars(rates) | {"lora": None, "quantize": None})
        free = replace(free, rates=rates, counts=counts_of(rates))
    for (optimizer, master), way in IN_FULL.items():
        if master == "fp32" or free.layout.compute.nbytes == 2:
            layout = replace(free.layout, optimizer=optimizer, master=master)
            found[way] = replace(free, layout=layout).choose().picked
    layout = picking.layout if picking.rates.lora else replace(picking.layout, optimizer="adamw", master="fp32")
    for quantize, way in ADAPTED.items() if find_spec("peft") else ():
        with suppress(ValueError):  # a model whose matrices are too small, or no whole blocks
            rates = adapted(picking.rates, quantize)
            found[way] = replace(free, rates=rates, counts=counts_of(rates), layout=layout).choose().picked
    found.pop(way_of(picking), None)
    return found


def adapted(rates: Rates, quantize: str | None) -> AdaptedRates:
    """The rates with adapters, where there are none in the language model by the published recipe."""
    changes = {"lora": rates.lora or Lora(), "vision": rates.vision if rates.lora else None, "quantize": quantize}
    return AdaptedRates(**vars(rates) | changes)


def ways_to_fit(picking: Picking, counts_of: Callable[[Rates], Units]) -> list[str]:
    """Ways that fit by arithmetic, each with its bytes of a rank; empty when none does.

    Args:
        picking: what does not fit.
        counts_of: the model's units under other rates.
    """
    memory = picking.hardware.memory
    free = replace(picking, wanted=Wanted())
    found = free.choose().picked
    if found.fits:
        return [f"{found.options} ({_gb(found.need)})"]
    ways = _ways_by_optimizer(picking)
    for ranks in (n for n in (2, 4, GPUS_PER_NODE) if n > picking.layout.shard):
        if (need := least(replace(picking, layout=replace(picking.layout, shard=ranks)))) <= memory:
            ways.append(f"{ranks} such GPUs ({_gb(need)} each)")
            break
    ways += by_adapters(picking, counts_of)
    for name in FREEZABLE if not picking.rates.lora else ():
        rates = replace(picking.rates, **{name: None})
        if getattr(picking.rates, name) is None or (rates.llm is None and rates.projector is None):
            continue
        if (need := least(replace(picking, rates=rates, counts=counts_of(rates)))) <= memory:
            ways.append(f"--optim.rates.{name} null ({_gb(need)})")
    if not picking.layout.offload:
        states = picking.estimate("full", picking.steps.longest, picking.steps.most_tiles).states
        if (need := least(replace(picking, layout=replace(picking.layout, offload=True)))) <= memory:
            sizes = f"{_gb(need)}, and {_gb(states)} of host memory a rank; slow"
            ways.append(f"fsdp_offload_params: true in the launch file ({sizes})")
    return ways


def by_adapters(picking: Picking, counts_of: Callable[[Rates], Units]) -> list[str]:
    """Low-rank adapters if that fits, else with the matrices under them in 4 bits; nothing where the run has both."""
    before = picking.rates
    if before.llm is None or before.quantize or not find_spec("peft"):
        return []
    options = [] if before.lora else ["--lora.r", str(Lora.r), "--optim.rates.llm 2e-4 --optim.rates.vision null"]
    for quantize in ("nf4",) if before.lora else (None, "nf4"):
        rates = adapted(before, quantize)
        with suppress(ValueError):  # a model whose matrices are too small, or no whole blocks
            if (need := least(replace(picking, rates=rates, counts=counts_of(rates)))) <= picking.hardware.memory:
                words = [*options, *(["--quantize nf4"] if quantize else [])]
                return [f"{' '.join(words)} ({_gb(need)})"]
    return []


def _ways_by_optimizer(picking: Picking) -> list[str]:
    """The one of the optimizer's options that would fit, or both where it takes both."""
    found, layout = [], picking.layout
    options = {"optimizer": ("adamw8bit", "--optim.name adamw8bit"), "master": ("bf16", "--optim.master bf16")}
    possible = ["optimizer", "master"] if layout.compute.nbytes == 2 else ["optimizer"]
    open_ones = [key for key in possible if getattr(layout, key) == getattr(Layout, key)]
    for keys in (*([key] for key in open_ones), *([open_ones] if len(open_ones) > 1 else ())):
        need = least(replace(picking, layout=replace(layout, **{key: options[key][0] for key in keys})))
        if need <= picking.hardware.memory and (len(keys) == 1 or not found):
            found.append(f"{' '.join(options[key][1] for key in keys)} ({_gb(need)})")
    return found


def least(picking: Picking) -> float:
    """Bytes that must be there for micro-batches of one longest sample, everything computed twice."""
    return picking.factor * picking.estimate("full", picking.steps.longest, picking.steps.most_tiles).total


def _gb(value: float) -> str:
    return f"{value / 1e9:.1f} GB"
