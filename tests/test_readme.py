"""What the README names exists."""

import importlib
import re

from launching import ROOT

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
    assert len(files) >= 3
    for file in files:
        config = yaml.safe_load(file.read_text())
        assert config["distributed_type"] == "FSDP" and config["fsdp_config"]["fsdp_version"] == 2
        assert file.read_text().startswith("# ")
