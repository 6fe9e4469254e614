"""The plan of a run, to be read before it starts: data, steps, what is trained, dealing, memory, time, storage."""

from __future__ import annotations

import os
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llava_next.data.inputs.unbuilt import Unbuilt
from llava_next.data.plan.dealing import CostModel
from llava_next.data.plan.mixture import Mixture
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration
from llava_next.tokenise import DATA_TOKENS, data_tokens, listed
from llava_next.training.devices.hardware import Hardware, present_hardware
from llava_next.training.devices.launch import checkpointing_policy, hsdp_sizes
from llava_next.training.forecast.activations import Compute
from llava_next.training.forecast.budget import POLICIES, Budget, Layout, choose, estimate, units
from llava_next.training.forecast.flops import Checkpointing, flops_model
from llava_next.training.recipe.config import RunConfig
from llava_next.training.recipe.optim import freeze, trainable_table, warmup_steps
from llava_next.training.setup import Parts, build_command, cut_warning, empty_model, refused_systems
from llava_next.training.watch.metrics import si

SAMPLED_STEPS = 20  # dealt to see how full and how even micro-batches are
# Assumed shares of the peak, by policy: published 7B text runs on H100 reach 46 % without checkpointing and 40 % with
# full (MosaicML's MPT-7B); what a run reaches stands in its metrics.
ASSUMED_MFU: dict[Checkpointing, float] = {"none": 0.45, "selective": 0.43, "full": 0.40}
SUPERVISED_SHARE = 0.1  # of all tokens, assumed: it moves the FLOPs by 1 %


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
    steps = min(SAMPLED_STEPS, mixture.total_steps - first)
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


def plan_banner(config: RunConfig, parts: Parts, mixture: Mixture, as_if: Hardware | None = None) -> str:
    """What the run will do, in lines of at most 100 columns (but for long paths).

    Args:
        as_if: a machine to plan for instead of the one at hand. Of its launch file nothing is known: the policy picked
            is then taken for the active one.
    """
    hardware, model, model_config = as_if or present_hardware(), empty_model(parts), parts.model_config
    freeze(model, config.optim.rates)
    dealt = deal_some(config, mixture, hardware.world)
    launched = as_if is None and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    layout = layout_of(hardware, launched)
    data = config.data
    arguments = (model_config, units(model), config.optim.rates, layout, data.token_budget)
    budget = choose(*arguments, data.tile_budget, hardware.memory)
    policy = checkpointing_policy(config.activation_checkpointing) if launched else budget.picked
    lines = [
        *model_lines(config, model_config, model),
        *data_lines(config, parts, mixture, dealt),
        *dealing_lines(config, dealt, hardware),
        *memory_lines(budget, config, layout, policy if launched else None),
        *hint_lines(budget, policy, arguments, config, dealt),
        *speed_lines(config),
        *time_lines(config, model_config, mixture, dealt, hardware, policy),
        *size_lines(model),
        f"run        {config.run_dir}",
    ]
    return "\n".join(lines)


def layout_of(hardware: Hardware, launched: bool) -> Layout:
    """How the launch file shards, or, without one, how the files that ship would: inside a node, resharding."""
    sizes = hsdp_sizes() if launched else None
    shard = sizes[1] if sizes else (hardware.world if launched else hardware.per_node)
    reshard = not launched or os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
    full_precision = not hardware.on_gpu
    if launched:
        full_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") == "no"
    compute = Compute(nbytes=4 if full_precision else 2, fused=hardware.on_gpu and not full_precision)
    return Layout(shard, compute, reshard, hardware.on_gpu)


def model_lines(config: RunConfig, model_config, model: LlavaNextForConditionalGeneration) -> list[str]:
    """The model and, by module, what is trained at which rate."""
    kinds = f"{model_config.text_config.model_type} + {model_config.vision_config.model_type}"
    lines = [f"model      {config.model}: {kinds}, template {config.data.template}"]
    for module, trainable, total, rate in trainable_table(model, config.optim.rates):
        state = f"{trainable:>14,} of {total:>14,} parameters at {rate:g}" if trainable else ""
        lines.append(f"  {module:<9}{state or f'{0:>14} of {total:>14,} parameters, frozen'}")
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
            lines.append(f"  build    {build_command(config, Path(storage.label))}")
        else:
            lines.append(f"data       {source.name}: {samples}, {size} from {storage.label}")
    steps = mixture.total_steps
    exact = "exact" if mixture.exact_lengths else "estimated from bytes"
    left = steps - mixture.first_step
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
    ]
    return lines


def text_lines(config: RunConfig, parts: Parts, mixture: Mixture) -> list[str]:
    """What the template and the tokenizer make of texts that a person may not expect."""
    lines, template, tokenizer = [], parts.encoder.template, parts.encoder.tokenizer
    if refused := refused_systems(config, mixture):
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
    return [
        f"dealing    {dealt.micro_batches:.1f} micro-batches a step on {hardware.world} rank(s), "
        f"{dealt.samples:.1f} samples and {dealt.filled:,.0f} tokens each",
        f"           cost balanced to {100 * dealt.balance:.1f} % (mean over slowest rank, in FLOPs)",
        f"           largest {dealt.most_tokens:,} tokens of {data.token_budget:,}, "
        f"{dealt.most_tiles} tiles of {data.tile_budget}",
    ]


# heading of the memory table -> part of `Estimate`
COLUMNS = {
    "weights": "weights",
    "grads": "gradients",
    "adam": "optimizer",
    "gather": "gathered",
    "activ.": "activations",
    "logits": "logits",
    "work": "working",
    "system": "workspace",
    "total": "total",
}


