"""What the README names exists."""

import importlib
import re
from itertools import pairwise

from llava_next.training.recipe.config import parse_run
from support.launching import ROOT

NEEDED = ["--model", "m", "--run_dir", "r", "--data.sources", "s"]
README = (ROOT / "README.md").read_text()


def test_follow_one_batch_names_functions_that_exist():
    section = README.split("## Follow one batch")[1].split("\n## ")[0]
    named = re.findall(r"`([\w/]+)\.py`: ((?:`[\w.]+`(?:, )?)+)", section)
    names = [(file, name) for file, group in named for name in re.findall(r"`([\w.]+)`", group) if ".py" not in name]
    assert len(names) >= 15
    for file, name in names:
        target = importlib.import_module(file.replace("/", "."))
        for part in name.split("."):
            target = getattr(target, part)


def test_every_path_in_the_readme_exists():
    paths = set(re.findall(r"(?:scripts|accelerate_configs|data_tools|llava_next)/[\w./-]*\w", README))
    assert len(paths) > 15
    assert not [p for p in paths if not (ROOT / p).exists()]


def test_accelerate_configs_ask_for_fsdp2_and_explain_themselves():
    import yaml

    files = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
    assert len(files) == 4
    for file in files:
        config = yaml.safe_load(file.read_text())
        assert config["distributed_type"] == "FSDP" and config["fsdp_config"]["fsdp_version"] == 2
        lines = file.read_text().splitlines()
        # a comment above every key that has a value
        keys = [(above, now) for above, now in pairwise(lines) if now.partition("#")[0].rstrip()[-1:] not in ("", ":")]
        uncommented = [now for above, now in keys if not above.lstrip().startswith("# ")]
        assert lines[0].startswith("# ") and uncommented == []


def test_recipe_table_names_every_model_with_its_figures():
    """The table of README's recipes says what the files say."""
    recipes = {p.parent.name for p in (ROOT / "scripts/recipes").glob("*/finetune.yaml")} - {"digits"}
    rows = re.findall(
        r"^\| `([\w-]+)`, `([\w-]+)-siglip` \| `[^`]+` \| `(\w+)` \| ([\d,]+) / ([\d,]+) \| (\S+) \|", README, re.M
    )
    assert {name for row in rows for name in (row[0], row[1] + "-siglip")} == recipes and len(rows) == 4
    for clip, siglip, template, *lengths, rate in rows:
        for model, length in zip((clip, f"{siglip}-siglip"), lengths, strict=True):
            options = ["--config", str(ROOT / f"scripts/recipes/{model}/finetune.yaml"), *NEEDED]
            run = parse_run(options, default_recipe=ROOT / "scripts/recipes/vicuna-7b/finetune.yaml")[0]
            assert (run.data.template, run.data.max_length) == (template, int(length.replace(",", "")))
            assert run.optim.rates.llm == float(rate)
