"""Every recipe has exactly the published figures, and its printed commands fit together."""

import math
import re
import shlex
from types import SimpleNamespace

import pytest

import compose
import inspect_shards
from llava_next.anyres import ORIGINAL_336, ORIGINAL_384, AnyRes, original_pinpoints
from llava_next.model.folders.dry import architecture
from llava_next.templates import get_template
from llava_next.training.forecast.picking import default_budgets
from llava_next.training.recipe.config import parse_run
from llava_next.training.recipe.optim import rate_multiplier, warmup_steps
from llava_next.training.setup import load_parts
from support.launching import ROOT

RECIPES = ROOT / "scripts/recipes"
TEMPLATES = {"vicuna-7b": "vicuna_v1", "llama3-8b": "llama_3", "qwen2-7b": "qwen", "mistral-7b": "mistral"}
MODELS = [llm + tower for llm in TEMPLATES for tower in ("", "-siglip")]
# whose rates nobody published
OURS = {"qwen3-8b-siglip2": "qwen3", "llama3.1-8b": "llama_3_1", "smollm2-1.7b-siglip2": "smollm"}
TEMPLATES |= {model.removesuffix("-siglip2"): template for model, template in OURS.items()}
EVERY = [*MODELS, *OURS]
# geometry of a tower, and its largest AnyRes picture in tokens
LARGEST = {"": (AnyRes(336, 14, ORIGINAL_336), 2928), "-siglip": (AnyRes(384, 14, ORIGINAL_384), 3699)}
LARGEST["qwen3-8b-siglip2"] = LARGEST["-siglip"]
LARGEST["smollm2-1.7b-siglip2"] = (AnyRes(256, 16, original_pinpoints(256)), 1312)
NEEDED = ["--model", "m", "--run_dir", "r", "--data.sources", "s"]


def recipe(model: str, stage: str, *options: str):
    """The run that `scripts/STAGE.py --config RECIPE` makes of a recipe."""
    given = ["--config", str(RECIPES / model / f"{stage}.yaml"), *NEEDED, *options]
    script = "pretrain" if stage == "pretrain" else "finetune"
    return parse_run(given, default_recipe=RECIPES / "vicuna-7b" / f"{script}.yaml")[0]


def llm_of(model: str) -> str:
    return model.removesuffix("2").removesuffix("-siglip") if "siglip" in model else model


def largest_of(model: str) -> tuple[AnyRes, int]:
    return LARGEST.get(model) or LARGEST[model.removeprefix(llm_of(model))]


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("model", EVERY)
def test_recipe_has_exactly_the_published_figures(model, stage):
    run = recipe(model, stage)
    data, optim = run.data, run.optim
    first = stage == "pretrain"
    assert data.batch_size == (256 if first else 128) and data.epochs == 1
    assert data.template == ("plain" if first else TEMPLATES[llm_of(model)])
    short = ("vicuna-7b", "qwen2-7b", "mistral-7b", "smollm2-1.7b-siglip2")
    assert data.max_length == (4096 if model in short else 6144)
    llm = None if first else 1e-5 if llm_of(model) in ("qwen2-7b", "qwen3-8b") else 2e-5
    rates = optim.rates
    assert (rates.llm, rates.vision) == (llm, None if first else 2e-6)
    assert (rates.projector, rates.newline) == ((1e-3, 1e-3) if first else (2e-5, llm))
    assert (tuple(optim.betas), optim.eps, optim.weight_decay) == ((0.9, 0.999), 1e-8, 0.0)
    assert (optim.warmup_ratio, optim.max_grad_norm, optim.loss_weighting) == (0.03, 1.0, "token")
    assert run.seed == 42 and run.max_steps is None
    text = (RECIPES / model / f"{stage}.yaml").read_text()
    assert ("ours, not published" in text) == (model in OURS and not first)


@pytest.mark.parametrize("kind", ["lora", "qlora"])
@pytest.mark.parametrize("model", EVERY)
def test_lora_recipe_has_the_published_figures_and_is_stage_2_in_all_else(model, kind):
    run, full = recipe(model, kind), recipe(model, "finetune")
    assert run.quantize == ("nf4" if kind == "qlora" else None)
    lora, rates = run.lora, run.optim.rates
    assert (lora.r, lora.alpha, lora.dropout, lora.targets) == (128, 256, 0.05, ["llm"])
    assert (lora.rank_scaling, lora.dora) == ("lora", False)
    assert (rates.llm, rates.projector, rates.vision, rates.newline) == (2e-4, 2e-5, None, 2e-5)
    for key in ("template", "batch_size", "epochs", "max_length"):
        assert getattr(run.data, key) == getattr(full.data, key)
    assert (run.optim.warmup_ratio, run.optim.weight_decay, run.seed) == (0.03, 0.0, 42)
    (command,) = commands(model, kind)
    assert (ROOT / command[3]).exists() and option(command, "--config") == f"scripts/recipes/{model}/{kind}.yaml"
    assert option(command, "--model") == option(commands(model, "finetune")[0], "--model")


