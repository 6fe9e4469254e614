"""Repeats a run: prints its whole path as a shell script, from the data to the scores, or walks it.

    python scripts/reproduce.py vicuna-7b --gpu_hour 2.5          # the plan for 8 x H100: nothing need be at hand
    python scripts/reproduce.py vicuna-7b --run --data data       # step by step; run again it goes on
    python scripts/reproduce.py digits --run                      # the quickstart's run, on this machine
    python scripts/reproduce.py --record runs/finetune --scores scores/scores.json

Steps whose output is there and whole are skipped. A run that has ended gets a line in DIR/ledger.jsonl, and its scores
stand in the card of its model; --record adds a run to scripts/benchmarks/ledger.jsonl (or --ledger FILE).
"""

import argparse
import difflib
import re
import sys
from pathlib import Path

from llava_next.paths import local_path, output_file, output_folder
from reproducing.digits import ENVIRONMENT, digits_steps, verdict
from reproducing.steps import Step, Stopped, run_steps, script

DIGITS = "digits"


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    try:
        if args.record:
            add_to_ledger(args.record, args.name, args.scores, args.ledger)
        elif args.name == DIGITS:
            digits(args)
        else:
            published(args)
    except (ValueError, OSError, Stopped) as error:
        sys.exit(f"error: {error}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("name", nargs="?", help="a recipe, such as vicuna-7b, or digits")
    add("--run", action="store_true", help="walk the path instead of printing it")
    add("--step", metavar="PART", help="walk this part of the path only, without headings")
    add("--out", type=output_folder, help="folder for all that is made (default: demo for digits, else runs/NAME)")
    add("--data", type=local_path, default=Path("data"), help="folder of the published data sets (default: data)")
    add("--shards", help="folder or URL for the built data sets (default: OUT/shards)")
    add("--mix", default="mix665k", choices=("mix665k", "mix1m"), help="data of stage 2 (default: mix665k)")
    add("--machine", default="8xh100-80g", help="plan for it, as --as_if of the training (default: 8xh100-80g)")
    add("--gpu_hour", type=float, help="price of a GPU for an hour, for the cost")
    add("--gpus", type=int, help="of this machine, to run on (default: all)")
    add("--pinpoints", help="digits only: canvases as [[height, width], ...]")
    add("--record", type=local_path, metavar="RUN_DIR", help="add a finished run to the ledger")
    add("--scores", type=local_path, help="of --record: scores.json or exact answers (default: of evaluate.every)")
    add("--ledger", type=output_file, help="file of the ledger (default: scripts/benchmarks/ledger.jsonl)")
    args = parser.parse_args(arguments)
    if not args.record:
        check_name(parser, args.name)
        args.out = args.out or Path("demo" if args.name == DIGITS else f"runs/{args.name}")
    return args


def check_name(parser: argparse.ArgumentParser, name: str | None) -> None:
    """Ends with what can be repeated, and the nearest of it."""
    from reproducing.published import published_names

    names = [DIGITS, *published_names()]
    if name not in names:
        near = [known for known in names if name and known.startswith(name.lower())]
        near = near or difflib.get_close_matches(name or "", names, 1, 0.4)
        hint = f" (did you mean {near[0]}?)" if near else ""
        parser.error(f"{name or 'no name'}: there are {', '.join(names)}{hint}")


def digits(args: argparse.Namespace) -> None:
    """The quickstart's run. Raises Stopped."""
    steps = digits_steps(args.out, gpus_here() if args.gpus is None else args.gpus, args.pinpoints)
    if args.step or args.run:
        walk(steps, args.step, ENVIRONMENT)
    else:
        head = ["the digits of the quickstart, on this machine; scripts/quickstart.sh installs and walks this path"]
        print(script(steps, ENVIRONMENT, head))
    if args.run and not args.step:
        answers = args.out / "answers.json"
        finish_run(args, {"pretrain": None, "finetune": answers})
        row, is_inside = verdict(answers)
        print(row)
        if not is_inside and not args.pinpoints:
            raise Stopped("the run read other than expected: scripts/plot_run.py --ledger sets it beside earlier ones")


def published(args: argparse.Namespace) -> None:
    """A recipe on the published data. Raises ValueError, Stopped."""
    from llava_next.training.banner_machine import launch_words
    from llava_next.training.devices.hardware import parse_hardware
    from reproducing.ledger import LEDGER
    from reproducing.published import MIXES, PRETRAIN, Places, forecast, published_steps, score_lines

    if args.pinpoints:
        raise ValueError("--pinpoints is for digits; a recipe's canvases are the published ones")
    hardware, is_walked = parse_hardware(args.machine, "--machine"), bool(args.run or args.step)
    launch = launch_here(args) if is_walked else launch_words(hardware)
    mix = next(source for source in MIXES if source.name == args.mix)
    places = Places(args.data, args.shards or str(args.out / "shards"), args.out, mix)
    if is_walked and (missing := places.missing()):
        names = ", ".join(missing)
        raise ValueError(f"--data: not there: {names}; see data_tools/README.md#the-published-data-sets")
    sources = (("pretrain", PRETRAIN), ("finetune", mix))
    found = tuple(forecast(args.name, stage, args.machine, source, places.built(source)) for stage, source in sources)
    gpus = hardware.per_node if not is_walked else gpus_here() if args.gpus is None else args.gpus
    steps = published_steps(args.name, places, launch, found, args.ledger or LEDGER, gpus)
    if is_walked:
        walk(steps, args.step, {})
        if args.run and not args.step:
            scores = args.out / "scores/scores.json"
            finish_run(args, {"pretrain": None, "finetune": scores if scores.exists() else None})
            row = scores.with_name("row.md")
            print(row.read_text() if row.exists() else "no scores were made")
        return
    head = [
        f"{args.name} on {hardware.name}, the published data in {args.data}: {len(steps)} steps",
        *totals(args, hardware, found),
    ]
    print(script(steps, {}, head, score_lines(args.name)))


def totals(args: argparse.Namespace, hardware, found: tuple) -> list[str]:
    """Disk, hours and cost of the whole path; nothing of it was measured on a GPU."""
    from reproducing.published import gb

    disk = found[0].result + sum(f.disk for f in found)
    shards = gb(sum(f.data for f in found))
    lines = [f"disk, by estimate: {gb(disk)} in {args.out}, {shards} of shards, and the raw data"]
    if any(f.hours is None for f in found):
        return [*lines, "hours: not known for this machine"]
    hours = sum(f.hours for f in found)
    spent = hours * hardware.world
    cost = "--gpu_hour PRICE tells the cost"
    if args.gpu_hour:
        cost = f"{spent * args.gpu_hour:,.0f} at {args.gpu_hour:g} a GPU hour"
    lines.append(
        f"training: {hours:.1f} hours, {spent:.0f} GPU hours ({cost}); a forecast by assumed speeds, without builds "
        "and evaluation"
    )
    return lines


def launch_here(args: argparse.Namespace) -> list[str]:
    """The launch on this machine. Raises ValueError: it has no GPU."""
    from llava_next.training.banner_machine import launch_words
    from llava_next.training.devices.hardware import parse_hardware

    count = gpus_here() if args.gpus is None else args.gpus
    if not count:
        raise ValueError("--run: this machine has no GPU; without --run the path is printed")
    kind = re.split(r"(?<=\d)x", args.machine)[-1]
    return launch_words(parse_hardware(f"{count}x{kind}", "--gpus"))


def gpus_here() -> int:
    """GPUs that torch sees."""
    import torch

    return torch.cuda.device_count()


def walk(steps: list[Step], part: str | None, environment: dict[str, str]) -> None:
    """Runs all steps, or those of a part. Raises ValueError: no such part; Stopped."""
    parts = list(dict.fromkeys(step.part for step in steps))
    if part is not None and part not in parts:
        raise ValueError(f"--step {part}: the parts are {', '.join(parts)}")
    run_steps([step for step in steps if part in (None, step.part)], environment, headings=part is None)


def finish_run(args: argparse.Namespace, runs: dict[str, Path | None]) -> None:
    """Lines of the runs in the ledger, each with the file of its scores or None."""
    ledger = args.ledger or args.out / "ledger.jsonl"
    for name, scores in runs.items():
        add_to_ledger(args.out / name, args.name, scores, ledger)
    print(f"to compare runs: python scripts/plot_run.py --ledger {ledger}")


def add_to_ledger(run_dir: Path, name: str | None, scores: Path | None, ledger: Path | None) -> None:
    """Adds a run to the ledger, and its scores to the card of its model. Raises ValueError."""
    from llava_next.model.folders.card import CARD, add_scores
    from reproducing.ledger import LEDGER, check_scores, last_scores, line_of, read_scores, record

    scores, ledger = scores or last_scores(run_dir), ledger or LEDGER
    found = read_scores(scores)
    line = line_of(run_dir, name or run_dir.resolve().name, found)
    if found:
        check_scores(scores, run_dir)
    if found and (run_dir / "model" / CARD).exists():
        add_scores(run_dir / "model", found)
    told = "has a line in" if record(line, ledger) else "is as it stands in"
    print(f"{run_dir} {told} {ledger}")


if __name__ == "__main__":
    main()
