"""Scores of a run on the way: in order, at their steps, the best kept, and whatever fails costs the run nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from llava_next.training import scoring
from llava_next.training.recipe.config import RunConfig, parse_run
from llava_next.training.recipe.evaluate import EvaluateConfig
from llava_next.training.scores import folder_of, forget_later, in_the_way, jobs_of, keep_best, read_best
from llava_next.training.scoring import (
    Scoring,
    ScoringError,
    check_scoring,
    commands,
    environment,
    read_check,
    scoring_lines,
)
from support.launching import ROOT

STUB = ROOT / "tests/support/workers/stub_evaluate.py"


class Told:
    """Stands for the journal: what it was given."""

    def __init__(self):
        self.scores, self.failed, self.said = [], [], []

    def scored(self, step: int, scores: dict, failed: str = "") -> None:
        self.scores += [(step, {name: found["value"] for name, found in scores.items()})] if scores else []
        self.failed += [(step, failed)] if failed else []

    def say(self, text: str) -> None:
        self.said.append(text)


def export(run: Path, step: int, value: float | str) -> None:
    """A model that the stub gives a score."""
    folder = run / f"model-step-{step}"
    folder.mkdir(parents=True)
    (folder / "value").write_text(str(value))
    (folder / "model.safetensors").write_bytes(f"weights {step}".encode())


def start(run: Path, **options) -> Scoring:
    given = {"every": 10, "json": str(run / "held_out.json"), "devices": "cpu", **options}
    config = RunConfig(run_dir=str(run), model="base", evaluate=EvaluateConfig(**given))
    return Scoring(config, ["held_out"], STUB, Told())


def until(scores: Scoring, done) -> None:
    """Polls as the loop does after its steps."""
    deadline = time.monotonic() + 60
    while not done():
        scores.poll()
        assert time.monotonic() < deadline, scores.journal.said
        time.sleep(0.01)


def finish(scores: Scoring) -> Told:
    until(scores, lambda: not scores._queue)
    return scores.journal


def models(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("model-step-*"))


def test_scores_come_in_order_at_their_steps_and_failures_cost_nothing(tmp_path):
    """Of the exports that are for them alone those of the best stay, and the last one where it failed."""
    scores = start(tmp_path)
    for step, value in ((10, 0.5), (20, "crash"), (30, 0.25)):
        export(tmp_path, step, value)
        assert not scores.full
        scores.submit(step, passing=step != 30)
        assert scores._process is not None
    told = finish(scores)
    assert told.scores == [(10, {"held_out": 0.5}), (30, {"held_out": 0.25})]
    log = folder_of(tmp_path, 20) / "log.txt"
    assert told.failed == [(20, f"scoring failed (exit status 1): error: no such thing; all of it in {log}")]
    assert models(tmp_path) == ["model-step-10", "model-step-30"]
    assert read_best(tmp_path)["step"] == 10 and (tmp_path / "best/value").samefile(tmp_path / "model-step-10/value")
    for step, value in ((40, 0.75), (50, "hang")):
        export(tmp_path, step, value)
        scores.submit(step, passing=True)
    until(scores, lambda: scores._queue == [50] and scores._process is not None)
    scores.config.evaluate.max_hours = 0.0
    assert finish(scores).failed[1][1].startswith("scoring failed (not done in 0 hours): ")
    assert models(tmp_path) == ["model-step-30", "model-step-40", "model-step-50"]
    assert (tmp_path / "best/model.safetensors").read_bytes() == b"weights 40"
    outcomes = {step: job["outcome"].partition(" (")[0] for step, job in jobs_of(tmp_path).items()}
    assert outcomes == {10: "done", 20: "scoring failed", 30: "done", 40: "done", 50: "scoring failed"}
    (tmp_path / "model-step-50/value").write_text("0.8")  # mended: the next start tries again
    assert finish(start(tmp_path)).scores == [(50, {"held_out": 0.8})] and models(tmp_path)[0] == "model-step-30"


def test_a_script_that_cannot_be_started_is_a_failure_like_any(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no more processes")

    monkeypatch.setattr(scoring, "Beside", refuse)
    scores = start(tmp_path)
    export(tmp_path, 10, 0.5)
    scores.submit(10, passing=True)
    assert scores.journal.said == ["warning: step 10 has no scores (OSError: no more processes)"]
    assert jobs_of(tmp_path)[10]["outcome"] == "OSError: no more processes" and models(tmp_path) == ["model-step-10"]
    monkeypatch.setattr(scoring, "write_job", refuse)  # a full disk, say: exports without a job do not pile up
    for step, passing in ((20, True), (30, False)):
        export(tmp_path, step, 0.5)
        scores.submit(step, passing)
    assert models(tmp_path) == ["model-step-10", "model-step-30"] and len(scores.journal.said) == 3


def test_a_stop_ends_the_evaluator_and_the_job_is_done_when_the_run_goes_on(one_process, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scoring, "POLL", 0.01)
    scores, started = start(tmp_path, devices=None), folder_of(tmp_path, 10) / "started.json"
    export(tmp_path, 10, "hang")
    scores.submit(10, passing=True)
    assert not scores.beside
    assert scores.wait(lambda: started.exists() and started.read_text().endswith("}")) is False
    assert not psutil.pid_exists(json.loads(started.read_text())["process"])
    assert jobs_of(tmp_path)[10] == {"passing": True, "outcome": None} and scores.journal.scores == []
    (tmp_path / "model-step-10/value").write_text("0.5")
    forget_later(tmp_path, 10, is_scored=False)
    assert f"without evaluate.every {tmp_path}/model-step-10 get no scores" in capsys.readouterr().out
    again = start(tmp_path, devices=None)
    again.submit(10, passing=True)  # is waiting already
    assert again.wait(lambda: False) is True and again.journal.scores == [(10, {"held_out": 0.5})]
    assert again.journal.said[0] == "waiting for the scores of step 10"


def test_the_result_is_scored_once_as_it_is(one_process, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "POLL", 0.01)
    export(tmp_path, 30, 0.5)
    (tmp_path / "model-step-30").rename(tmp_path / "model")
    for also, expected in (([], [(30, {"held_out": 0.5})]), ([], []), (["more"], [(30, {"held_out": 0.5})])):
        scores = start(tmp_path, devices=None)
        scores.names.update(also)  # the run goes on with a score that it had not: made of the result
        assert scores.score_result(30, lambda: False) is True and scores.journal.scores == expected
    assert read_best(tmp_path)["step"] == 30 and (tmp_path / "best/value").samefile(tmp_path / "model/value")


def test_scores_stand_in_the_cards_of_the_model_and_of_its_adapter(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(scoring, "add_scores", lambda folder, scores: told.append((folder.name, scores["held_out"])))
    scores = start(tmp_path)
    export(tmp_path, 10, 0.5)
    (tmp_path / "adapter-step-10").mkdir()
    scores.submit(10, passing=False)
    finish(scores)
    assert [(name, found["value"]) for name, found in told] == [("model-step-10", 0.5), ("adapter-step-10", 0.5)]


def test_behind_too_many_a_step_is_left_out_with_a_word(tmp_path):
    scores = start(tmp_path)
    for step in (10, 20, 30):
        export(tmp_path, step, "hang")
        scores.submit(step, passing=True)
    assert scores.full
    scores.leave_out(40)
    scores.close()
    ((step, failed),) = scores.journal.failed
    assert step == 40 and failed.startswith("not scored, 2 exports wait behind one already")


@pytest.mark.parametrize(
    ("values", "more", "best"),
    [
        ([0.5, 0.7, 0.6], {}, 2),
        ([0.7, 0.7, 0.6], {}, 1),
        ([0.7, 0.5, 0.6], {"lower_is_better": True}, 2),
        ([float("nan"), 0.1, float("nan")], {}, 2),
        ([-1.0, -2.0, 0.0], {}, 3),
    ],
    ids=["highest", "the earlier of equal ones", "lowest where that is better", "no number is none", "signs"],
)
def test_best_is_the_best_by_the_named_score(tmp_path, values, more, best):
    for step, value in enumerate(values, start=1):
        export(tmp_path, step, value)
        scores = {"a": {"value": value, "samples": 3, **more}, "b": {"value": -value, "samples": 3}}
        keep_best(tmp_path, step, "a", scores)
    assert read_best(tmp_path)["step"] == best and read_best(tmp_path)["by"] == "a"
    assert (tmp_path / "best/model.safetensors").read_bytes() == f"weights {best}".encode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", *models(tmp_path)]


def test_scores_of_other_samples_are_not_compared_and_a_cut_replacement_is_undone(tmp_path):
    export(tmp_path, 1, 0.5)
    export(tmp_path, 2, 0.4)
    assert keep_best(tmp_path, 1, "a", {"a": {"value": 0.5, "samples": 3}})
    (tmp_path / "best").rename(tmp_path / "best.old")  # killed before the next rename
    start(tmp_path)
    assert read_best(tmp_path)["step"] == 1 and not (tmp_path / "best.old").exists()
    assert not keep_best(tmp_path, 2, "b", {"a": {"value": 0.9, "samples": 3}})
    assert keep_best(tmp_path, 2, "a", {"a": {"value": 0.4, "samples": 4}})


def test_steps_that_are_done_again_are_scored_again(tmp_path, capsys):
    scores = start(tmp_path)
    for step, passing in ((10, True), (20, True), (30, False)):
        export(tmp_path, step, step / 100)
        scores.submit(step, passing)
    finish(scores)
    export(tmp_path, 40, 0.5)  # no scoring's
    forget_later(tmp_path, 10, is_scored=False)
    assert capsys.readouterr().out == ""  # nothing waits
    assert list(jobs_of(tmp_path)) == [10] and models(tmp_path) == ["model-step-30", "model-step-40"]
    assert read_best(tmp_path)["step"] == 30  # of this run, and what it says is so
    forget_later(tmp_path, 0)
    assert jobs_of(tmp_path) == {} and not (tmp_path / "best").exists()
    assert "best of step 30 is removed: the run begins anew" in capsys.readouterr().out


def test_an_evaluator_is_no_rank_and_has_its_devices_alone(tmp_path, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "ACCELERATE_USE_FSDP", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("LLAVA_NEXT_LAUNCHER", "1:/tmp")
    monkeypatch.setenv("KEPT", "1")
    scores = start(tmp_path)
    export(tmp_path, 10, 0.5)
    scores.submit(10, passing=False)
    finish(scores)
    found = json.loads((folder_of(tmp_path, 10) / "started.json").read_text())
    assert [
        n for n in found if n.startswith(("RANK", "LOCAL_", "WORLD", "MASTER", "ACCEL", "TORCHE", "LLAVA_NEXT_L"))
    ] == []
    assert found["KEPT"] == "1" and found["CUDA_VISIBLE_DEVICES"] == "" and found["PYTHONPATH"].startswith(str(ROOT))
    config = scores.config
    config.evaluate = EvaluateConfig(1, ["mme", "pope"], "h.json", "root", "anls", 5, "--batch_size 4", "cuda:6, 7")
    assert environment(config.evaluate, STUB)["CUDA_VISIBLE_DEVICES"] == "6,7"
    words = ["--model", "m", "--out", "o", "--limit", "5", "--device", "cuda", "--keep_template", "false"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(STUB)]
    assert commands(config, STUB, Path("m"), Path("o")) == [
        [*launcher, "--tasks", "mme,pope", *words, "--batch_size", "4"],
        [*launcher, "--json", "h.json", "--images", "root", "--metric", "anls", *words, "--batch_size", "4"],
    ]
    config.evaluate.metric = None  # its own small part of evaluate.py, on one device
    assert commands(config, STUB, Path("m"), Path("o"))[1][:3] == [sys.executable, str(STUB), "--json"]
    told = " ".join(" ".join(scoring_lines(config)).split())
    assert told.startswith(
        "scores every 1 steps and at the end, on GPU 6, 7 while it trains: mme, pope, h.json by exact"
    )


def test_a_start_asks_for_the_scores_names_and_refuses_the_run_s_own_devices(one_process, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "POLL", 0.01)
    config = start(tmp_path).config
    assert check_scoring(config, STUB) == ["held_out"]
    config.evaluate.best = "other"
    with pytest.raises(ScoringError, match=r"evaluate\.best: 'other' is no score of this run; they are held_out"):
        check_scoring(config, STUB)
    monkeypatch.setattr(scoring.torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    config.evaluate.devices = "6,5"
    with pytest.raises(ScoringError, match=r"evaluate\.devices: the run uses 5 itself: give others, or null"):
        check_scoring(config, STUB)
    config.evaluate.devices = None
    assert environment(config.evaluate, STUB)["CUDA_VISIBLE_DEVICES"] == "4,5"


def test_nothing_of_an_evaluation_outlives_the_run(tmp_path):
    """Its process is killed; what it had started has processes of its own."""
    grandchild = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60'], start_new_session=True); "
    grandchild += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); p.wait()"
    code = "import sys, time; from pathlib import Path; from llava_next.training.watch.beside import *; "
    code += f"b = Beside([[sys.executable, '-c', {grandchild!r}]], Path({str(tmp_path / 'log')!r}), dict(os.environ)); "
    code += "time.sleep(60)"
    run = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.01)
    tree = psutil.Process(run.pid).children(recursive=True)
    assert len(tree) == 3 and int((tmp_path / "pid").read_text()) in [process.pid for process in tree]
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert psutil.wait_procs(tree, timeout=30)[1] == []


@pytest.mark.parametrize("told", [None, "[1]", '{"step": 1}', '{"step": "1", "scores": {}}'])
def test_what_people_have_put_where_scores_go_is_not_replaced(one_process, tmp_path, told):
    config = start(tmp_path, devices=None).config
    (tmp_path / "best").mkdir()
    (tmp_path / "best/weights").touch()
    if told:
        (tmp_path / "best/best.json").write_text(told)
    with pytest.raises(ScoringError, match=r"evaluate: .*/best is not one that a run has written .*: rename it"):
        check_scoring(config, STUB)
    forget_later(tmp_path, 0)
    assert (tmp_path / "best/weights").exists()
    (tmp_path / "best").rename(tmp_path / "scores")
    assert in_the_way(tmp_path) == ""
    (tmp_path / "best").symlink_to("nowhere")
    assert "/best is not one" in in_the_way(tmp_path)


def test_what_the_check_says_is_the_names_or_one_error(tmp_path):
    assert read_check('a note\n["mme", "pope"]\n["held_out"]\n', 0, "pope") == [["mme", "pope", "held_out"], ""]
    assert read_check('["mme"]\n', 0, "mmee")[1] == "evaluate.best: 'mmee' is no score of this run; they are mme"
    said = "Traceback\nevaluate.py: error: --tasks: 'mm' is no task\nat the end\n"
    assert read_check(said, 1, None) == [[], "evaluate: scripts/evaluate.py: --tasks: 'mm' is no task"]
    told = read_check("error: fetch it, then give --data DATA\n", 1, None)[1]
    assert told.endswith("give --data DATA in evaluate.options")
    assert "two scores are called mme: name" in read_check('["pope", "mme"]\n["mme"]\n', 0, None)[1]
    assert read_check("", 3, None)[1] == "evaluate: scripts/evaluate.py: exit status 3"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--evaluate.tasks", "mme"], "evaluate.every: give the steps between scorings"),
        (["--evaluate.every", "5"], "evaluate: give tasks or json"),
        (["--evaluate.every", "5", "--evaluate.json", "nowhere.json"], "evaluate.json: nowhere.json is not a file"),
        (["--evaluate.every", "5", "--evaluate.tasks", "mme", "--evaluate.devices", "gpu"], "evaluate.devices: 'gpu'"),
        (["--evaluate.every", "5", "--evaluate.tasks", "mme", "--evaluate.options", "'"], "evaluate.options: "),
        (["--evaluate.every", "5", "--evaluate.tasks", "mme", "--evaluate.options", "--show 1 --out=o"], ": --out is"),
        (["--evaluate.every", "5", "--evaluate.tasks", "mme", "--evaluate.options", "--lim 3"], ": --lim is"),
        (["--evaluate.every", "5", "--evaluate.tasks", "mme", "--evaluate.metric", "anls"], "metric: says nothing"),
        (["--evaluate.every", "-5", "--evaluate.tasks", "mme"], "must be 0 or more"),
    ],
)
def test_what_cannot_be_scored_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        parse_run(["--model", "m", "--run_dir", "r", "--data.sources", "s", *options])
