"""What a run says of itself: strict JSON in its files, the same numbers in the trackers, before and after a restart."""

import json
import math
import os
import sys
from dataclasses import asdict
from types import SimpleNamespace

import accelerate.tracking
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import LoggerType

from llava_next.training.recipe.config import RunConfig, Source
from llava_next.training.watch.journal import Journal
from llava_next.training.watch.metrics import JsonLines, Progress, flat
from llava_next.training.watch.trackers import TrackerError, start_trackers
from support.runs import read_lines


def step_record(step: int, loss: float = 0.5) -> dict:
    """What the loop gives the journal of a step of half a second that waited a fifth of it."""
    counts = {"step": step, "samples": 16, "tokens": 900, "bytes": 3_000_000, "data_wait_s": 0.1, "step_s": 0.5}
    nested = {"source_loss": {"a": loss, "b": 2.0}, "rates": {"llm": 1e-5}, "source_share": {"a": [0.25, 0.75]}}
    return {**counts, "loss": loss, "grad_norm": 1.0, **nested, "skipped_update": [3, 4] if loss != loss else []}


class Trackers:
    """Stands for the tensorboard and wandb packages, which Accelerate's own trackers then call.

    Attributes:
        scalars: step -> name -> value of tensorboard; folders: of its writers.
        logged: the same of wandb; axes: names with their axes; runs: options of each `wandb.init`; configs: of each
            `wandb.config.update`.
    """

    def __init__(self, patch: pytest.MonkeyPatch):
        self.scalars, self.folders, self.logged, self.axes, self.runs, self.configs = {}, [], {}, set(), [], []
        patch.setattr(torch.utils, "tensorboard", SimpleNamespace(SummaryWriter=self.writer), raising=False)
        config = SimpleNamespace(update=lambda values, **_: self.configs.append(values))
        patch.setitem(sys.modules, "wandb", SimpleNamespace(init=self.init, config=config))
        patch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.TENSORBOARD, LoggerType.WANDB])

    def writer(self, folder: str):
        self.folders.append(folder)

        def add_scalar(name: str, value: float, global_step: int) -> None:
            self.scalars.setdefault(global_step, {})[name] = value

        ignored = dict.fromkeys(("add_hparams", "flush", "close"), lambda *_, **__: None)
        return SimpleNamespace(add_scalar=add_scalar, **ignored)

    def init(self, **options):
        self.runs.append(options)
        return SimpleNamespace(
            log=lambda values, step: self.logged.setdefault(step, {}).update(values),
            define_metric=lambda name, step_metric: self.axes.add((name, step_metric)),
            finish=lambda: None,
        )


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Makes the journal of a run of 10 steps in `tmp_path/run`, as each start of the run does."""
    monkeypatch.setattr(os, "environ", os.environ.copy())

    def start(done: int = 0, **options) -> Journal:
        reset()
        config = RunConfig(run_dir=str(tmp_path / "run"), **options)
        config.data.sources = [Source("shards")]
        (tmp_path / "run").mkdir(exist_ok=True)
        accelerator = Accelerator(cpu=True)
        start_trackers(config, accelerator)
        return Journal(config, accelerator, None, Progress(10, done))

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    yield start
    reset()


def test_trackers_get_the_numbers_of_the_log_with_their_steps_also_after_a_restart(start, tmp_path, monkeypatch):
    trackers, path = Trackers(monkeypatch), tmp_path / "run"
    for done, last in ((0, 4), (4, 10)):
        journal = start(done, log_with=["tensorboard", "wandb"], log_every=3)
        for step in range(done + 1, last + 1):
            journal.progress.advance()
            journal.write(step_record(step, loss=1 / step))
        journal.validated(last, {"all": 1.5})
        journal.scored(last - 2, {"mme": {"value": 1500.0, "metric": "sum", "noise": None, "published": {}}})
        journal.close()
        journal.accelerator.end_training()
    lines = read_lines(path / "metrics.jsonl")
    score = {"value": 1500.0, "metric": "sum", "samples": None, "noise": None}
    assert [line for line in lines if "scores" in line] == [{"step": s, "scores": {"mme": score}} for s in (2, 8)]
    lines = {line["step"]: line for line in lines if "scores" not in line}
    assert list(lines) == list(range(1, 11))
    expected = {step: {k: v for k, v in flat(lines[step]).items() if not isinstance(v, str)} for step in (3, 6, 9, 10)}
    assert {"loss", "step", "source_loss/a", "rates/llm", "source_share/a/1", "eta_s"} < set(expected[3])
    expected[4], expected[10] = {"validation/all": 1.5}, {**expected[10], "validation/all": 1.5}
    late = {2: {"scores/mme": 1500.0}, 8: {"scores/mme": 1500.0}}  # at their steps
    assert trackers.scalars == late | expected
    for now, step in ((4, 2), (10, 8)):  # wandb takes no step back
        expected[now] |= {"scores/mme": 1500.0, "scores/step": step}
    assert trackers.logged == expected and trackers.axes == {("scores/*", "scores/step")}
    assert trackers.folders == [str(path / "llava-next")] * 2
    assert trackers.runs == [{"project": "llava-next", "name": "run", "dir": path}] * 2
    config = flat(asdict(journal.config))
    stored = [yaml.safe_load(file.read_text()) for file in path.glob("llava-next/*/hparams.yml")]
    assert trackers.configs == stored == [config] * 2 and config["data/sources/0/path"] == "shards"


def test_lines_are_strict_json_with_null_for_what_is_not_finite(start, tmp_path, capsys):
    journal = start(log_every=1)
    for step, loss in enumerate((0.5, math.nan, math.inf, -math.inf), start=1):
        journal.write(step_record(step, loss))
    journal.validated(4, {"all": math.nan})
    journal.close()
    lines = read_lines(tmp_path / "run/metrics.jsonl")  # refuses NaN and Infinity
    assert [line["loss"] for line in lines] == [0.5, None, None, None]
    assert [line["source_loss"]["a"] for line in lines] == [0.5, None, None, None]
    assert lines[1]["skipped_update"] == [3, 4] and lines[1]["source_loss"]["b"] == 2.0
    assert read_lines(tmp_path / "run/validation.jsonl") == [{"step": 4, "loss/all": None}]
    said = capsys.readouterr().out
    assert "loss nan" in said and said.count("data 20 %") == 4 and lines[0]["data_wait_share"] == pytest.approx(0.2)


def test_a_log_read_strictly_refuses_what_other_parsers_take(tmp_path):
    (tmp_path / "log").write_text('{"step": 1, "loss": NaN}\n')
    assert math.isnan(json.loads((tmp_path / "log").read_text())["loss"])
    with pytest.raises(ValueError, match="NaN is not JSON"):
        read_lines(tmp_path / "log")


def test_sync_puts_every_log_that_has_lines_on_the_disk(start, tmp_path, monkeypatch):
    synced, journal = [], start()
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_ino))
    journal.sync()
    assert synced == []
    journal.write(step_record(1))
    journal.validated(1, {"all": 1.0})
    journal.sync()
    journal.close()
    assert synced == [(tmp_path / "run" / name).stat().st_ino for name in ("metrics.jsonl", "validation.jsonl")]


def test_no_line_no_file(tmp_path):
    log = JsonLines(tmp_path / "log")
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_tracker_that_cannot_be_reached_is_one_line_and_the_others_go_on(start, tmp_path, monkeypatch, capsys):
    trackers = Trackers(monkeypatch)

    def unreachable(**options):
        raise OSError("no route to\n host")

    monkeypatch.setattr(sys.modules["wandb"], "init", unreachable)
    journal = start(log_with=["wandb", "tensorboard"], log_every=1)
    said = capsys.readouterr().out
    assert said.startswith("warning: wandb cannot be used (no route to host): see that WANDB_API_KEY and WANDB_BASE_")
    assert said.count("\n") == 1 and "The run goes on without it; metrics.jsonl has everything" in said
    journal.write(step_record(1))
    assert trackers.scalars[1]["loss"] == 0.5
    with pytest.raises(TrackerError, match="log_required: wandb cannot be used"):
        start(log_with=["wandb", "tensorboard"], log_required=True)


def test_tracker_that_fails_on_the_way_is_left_out_and_the_log_is_whole(start, tmp_path, monkeypatch, capsys):
    trackers = Trackers(monkeypatch)
    journal = start(log_with=["tensorboard", "wandb"], log_every=1)
    journal.write(step_record(1))

    def broken(values, step):
        raise ConnectionError("gone")

    monkeypatch.setattr(journal.accelerator.trackers[1].run, "log", broken)
    for step in (2, 3):
        journal.write(step_record(step))
    assert capsys.readouterr().out.count("warning: wandb cannot be used (gone)") == 1
    assert list(trackers.scalars) == [1, 2, 3] and list(trackers.logged) == [1]
    assert len(read_lines(tmp_path / "run/metrics.jsonl")) == 3


def test_changes_of_a_start_are_kept_with_their_first_step(start, tmp_path):
    journal = start(done=3)
    journal.changed(["data.max_length was 4096 until step 3 and is 2048 from here"])
    journal.close()
    (line,) = read_lines(tmp_path / "run/changes.jsonl")
    assert line == {"step": 4, "change": "data.max_length was 4096 until step 3 and is 2048 from here"}
