"""What of a run is left to the machine: activation checkpointing and the budgets of a micro-batch, picked and kept.

None of it changes what is learned: a step's samples and its loss are the same whatever micro-batches they come in.
A run folder keeps what was picked (`choice.json`), so that a run continues on the same machine bit by bit, and what
memory turned out to be too little (`out-of-memory*.jsonl`).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from llava_next.data.plan.mixture import Mixture
from llava_next.data.storage.client import written_aside
from llava_next.training.devices.hardware import Hardware, present_hardware
from llava_next.training.devices.launch import checkpointing_policy, hsdp_sizes
from llava_next.training.forecast.activations import Compute
from llava_next.training.forecast.budget import Layout, Units, units
from llava_next.training.forecast.fitting import ways_to_fit
from llava_next.training.forecast.flops import cost_model
from llava_next.training.forecast.picking import (
    ACCURACY,
    MARGIN,
    Candidate,
    Choice,
    Picking,
    Wanted,
    default_budgets,
    first_steps,
)
from llava_next.training.recipe.config import RunConfig
from llava_next.training.recipe.optim import Rates, freeze
from llava_next.training.setup import Parts, empty_model
from llava_next.training.watch.memory import measured_factor
from llava_next.training.watch.metrics import si

CHOICE_FILE = "choice.json"
CHECKPOINTING, TOKENS, TILES = "activation_checkpointing", "data.token_budget", "data.tile_budget"


@dataclass(frozen=True)
class Plan:
    """A run with everything decided.

    Args:
        config: without `auto`.
        facts: what the choice holds for; it is kept as long as these are the same.
        origin: where the choice comes from, for people.
        launched: by `accelerate launch`, whose file is known then.
        too_large: of what does not fit, by how much and what would; else empty.
    """

    config: RunConfig
    picking: Picking
    choice: Choice
    facts: dict
    origin: str
    launched: bool
    too_large: str = ""

    @property
    def picked(self) -> Candidate:
        """What the run does."""
        return self.choice.picked

    @property
    def wanted(self) -> Wanted:
        """What was not left to the plan."""
        return self.picking.wanted

    @property
    def launch_file_keeps_all(self) -> bool:
        """Whether the launch file switches checkpointing off."""
        return self.launched and checkpointing_policy("full") == "none"

    @property
    def refused(self) -> bool:
        """Whether a run would not start: a little too large is only warned of, an estimate is not more exact than that.

        Nothing is known of CPUs, whose memory others use as well.
        """
        return self.hardware.on_gpu and self.picked.estimate.total > ACCURACY * self.hardware.memory

    @property
    def hardware(self) -> Hardware:
        """The machine."""
        return self.picking.hardware

    @property
    def layout(self) -> Layout:
        """How the work lies on it."""
        return self.picking.layout


def make_plan(config: RunConfig, parts: Parts, mixture: Mixture, as_if: Hardware | None = None) -> Plan:
    """Decides what was left to the machine. Gives the mixture what its samples cost under that.

    Args:
        as_if: a machine to plan for instead of the one at hand, with the launch file that ships for it.

    Raises:
        ValueError: a budget below the largest sample, or a number of layers that the model does not have; bf16 masters
            without mixed precision.
    """
    hardware = as_if or present_hardware()
    launched = as_if is None and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    layout = replace(layout_of(hardware, launched), optimizer=config.optim.name, master=config.optim.master)
    if layout.master == "bf16" and layout.compute.nbytes == 4:
        raise ValueError(
            "optim.master: bf16 goes with mixed_precision: bf16 in the launch file; without it (`no`, and a plan for "
            "CPUs) all is computed in fp32, whose weights would be rounded: set fp32, or that key"
        )
    at_home = as_if is None and config.run_dir
    factor = max(MARGIN, measured_factor(Path(config.run_dir), hardware)) if at_home else MARGIN
    picking = Picking(
        parts.model_config,
        units_under(parts, layout.compute, config.rates),
        config.rates,
        *(layout, hardware, first_steps(mixture), wanted_by(config, launched), factor),
    )
    check_wanted(picking)
    facts = facts_of(config, picking)
    kept, origin = read_choice(Path(config.run_dir), facts) if at_home else (None, "")
    choice = replace(picking, wanted=Wanted(*kept)).choose() if kept else picking.choose()
    picked = choice.picked
    config = decided(config, picked)
    mixture.cost = cost_model(parts.model_config, config.rates, picked.policy)
    said = "" if picked.fits else too_large(picking, picked, parts)
    return Plan(config, picking, choice, facts, origin, launched, said)


def too_large(picking: Picking, picked: Candidate, parts: Parts) -> str:
    """By how much a choice does not fit, and what would."""
    memory, found = picking.hardware.memory, picked.estimate
    text = (
        f"{picked.options} takes {si(picked.need, 'B')} of {si(memory, 'B')}, {si(picked.need - memory, 'B')} too much"
    )
    if picking.factor * found.states > memory:
        text += f"; weights, gradients and optimizer state alone are {si(found.states, 'B')}, whatever the budgets"
    if not picking.hardware.on_gpu:
        return f"{text}. --dry_run --as_if plans for a machine with GPUs"
    ways = ways_to_fit(picking, partial(units_under, parts, picking.layout.compute))
    fit = "; ".join(ways) or "nothing that is known here; take more GPUs"
    return f"{text}. What would fit (in brackets the least that it takes): {fit}"


def check_plan(plan: Plan) -> None:
    """Refuses what cannot fit. Raises ValueError: by how much it does not, and what would."""
    if plan.refused:
        raise ValueError(f"{CHECKPOINTING}, {TOKENS}, {TILES}: {plan.too_large}")


def check_wanted(picking: Picking) -> None:
    """Raises ValueError for what is given and cannot work with this model and data."""
    policy, tiles, most = picking.wanted.policy, picking.wanted.tiles, picking.steps.most_tiles
    layers = picking.config.text_config.num_hidden_layers
    if isinstance(policy, int) and not 0 < policy < layers:
        raise ValueError(f"{CHECKPOINTING}: {policy}: give 1 to {layers - 1} of the model's {layers} layers, or a word")
    if tiles is not None and tiles < most:
        raise ValueError(
            f"{TILES}: {tiles} is smaller than the {most} tiles of the largest sample, which would not fit a "
            "micro-batch; give auto, or at least as many"
        )


def decided(config: RunConfig, picked: Candidate) -> RunConfig:
    """The configuration with `picked` in the place of what was left open."""
    data = replace(config.data, token_budget=picked.tokens, tile_budget=picked.tiles)
    return replace(config, activation_checkpointing=picked.policy, data=data)


def with_default_budgets(config: RunConfig) -> RunConfig:
    """The configuration with fixed budgets where they are `auto`, for what is no run on a machine."""
    data = config.data
    tokens, tiles = default_budgets(data.max_length)
    tokens = tokens if data.token_budget == "auto" else data.token_budget
    tiles = tiles if data.tile_budget == "auto" else data.tile_budget
    return replace(config, data=replace(data, token_budget=tokens, tile_budget=tiles))


def wanted_by(config: RunConfig, launched: bool) -> Wanted:
    """What the configuration decides, and the launch file: without its checkpointing nothing is computed twice."""
    data = config.data
    options = (config.activation_checkpointing, data.token_budget, data.tile_budget)
    given = [None if option == "auto" else option for option in options]
    if launched and checkpointing_policy("full") == "none":
        given[0] = "none"
    return Wanted(*given)


def layout_of(hardware: Hardware, launched: bool) -> Layout:
    """How the launch file shards, or, without one, how the files that ship would: inside a node, resharding."""
    sizes = hsdp_sizes() if launched else None
    default = (1, hardware.world) if launched else (hardware.nodes, hardware.per_node)
    replicate, shard = sizes or default
    reshard = not launched or os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
    offload = launched and os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true"
    full_precision = not hardware.on_gpu
    if launched:
        full_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") == "no"
    compute = Compute(nbytes=4 if full_precision else 2, fused=hardware.on_gpu and not full_precision)
    return Layout(shard, compute, reshard, hardware.on_gpu, offload, replicate)


def units_under(parts: Parts, compute: Compute, rates: Rates) -> Units:
    """The model's units with what these rates train, matrices in 4 bits counted as so many values of `compute`."""
    how = replace(parts, lora=rates.lora, quantize=rates.quantize)
    model = empty_model(how, torch.float32 if compute.nbytes == 4 else torch.bfloat16)
    freeze(model, rates)
    return units(model)


