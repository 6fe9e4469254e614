"""What the READMEs name exists: paths, links, commands with their options, functions, files, recipes."""

import ast
import importlib
import re
import shlex
from dataclasses import fields
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from llava_next.model.forward.lora import Lora
from llava_next.training.recipe.config import parse_run, run_parser
from support.launching import ROOT
from test_rooms import ROOMS, folder_of

NEEDED = ["--model", "m", "--run_dir", "r", "--data.sources", "s"]
READMES = ["README.md", *(f"{d}/README.md" for d in ("data_tools", "llava_next", "scripts", "scripts/benchmarks"))]
# of other programs: sbatch, pip, vLLM and the like
STRANGE_OPTIONS = {"--nodes", "--gpus-per-node", "--array", "--dependency", "--parsable"}


@cache
def read(name: str) -> str:
    return (ROOT / name).read_text()


def slugs(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str) -> list[list[str]]:
    """Words of the commands in code, indented or within backticks, that run a script of this project."""
    code = re.sub(r"\\\n\s*", " ", text)
    lines = re.findall(r"^    (\S.*)$", code, re.M) + re.findall(r"`([^`\n]+)`", code)
    ran = [line.partition("  #")[0] for line in lines if re.search(r"(^|\s)(python|launch|bash|sbatch)\s", line)]
    return [shlex.split(line) for line in ran if re.search(r"(scripts|data_tools)/[\w/]+\.(py|sh|sbatch)", line)]


@cache
def launch_options() -> set[str]:
    return set(launch_command_parser()._option_string_actions)


@cache
def options_of(script: str) -> set[str]:
    """Options of a command: of a training script its configuration's, else what its source and its parts add."""
    if script in ("scripts/pretrain.py", "scripts/finetune.py", "scripts/slurm/finetune.sbatch"):
        section = {f"--lora.{key.name}" for key in fields(Lora)}  # may be null, so the parser lists it as a whole
        return section | set(run_parser(ROOT / "scripts/recipes/vicuna-7b/finetune.yaml")._option_string_actions)
    if script == "scripts/slurm/build.sbatch":
        return options_of("data_tools/build_shards.py") | STRANGE_OPTIONS
    parts = {"scripts/benchmark.py": "scripts/benchmarking", "data_tools/inspect_shards.py": "data_tools/doctor"}
    folder = ROOT / parts.get(script, "data_tools/building")
    has_parts = script in parts or f"from {folder.name}." in (ROOT / script).read_text()
    files = [ROOT / script, *(folder.glob("*.py") if has_parts else [])]
    found = {option for file in files for option in re.findall(r"[\"'](--\w+)[\"']", file.read_text())} | {"--help"}
    overrides = options_of("scripts/finetune.py") if script == "data_tools/inspect_shards.py" else set()
    return found | overrides


def words_wrong(words: list[str]) -> list[str]:
    """What a command names that does not exist."""
    place = next(i for i, word in enumerate(words) if re.fullmatch(r"(scripts|data_tools)/.*\.(py|sh|sbatch)", word))
    script, before, after = words[place], words[:place], words[place + 1 :]
    if not (ROOT / script).exists():
        return [script]
    given = [(word, options_of(script)) for word in after] + [
        (word, launch_options() | STRANGE_OPTIONS) for word in before
    ]
    return [f"{script} {w}" for w, known in given if w.startswith("--") and w.partition("=")[0] not in known]


def test_the_front_page_is_read_in_three_minutes():
    assert len(read("README.md").splitlines()) <= 150


@pytest.mark.parametrize("name", READMES)
def test_every_path_and_link_in_a_readme_leads_somewhere(name):
    text, folder = read(name), (ROOT / name).parent
    paths = set(re.findall(r"(?<![\w/.-])(?:scripts|accelerate_configs|data_tools|llava_next|tests)/[\w./-]*\w", text))
    assert [p for p in sorted(paths) if not (ROOT / p).exists()] == []
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    wrong = []
    for link in links:
        file, _, anchor = link.partition("#")
        target = (folder / file).resolve() if file else ROOT / name
        exists = target.exists() and target.is_relative_to(ROOT)
        if not exists or (anchor and anchor not in slugs(target.read_text())):
            wrong.append(link)
    assert wrong == []


@pytest.mark.parametrize("name", READMES)
def test_every_command_in_a_readme_names_a_script_and_options_it_has(name):
    found = commands(read(name))
    assert len(found) >= (0 if name.startswith("llava_next") else 4)
    assert [wrong for words in found for wrong in words_wrong(words)] == []


