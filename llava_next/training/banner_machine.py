"""The plan of a run, as far as it is the machine's: memory by policy, what is picked and why, the command."""

from __future__ import annotations

import shlex
import textwrap
from dataclasses import replace
from functools import partial

from llava_next.data.plan.profile import PREFIX
from llava_next.training.devices.hardware import GPUS_PER_NODE, Hardware
from llava_next.training.forecast.budget import Layout
from llava_next.training.forecast.fitting import way_of, ways_to_train
from llava_next.training.forecast.flops import Checkpointing
from llava_next.training.forecast.picking import MARGIN, Candidate
from llava_next.training.planning import CHECKPOINTING, TILES, TOKENS, Plan, units_under
from llava_next.training.setup import Parts
from llava_next.training.watch.memory import LOG
from llava_next.training.watch.metrics import si

COLUMNS = 100  # of a line
WHOLE_WORDS = {"break_long_words": False, "break_on_hyphens": False}
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


def way_lines(plan: Plan, parts: Parts) -> list[str]:
    """A table of the ways to train, each with its best policy and budgets, memory by part and time.

    Nothing where the language model, whose states are what they differ in, does not train.
    """
    if plan.picking.rates.llm is None:
        return []
    own, picking = way_of(plan.picking), plan.picking
    rows = {own: plan.picked} | ways_to_train(picking, partial(units_under, parts, picking.layout.compute))
    unit, scale = ("GB", 1e9) if max(row.estimate.total for row in rows.values()) >= 1e9 else ("MB", 1e6)
    columns = {**STATES, "activ.": "activations", "total": "total"}
    lines = [
        f"ways       to train, this plan's first, each with its best budgets; {unit} at the peak:",
        f"  {'':<12}{'policy':<10}{'tokens':>8}" + "".join(f"{name:>10}" for name in columns) + f"{'s/step':>10}",
    ]
    for way, row in rows.items():
        figures = "".join(f"{getattr(row.estimate, name) / scale:>10.2f}" for name in columns.values())
        seconds = f"{row.seconds:.2f}" if row.seconds is not None and plan.hardware.peak else "-"
        sizes = f"{way:<12}{label(row.policy):<10}{row.tokens:>8,}"
        lines.append(f"  {sizes}{figures}{seconds if row.fits else 'too large':>10}")
    words = "adamw8bit, bf16 master, both: --optim.name adamw8bit, --optim.master bf16; LoRA, QLoRA: by their recipes; "
    words += "total has the table above's other columns in it"
    return [*lines, *wrapped(words)]


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
    return wrapped("; ".join(saved)) if saved else []


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
    lines = [f"choice     {picked.options}", *wrapped("; ".join(reasons)), *wrapped(spare)]
    return lines if picked.fits else [*lines, *wrapped(f"warning: {plan.too_large}")]


def wrapped(text: str, width: int = COLUMNS, indent: str = " " * 11) -> list[str]:
    """Lines of a text, below what the first column names."""
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False)


def reshard_lines(plan: Plan) -> list[str]:
    """What the other value of the launch file's fsdp_reshard_after_forward would change."""
    layout = plan.layout
    other = replace(plan.picking, layout=replace(layout, reshard=not layout.reshard))
    if not plan.hardware.on_gpu or layout.shard == 1:  # nothing is gathered
        return []
    found = other.choose().picked
    return wrapped(f"with fsdp_reshard_after_forward: {str(not layout.reshard).lower()} {described(found, plan)}")


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
        lines += wrapped(
            f"on every node, with its --machine_rank. The one-node file h100x8_fsdp.yaml for {hardware.world} "
            f"processes would shard over all of them, its gathers crossing the network: {described(found, plan)}"
        )
    elif 1 < hardware.world != GPUS_PER_NODE:
        lines += wrapped("h100x8_fsdp.yaml as it is starts 8 processes")
    return lines
