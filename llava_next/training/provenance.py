"""What a run was made with: for the card of its result, and kept in the run folder for the ledger."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import llava_next
from llava_next.data.plan.mixture import Mixture
from llava_next.data.storage.client import written_aside
from llava_next.model.folders.card import CARD, CARD_FILES, Story, read_story, thinned, write_card
from llava_next.model.folders.starting import model_fingerprint
from llava_next.training.checkpoints.exports import COMPANIONS
from llava_next.training.checkpoints.same_run import describe_rates, options_of
from llava_next.training.planning import Plan
from llava_next.training.recipe.config import RunConfig
from llava_next.versions import installed

PROVENANCE = "provenance.json"
# options that `recipe_of` words itself; any other that changes what is learned is listed as it is
SHOWN = ("optim.rates", "optim.betas", "optim.eps", "optim.weight_decay", "optim.warmup_ratio", "optim.max_grad_norm")
SHOWN += ("optim.loss_weighting", "data.template", "data.max_length", "data.images", "lora")
PACKAGES = ("torch", "transformers", "accelerate", "peft", "torchao", "bitsandbytes", "flash-attn", "pillow")


def keep_provenance(plan: Plan, mixture: Mixture) -> None:
    """Writes into the run folder what the run is made with, as last started."""
    config, hardware = plan.config, plan.hardware
    machine = {"name": hardware.name, "processes": hardware.world, "per_node": hardware.per_node}
    found = {
        "stage": stage_of(config, mixture),
        "start": model_fingerprint(Path(config.model)),
        "code": code_hash(),
        "hardware": machine | {"memory_gb": round(hardware.memory / 1e9, 1)},
        "plan": mixture.state()["plan_hash"],
    }
    with written_aside(Path(config.run_dir) / PROVENANCE) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")


@cache
def code_hash() -> str:
    """Sha256 of the package's sources, 16 hex digits: the same code, the same digits."""
    root, digest = Path(llava_next.__file__).parent, hashlib.sha256()
    for path in sorted(root.glob("**/*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Of what computes, where it is installed."""
    ours = {"llava_next": f"{llava_next.__version__} ({code_hash()})", "python": platform.python_version()}
    return ours | installed(PACKAGES)


def stage_of(config: RunConfig, mixture: Mixture, steps: int | None = None) -> dict:
    """The run as a stage of `Story.stages`, but for its losses and steps done.

    Args:
        steps: done; None: those that it is to do.
    """
    infos = zip(mixture.plan_sources, mixture.infos, mixture.indexes, strict=True)
    return {
        "title": "stage 1" if config.data.template == "plain" else "stage 2, LoRA" if config.lora else "stage 2",
        "data": [
            {"name": source.name, "samples": info.samples, "weight": float(source.repeat), "index": index.hash()[:16]}
            for source, info, index in infos
        ],
        "recipe": recipe_of(config, mixture.total_steps, steps),
        "versions": versions(),
    }


def recipe_of(config: RunConfig, total_steps: int, steps: int | None = None) -> dict[str, str]:
    """What decides what is learned, label -> text; `steps` as `stage_of`."""
    data, optim, lora = config.data, config.optim, config.lora
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    steps = config.last_step(total_steps) if steps is None else steps
    is_whole = steps == total_steps
    found = {
        "trained": describe_rates(asdict(optim.rates)),
        "samples a step": str(data.batch_size),
        "steps": f"{steps:,}" if is_whole else f"{steps:,} of {total_steps:,}",
        "epochs": f"{data.epochs}" if is_whole else f"{data.epochs * steps / total_steps:.3g} of {data.epochs}",
        "longest sample": f"{data.max_length:,} tokens",
        "template": data.template,
        "pictures": data.images,
        "optimizer": f"AdamW, betas {tuple(optim.betas)}, eps {optim.eps:g}, weight decay {optim.weight_decay:g}",
        "schedule": f"linear warm-up over {100 * optim.warmup_ratio:g} % of {total_steps:,} steps, cosine to 0",
        "gradient clipping": "none" if optim.max_grad_norm is None else f"{optim.max_grad_norm:g}",
        "loss weighting": optim.loss_weighting,
        "precision": {"no": "float32"}.get(precision, precision),
        "seed": str(config.seed),
    }
    if lora:
        found["adapters"] = f"r {lora.r}, scale {lora.scale:g}, dropout {lora.dropout:g}, in {', '.join(lora.targets)}"
        found["adapters"] += ", DoRA" if lora.dora else ""
    usual, here = (options_of(asdict(run)) for run in (RunConfig(), config))
    others = [key for key in here if here[key] != usual.get(key) and not key.startswith(SHOWN)]
    if others:
        found["other options"] = ", ".join(f"{key} {here[key]}" for key in others)
    return found


def numbers_of(run_dir: Path, key: str) -> dict[int, float]:
    """Step -> a number of it in metrics.jsonl, in order, each step as done last; without those that were not finite."""
    path, found = run_dir / "metrics.jsonl", {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
            found[int(record["step"])] = record[key]
        except (ValueError, KeyError, TypeError):  # cut off by a crash, or no step's
            continue
    return {step: found[step] for step in sorted(found) if found[step] is not None}


def losses_of(run_dir: Path, last_step: int | None = None) -> list[tuple[int, float]]:
    """(step, loss) of a run, up to `last_step`."""
    losses = numbers_of(run_dir, "loss").items()
    return [(step, loss) for step, loss in losses if last_step is None or step <= last_step]


def told_start(config: RunConfig) -> Story:
    """What the start model's card tells, as it was before the first step."""
    kept = Path(config.run_dir) / COMPANIONS
    return read_story(kept if (kept / CARD).exists() else Path(config.model))


def card_writer(config: RunConfig, mixture: Mixture, step: int) -> Callable[[Path], None]:
    """What writes the card of the model after a step into its folder. A card that cannot be made costs no result: what
    was wrong is printed."""

    def write(folder: Path) -> None:
        try:
            story, losses = told_start(config), losses_of(Path(config.run_dir), step)
            stage = stage_of(config, mixture, step) | {"loss": thinned(losses), "steps": step}
            story.stages = [*story.stages, stage]
            story.datasets = list(dict.fromkeys([*story.datasets, *hub_data(config)]))
            write_card(folder, story, config.push_to_hub)
        except Exception as error:
            for name in CARD_FILES:
                (folder / name).unlink(missing_ok=True)
            print(f"warning: {folder.name} gets no {CARD} ({type(error).__name__}: {error})", flush=True)

    return write


def hub_data(config: RunConfig) -> list[str]:
    """`ORG/NAME` of the sources that are read from the hub."""
    prefix = "hf://datasets/"
    paths = [source.path.removeprefix(prefix) for source in config.data.sources if source.path.startswith(prefix)]
    return ["/".join(path.split("/")[:2]).partition("@")[0] for path in paths]