def memory_lines(budget: Budget, config: RunConfig, layout: Layout, active: Checkpointing | None) -> list[str]:
    """The table of policies, the one that is picked and why, and whether the one that is active fits."""
    reshard = "freed after each layer" if layout.reshard else "kept until backward"
    unit, scale = ("GB", 1e9) if max(found.total for found in budget.estimates.values()) >= 1e9 else ("MB", 1e6)
    lines = [
        f"memory     {si(budget.memory, 'B')} a rank; states sharded over {layout.shard} rank(s), "
        f"gathered weights {reshard}",
        f"           {unit} at the peak with {config.data.token_budget:,} tokens, {config.data.tile_budget} tiles a "
        "micro-batch, by activation checkpointing:",
        "  " + f"{'policy':<10}" + "".join(f"{heading:>8}" for heading in COLUMNS),
    ]
    for policy, found in budget.estimates.items():
        figures = "".join(f"{getattr(found, name) / scale:>8.2f}" for name in COLUMNS.values())
        marks = [word for word, said in (("picked", policy == budget.picked), ("active", policy == active)) if said]
        lines.append(
            f"  {policy:<10}{figures}  {'fits' if budget.fits(policy) else 'too large'} {', '.join(marks)}".rstrip()
        )
    lines.append("           total counts the larger of logits and work, which come one after the other")
    lines.append(f"policy     {budget.picked}: {budget.reason}")
    if active is not None and active != budget.picked:
        verdict = "fits" if budget.fits(active) else "does not fit"
        lines.append(f"           the launch file's is {active}, which {verdict}")
    return lines


def hint_lines(budget: Budget, policy: Checkpointing, arguments: tuple, config: RunConfig, dealt: Dealt) -> list[str]:
    """What else would fit: a cheaper policy with fewer tiles (no fewer than were dealt), weights that stay gathered.

    Args:
        arguments: of `estimate`, from the model's config to the token budget, without the policy.
    """
    model_config, counts, rates, layout, tokens = arguments

    def total(of: Checkpointing, how: Layout, tiles: int) -> float:
        return estimate(model_config, counts, rates, of, how, tokens, tiles).total

    lines, most = [], config.data.tile_budget
    for cheaper in POLICIES[: POLICIES.index(budget.picked)]:
        enough = (n for n in range(most - 1, dealt.most_tiles - 1, -1) if total(cheaper, layout, n) <= budget.memory)
        if (tiles := next(enough, None)) is not None:
            lines.append(f"           {cheaper} would fit with --data.tile_budget {tiles}")
            break
    if layout.reshard:
        kept = total(policy, replace(layout, reshard=False), most)
        verdict = "fits as well" if kept <= budget.memory else "does not fit"
        lines.append(
            f"           with fsdp_reshard_after_forward: false {policy} takes {si(kept, 'B')}, which {verdict}"
        )
    return lines


def speed_lines(config: RunConfig) -> list[str]:
    """What is asked for to run faster; nothing when nothing is."""
    lines = []
    if config.compile_layers:
        lines.append("compile    each layer, for any length: the first steps wait for it; memory is counted without")
    if config.float8:
        lines.append("float8     matrix products of the language model's layers; MFU stays a share of the bf16 peak")
        if not config.compile_layers:
            lines.append("           its casts are kernels of their own; --compile_layers true fuses them")
    return lines


def time_lines(
    config: RunConfig, model_config, mixture: Mixture, dealt: Dealt, hardware: Hardware, policy: Checkpointing
) -> list[str]:
    """FLOPs, hours and what storage must deliver, at an assumed share of the peak."""
    flops = flops_model(model_config, config.optim.rates, policy)
    step, _ = flops.step_flops(dealt.tokens, dealt.squared_lengths, dealt.tiles, SUPERVISED_SHARE * dealt.tokens)
    shares = f"llm {100 * step.llm / step.total:.0f} %, vision {100 * step.vision / step.total:.0f} %"
    per_sample = si(step.total / config.data.batch_size, "FLOP")
    lines = [f"work       {si(step.total, 'FLOP')} a step, {per_sample} a sample ({shares})"]
    stored = zip(mixture.plan_sources, mixture.infos, strict=True)
    volume = config.data.epochs * sum(
        sum(shard.bytes for shard in info.shards) * source.repeat for source, info in stored
    )
    if hardware.peak is None:
        return [*lines, f"time       peak of {hardware.name} unknown, so no estimate; {si(volume, 'B')} are read"]
    mfu = ASSUMED_MFU[policy] * dealt.balance
    seconds = step.total / hardware.world / hardware.peak / mfu
    total = seconds * mixture.total_steps
    samples = config.data.batch_size / seconds
    return [
        *lines,
        f"time       {_duration(total)}: {samples:.1f} samples/s, {seconds:.2f} s a step on {hardware.name}",
        f"           assumed: MFU {100 * ASSUMED_MFU[policy]:.0f} % ({policy} checkpointing) of "
        f"{hardware.peak / 1e12:,.0f} TFLOP/s, times the balance",
        f"storage    {si(volume / total, 'B/s')} and {samples:.0f} requests/s over all ranks; {si(volume, 'B')} in all",
    ]


def size_lines(model: LlavaNextForConditionalGeneration) -> list[str]:
    """What a checkpoint and the result weigh: trained weights and two Adam moments in fp32; all weights in bf16."""
    whole = units(model).whole
    return [f"disk       {si(12 * whole.trainable, 'B')} a checkpoint, {si(2 * whole.parameters, 'B')} the result"]
