"""The plan of a run, to be read before it starts: data, steps, what is trained, dealing, memory, time, storage."""

from __future__ import annotations

import shlex
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llava_next.data.inputs.unbuilt import Unbuilt
from llava_next.data.plan.dealing import CostModel
from llava_next.data.plan.mixture import Mixture
from llava_next.data.plan.profile import PREFIX, Profile
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration
from llava_next.tokenise import DATA_TOKENS, data_tokens, listed
from llava_next.training.devices.hardware import GPUS_PER_NODE, Hardware
from llava_next.training.forecast.budget import Layout, units
from llava_next.training.forecast.flops import Checkpointing, flops_model
from llava_next.training.forecast.picking import MARGIN, Candidate
from llava_next.training.forecast.speed import ASSUMED_HFU, MICRO_STEP_SECONDS, SUPERVISED_SHARE
from llava_next.training.planning import CHECKPOINTING, TILES, TOKENS, Plan
from llava_next.training.recipe.config import RunConfig
from llava_next.training.recipe.optim import freeze, trainable_table, warmup_steps
from llava_next.training.setup import Parts, build_command, cut_warning, empty_model, refused_systems
from llava_next.training.watch.memory import LOG
from llava_next.training.watch.metrics import si

SAMPLED_STEPS = 20  # dealt to see how full and how even micro-batches are
COLUMNS = 100  # of a line


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


def plan_banner(plan: Plan, parts: Parts, mixture: Mixture, command: tuple[str, ...] = ()) -> str:
    """What the run will do, in lines of at most 100 columns (but for long paths).

    Args:
        command: the script with its options, for the command that a plan for another machine assumes.
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
    lines += _wrapped(parts.stands_in) if parts.stands_in else []
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


# headings of the memory table, and parts of `Estimate`
STATES = {"weights": "weights", "gradients": "gradients", "Adam": "optimizer", "gathered": "gathered"}
BESIDES = {"activ.": "activations", "logits": "logits", "work": "working", "system": "workspace", "total": "total"}


def label(policy: Checkpointing) -> str:
    """A policy in a table: `12 full`, the others being selective."""
    return f"{policy} full" if isinstance(policy, int) else policy


def memory_lines(plan: Plan) -> list[str]:
    """The table of policies, each with the budgets that are best under it."""
    rows, layout = plan.choice.rows, plan.layout
    reshard = "freed after each layer" if layout.reshard else "kept for the whole step"
    unit, scale = ("GB", 1e9) if max(row.estimate.total for row in rows) >= 1e9 else ("MB", 1e6)
    parts = [f"{heading} {getattr(rows[0].estimate, name) / scale:.2f}" for heading, name in STATES.items()]
    where = " (states in host memory)" if layout.offload else ""
    lines = [
        f"memory     {si(plan.hardware.memory, 'B')} a rank; states sharded over {layout.shard} rank(s), "
        f"gathered weights {reshard}",
        f"           {unit} at the peak: {', '.join(parts)}{where};",
        "           besides, by activation checkpointing, each with its best budgets of a micro-batch:",
        f"  {'policy':<10}{'tokens':>8}{'tiles':>6}{'micros':>7}{'filled':>7}"
        + "".join(f"{heading:>8}" for heading in BESIDES)
        + f"{'s/step':>8}",
    ]
    for row in rows:
        figures = "".join(f"{getattr(row.estimate, name) / scale:>8.2f}" for name in BESIDES.values())
        timed = [f"{'-':>7}", f"{'-':>7}", f"{'-':>8}"]
        if row.seconds is not None:
            seconds = f"{row.seconds:>8.2f}" if plan.hardware.peak else f"{'-':>8}"
            timed = [f"{row.micro_batches:>7.1f}", f"{100 * row.filled:>5.0f} %", seconds]
        verdict = ", ".join(["picked"] * (row == plan.picked) + ["too large"] * (not row.fits))
        sizes = f"{label(row.policy):<10}{row.tokens:>8,}{row.tiles:>6,}{timed[0]}{timed[1]}"
        lines.append(f"  {sizes}{figures}{timed[2]}  {verdict}".rstrip())
    lines.append("           total counts the larger of logits and work, which come one after the other")
    return lines


def saving_lines(plan: Plan) -> list[str]:
    """What the optimizer's options take off the memory; nothing when both are the default."""
    picking, layout, picked = plan.picking, plan.layout, plan.picked
    given = {"optimizer": f"optim.name {layout.optimizer}", "master": f"optim.master {layout.master}"}
    saved = []
    for key, said in given.items():
        without = replace(layout, **{key: getattr(Layout, key)})
        other = replace(picking, layout=without).estimate(picked.policy, picked.tokens, picked.tiles)
        if without != layout:
            saved.append(f"{said} saves {si(other.total - picked.estimate.total, 'B')}")
    return _wrapped("; ".join(saved)) if saved else []


def choice_lines(plan: Plan) -> list[str]:
    """What was picked and why, and what would fit where that does not."""
    picked, wanted = plan.picked, plan.wanted
    given = zip((CHECKPOINTING, TOKENS, TILES), (wanted.policy, wanted.tokens, wanted.tiles), strict=True)
    named = [name for name, value in given if value is not None]
    if plan.launch_file_keeps_all:
        named[0] = "fsdp_activation_checkpointing: false of the launch file"
    reason = "the least time of what fits" if plan.hardware.on_gpu else "fixed on CPUs"
    reasons = [plan.origin or (reason if picked.fits else "the least memory of what was left open")]
    if named:
        reasons.append(f"given: {', '.join(named)}")
    spare = f"memory is counted {plan.picking.factor:.2f} times the estimate"
    if plan.picking.factor > MARGIN:
        spare += f", in place of {MARGIN}, by {plan.config.run_dir}/{LOG}*.jsonl"
    lines = [f"choice     {picked.options}", *_wrapped("; ".join(reasons)), *_wrapped(spare)]
    return lines if picked.fits else [*lines, *_wrapped(f"warning: {plan.too_large}")]


