"""Stage 2, visual instruction tuning: language model, projector and vision tower learn from conversations.

    accelerate launch --config_file accelerate_configs/h100x8_fsdp.yaml scripts/finetune.py \\
        --model runs/pretrain/model --data.sources s3://bucket/mix665k --run_dir runs/finetune

Without --config it runs the Vicuna-7B recipe. `--help` lists every key, `--dry_run` prints the plan and stops.
"""

import os
import sys
from pathlib import Path

from llava_next.data.loader import build_loader, steps
from llava_next.model.export import save_model
from llava_next.training.checkpoint import checkpoint_to_resume, load_checkpoint, read_manifest
from llava_next.training.config import RunConfig, parse_run, save_run
from llava_next.training.loop import Trainer
from llava_next.training.parallel import build_accelerator, finish, require_fsdp2_launch
from llava_next.training.setup import build_model, load_parts, open_mixture, plan_banner, report_export

RECIPES = Path(__file__).parent / "recipes"


def main(default_recipe: Path) -> None:
    """Runs one stage. Everything a user can get wrong is an error before the model loads."""
    try:
        config, dry_run = parse_run(default_recipe=default_recipe)
        parts = load_parts(config)
        mixture = open_mixture(config, parts)
        checkpoint = checkpoint_to_resume(Path(config.run_dir) / "checkpoints", config.checkpoint.resume)
        state = read_manifest(checkpoint)["state"] if checkpoint else {"step": 0, "counters": {}}
        if checkpoint:
            mixture.check_state(state)
        if not dry_run:
            require_fsdp2_launch()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

    if int(os.environ.get("RANK", "0")) == 0:
        print(plan_banner(config, parts, mixture, world=int(os.environ.get("WORLD_SIZE", "1"))), flush=True)
    if dry_run:
        return
    train(config, parts, mixture, checkpoint, state)


def train(config: RunConfig, parts, mixture, checkpoint: Path | None, state: dict) -> None:
    """Loads the model (or the checkpoint's weights into it), trains, and writes `model/`."""
    accelerator = build_accelerator()
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        save_run(config, run_dir / "config.yaml")

    model, optimizer = build_model(config, accelerator)
    if checkpoint:
        load_checkpoint(checkpoint, model, optimizer.optimizer)
        accelerator.print(f"continuing after step {state['step']} from {checkpoint}", flush=True)

    data = config.data
    loader = build_loader(
        mixture,
        parts.encoder,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        token_budget=data.token_budget,
        tile_budget=data.tile_budget,
        start_step=state["step"],
        num_workers=data.num_workers,
    )
    trainer = Trainer(
        config,
        accelerator,
        model,
        optimizer,
        steps(loader),
        start_step=state["step"],
        total_steps=mixture.total_steps,
        source_names=mixture.names,
        state=mixture.state(),
        counters=state["counters"],
    )
    if not trainer.train():
        accelerator.print(f"stopped after step {trainer.step}; the same command continues from there", flush=True)
        finish(accelerator)

    save_model(model, run_dir / "model", config.model, is_main_process=accelerator.is_main_process)
    if accelerator.is_main_process:
        report_export(run_dir / "model", config.data.keep_template)
    finish(accelerator)


if __name__ == "__main__":
    main(RECIPES / "vicuna-7b" / "finetune.yaml")
