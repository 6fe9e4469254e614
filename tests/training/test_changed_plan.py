"""Runs whose plan or settings change on the way, through the script: nothing is lost, repeated or changed silently."""

import json
import sys

import pytest

import finetune
from support.demo import build_demo
from support.runs import demo_arguments, read_lines, run_demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """32 samples in folder/shards."""
    folder = tmp_path_factory.mktemp("demo")
    build_demo(folder, samples=32)
    return folder


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    """Another data set, of 16 samples."""
    folder = tmp_path_factory.mktemp("more")
    build_demo(folder, samples=16)
    return folder / "shards"


@pytest.fixture(scope="module")
def begun(demo, tmp_path_factory):
    """A run of one epoch in steps of 8, stopped after 2 of them."""
    run = tmp_path_factory.mktemp("begun") / "run"
    run_demo(demo, run, "--data.batch_size", 8, "--max_steps", 2)
    return run


def plan(demo, run, monkeypatch, capsys, *options) -> str:
    """What a dry run says, or the error it ends in."""
    arguments = [*demo_arguments(demo, run), "--data.batch_size", 8, "--dry_run", *options]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, arguments)])
    try:
        finetune.main(None)
    except SystemExit as stopped:
        return str(stopped)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "changes", "steps"),
    [
        (["--data.epochs", 2], ["data.epochs: 1 -> 2"], "8 of 8 samples (the first 2"),
        (["--data.batch_size", 4], ["data.batch_size: 8 -> 4"], "6 of 4 samples (the first 2"),
        (["--data.sources", "both"], ["data.sources: more is new"], "6 of 8 samples (the first 2"),
        (["--seed", 1], ["seed: 42 -> 1"], "4 of 8 samples (the first 2"),
        (["--data.sources", "other"], ["data.sources: shards is gone", "data.sources: more is new"], "4 of 8 samples"),
    ],
    ids=["more epochs", "another batch size", "a data set added", "another seed", "another data set"],
)
def test_changed_plan_is_refused_named_and_taken_when_allowed(
    demo, more, begun, monkeypatch, capsys, options, changes, steps
):
    both = f"[{demo / 'shards'}, {{path: {more}, name: more}}]"
    sources = {"both": both, "other": f"[{{path: {more}, name: more}}]"}
    options = [sources.get(option, option) for option in options]
    refused = plan(demo, begun, monkeypatch, capsys, *options)
    assert "made with another plan" in refused and all(change in refused for change in changes)
    told = plan(demo, begun, monkeypatch, capsys, *options, "--data.allow_changed_plan", "true")
    assert all(f"note       {change}" in told for change in changes) and f"steps      {steps}" in told
    assert "plan_hash" not in refused + told


def test_run_whose_plan_changed_sees_every_sample_once_and_can_start_again(demo, more, begun):
    both = f"[{demo / 'shards'}, {{path: {more}, name: more}}]"
    options = ["--data.sources", both, "--data.batch_size", 12, "--data.max_length", 200, "--checkpoint.every", 1]
    options += ["--data.epochs", 2]
    run_demo(demo, begun, *options, "--data.allow_changed_plan", "true", "--max_steps", 3)
    _, metrics = run_demo(demo, begun, *options)  # the changed plan is the run's own now
    # 16 of 32 were seen in the first epoch; with 16 more, 32 are left: 3 steps of 12, then 48 in 4
    assert [line["samples"] for line in metrics] == [8, 8, 12, 12, 8, 12, 12, 12, 12]
    assert [line["epoch"] for line in metrics] == [0, 0, 0, 0, 0, 1, 1, 1, 1]
    changes = read_lines(begun / "changes.jsonl")
    assert {line["step"] for line in changes} == {3} and [line["change"] for line in changes] == [
        "data.max_length was 300 until step 2 and is 200 from here",
        "data.epochs: 1 -> 2",
        "data.batch_size: 8 -> 12",
        "data.sources: more is new",
    ]
    assert json.loads((begun / "model/config.json").read_text())["model_type"] == "llava_next"
