"""A plan with nothing at hand: an architecture for the model, a profile for the data."""

import json
import re

import pytest

from llava_next.training.banner import plan_banner
from llava_next.training.planning import make_plan
from llava_next.training.recipe.config import parse_run
from llava_next.training.setup import open_mixture
from llava_next.training.stand_ins import plan_parts
from support.launching import ROOT
from support.published import LLAMA3, SIGLIP, full_config

RECIPES = ROOT / "scripts" / "recipes"


def asked_for(recipe: str, *options: str):
    """What `--dry_run --as_if 8xh100-80g` with a recipe, and nothing else, asks for."""
    path = RECIPES / recipe
    return parse_run(["--config", str(path), "--dry_run", "--as_if", "8xh100-80g", *options], path)


def test_recipe_alone_is_planned_with_the_published_model_and_data():
    config, asked = asked_for("vicuna-7b/finetune.yaml")
    parts = plan_parts(config)
    mixture = open_mixture(config, parts)
    out = plan_banner(make_plan(config, parts, mixture, asked.as_if), parts, mixture, asked.command)
    assert "lmsys/vicuna-7b-v1.5: llama + clip_vision_model, template vicuna_v1" in out
    assert "an architecture, no model folder" in out and "no data set was read" in out
    # as a composed folder: 32,000 words, image and pad token, a multiple of 64
    assert "6,738,939,904 parameters" in out
    assert "data       mix665k: 665,298 samples x 1" in out and "steps      5,198 of 128 samples, 156 warm-up" in out
    assert re.search(r"time       [45]\.\d hours", out)
    assert "--model MODEL --data.sources DATA --run_dir RUN" in " ".join(out.replace("\\\n", "").split())
    assert max(len(line) for line in out.splitlines() if "--config" not in line) <= 100


def test_architectures_are_known_by_name_and_by_config(tmp_path):
    config, _ = asked_for("llama3-8b-siglip/pretrain.yaml")
    assert [source.path for source in config.data.sources] == ["profile:pretrain558k"]
    named = plan_parts(config)
    assert config.model == f"{LLAMA3}+{SIGLIP}" and named.anyres.tile_size == 384
    assert named.model_config.text_config.vocab_size == 128_320  # 128,256 and two, a multiple of 64
    path, whole = tmp_path / "config.json", full_config(LLAMA3)
    for content in (whole.to_dict(), whole.text_config.to_dict()):  # of a LLaVA-NeXT model, of a language model
        path.write_text(json.dumps(content))
        for given in (path, tmp_path):
            found = plan_parts(asked_for("llama3-8b/finetune.yaml", "--model", str(given))[0])
            assert found.stands_in and found.anyres.tile_size == 336
            assert found.model_config.text_config.intermediate_size == 14_336


def test_a_run_takes_no_stand_in():
    given = ["--config", str(RECIPES / "vicuna-7b/finetune.yaml"), "--run_dir", "r", "--data.sources"]
    with pytest.raises(ValueError, match=r"data.sources: .*can be planned with \(--dry_run\), not trained on"):
        parse_run([*given, "profile:mix665k"])
    config, _ = parse_run([*given, "shards", "--dry_run", "--model", "nobody/nothing"])
    with pytest.raises(ValueError, match=r"no architecture known without network .*`hf download nobody/nothing`"):
        plan_parts(config)