def test_a_wrong_command_is_found():
    text = "x\n\n    accelerate launch --config_fil a scripts/finetune.py --model m \\\n        --data.length 3\n"
    text += "\nand `python scripts/talk.py --model m` or `python data_tools/build_shards.py --towers x`\n"
    wrong = [wrong for words in commands(text) for wrong in words_wrong(words)]
    assert wrong == [
        "scripts/finetune.py --data.length",
        "scripts/finetune.py --config_fil",
        "scripts/talk.py",
        "data_tools/build_shards.py --towers",
    ]


@pytest.mark.parametrize("name", READMES)
def test_every_option_that_a_readme_speaks_of_belongs_to_a_command(name):
    scripts = [*ROOT.glob("scripts/*.py"), *ROOT.glob("data_tools/*.py")]
    known = {o for script in scripts for o in options_of(str(script.relative_to(ROOT)))} | launch_options()
    spoken = {o for code in re.findall(r"`([^`\n]+)`", read(name)) for o in re.findall(r"(?<!\S)--[\w.]+", code)}
    assert sorted(spoken - known - STRANGE_OPTIONS) == []


def test_follow_one_batch_names_functions_that_exist():
    section = read("llava_next/README.md").split("## Follow one batch")[1].split("\n## ")[0]
    named = re.findall(r"`([\w/]+)\.py`: ((?:`[\w.]+`(?:, )?)+)", section)
    names = [(file, name) for file, group in named for name in re.findall(r"`([\w.]+)`", group) if ".py" not in name]
    assert len(names) >= 15
    for file, name in names:
        target = importlib.import_module(file.replace("/", ".").removeprefix("data_tools."))
        for part in name.split("."):
            target = getattr(target, part)


@pytest.mark.parametrize("room", [room for room in ROOMS if room.startswith("llava_next")])
def test_the_tour_has_a_line_for_every_file(room):
    """The line of a file is the one in its room's docstring."""
    folder = folder_of(room)
    label = "llava_next" if room == "llava_next" else str(folder.relative_to(ROOT / "llava_next"))
    section = read("llava_next/README.md").split(f"**`{label}/`**")[1].split("\n**`")[0].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)\.py` \| (\S.*) \|$", section, re.M))
    assert sorted(rows) == sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert room == "llava_next" or rows == dict(re.findall(r"^(\w+)\.py: (\S.*)$", text, re.M))


@pytest.mark.parametrize(("name", "pattern"), [("scripts", "*.*"), ("data_tools", "*.py")])
def test_every_command_has_its_line(name, pattern):
    files = {p.name for p in Path(ROOT / name).glob(pattern) if p.suffix in (".py", ".sh")} - {"environment.sh"}
    assert set(re.findall(r"^\| `([\w.]+)` \|", read(f"{name}/README.md"), re.M)) >= files


def test_pictures_are_small():
    pictures = list((ROOT / "scripts/pictures").iterdir())
    shown = "".join(read(page) for page in ("README.md", "scripts/README.md", "scripts/benchmarks/README.md"))
    assert all(f"pictures/{picture.name})" in shown for picture in pictures)
    assert [p.name for p in pictures if p.stat().st_size > 100_000] == []


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
    """The table of recipes says what the files say."""
    recipes = {p.parent.name for p in (ROOT / "scripts/recipes").glob("*/finetune.yaml")} - {"digits"}
    rows = re.findall(
        r"^\| `([\w-]+)`, `([\w-]+)-siglip` \| `[^`]+` \| `(\w+)` \| ([\d,]+) / ([\d,]+) \| (\S+) \|",
        read("scripts/README.md"),
        re.M,
    )
    figures = [
        (model, template, length, rate)
        for clip, siglip, template, *lengths, rate in rows
        for model, length in zip((clip, f"{siglip}-siglip"), lengths, strict=True)
    ]
    ours = r"^\| `([\w.-]+)` \| `[^`]+` \| `(\w+)` \| ([\d,]*\d).* \| (\S+), ours \|"
    figures += re.findall(ours, read("scripts/README.md"), re.M)
    assert {model for model, *_ in figures} == recipes and len(rows) == 4
    for model, template, length, rate in figures:
        options = ["--config", str(ROOT / f"scripts/recipes/{model}/finetune.yaml"), *NEEDED]
        run = parse_run(options, default_recipe=ROOT / "scripts/recipes/vicuna-7b/finetune.yaml")[0]
        assert (run.data.template, run.data.max_length) == (template, int(length.replace(",", "")))
        assert run.optim.rates.llm == float(rate)
