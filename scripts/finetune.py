"""Stage 2, visual instruction tuning: language model, projector and vision tower learn from conversations.

    accelerate launch --config_file accelerate_configs/h100x8_fsdp.yaml scripts/finetune.py \\
        --model runs/pretrain/model --data.sources s3://bucket/mix665k --run_dir runs/finetune

Without --config it runs the Vicuna-7B recipe. `--help` lists every key, `--dry_run` prints the plan and stops;
with `--as_if 8xh100-80g` it is the plan for that machine.
"""

import json
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path

import yaml

from llava_next.data.loading.loader import start_worker_server
from llava_next.training.banner import plan_banner
from llava_next.training.checkpoints.exports import export_run
from llava_next.training.checkpoints.holding import hold_run
from llava_next.training.checkpoints.recovery import Resume, find_resume, resume_command
from llava_next.training.checkpoints.same_run import run_facts
from llava_next.training.checkpoints.saving import Checkpoints
from llava_next.training.checkpoints.verifying import verified
from llava_next.training.devices.agreement import same_on_all_ranks
from llava_next.training.devices.launch import check_launch
from llava_next.training.devices.parallel import build_accelerator, finish
from llava_next.training.ending import fail, refuse
from llava_next.training.loop import Trainer
from llava_next.training.planning import Plan, check_plan, keep_choice, make_plan
from llava_next.training.provenance import card_writer, keep_provenance
from llava_next.training.pushing import push
from llava_next.training.readiness import check_places, check_ready, keep_companions
from llava_next.training.recipe.config import Options, RunConfig, parse_run, save_run
from llava_next.training.scores import forget_later
from llava_next.training.scoring import Scoring, check_scoring, scoring_lines
from llava_next.training.setup import (
    build_model,
    check_built,
    check_cut,
    check_systems,
    cut_warning,
    empty_model,
    load_parts,
    open_feed,
    open_journal,
    open_mixture,
    report_export,
)
from llava_next.training.validate import Validation
from llava_next.training.watch.health import record_communication
from llava_next.training.watch.launcher import say_last, time_limit
from llava_next.training.watch.memory import MemoryWatch
from llava_next.training.watch.stopping import StoppedEarly, StopRequest
from llava_next.training.watch.trackers import start_trackers

RECIPES, EVALUATE = (Path(__file__).parent / name for name in ("recipes", "evaluate.py"))


def main(default_recipe: Path) -> None:
    """Runs one stage. Whatever happens ends in one message and an exit status."""
    with StopRequest() as stop:  # by a signal, by a file, or because the launcher is gone
        try:
            run(default_recipe, stop)
        except (Exception, StoppedEarly) as error:
            fail(error)


def read_parts(config: RunConfig, options: Options):
    """The parts of the model folder, for a plan alone also of less."""
    if not options.dry_run:
        return load_parts(config)
    from llava_next.training.stand_ins import plan_parts  # what composes models: no run waits for its import

    return plan_parts(config)


def run(default_recipe: Path, stop: StopRequest) -> None:
    """Everything a user can get wrong is an error before the model loads."""
    try:
        config, options = parse_run(default_recipe=default_recipe)
        if not options.dry_run:
            check_built(config)
            check_places(config)
        elif os.environ.get("RANK", "0") != "0":
            return  # rank 0 plans
        parts = read_parts(config, options)
        mixture = open_mixture(config, parts)
        resume = find_resume(config) if config.run_dir else Resume(Path())
        if resume.path:
            resume.notes += mixture.resume(resume.state, config.data.allow_changed_plan)
        if not options.dry_run:
            check_cut(config, mixture)
            check_systems(config, parts, mixture)
            check_launch(lambda: empty_model(parts))
        plan = make_plan(config, parts, mixture, options.as_if)
        validation = Validation(plan.config, parts) if config.data.validation else None
        if not options.dry_run:
            if validation:
                check_cut(validation.config, validation.mixture, "data.validation")
                check_systems(validation.config, parts, validation.mixture)
            check_plan(plan)
            resume.notes += check_ready(config, parts, mixture, resume)
    except (ValueError, OSError) as error:
        refuse(error)

    if int(os.environ.get("RANK", "0")) == 0:
        print(plan_banner(plan, parts, mixture, options.command, options.dry_run), flush=True)
        if validation and (warning := cut_warning(validation.mixture)):
            print(f"held out   {warning}", flush=True)
        notes = [*scoring_lines(config), *(f"note       {note}" for note in resume.notes)]
        for text in [*notes, *time_limit(config.run_dir)]:
            print(text, flush=True)
    if options.dry_run:
        return
    train(config, plan, options, parts, mixture, validation, resume, stop)


