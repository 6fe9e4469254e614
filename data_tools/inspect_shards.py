"""The data doctor: tells whether a data set is fit for training, and shows what the model would see of it.

    python data_tools/inspect_shards.py URL --html report.html
    python data_tools/inspect_shards.py URL --html report.html --verify --model models/vicuna-7b --template vicuna_v1
    python data_tools/inspect_shards.py --step 1200 --config runs/finetune/config.yaml --ranks 8
    python data_tools/inspect_shards.py train.json --image_root ROOT --model models/vicuna-7b

The first reads the index and a few samples. `--verify` reads everything: checksums, pictures, texts, against the index.
With a recipe (--config) or a model, lengths, supervision, steps and packing are those of that run; any key of the run's
configuration can follow, as in `--data.max_length 2048`. `--step` lists the samples, bins and costs of a step of a run
from the plan alone. The last looks at records that are not built yet, pictures by their headers.

Exit status: 0 no faults; 1 faults found, or not a data set that can be opened; 2 wrong usage.
"""

import argparse
import os
import sys
from pathlib import Path

from doctor import report_page, survey
from doctor.examining import examine, summarise
from doctor.step_listing import follow_run, list_step
from llava_next.data.format.tar import one_line
from llava_next.data.inputs.samples import model_template
from llava_next.data.inputs.unbuilt import records_file
from llava_next.data.storage.client import written_aside
from llava_next.paths import output_file
from llava_next.training.planning import with_default_budgets
from llava_next.training.recipe.config import RunConfig, parse_run
from llava_next.training.setup import Parts, load_parts, open_mixture, read_model_config

RECIPES = Path(__file__).resolve().parents[1] / "scripts/recipes"


def load_run(options: argparse.Namespace) -> tuple[RunConfig, Parts] | None:
    """The run that --config, --model and the overrides describe. Raises ValueError."""
    if options.config is None and options.model is None:
        return None
    own = model_template(Path(options.model)) if options.config is None and not options.template else None
    template = options.template or (own and own.name)
    is_first = Path(options.config or "").stem.startswith("pretrain") or options.template == "plain"
    stage = "pretrain" if is_first else "finetune"
    given = ["--run_dir", os.devnull]  # needed by a run, not here; a recipe's own comes after it
    for key, value in (
        ("config", options.config),
        ("model", options.model),
        ("data.template", template),
        ("data.sources", options.url),
        ("data.image_root", options.image_root),
    ):
        given += [f"--{key}", str(value)] if value is not None else []
    recipe = RECIPES / "vicuna-7b" / f"{stage}.yaml"
    if options.config is None:
        recipe = fitting_recipe(template, read_model_config(options.model), stage)
        print(f"assumed: the recipe {recipe.relative_to(RECIPES.parents[1])}; --config names another")
    config, _ = parse_run([*given, *options.overrides], default_recipe=recipe)
    return with_default_budgets(config), load_parts(config)


def fitting_recipe(template: str | None, model_config, stage: str) -> Path:
    """The recipe of scripts/recipes that fits a model: its family by template or language model, its tower by kind."""
    text = model_config.text_config
    families = {"vicuna_v1": "vicuna-7b", "mistral": "mistral-7b", "llama_3": "llama3-8b", "qwen": "qwen2-7b"}
    by_kind = {"qwen2": "qwen2-7b", "mistral": "mistral-7b"}
    llama = "llama3-8b" if text.vocab_size > 100_000 else "vicuna-7b"
    family = families.get(template) or by_kind.get(text.model_type, llama)
    if text.model_type == "qwen3":
        family = "qwen3-8b"
    elif text.model_type == "llama" and text.rope_parameters["rope_type"] == "llama3":
        family = "llama3.1-8b"
    elif text.model_type == "llama" and text.tie_word_embeddings:
        family = "smollm2-1.7b"
    tower = "-siglip" if "siglip" in model_config.vision_config.model_type else ""
    found = (RECIPES / f"{family}{ending}" / f"{stage}.yaml" for ending in (tower, "", "-siglip2"))
    return next(path for path in found if path.exists())


