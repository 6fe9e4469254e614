"""Whether a checkpoint is one of this run: the same parts trained from the same model; and what changed on the way.

What may differ without a word is listed (`FREE`); every other key of the configuration that differs is noted, so that
nothing that changes what is learned changes silently.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from llava_next.model.folders.starting import model_fingerprint
from llava_next.template_jinja import without_images
from llava_next.tokenise import DATA_TOKENS
from llava_next.training.recipe.config import RunConfig
from llava_next.training.recipe.optim import Rates
from llava_next.training.watch.metrics import flat

# Where a run lies, how fast it goes, what it tells: none of it changes what is learned.
RUN_KEYS = ("model", "run_dir", "max_steps", "log_every", "log_with", "log_required", "hang_seconds")
RUN_KEYS += ("push_to_hub", "push_public")
RUN_KEYS += ("checkpoint", "evaluate", "profile", "activation_checkpointing", "lora.start", "lora.copy_base")
DATA_KEYS = ("token_budget", "tile_budget", "num_workers", "reads_in_flight", "cache_dir", "cache_gb", "stall_seconds")
DATA_KEYS += ("image_root", "max_skip_share", "allow_cut", "validation", "validation_every", "validation_steps")
FREE = (*RUN_KEYS, *(f"data.{key}" for key in DATA_KEYS))
# These make the plan, whose own differences are refused or told (see `Mixture.resume`).
PLAN = ("seed", "data.sources", "data.epochs", "data.batch_size", "data.shuffle_shards", "data.allow_changed_plan")


def run_facts(config: RunConfig) -> dict:
    """What of the configuration a checkpoint must remember beside plan and counters. JSON."""
    return {
        "rates": asdict(config.optim.rates),
        "model": model_fingerprint(Path(config.model)),
        "tokenizer": tokenizer_fingerprint(Path(config.model)),
        "precision": os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        "config": asdict(config),
    }


def tokenizer_fingerprint(folder: Path) -> str:
    """Names the tokenizer of a model folder by what makes its ids; empty when there is no tokenizer.json."""
    path, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not path.exists():
        return ""
    digest = hashlib.sha256(path.read_bytes())
    told = json.loads(config.read_bytes()) if config.exists() else {}
    if declared := told.get(DATA_TOKENS):
        digest.update(json.dumps(declared).encode())
    # of a named template the name is in the configuration, an own one is this text
    if isinstance(chats := told.get("chat_template"), str) and without_images(chats):
        digest.update(chats.encode())
    return digest.hexdigest()[:16]


def check_same_run(config: RunConfig, state: dict, path: Path) -> list[str]:
    """Refuses a checkpoint of another stage or of another model.

    Args:
        state: of the checkpoint `path`.

    Returns:
        What has changed since, of all that changes what is learned, one a line.

    Raises:
        ValueError: names the difference.
    """
    facts = run_facts(config)
    ours, theirs = facts["rates"], state["rates"]
    if {n for n, r in ours.items() if r is not None} != {n for n, r in theirs.items() if r is not None}:
        raise ValueError(
            f"{path} was made with {describe_rates(theirs)}; this run has {describe_rates(ours)}. It is a "
            "checkpoint of another stage: choose another run_dir, or give the recipe it was made with"
        )
    if facts["model"] != state["model"]:
        raise ValueError(
            f"model: {config.model} is not what {path} was started from (its config or weights changed). What "
            "is frozen is not in a checkpoint and would come from another model: give the folder as it was, or choose "
            "another run_dir"
        )
    check_same_adapters(config, state, path)
    check_same_optimizer(config, state, path)
    before = options_of(state["config"]) | {"launch file's mixed_precision": state["precision"]}
    now = options_of(facts["config"]) | {"launch file's mixed_precision": facts["precision"]}
    notes = [
        f"{key} was {before.get(key)} until step {state['step']} and is {now.get(key)} from here"
        for key in sorted(now.keys() | before.keys())
        if now.get(key) != before.get(key)
    ]
    if facts["tokenizer"] != state["tokenizer"]:
        notes.append(f"the tokenizer of {config.model} is another one than until step {state['step']}")
    return notes


def check_same_adapters(config: RunConfig, state: dict, path: Path) -> None:
    """Refuses a checkpoint whose adapters are others, or in other layers. Raises ValueError."""
    ours, theirs = facts_of_adapters(asdict(config)), facts_of_adapters(state["config"])
    if ours != theirs:
        words = [", ".join(f"{key} {value}" for key, value in facts.items()) or "none" for facts in (theirs, ours)]
        raise ValueError(
            f"lora: {path} was made with adapters: {words[0]}; this run has: {words[1]}. Give them as they were, or "
            "another run_dir (--lora.start takes an adapter there)"
        )


def check_same_optimizer(config: RunConfig, state: dict, path: Path) -> None:
    """Refuses a checkpoint whose parameters or moments are stored otherwise. Raises ValueError."""
    before = state["config"].get("optim", {})
    for key, default in (("name", "adamw"), ("master", "fp32")):
        theirs, ours = before.get(key, default), getattr(config.optim, key)
        if theirs != ours:
            raise ValueError(
                f"optim.{key}: {path} was made with {theirs}, this run has {ours}: what it stores does not fit, or "
                f"not without loss. Give --optim.{key} {theirs}, or another run_dir"
            )


def facts_of_adapters(config: dict) -> dict:
    """What adapters are, of a configuration as nested dictionaries; what may change on the way is left out."""
    lora = config.get("lora") or {}
    facts = {key: value for key, value in lora.items() if key not in ("dropout", "start", "copy_base")}
    return facts | ({"quantize": config["quantize"]} if config.get("quantize") else {})


def options_of(config: dict) -> dict:
    """Key -> value of what changes what is learned, of a configuration as nested dictionaries."""
    values = {name.replace("/", "."): value for name, value in flat(config).items()}
    return {
        name: value
        for name, value in values.items()
        if not any(name == key or name.startswith(f"{key}.") for key in (*FREE, *PLAN))
    }


def describe_rates(rates: dict[str, float | None]) -> str:
    """`projector at 0.001, newline at 0.001 and llm, vision frozen`"""
    names = asdict(Rates()).keys() & rates.keys()
    trained = [f"{name} at {rates[name]:g}" for name in rates if name in names and rates[name] is not None]
    frozen = [name for name in rates if name in names and rates[name] is None]
    return ", ".join(trained) + (f" and {', '.join(frozen)} frozen" if frozen else "")
