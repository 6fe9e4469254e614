"""Paths as people write them, in every flag, file and key: `~`, `file://`, below a root, and what is no path."""

import json
import re

import pytest
from jsonargparse import ArgumentParser

import build_shards
import compose
from llava_next.data.format.index import read_dataset
from llava_next.data.storage.client import Storage
from llava_next.paths import PathError, below, folder_or_name, local_path, new_folder, output_file, output_folder
from llava_next.training.checkpoints.recovery import checkpoint_places
from llava_next.training.recipe.config import parse_run
from support.builds import GEOMETRY, call, make_inputs
from support.launching import ROOT


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("~/a", "HOME/a"),
        ("~", "HOME"),
        ("a/~", "a/~"),
        ("file:///a%20b/c", "/a b/c"),
        ("FILE:///a", "/a"),
        ("file:/a", "/a"),
        ("file://localhost/a", "/a"),
        ("/a/b", "/a/b"),
        ("a b", "a b"),
        ("a:b", "a:b"),
    ],
)
def test_local_paths_are_read_in_every_spelling(home, given, expected):
    assert str(local_path(given)) == expected.replace("HOME", str(home))


@pytest.mark.parametrize(
    "given", ["s3://b/k", "https://user:secret@h/p?token=secret", "hf://datasets/a/b", "file://h/a"]
)
def test_what_is_no_local_path_is_said_without_secrets(given):
    with pytest.raises(PathError) as error:
        local_path(given)
    assert "secret" not in str(error.value) and re.search(
        "a local path is needed|file:///absolute/path", str(error.value)
    )


def test_names_on_the_hub_stay_names(home):
    names = ("org/name", "./org/name", "name")
    assert [folder_or_name(name) for name in (*names, "~/org")] == [*names, f"{home}/org"]


@pytest.mark.parametrize(
    ("read", "given", "message"),
    [
        (output_file, "full/a", ""),
        (output_file, "full", "full is a folder"),
        (output_file, "none/a", "there is no folder .*none; make it"),
        (output_file, "locked/a", "locked cannot be written to"),
        (output_folder, "full", ""),
        (output_folder, "none/deep/deeper", ""),
        (output_folder, "full/a", "full/a is no folder"),
        (output_folder, "full/a/b", "b: .*full/a is no folder"),
        (output_folder, "locked/a/b", "locked cannot be written to"),
        (new_folder, "empty", ""),
        (new_folder, "none", ""),
        (new_folder, "full", "full is not empty; give a new folder or remove it"),
    ],
)
def test_where_nothing_can_be_written_is_said_when_the_option_is_read(tmp_path, monkeypatch, read, given, message):
    for name in ("full", "empty", "locked"):
        (tmp_path / name).mkdir()
    (tmp_path / "full/a").touch()
    monkeypatch.setattr("os.access", lambda path, _: "locked" not in str(path))  # root may write anywhere
    if not message:
        assert read(tmp_path / given) == tmp_path / given
    else:
        with pytest.raises(PathError, match=message):
            read(tmp_path / given)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("path", "inside"),
    [
        ("a/b", "a/b"),
        ("a/../b", "b"),
        ("../a", None),
        ("../root/a", "a"),
        ("../root-2/a", None),
        ("a/../../b", None),
        ("ROOT/a", "a"),
        ("ROOT/./a/", "a"),
        ("REAL/a", "a"),
        ("ROOT/../a", None),
        ("ROOT-2/a", None),
        ("/a", None),
    ],
)
def test_a_path_lies_below_its_root_or_it_is_none(tmp_path, path, inside):
    (tmp_path / "real").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "real")
    path = path.replace("ROOT", f"{tmp_path}/root").replace("REAL", f"{tmp_path}/real")
    assert below(path, tmp_path / "root") == inside


def test_the_whole_build_runs_on_paths_of_every_spelling(home):
    make_inputs(home, 4)
    (home / "mixture.yaml").write_text("datasets:\n  - json_path: ~/train.json\n  - json_path: train.json\n")
    (home / "expect.json").write_text(json.dumps({"sources": {}, "complete": False, "total": 8}))
    options = ["--json", f"file://{home}/mixture.yaml", "--images", "~/images", "--out", "~/a set", "--workers", 0]
    result = call(build_shards.main, *options, "--expect", "~/expect.json", *GEOMETRY)
    assert result.returncode == 0, result.stderr
    for url in ("~/a set", f"file://{home}/a%20set", home / "a set"):
        assert read_dataset(url)[0].samples == 8
    assert Storage("~/a set").url == f"file://{home}/a set"


def test_every_key_of_a_run_that_is_a_path(home):
    recipe = {
        "model": "~/model",
        "run_dir": f"file://{home}/a%20run",
        "data": {"sources": ["~/set"], "cache_dir": "~/cache"},
        "checkpoint": {"dir": "~/kept", "resume": "~/run/step"},
    }
    (home / "recipe.yaml").write_text(json.dumps(recipe))
    config, _ = parse_run(["--config", "~/recipe.yaml"])
    assert (config.model, config.run_dir) == (f"{home}/model", f"{home}/a run")
    assert (config.data.cache_dir, config.checkpoint.resume) == (f"{home}/cache", f"{home}/run/step")
    assert Storage(config.data.sources[0].path).url == f"file://{home}/set"
    assert checkpoint_places(config) == (home / "kept", None)
    with pytest.raises(ValueError, match=r"model: s3://bucket/\.\.\. is a URL, and a local path is needed"):
        parse_run(["--model", "s3://bucket/m", "--run_dir", "r", "--data.sources", "s"])
    for mistyped in ("[{path: a, repeat: x}]", "[{pth: a}]"):
        with pytest.raises(ValueError, match=r"data.sources, .* is no path and none of \{path, name, repeat\}"):
            parse_run(["--model", "m", "--run_dir", "r", "--data.sources", mistyped])


def test_no_option_takes_a_path_in_another_way():
    """Every option that is a path has one of the functions of `paths` as its type, or is opened as a `Storage`."""
    sources = [*ROOT.glob("scripts/**/*.py"), *ROOT.glob("data_tools/**/*.py")]
    wrong = [path.name for path in sources if re.search(r"type=(Path|str)\b|\.expanduser\(", path.read_text())]
    assert len(sources) > 40 and wrong == []


def test_messages_of_command_lines_say_what_to_do(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["compose.py", "--vision", "https://a.b/c", "--llm", "x", "--out", "y"])
    with pytest.raises(SystemExit):
        compose.main()
    assert "--vision: https://a.b/... is a URL" in " ".join(capsys.readouterr().err.split())
    result = call(build_shards.main, "--json", "s3://a/b.json", "--out", "o", *GEOMETRY)
    assert result.returncode == 2 and "--json: s3://a/... is a URL, and a local path is needed" in result.stderr


def test_help_shows_what_an_argument_is_and_not_where_its_function_lies():
    parser = ArgumentParser()
    parser.add_argument("--out", type=local_path, help="a folder")
    parser.add_argument("--model", type=folder_or_name, help="a model")
    shown = " ".join(parser.format_help().split())
    assert "a folder (type: path, default: null)" in shown and "a model (type: path or name, default: null)" in shown