def facts_of(config: RunConfig, picking: Picking) -> dict:
    """What a choice holds for. JSON."""
    hardware, layout = picking.hardware, picking.layout
    return {
        "machine": {"name": hardware.name, "per_node": hardware.per_node, "memory": hardware.memory},
        "layout": asdict(layout),
        "given": asdict(picking.wanted),
        "max_length": config.data.max_length,
        "trained": [name for name, rate in asdict(config.optim.rates).items() if rate is not None],
        "lora": config.lora and asdict(config.lora),
        "quantize": config.quantize,
        "factor": round(picking.factor, 4),
    }


def read_choice(run_dir: Path, facts: dict) -> tuple[list | None, str]:
    """What the run folder keeps (policy, tokens, tiles), if it was picked for the same; and a word on where it comes
    from."""
    path = run_dir / CHOICE_FILE
    if not path.exists():
        return None, ""
    try:
        kept = json.loads(path.read_bytes())
        picked = [kept["picked"][key] for key in (CHECKPOINTING, TOKENS, TILES)]
    except (ValueError, KeyError, TypeError):
        return None, f"made anew: {path} is damaged"
    changed = [name for name in facts if kept.get("for", {}).get(name) != facts[name]]
    if changed:
        return None, f"made anew, other than at this run's last start: {', '.join(changed)}"
    return picked, "kept from this run's last start on this machine"


def keep_choice(plan: Plan, run_dir: Path) -> None:
    """Writes what was picked into the run folder."""
    picked = plan.picked
    values = {CHECKPOINTING: picked.policy, TOKENS: picked.tokens, TILES: picked.tiles}
    with written_aside(run_dir / CHOICE_FILE) as temporary:
        temporary.write_text(json.dumps({"picked": values, "for": plan.facts}, indent=1))