@pytest.mark.parametrize("model", EVERY)
def test_longest_picture_fits_the_length_and_the_machine_sets_the_budgets(model):
    anyres, largest = largest_of(model)
    sides = (512, 672, 1344, 768)
    width, height = max(((w, h) for w in sides for h in sides), key=lambda s: anyres.num_tokens(*s))
    assert anyres.num_tokens(width, height) == largest
    for stage in ("pretrain", "finetune"):
        data = recipe(model, stage).data
        assert largest < data.max_length and data.token_budget == data.tile_budget == "auto"
        tokens, tiles = default_budgets(data.max_length)  # without a GPU: two of the longest
        assert tokens == 2 * data.max_length
        # tiles never bind before tokens do, unless a tile is few tokens: a full budget of the largest pictures, 5 each
        assert 5 * (tokens // largest + 1) <= tiles or anyres.patches_per_tile < 576


@pytest.mark.parametrize(
    ("stage", "samples", "steps", "warmup"),
    [("pretrain", 558_128, 2_181, 66), ("finetune", 665_298, 5_198, 156), ("finetune", 779_289, 6_089, 183)],
)
def test_steps_and_warm_up_are_the_published_ones(stage, samples, steps, warmup):
    run = recipe("vicuna-7b", stage)
    assert math.ceil(samples / run.data.batch_size) == steps
    assert warmup_steps(steps, run.optim.warmup_ratio) == warmup
    assert rate_multiplier(0, steps, 0.03) == 0 and rate_multiplier(warmup, steps, 0.03) == 1


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_script_without_config_runs_vicuna_7b(stage):
    default = parse_run(NEEDED, default_recipe=RECIPES / "vicuna-7b" / f"{stage}.yaml")[0]
    assert default == recipe("vicuna-7b", stage)


def test_own_copy_of_a_recipe_anywhere_means_the_same_and_options_override_it(tmp_path):
    for stage in ("pretrain", "finetune"):
        copy = tmp_path / "mine.yaml"
        copy.write_text((RECIPES / "qwen2-7b-siglip" / f"{stage}.yaml").read_text())
        ours = parse_run(["--config", str(copy), *NEEDED], RECIPES / "vicuna-7b" / f"{stage}.yaml")[0]
        assert ours == recipe("qwen2-7b-siglip", stage)
    changed = recipe("qwen2-7b", "finetune", "--optim.rates.llm", "3e-5", "--data.max_length", "2048")
    assert (changed.optim.rates.llm, changed.optim.rates.vision, changed.data.max_length) == (3e-5, 2e-6, 2048)


def commands(model: str, stage: str) -> list[list[str]]:
    """The commands in a recipe's header, split as a shell would."""
    lines = [
        line[1:].strip() for line in (RECIPES / model / f"{stage}.yaml").read_text().splitlines() if line[:1] == "#"
    ]
    text = "\n".join(lines).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if re.match(r"accelerate|python ", line)]


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


@pytest.mark.parametrize("model", EVERY)
def test_printed_commands_name_what_exists_and_stage_2_takes_stage_1s_model(model):
    composing, first = commands(model, "pretrain")
    (second,) = commands(model, "finetune")
    assert (ROOT / composing[1]).exists() and option(composing, "--template") == TEMPLATES[llm_of(model)]
    assert architecture(option(composing, "--llm")).model_type in ("llama", "qwen2", "mistral", "qwen3")
    tower, anyres = architecture(option(composing, "--vision")), largest_of(model)[0]
    assert (tower.image_size, tower.patch_size) == (anyres.tile_size, anyres.patch_size)
    named = "+".join((option(composing, "--llm"), option(composing, "--vision")))
    named = named.removesuffix("+openai/clip-vit-large-patch14-336")
    for stage in ("pretrain", "finetune", "lora"):
        assert f"\nmodel: {named}  #" in (RECIPES / model / f"{stage}.yaml").read_text()
    for stage, command in (("pretrain", first), ("finetune", second)):
        assert command[:3] == ["accelerate", "launch", "--config_file"] and command[4] == f"scripts/{stage}.py"
        assert (ROOT / command[3]).exists() and (ROOT / command[4]).exists()
        assert option(command, "--config") == f"scripts/recipes/{model}/{stage}.yaml"
        own = parse_run(command[5:], default_recipe=RECIPES / "vicuna-7b" / f"{stage}.yaml")[0]
        assert own.data == recipe(model, stage, "--data.sources", own.data.sources[0].path).data
    assert option(first, "--model") == option(composing, "--out")
    assert option(second, "--model") == option(first, "--run_dir") + "/model"


@pytest.mark.parametrize("model", ["vicuna-7b", "llama3-8b-siglip", "smollm2-1.7b-siglip2"])
def test_one_composed_folder_serves_both_stages(model, tmp_path, monkeypatch):
    """Tiny weights of the recipe's true architecture: template, window and vocabulary are accepted by both recipes."""
    composing = commands(model, "pretrain")[0]
    arguments = ["compose.py", *composing[2:], "--random_init", "--scale", "tiny", "--out", str(tmp_path / "model")]
    monkeypatch.setattr("sys.argv", arguments)
    compose.main()
    for stage in ("pretrain", "finetune"):
        run = recipe(model, stage, "--model", str(tmp_path / "model"))
        parts = load_parts(run)
        assert parts.encoder.template is get_template(run.data.template)
        assert parts.anyres == largest_of(model)[0]


@pytest.mark.parametrize("model", EVERY)
def test_doctor_assumes_the_recipe_that_fits_the_model(model):
    composing = commands(model, "pretrain")[0]
    llm, tower = (architecture(option(composing, name)) for name in ("--llm", "--vision"))
    config = SimpleNamespace(text_config=llm, vision_config=tower)
    for template in (None, "plain", TEMPLATES[llm_of(model)]):
        found = inspect_shards.fitting_recipe(template, config, "finetune")
        assert found.parent.name == model and found.exists()
