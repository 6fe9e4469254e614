"""The plan of a run, to be read before it starts: data, steps, what is trained, dealing, memory, time, storage."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llava_next.data.inputs.unbuilt import Unbuilt
from llava_next.data.plan.dealing import CostModel
from llava_next.data.plan.mixture import Mixture
from llava_next.data.plan.profile import Profile
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration
from llava_next.tokenise import DATA_TOKENS, data_tokens, listed
from llava_next.training.banner_machine import (
    choice_lines,
    command_lines,
    memory_lines,
    reshard_lines,
    saving_lines,
    way_lines,
    wrapped,
)
from llava_next.training.devices.hardware import Hardware
from llava_next.training.forecast.budget import units
from llava_next.training.forecast.flops import flops_model
from llava_next.training.forecast.speed import ASSUMED_HFU, MICRO_STEP_SECONDS, SUPERVISED_SHARE
from llava_next.training.planning import Plan
from llava_next.training.recipe.config import RunConfig
from llava_next.training.recipe.optim import freeze, trainable_table, warmup_steps
from llava_next.training.setup import Parts, build_command, cut_warning, empty_model, refused_systems
from llava_next.training.watch.metrics import si

SAMPLED_STEPS = 20  # dealt to see how full and how even micro-batches are


@dataclass(frozen=True)
class Dealt:
    """What the first steps of a run look like on a number of ranks.

    Args:
        steps: how many were dealt.
        tokens, squared_lengths, tiles: means of a step, over all ranks.
        micro_batches: mean of a step; samples, filled: means of a micro-batch, samples and tokens.
        most_tokens, most_tiles: the largest micro-batch.
        balance: mean cost of a rank over that of the slowest, in FLOPs.
    """

    steps: int
    tokens: float
    squared_lengths: float
    tiles: float
    micro_batches: float
    samples: float
    filled: float
    most_tokens: int
    most_tiles: int
    balance: float


def deal_some(config: RunConfig, mixture: Mixture, world: int) -> Dealt:
    """Deals the first steps of the present plan."""
    cost = mixture.cost or CostModel()
    totals, bins_tokens, bins_tiles, bins_samples, micros, spent, slowest = [], [], [], [], [], 0, 0
    first = mixture.first_step
    steps = min(SAMPLED_STEPS, max(1, config.last_step(mixture.total_steps) - first))
    for step in range(first, first + steps):
        lengths, tiles = mixture.step_sizes(step)
        costs = cost.sample_cost(lengths, tiles)
        totals.append((lengths.sum(), (lengths.astype(float) ** 2).sum(), tiles.sum()))
        bins = mixture.deal(step, world, config.data.token_budget, config.data.tile_budget)
        micros.append(len(bins))
        for ranks in bins:
            bins_tokens += [lengths[members].sum() for members in ranks]
            bins_tiles += [tiles[members].sum() for members in ranks]
            bins_samples += map(len, ranks)
            by_rank = [int(costs[members].sum()) for members in ranks]
            spent, slowest = spent + sum(by_rank) / world, slowest + max(by_rank)
    means = np.mean(totals, axis=0)
    return Dealt(
        steps=steps,
        tokens=means[0],
        squared_lengths=means[1],
        tiles=means[2],
        micro_batches=np.mean(micros),
        samples=np.mean(bins_samples),
        filled=np.mean(bins_tokens),
        most_tokens=int(max(bins_tokens)),
        most_tiles=int(max(bins_tiles)),
        balance=spent / max(slowest, 1),
    )


def plan_banner(
    plan: Plan, parts: Parts, mixture: Mixture, command: tuple[str, ...] = (), other_ways: bool = False
) -> str:
    """What the run will do, in lines of at most 100 columns (but for long paths).

    Args:
        command: the script with its options, for the command that a plan for another machine assumes.
        other_ways: to train are shown as well.
    """
    config, model = plan.config, empty_model(parts)
    freeze(model, config.optim.rates)
    dealt = deal_some(config, mixture, plan.hardware.world)
    lines = [
        *model_lines(config, parts, model),
        *data_lines(config, parts, mixture, dealt),
        *dealing_lines(config, dealt, plan.hardware),
        *memory_lines(plan),
        *saving_lines(plan),
        *choice_lines(plan),
        *reshard_lines(plan),
        *(way_lines(plan, parts) if other_ways else []),
        *speed_lines(config),
        *time_lines(plan, mixture, dealt),
        *size_lines(model, config),
        *([f"run        {config.run_dir}"] if config.run_dir else []),
        *command_lines(plan, command, bool(parts.stands_in)),
    ]
    return "\n".join(lines)


def model_lines(config: RunConfig, parts: Parts, model: LlavaNextForConditionalGeneration) -> list[str]:
    """The model and, by module, what is trained at which rate."""
    model_config = parts.model_config
    kinds = f"{model_config.text_config.model_type} + {model_config.vision_config.model_type}"
    lines = [f"model      {config.model}: {kinds}, template {config.data.template}"]
    lines += wrapped(parts.stands_in) if parts.stands_in else []
    for module, trainable, total, rate in trainable_table(model, config.optim.rates):
        state = f"{trainable:>14,} of {total:>14,} parameters at {rate:g}" if trainable else ""
        state += " by LoRA" if state and config.lora and module in config.lora.modules else ""
        lines.append(f"  {module:<9}{state or f'{0:>14} of {total:>14,} parameters, frozen'}")
    if lora := config.lora:
        kind = "DoRA" if lora.dora else "LoRA"
        start = f", from {lora.start}" if lora.start else ""
        figures = f"r {lora.r}, scale {lora.scale:g}, dropout {lora.dropout:g}"
        lines.append(f"  {kind:<9}{figures}, in {', '.join(lora.targets)}{start}")
    if config.quantize:
        lines.append("  nf4      the language model's matrices under them, in 4 bits; the result has them as they were")
    return lines


def data_lines(config: RunConfig, parts: Parts, mixture: Mixture, dealt: Dealt) -> list[str]:
    """Sources, lengths, steps."""
    lines = []
    for source, storage, info in zip(mixture.plan_sources, mixture.storages, mixture.infos, strict=True):
        size = si(sum(shard.bytes for shard in info.shards), "B")
        samples = f"{source.num_samples:,} samples x {source.repeat:g}"
        if isinstance(storage, Unbuilt):
            lines.append(f"data       {source.name}: {samples}, not built yet, {size} if photos, from {storage.label}")
            lines += [f"  {line}" for line in storage.report()]
            composed = replace(config, model="MODEL") if parts.stands_in else config
            lines.append(f"  build    {build_command(composed, Path(storage.label))}")
        else:
            lines.append(f"data       {source.name}: {samples}, {size} from {storage.label}")
        if isinstance(storage, Profile):
            lines.append("  assumed  no data set was read: published counts, estimated sizes and lengths")
    steps = mixture.total_steps
    exact = "exact" if mixture.exact_lengths else "estimated from bytes"
    last = config.last_step(steps)
    left = max(1, last - mixture.first_step)
    tokens, tiles = (dealt.tokens * left, dealt.tiles * left)
    seen = "" if dealt.steps == left else f", by the first {dealt.steps} steps"
    earlier = f" (the first {mixture.first_step:,} under another plan)" if mixture.first_step else ""
    lines += [
        f"  lengths  {exact}; {mixture.num_too_long:,} samples longer than {config.data.max_length:,} tokens are cut",
        *textwrap.wrap(cut_warning(mixture) or "", 100, initial_indent="  warning  ", subsequent_indent=" " * 11),
        *text_lines(config, parts, mixture),
        f"  in all   {_count(tokens)} tokens, {_count(tiles)} tiles{seen}",
        f"steps      {steps:,} of {config.data.batch_size} samples{earlier}, "
        f"{warmup_steps(steps, config.optim.warmup_ratio):,} warm-up, cosine to 0; seed {config.seed}, "
        f"weighting {config.optim.loss_weighting}, clip {config.optim.max_grad_norm}",
        *([f"           ends after step {last:,} by max_steps, which all below is of"] if last < steps else []),
    ]
    return lines


def text_lines(config: RunConfig, parts: Parts, mixture: Mixture) -> list[str]:
    """What the template and the tokenizer make of texts that a person may not expect."""
    lines, template, tokenizer = [], parts.encoder.template, parts.encoder.tokenizer
    if refused := refused_systems(parts, mixture):
        lines.append(
            f"  warning  {refused:,} samples have a system prompt of their own, for which {template.name} has no "
            "place: they are left out; build with --system drop or --system prepend"
        )
    if declared := data_tokens(tokenizer):
        lines.append(f"  tokens   data may contain {listed(declared)}")
    if undeclared := template.undeclared_tokens(tokenizer):
        lines.append(
            f"  tokens   {listed(undeclared)}: characters where data spells them, one token at inference; name those "
            f"that data may contain under {DATA_TOKENS} in the model folder's tokenizer_config.json"
        )
    return lines


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"


def _count(value: float) -> str:
    return f"{value / 1e6:,.1f} million" if value >= 1e6 else f"{value:,.0f}"


def dealing_lines(config: RunConfig, dealt: Dealt, hardware: Hardware) -> list[str]:
    """How full and how even the micro-batches are."""
    data = config.data
    balanced = f"           cost balanced to {100 * dealt.balance:.1f} % (mean over slowest rank, in FLOPs)"
    return [
        f"dealing    {dealt.micro_batches:.1f} micro-batches a step on {hardware.world} rank(s), "
        f"{dealt.samples:.1f} samples and {dealt.filled:,.0f} tokens each",
        *([balanced] if hardware.world > 1 else []),
        f"           largest {dealt.most_tokens:,} tokens of {data.token_budget:,}, "
        f"{dealt.most_tiles} tiles of {data.tile_budget}",
    ]


def speed_lines(config: RunConfig) -> list[str]:
    """What is asked for to run faster; nothing when nothing is."""
    lines = []
    if config.compiled:
        lines.append("compile    each layer, for any length: the first steps wait for it; memory is counted without")
    if config.fused_layers is True:
        lines.append("fused      norm, SwiGLU and rotary embedding by Liger's kernels; memory is counted without")
    if config.float8:
        lines.append("float8     matrix products of the language model's layers; MFU stays a share of the bf16 peak")
        if not config.compiled:
            lines.append("           its casts are kernels of their own; --compile_layers true fuses them")
    return lines


def time_lines(plan: Plan, mixture: Mixture, dealt: Dealt) -> list[str]:
    """FLOPs, hours and what storage must deliver, at an assumed share of the peak."""
    config, hardware, picked, layout = plan.config, plan.hardware, plan.picked, plan.layout
    flops = flops_model(plan.picking.config, config.rates)
    step, _ = flops.step_flops(dealt.tokens, dealt.squared_lengths, dealt.tiles, SUPERVISED_SHARE * dealt.tokens)
    shares = f"llm {100 * step.llm / step.total:.0f} %, vision {100 * step.vision / step.total:.0f} %"
    per_sample = si(step.total / config.data.batch_size, "FLOP")
    lines = [f"work       {si(step.total, 'FLOP')} a step, {per_sample} a sample ({shares})"]
    stored = zip(mixture.plan_sources, mixture.infos, strict=True)
    steps = config.last_step(mixture.total_steps)
    volume = config.data.epochs * sum(
        sum(shard.bytes for shard in info.shards) * source.repeat for source, info in stored
    )
    volume *= steps / mixture.total_steps
    if hardware.peak is None:
        return [*lines, f"time       peak of {hardware.name} unknown, so no estimate; {si(volume, 'B')} are read"]
    if plan.refused:
        return [*lines, "time       none: it does not fit, and would not start"]
    seconds = picked.seconds
    total, samples = seconds * steps, config.data.batch_size / seconds
    mfu = step.total / hardware.world / hardware.peak / seconds
    links = [f"{si(hardware.near, 'B/s')} in a node"] if layout.shard <= hardware.per_node else []
    links += [f"{si(hardware.far, 'B/s')} between nodes"] if hardware.nodes > 1 else []
    moved = (
        f"or {picked.moved:.2f} s of moving weights and gradients at {', '.join(links)}, whichever is more in a "
        "micro-batch, "
    )
    whose = "of the slowest ranks" if hardware.world > 1 else "in all"
    return [
        *lines,
        f"time       {_duration(total)}: {samples:.1f} samples/s, {seconds:.2f} s a step on {hardware.name}, "
        f"MFU {100 * mfu:.0f} %",
        *wrapped(
            f"assumed: {100 * ASSUMED_HFU:.0f} % of {hardware.peak / 1e12:,.0f} TFLOP/s on all that is computed "
            f"({picked.computed:.2f} s {whose}), {moved if picked.moved else ''}and "
            f"{1000 * MICRO_STEP_SECONDS:.0f} ms for each micro-batch"
        ),
        f"storage    {si(volume / total, 'B/s')} and {samples:.3g} requests/s over all ranks; {si(volume, 'B')} in all",
    ]


def size_lines(model: LlavaNextForConditionalGeneration, config: RunConfig) -> list[str]:
    """What a checkpoint and the result weigh: trained weights and Adam's two moments; all weights in bf16."""
    checkpoint, result, adapter = units(model).disk_bytes(config.optim.name, config.optim.master)
    beside = f", {si(adapter, 'B')} its adapter" if adapter else ""
    return [f"disk       {si(checkpoint, 'B')} a checkpoint, {si(result, 'B')} the result{beside}"]