def open_data(options: argparse.Namespace) -> survey.Training | None:
    """That run with the plan over its data sets; exits when either cannot be had."""
    try:
        run = load_run(options)
    except (ValueError, OSError) as error:
        options.parser.error(str(error))
    try:
        return run and survey.Training(*run, open_mixture(*run))
    except (ValueError, OSError) as error:
        sys.exit(f"inspect_shards: {error}")


def print_step(options: argparse.Namespace, training: survey.Training) -> None:
    """Prints the step that --step asks for."""
    try:
        follow_run(training.config, training.mixture)
        print("\n".join(list_step(training.config, training.mixture, options.step, options.ranks)))
    except ValueError as error:
        options.parser.error(str(error))


def print_report(options: argparse.Namespace, training: survey.Training | None) -> None:
    """Looks at the data set, writes the page and prints the summary."""
    try:
        report = examine(options, training)
        if options.html is not None:
            with written_aside(options.html) as temporary:
                temporary.write_text(report_page.render(report), encoding="utf-8")
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: a worker process was killed
        sys.exit(f"inspect_shards: {error}")
    print("\n".join(map(one_line, summarise(report))))
    if options.html is not None:
        print(f"page: {options.html}, {options.html.stat().st_size / 1e6:.1f} MB")
    if report["shards_wrong"] or any(entry["level"] == "fault" for entry in report["problems"]):
        sys.exit(1)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; what is no option of this tool is one of the run's configuration, in `overrides`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    known = [
        add("--html", type=output_file, metavar="FILE", help="write the report as a page"),
        add("--verify", action="store_true", help="read everything"),
        add("--config", metavar="RECIPE.yaml", help="the run to inspect for: a recipe, or config.yaml of a run folder"),
        add("--model", metavar="DIR", help="LLaVA-NeXT model folder, where the recipe names none"),
        add("--template", help="chat template (default: the recipe's, or the model's own)"),
        add("--image_root", metavar="DIR", help="of a file of records: what image paths are relative to"),
        add("--samples", type=int, default=60, metavar="N", help="shown on the page (default: %(default)s)"),
        add("--ranks", type=int, default=8, metavar="N", help="GPUs to deal a step to (default: %(default)s)"),
        add("--step", type=int, metavar="N", help="list this step of a run, counted from 0"),
        add("--name", help="title of the page (default: the folder's name)"),
        add("--workers", type=int, default=os.cpu_count(), help="processes; 0: none (default: the number of CPUs)"),
    ]
    add("url", nargs="?", help="folder or URL of the data set, or a file of records that is not built yet")
    ours, overrides = split_overrides(
        sys.argv[1:] if arguments is None else arguments, {o for action in known for o in action.option_strings}
    )
    options = parser.parse_args(ours)
    options.overrides, options.parser = overrides, parser
    for name, least in (("samples", 1), ("ranks", 1), ("workers", 0), ("step", 0)):
        if getattr(options, name) is not None and getattr(options, name) < least:
            parser.error(f"--{name} must be {least} or more")
    if options.step is None and options.url is None:
        parser.error("give the URL of a data set, or --step N --config RECIPE")
    if options.step is not None and options.config is None:
        parser.error("--step needs --config: the plan is made from a run's configuration")
    if options.url is not None and records_file(options.url) is not None and options.step is None:
        if options.config is None and options.model is None:
            parser.error(f"{options.url} is no folder of shards; of a file of records give --config or --model too")
        if options.verify:
            parser.error("--verify reads shards; a file of records is read in whole by the build")
    if overrides and options.config is None and options.model is None:
        parser.error(f"{overrides[0]} is not an option here; keys of a run go with --config or --model")
    return options


def split_overrides(arguments: list[str], known: set[str]) -> tuple[list[str], list[str]]:
    """This tool's arguments, and keys of a run with their values."""
    ours, overrides = [], []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word.partition("=")[0] in known | {"--help"}:
            ours.append(word)
            continue
        overrides.append(word)
        if "=" not in word and rest and not rest[0].startswith("--"):
            overrides.append(rest.pop(0))
    return ours, overrides


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    try:
        training = open_data(options)
        print_report(options, training) if options.step is None else print_step(options, training)
    except KeyboardInterrupt:
        sys.exit("inspect_shards: interrupted")
    except BrokenPipeError:  # the reader, `head` for one, had enough; nothing more is flushed to it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