def train(
    given: RunConfig, plan: Plan, options: Options, parts, mixture, validation, resume: Resume, stop: StopRequest
) -> None:
    """Loads the model (or the checkpoint's weights into it), trains, and writes `model/`."""
    config = plan.config
    run_dir, how_to_go_on = Path(config.run_dir), resume_command(config)
    record_communication(run_dir)
    if config.data.num_workers:
        start_worker_server(parts.encoder)  # loads its modules while the model loads
    accelerator = build_accelerator()
    check_same(given, plan, mixture, resume)
    scores = check_scoring(config, EVALUATE)
    hold_run(config, resume, options.take_over)  # one run at a time; nothing was written yet
    replan = partial(mixture.resume, allow_changed_plan=config.data.allow_changed_plan)
    resume = verified(config, resume, replan, accelerator.print)
    kept = (partial(save_run, given, run_dir / "config.yaml"), partial(keep_choice, plan, run_dir))
    kept += (partial(keep_companions, config, parts), partial(keep_provenance, plan, mixture))
    kept += (partial(forget_later, run_dir, resume.state["step"], bool(scores)),)
    resume.prepare(run_dir, lambda: [keep() for keep in kept])
    start_trackers(config, accelerator, accelerator.print)

    memory = MemoryWatch(run_dir, accelerator.process_index, accelerator.device, plan.picking, plan.picked)
    with memory.computing("loading the model", resume.state["step"] + 1):
        model, optimizer = build_model(config, accelerator)
    journal = open_journal(config, accelerator, parts, mixture, resume.state["step"])
    journal.changed(resume.notes)
    checkpoints = Checkpoints(
        resume.folder, model, optimizer.optimizer, config.checkpoint, run_facts(config), resume.mirror, journal.say
    )
    if resume.path:
        checkpoints.load(resume.path)
        journal.say(f"continuing after step {resume.state['step']} from {resume.path}")

    start = resume.state["step"]
    scoring = Scoring(config, scores, EVALUATE, journal, accelerator.is_main_process) if scores else None
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
        resume.state,
        stop,
        validation=validation,
        scoring=scoring,
        memory=memory,
    )
    if not trainer.train():
        say_last(f"stopped after step {trainer.step}; to continue:\n{how_to_go_on}", 0, on_all_ranks=True)
    elif not leave_result(trainer, resume):
        say_last(f"stopped before {run_dir}/model had its scores; to make them:\n{how_to_go_on}", 0, on_all_ranks=True)
    else:
        say_last("", 0)
        finish(accelerator, last=partial(push, config))
    finish(accelerator)


def check_same(given: RunConfig, plan: Plan, mixture, resume: Resume) -> None:
    """Refuses ranks that are about to do different things. A collective."""
    same_on_all_ranks("configuration", yaml.safe_dump(asdict(given)))
    same_on_all_ranks("plans for their memory (a run needs GPUs of one kind)", plan.picked.options)
    same_on_all_ranks("data sets", json.dumps(mixture.state(), sort_keys=True))
    same_on_all_ranks("checkpoints", str(resume.state["step"]))


def leave_result(trainer: Trainer, resume: Resume) -> bool:
    """Writes and proves `model/`, and has it scored. Returns False when asked to stop before it was."""
    config = trainer.config
    check = partial(report_export, keep_template=config.data.keep_template)
    tell = card_writer(config, trainer.mixture, trainer.step)
    export_run(trainer.model, config, resume.folder, check=check, tell=tell)
    return trainer.score_result()


if __name__ == "__main__":
    main(RECIPES / "vicuna-7b" / "finetune.yaml")