def _wrapped(text: str, width: int = COLUMNS, indent: str = " " * 11) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False)


def reshard_lines(plan: Plan) -> list[str]:
    """What the other value of the launch file's fsdp_reshard_after_forward would change."""
    layout = plan.layout
    other = replace(plan.picking, layout=replace(layout, reshard=not layout.reshard))
    if not plan.hardware.on_gpu or layout.shard == 1:  # nothing is gathered
        return []
    found = other.choose().picked
    return _wrapped(f"with fsdp_reshard_after_forward: {str(not layout.reshard).lower()} {described(found, plan)}")


def described(found: Candidate, plan: Plan) -> str:
    """A candidate in a sentence."""
    seconds = f", {found.seconds:.2f} s a step" if plan.hardware.peak else ""
    verdict = "" if found.fits else ", which does not fit"
    return f"{label(found.policy)} with {found.tokens:,} tokens takes {si(found.estimate.total, 'B')}{seconds}{verdict}"


def launch_words(hardware: Hardware) -> list[str]:
    """The launch that a plan for a machine assumes: the file that ships for it, and what it must be told."""
    if hardware.nodes > 1:
        words = ["accelerate_configs/h100x8x4_hsdp.yaml", "--num_machines", str(hardware.nodes)]
        words += ["--num_processes", str(hardware.world)]
        words += ["--parallelism_config_dp_replicate_size", str(hardware.nodes)]
        if hardware.per_node != GPUS_PER_NODE:
            words += ["--parallelism_config_dp_shard_size", str(hardware.per_node)]
    elif hardware.world > 1:
        words = ["accelerate_configs/h100x8_fsdp.yaml"]
        words += ["--num_processes", str(hardware.world)] if hardware.world != GPUS_PER_NODE else []
    else:
        words = ["accelerate_configs/gpu1.yaml"]
    return ["accelerate", "launch", "--config_file", *words]


def command_lines(plan: Plan, command: tuple[str, ...], without_model: bool = False) -> list[str]:
    """The command that the plan assumes, and where a launch file that ships would run something else.

    Args:
        without_model: the plan is for an architecture, a run needs a folder.
    """
    hardware = plan.hardware
    if plan.launched or not hardware.on_gpu or not command or plan.refused:
        return []
    words = [*launch_words(hardware), *command]
    assumed = any(source.path.startswith(PREFIX) for source in plan.config.data.sources)
    needed = {"--model": "MODEL" if without_model else "", "--data.sources": "DATA" if assumed else ""}
    for key, value in (needed | {"--run_dir": "" if plan.config.run_dir else "RUN"}).items():
        if value and key in words:
            words[words.index(key) + 1] = value
        elif value:
            words += [key, value]
    text = " ".join(map(shlex.quote, words))
    lines = textwrap.wrap(text, COLUMNS - 2, initial_indent="command    ", subsequent_indent=" " * 15, **WHOLE_WORDS)
    lines = [*(f"{line} \\" for line in lines[:-1]), lines[-1]]
    if hardware.nodes > 1:
        shard = replace(plan.layout, shard=hardware.world, replicate=1)
        found = replace(plan.picking, layout=shard).choose().picked
        lines += _wrapped(
            f"on every node, with its --machine_rank. The one-node file h100x8_fsdp.yaml for {hardware.world} "
            f"processes would shard over all of them, its gathers crossing the network: {described(found, plan)}"
        )
    elif 1 < hardware.world != GPUS_PER_NODE:
        lines += _wrapped("h100x8_fsdp.yaml as it is starts 8 processes")
    return lines


WHOLE_WORDS = {"break_long_words": False, "break_on_hyphens": False}


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
    volume = config.data.epochs * sum(
        sum(shard.bytes for shard in info.shards) * source.repeat for source, info in stored
    )
    if hardware.peak is None:
        return [*lines, f"time       peak of {hardware.name} unknown, so no estimate; {si(volume, 'B')} are read"]
    if plan.refused:
        return [*lines, "time       none: it does not fit, and would not start"]
    seconds = picked.seconds
    total, samples = seconds * mixture.total_steps, config.data.batch_size / seconds
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
        *_wrapped(
            f"assumed: {100 * ASSUMED_HFU:.0f} % of {hardware.peak / 1e12:,.0f} TFLOP/s on all that is computed "
            f"({picked.computed:.2f} s {whose}), {moved if picked.moved else ''}and "
            f"{1000 * MICRO_STEP_SECONDS:.0f} ms for each micro-batch"
        ),
        f"storage    {si(volume / total, 'B/s')} and {samples:.3g} requests/s over all ranks; {si(volume, 'B')} in all",
    ]


def size_lines(model: LlavaNextForConditionalGeneration, config: RunConfig) -> list[str]:
    """What a checkpoint and the result weigh: trained weights and Adam's two moments; all weights in bf16."""
    counts = units(model)
    checkpoint = sum(counts.trained_bytes(config.optim.name, config.optim.master))
    return [f"disk       {si(checkpoint, 'B')} a checkpoint, {si(2 * counts.whole.parameters, 'B')} the result"]
