"""Stage 2, visual instruction tuning: language model, projector and vision tower learn from conversations.

    accelerate launch --config_file accelerate_configs/h100x8_fsdp.yaml scripts/finetune.py \\
        --model runs/pretrain/model --data.sources s3://bucket/mix665k --run_dir runs/finetune

Without --config it runs the Vicuna-7B recipe. `--help` lists every key, `--dry_run` prints the plan and stops;
with `--as_if 8xh100-80g` it is the plan for that machine.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import yaml

from llava_next.data.loading.loader import start_worker_server
from llava_next.data.storage.client import StorageError
from llava_next.model.folders.export import save_model
from llava_next.training.banner import plan_banner
from llava_next.training.checkpoints.recovery import CheckpointError, Resume, find_resume, resume_command, run_facts
from llava_next.training.checkpoints.saving import Checkpoints
from llava_next.training.devices.agreement import RanksDisagree, RunStopped, same_on_all_ranks
from llava_next.training.devices.launch import check_launch
from llava_next.training.devices.parallel import build_accelerator, finish
from llava_next.training.loop import Trainer
from llava_next.training.recipe.config import RunConfig, parse_run, save_run
from llava_next.training.setup import (
    build_model,
    check_cut,
    empty_model,
    load_parts,
    open_feed,
    open_journal,
    open_mixture,
    report_export,
)
from llava_next.training.validate import Validation
from llava_next.training.watch.health import record_communication

RECIPES = Path(__file__).parent / "recipes"


def main(default_recipe: Path) -> None:
    """Runs one stage. Everything a user can get wrong is an error before the model loads."""
    try:
        config, options = parse_run(default_recipe=default_recipe)
        parts = load_parts(config)
        mixture = open_mixture(config, parts)
        validation = Validation(config, parts) if config.data.validation else None
        resume = find_resume(config)
        changes = mixture.resume(resume.state, config.data.allow_changed_plan) if resume.path else []
        if not options.dry_run:
            check_cut(config, mixture)
            check_launch(lambda: empty_model(parts))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

    if int(os.environ.get("RANK", "0")) == 0:
        print(plan_banner(config, parts, mixture, options.as_if), flush=True)
        for text in [*(f"changed    {change}" for change in changes), *(f"resume     {note}" for note in resume.notes)]:
            print(text, flush=True)
    if options.dry_run:
        return
    try:
        train(config, parts, mixture, validation, resume)
    except (CheckpointError, RanksDisagree) as error:  # the same on all ranks
        sys.exit(f"error: {error}" if os.environ.get("RANK", "0") == "0" else 1)
    except (StorageError, RunStopped) as error:
        sys.exit(f"error on rank {os.environ.get('RANK', '0')}: {error}")


def train(config: RunConfig, parts, mixture, validation, resume: Resume) -> None:
    """Loads the model (or the checkpoint's weights into it), trains, and writes `model/`."""
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    record_communication(run_dir)
    if config.data.num_workers:
        start_worker_server(parts.encoder)  # loads its modules while the model loads
    accelerator = build_accelerator()
    same_on_all_ranks("configuration", yaml.safe_dump(asdict(config)))
    same_on_all_ranks("data sets", json.dumps(mixture.state(), sort_keys=True))
    same_on_all_ranks("checkpoints", str(resume.state["step"]))
    resume.prepare(run_dir)
    if accelerator.is_main_process:
        save_run(config, run_dir / "config.yaml")

    model, optimizer = build_model(config, accelerator)
    journal = open_journal(config, accelerator, parts, mixture, resume.state["step"])
    checkpoints = Checkpoints(
        resume.folder, model, optimizer.optimizer, config.checkpoint, run_facts(config), resume.mirror, journal.say
    )
    if resume.path:
        checkpoints.load(resume.path)
        journal.say(f"continuing after step {resume.state['step']} from {resume.path}")

    start = resume.state["step"]
    feed = open_feed(config, parts, mixture, accelerator.process_index, accelerator.num_processes, start)
    trainer = Trainer(
        config,
        accelerator,
        model,
        optimizer,
        feed,
        mixture,
        journal,
        checkpoints,
        start_step=start,
        counters=resume.state["counters"],
        validation=validation,
    )
    if not trainer.train():
        accelerator.print(f"stopped after step {trainer.step}; to continue:\n{resume_command(config)}", flush=True)
        finish(accelerator)

    save_model(model, run_dir / "model", config.model, is_main_process=accelerator.is_main_process)
    if accelerator.is_main_process:
        report_export(run_dir / "model", config.data.keep_template)
    finish(accelerator)


if __name__ == "__main__":
    main(RECIPES / "vicuna-7b" / "finetune.yaml")
