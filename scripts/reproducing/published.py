"""The path of a recipe on the published data: what is expected of each step, what it takes, and how it is started."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from evaluation.published import NOISES, needs_judge, standard_error, table
from reproducing.ledger import known_index
from reproducing.steps import ROOT, Step, told_dataset, whole_dataset, whole_model

RECIPES = ROOT / "scripts" / "recipes"
TOWERS = {"openai/clip-vit-large-patch14-336": "clip-336", "google/siglip-so400m-patch14-384": "siglip-384"}
# Questions of the benchmarks as lmms-eval asks them, for the noise of published scores; of SEED the image part, of
# MMBench the questions, not their rotations.
QUESTIONS = {
    "seedbench": 14233,
    "scienceqa_img": 2017,
    "mmbench_en_dev_static": 1164,
    "textvqa_val": 5000,
    "gqa": 12578,
    "mmmu_val": 900,
}


@dataclass(frozen=True)
class Source:
    """A published data set: records and images below `--data`, expected counts, what to add to the build.

    Args:
        like: profile whose assumed sizes and lengths stand in for it in forecasts.
    """

    name: str
    records: str
    images: str
    expect: str
    like: str
    more: tuple[str, ...] = ()

    @property
    def counts(self) -> dict:
        """As published, see `--expect`."""
        return json.loads((ROOT / self.expect).read_bytes())

    @property
    def samples(self) -> int:
        """As published, where only that is: about so many."""
        return self.counts["total"] or self.counts["about"]


PRETRAIN = Source(
    "pretrain",
    "blip_laion_cc_sbu_558k.json",
    "llava_pretrain/images",
    "data_tools/expect/llava-pretrain-558k.json",
    "pretrain558k",
    ("--source", "llava_pretrain"),
)
MIXES = (
    Source("mix665k", "llava_v1_5_mix665k.json", ".", "data_tools/expect/mix665k.json", "mix665k"),
    Source("mix1m", "open-llava-next_instruct_mix1M.json", ".", "data_tools/expect/mix1m.json", "mix665k"),
)


@dataclass(frozen=True)
class Places:
    """Where things lie: raw data, shards (a folder or a URL), all else."""

    data: Path
    shards: str
    out: Path
    mix: Source

    def built(self, source: Source) -> str:
        """The shards of a data set."""
        return f"{self.shards.rstrip('/')}/{source.name}"

    def missing(self) -> list[str]:
        """Files that a build needs and that are not there."""
        sources = [source for source in (PRETRAIN, self.mix) if not whole_dataset(self.built(source))]
        needed = [self.data / name for source in sources for name in (source.records, source.images)]
        return [str(path) for path in needed if not path.exists()]


@dataclass(frozen=True)
class Forecast:
    """What a stage takes, by the project's own plan: bytes and hours are estimates.

    Args:
        hours: None where the machine's peak is unknown.
        data: bytes of its shards; kept: checkpoints at a time.
        picked: what is left to the machine; too_large: what does not fit.
    """

    samples: int
    steps: int
    batch_size: int
    hours: float | None
    checkpoint: int
    kept: int
    result: int
    data: int
    picked: str
    too_large: str

    @property
    def disk(self) -> int:
        """Bytes that the run folder takes at most."""
        return self.kept * self.checkpoint + self.result


def published_names() -> list[str]:
    """Recipes on the published data."""
    return sorted(path.parent.name for path in RECIPES.glob("*/finetune.yaml") if path.parent.name != "digits")


def read_recipe(name: str) -> tuple[str, str, str]:
    """Language model, vision tower and chat template of a recipe."""
    import yaml

    found = yaml.safe_load((RECIPES / name / "finetune.yaml").read_text())
    llm, _, tower = found["model"].partition("+")
    return llm, tower or next(iter(TOWERS)), found["data"]["template"]


def forecast(name: str, stage: str, machine: str, source: Source, shards: str) -> Forecast:
    """What a stage takes on a machine (as `--as_if`); of built local shards their own sizes. Raises ValueError."""
    from llava_next.training.forecast.budget import units
    from llava_next.training.planning import make_plan
    from llava_next.training.recipe.config import parse_run
    from llava_next.training.recipe.optim import freeze
    from llava_next.training.setup import empty_model, open_mixture
    from llava_next.training.stand_ins import plan_parts

    recipe = RECIPES / name / f"{stage}.yaml"
    stand_in = {"path": f"profile:{source.like}", "repeat": 1.0}
    if (likes := next((s.samples for s in (PRETRAIN, *MIXES) if s.name == source.like), None)) is not None:
        stand_in["repeat"] = source.samples / likes
    sources = shards if whole_dataset(shards) else json.dumps([stand_in])
    words = ["--config", str(recipe), "--dry_run", "--as_if", machine, "--data.sources", sources]
    config, options = parse_run(words, recipe)
    parts = plan_parts(config)
    mixture = open_mixture(config, parts)
    plan = make_plan(config, parts, mixture, options.as_if)
    model = empty_model(parts)
    freeze(model, config.optim.rates)
    sizes, every, steps = units(model).whole, config.checkpoint.every, mixture.total_steps
    return Forecast(
        samples=mixture.samples_per_epoch,
        steps=steps,
        batch_size=config.data.batch_size,
        hours=plan.picked.seconds * steps / 3600 if plan.hardware.peak else None,
        checkpoint=12 * sizes.trainable,
        # one more while it is written
        kept=min(math.ceil(steps / every) if every else 1, config.checkpoint.keep_last + 1),
        result=2 * sizes.parameters,
        data=round(sum(s.bytes for info in mixture.infos for s in info.shards) * stand_in["repeat"]),
        picked=plan.picked.options,
        too_large=plan.too_large,
    )


def published_steps(
    name: str, places: Places, launch: list[str], forecasts: tuple[Forecast, Forecast], ledger: Path, gpus: int = 1
) -> list[Step]:
    """The whole path.

    Args:
        launch: `accelerate launch ...` up to the script, for training.
        forecasts: of stage 1 and stage 2.
        gpus: of one machine, to score on.
    """
    llm, tower, template = read_recipe(name)
    model, out = places.out / "model", places.out
    runs, (first, second) = [out / "pretrain", out / "finetune"], forecasts
    compose = ("--vision", tower, "--llm", llm, "--template", template, "--out", str(model))
    tasks = dict.fromkeys(row["task"] for row in published_rows(name) if row["is_asked"])
    evaluate = ("--model", str(runs[1] / "model"), "--tasks", ",".join(tasks), "--out", str(out / "scores"))
    steps = [
        Step(
            "compose",
            (f"{llm} and {tower} become a model folder, {gb(first.result)}; they are fetched from the hub",),
            ("python", "scripts/compose.py", *compose),
            lambda: whole_model(model),
            model,
        ),
        *(
            build(name, source, tower, places, found, ledger)
            for source, found in ((PRETRAIN, first), (places.mix, second))
        ),
    ]
    given = (("pretrain", model, PRETRAIN), ("finetune", runs[0] / "model", places.mix))
    for number, ((script, start, source), run, found) in enumerate(zip(given, runs, forecasts, strict=True), 1):
        steps.append(stage(number, name, script, start, places.built(source), run, launch, found))
    if tasks:
        about = ("the benchmarks of the table below; data sets are fetched from the hub; its hours are not forecast",)
        begin = ("accelerate", "launch", "--num_processes", str(gpus)) if gpus > 1 else ("python",)
        steps.append(Step("evaluate", about, (*begin, "scripts/evaluate.py", *evaluate)))
    return steps


def build(name: str, source: Source, tower: str, places: Places, found: Forecast, ledger: Path) -> Step:
    """The shards of a published data set."""
    shards = places.built(source)
    words = ("--json", places.data / source.records, "--images", places.data / source.images, "--out", shards)
    words += ("--tower", TOWERS[tower]) if tower in TOWERS else ("--model", places.out / "model")
    words += (*source.more, "--expect", source.expect)
    index = known_index(ledger, name, source.name) or "unknown until built"
    count = f"{'' if source.counts['total'] else 'about '}{source.samples:,} samples"
    about = (
        f"{source.name}: {count}, which the build checks ({source.expect}); sha256 of its dataset.json: {index}; about "
        f"{gb(found.data)}",
        "samples whose pictures are missing or damaged are left out and listed in rejected.jsonl",
    )
    return Step(
        f"build-{source.name}",
        about,
        ("python", "data_tools/build_shards.py", *map(str, words)),
        lambda: told_dataset(shards),
    )


def stage(
    number: int, name: str, script: str, start: Path, shards: str, run: Path, launch: list[str], found: Forecast
) -> Step:
    """A training."""
    words = ("--config", f"scripts/recipes/{name}/{script}.yaml", "--model", start, "--data.sources", shards)
    hours = "hours unknown" if found.hours is None else f"{found.hours:.1f} hours"
    about = [
        f"{found.steps:,} steps of {found.batch_size} samples, {hours}; {found.kept} checkpoint(s) of "
        f"{gb(found.checkpoint)} at a time, result {gb(found.result)}; picked: {found.picked}"
    ]
    about += [f"does not fit: {found.too_large}"] if found.too_large else []
    return Step(
        f"stage-{number}",
        tuple(about),
        (*launch, f"scripts/{script}.py", *map(str, words), "--run_dir", str(run)),
        lambda: whole_model(run / "model"),
        run / "model",
    )


def gb(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def published_rows(name: str) -> list[dict]:
    """Published scores of models of this language model's template: `label`, `task`, `model`, `value`, `tolerance`,
    `source`, `is_asked`. Empty where none is published: with SigLIP, or a language model of another width.
    """
    _, tower, template = read_recipe(name)
    if tower != next(iter(TOWERS)):
        return []
    known = table()
    return [
        {
            "label": label,
            "task": entry["task"],
            "model": model["name"],
            "value": model["scores"][entry.get("as", label)],
            "tolerance": tolerance(entry, model["scores"][entry.get("as", label)]),
            "source": model["source"],
            "is_asked": is_asked(entry),
        }
        for label, entry in known["benchmarks"].items()
        for model in known["models"]
        if model["template"] == template and entry.get("as", label) in model["scores"]
    ]


def is_asked(entry: dict) -> bool:
    """Whether a benchmark can be scored without a judge or a server of its own."""
    return bool(entry["task"]) and not needs_judge(entry["task"], [entry["metric"]])


def tolerance(entry: dict, value: float) -> float | None:
    """`NOISES` binomial standard errors of a score in percent; None where it is no share of right answers."""
    count = QUESTIONS.get(entry["task"])
    if not entry.get("share") or count is None:
        return None
    return 100 * NOISES * standard_error(value / 100, count)


def score_lines(name: str) -> list[str]:
    """What to expect of the evaluation, for people."""
    rows = published_rows(name)
    if not rows:
        return ["expected scores: none is published of this pairing"]
    lines = [
        f"expected scores, as published (± {NOISES} binomial standard errors where a score is a share of right "
        "answers); Open-LLaVA-NeXT's are of mix1m, the others saw data that are not all public"
    ]
    for label in dict.fromkeys(row["label"] for row in rows if row["is_asked"]):
        found = [row for row in rows if row["label"] == label]
        noises = ["" if row["tolerance"] is None else f" ± {row['tolerance']:.1f}" for row in found]
        about = [f"{row['value']:g}{noise} ({row['model']})" for row, noise in zip(found, noises, strict=True)]
        lines.append(f"   {label}, {found[0]['task']}: {', '.join(about)}")
    return [*lines, *(f"   {source}" for source in dict.fromkeys(row["source"] for row in rows))]
