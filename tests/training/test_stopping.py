"""Runs that are stopped, killed, or cannot save: what a person sees, and that nothing is lost."""

import json
import os
import random
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration
from llava_next.training import loop
from llava_next.training.checkpoints.recovery import complete_checkpoints
from llava_next.training.loop import StopSignal
from support.demo import build_demo
from support.launching import ROOT, command_and_environment
from support.runs import losses

KILLS = int(os.environ.get("LLAVA_NEXT_KILLS", "0"))


def test_second_signal_exits_but_an_echo_of_the_first_does_not(monkeypatch):
    exits, now, before = [], [100.0], [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setattr(loop.os, "_exit", exits.append)
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    try:
        stop = StopSignal()
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 0.5
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked and exits == []
        now[0] += 5
        os.kill(os.getpid(), signal.SIGTERM)
        assert exits == [128 + signal.SIGTERM]
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The quickstart's data and model, small: 12 steps of 8 samples."""
    folder = tmp_path_factory.mktemp("demo")
    build_demo(folder, samples=96)
    return folder


def start(demo: Path, run: Path, *options, processes: int, **popen) -> subprocess.Popen:
    """A launched run of scripts/finetune.py that saves after every step; what it prints goes to `run`.txt."""
    arguments = [
        *("--config", ROOT / "scripts/recipes/digits/finetune.yaml", "--run_dir", run, "--model", demo / "base"),
        *("--data.sources", demo / "shards", "--data.batch_size", 8, "--data.max_length", 300, "--data.epochs", 1),
        *("--data.num_workers", 0, "--log_every", 1, "--checkpoint.every", 1),
    ]
    command, environment = command_and_environment("scripts/finetune.py", *arguments, *options, processes=processes)
    with open(f"{run}.txt", "a") as out:
        options = {"env": environment, "cwd": ROOT, "stdout": out, "stderr": out, "start_new_session": True}
        return subprocess.Popen(command, **options, **popen)


def until_step(process: subprocess.Popen, run: Path, step: int) -> None:
    """Returns when the run has logged a step, or has ended."""
    log, deadline = run / "metrics.jsonl", time.monotonic() + 170
    while process.poll() is None and not (log.exists() and f'"step": {step}, ' in log.read_text()):
        assert time.monotonic() < deadline, Path(f"{run}.txt").read_text()[-3000:]
        time.sleep(0.01)


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The training processes below a launcher."""
    found = psutil.Process(process.pid).children(recursive=True)
    return [p for p in found if "RANK" in p.environ() and any("finetune.py" in word for word in p.cmdline())]


def result(run: Path) -> dict[str, torch.Tensor]:
    """The weights of the exported model."""
    return LlavaNextForConditionalGeneration.from_pretrained(run / "model").state_dict()


def test_sigterm_finishes_the_step_saves_and_prints_the_command_that_goes_on(demo, tmp_path):
    run = tmp_path / "run"
    process = start(demo, run, "--optim.rates.vision", "null", processes=2)
    until_step(process, run, 2)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    ranks[1].terminate()  # one rank is enough: all of them agree
    assert process.wait(60) == 0
    said = Path(f"{run}.txt").read_text()
    step = int(said.split("stopped after step ")[1].split(";")[0])
    assert 2 <= step < 12 and len(losses(run)) == step
    assert complete_checkpoints(run / "checkpoints")[-1].name == f"step-{step:08d}"
    command = said.split("to continue:\n")[1].splitlines()[0]
    assert command.startswith("accelerate launch --config_file ")
    words = [sys.executable, "-m", "accelerate.commands.launch", *shlex.split(command)[2:]]
    environment = command_and_environment("")[1]
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"continuing after step {step} from" in done.stdout and len(losses(run)) == 12
    assert all(json.loads(line)["checkpoint_s"] >= 0 for line in (run / "metrics.jsonl").read_text().splitlines())
    # what is frozen came from the model that the run was started from
    state, base = result(run), LlavaNextForConditionalGeneration.from_pretrained(demo / "base").state_dict()
    frozen = [name for name in base if "vision_tower" in name]
    assert frozen and all(torch.equal(state[name], base[name].bfloat16()) for name in frozen)
    assert not torch.equal(state["lm_head.weight"], base["lm_head.weight"].bfloat16())


def test_checkpoint_that_cannot_be_written_ends_the_run_with_one_plain_error(demo, tmp_path):
    run = tmp_path / "run"
    largest = (200_000, 200_000)  # bytes of a file; a checkpoint's are larger
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, largest)}
    assert start(demo, run, processes=2, **limit).wait(170) != 0
    said = Path(f"{run}.txt").read_text()
    assert said.count("error: checkpoint ") == 1 and 'finetune.py", line' not in said  # no trace of ours
    assert "step-00000001 could not be written (rank 0: [Errno 27] File too large" in said
    assert list((run / "checkpoints").iterdir()) == []


@pytest.mark.skipif(not KILLS, reason="takes half a minute a kill; set LLAVA_NEXT_KILLS=20 to run it")
def test_killed_runs_end_like_one_that_was_left_alone(demo, tmp_path, capsys):
    generator, table = random.Random(KILLS), []
    for number, world in enumerate((1, 2, 4)):
        whole = tmp_path / f"whole-{world}"
        assert start(demo, whole, processes=world).wait(400) == 0
        while len(table) < KILLS * (number + 1) // 3:
            run = tmp_path / f"killed-{world}-{len(table)}"
            rows = killed_run(demo, run, world, KILLS * (number + 1) // 3 - len(table), generator)
            same_log = losses(run) == losses(whole)
            ours, theirs = result(run), result(whole)
            equal = same_log and all(torch.equal(ours[name], theirs[name]) for name in theirs)
            table += [f"{row}  {'bit-equal' if equal else 'DIFFERENT'}" for row in rows]
            assert equal, "\n".join(table)
    with capsys.disabled():
        print("\nranks  seconds  step  phase         checkpoints           result", *table, sep="\n")


def killed_run(demo: Path, run: Path, world: int, most: int, generator: random.Random) -> list[str]:
    """One run, killed up to `most` times and started again until it is done. Returns a line a kill."""
    rows, log = [], run / "metrics.jsonl"
    while len(rows) < most:
        process, begin = start(demo, run, processes=world), time.monotonic()
        done = len(log.read_text().splitlines()) if log.exists() else 0
        if generator.random() < 0.8:
            until_step(process, run, done + 1)
            time.sleep(generator.uniform(0, 1))
        else:  # a moment in the start, which takes about that long
            time.sleep(generator.uniform(0, 12))
        if process.poll() is None:
            for member in [*psutil.Process(process.pid).children(recursive=True), process]:
                member.kill()
        if process.wait(60) == 0:
            return rows
        names = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
        steps = len(log.read_text().splitlines()) if log.exists() else 0
        phase = "saving" if any(".tmp" in name for name in names) else "training" if steps > done else "starting"
        short = " ".join(name.removeprefix("step-").lstrip("0") for name in names)
        rows.append(f"{world:5}  {time.monotonic() - begin:7.2f}  {steps:4}  {phase:12}  {short:20}")
    assert start(demo, run, processes=world).wait(400) == 0
    return rows
