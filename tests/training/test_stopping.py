"""Runs that are stopped, killed, or cannot save: what a person sees, and that nothing is lost."""

import contextlib
import itertools
import json
import os
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from llava_next.data.storage import lease as leases
from llava_next.data.storage.client import Storage
from llava_next.data.storage.lease import LEASE_FILE, Lease, LeaseHeld, release_all
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration
from llava_next.training.checkpoints.holding import hold_run
from llava_next.training.checkpoints.recovery import complete_checkpoints, find_resume
from llava_next.training.recipe.config import RunConfig
from support.demo import build_demo
from support.launching import ROOT, command_and_environment, installed, launch
from support.runs import demo_arguments, losses, read_lines

KILLS = int(os.environ.get("LLAVA_NEXT_KILLS", "0"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The quickstart's data and model, small: 12 steps of 8 samples."""
    folder = tmp_path_factory.mktemp("demo")
    build_demo(folder, samples=96)
    return folder


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> str:
    """The project as if it were installed: the launcher's half of it takes part."""
    return installed(tmp_path_factory.mktemp("installed"))


def start(demo: Path, run: Path, package: str, *options, processes: int, node: int | None = None):
    """A launched run of scripts/finetune.py that saves after every step; what it prints goes to `run`.txt.

    Args:
        node: of two with half of the processes each, which both have to be started.
    """
    arguments = (*arguments_of(demo, run), "--checkpoint.every", 1, *options)
    command, environment = command_and_environment("scripts/finetune.py", *arguments, processes=processes)
    if node is not None:
        place = command.index("--main_process_port")
        port = str(20000 + zlib.crc32(str(run).encode()) % 10000)
        nodes = ["--num_machines", "2", "--machine_rank", str(node), "--main_process_ip", "127.0.0.1"]
        command[place : place + 2] = [*nodes, "--main_process_port", port]
    environment["PYTHONPATH"] += os.pathsep + package
    with open(f"{run}.txt", "a") as out:
        options = {"env": environment, "cwd": ROOT, "stdout": out, "stderr": out, "start_new_session": True}
        return subprocess.Popen(command, **options)


def arguments_of(demo: Path, run: Path) -> list:
    """One epoch of the demo."""
    return [*demo_arguments(demo, run), "--data.batch_size", 8]


def end_of(run: Path) -> str:
    """What a person sees last."""
    return Path(f"{run}.txt").read_text()[-3000:]


def until_step(process: subprocess.Popen, run: Path, step: int) -> None:
    """Returns when the run has logged a step, or has ended."""
    log, deadline = run / "metrics.jsonl", time.monotonic() + 170
    while process.poll() is None and not (log.exists() and f'"step": {step}, ' in log.read_text()):
        assert time.monotonic() < deadline, Path(f"{run}.txt").read_text()[-3000:]
        time.sleep(0.01)


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The training processes below a launcher."""
    found = []
    for child in tree(process)[1:]:
        with contextlib.suppress(psutil.NoSuchProcess):  # ended since
            if "RANK" in child.environ() and any("finetune.py" in word for word in child.cmdline()):
                found.append(child)
    return found


def result(run: Path) -> dict[str, torch.Tensor]:
    """The weights of the exported model, and of its adapter."""
    adapter = run / "adapter/adapter_model.safetensors"
    found = LlavaNextForConditionalGeneration.from_pretrained(run / "model").state_dict()
    return found | (load_file(adapter) if adapter.exists() else {})


def test_stopped_and_failed_runs_lose_nothing_say_one_thing_last_and_go_on(demo, package, tmp_path):
    """Two ranks: the launcher alone is killed, then asked to stop, then no checkpoint can be written, then it ends."""
    run, options = tmp_path / "run", ("--optim.rates.vision", "null")
    process = start(demo, run, package, *options, processes=2)
    until_step(process, run, 2)
    with pytest.raises(LeaseHeld, match=rf"{run} is in use by another run: process \d+ on "):
        Lease(Storage(run), "run", "").take()
    ranks = ranks_of(process)
    assert len(ranks) == 2
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    assert psutil.wait_procs(ranks, timeout=60)[1] == []
    first, command = stopped_at(run)
    assert 2 <= first < 12 and len(losses(run)) == first and not (run / LEASE_FILE).exists()

    process = launched(command, run, package)
    until_step(process, run, first + 1)
    process.terminate()
    assert process.wait(60) == 0
    second, command = stopped_at(run)
    assert first < second < 12 and len(losses(run)) == second

    largest = (200_000, 200_000)  # bytes of a file; a checkpoint's are larger
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, largest)}
    before = complete_checkpoints(run / "checkpoints")
    assert launched(command, run, package, **limit).wait(170) == 1
    said = Path(f"{run}.txt").read_text()
    failed = f"error: checkpoint {run}/checkpoints/step-{second + 1:08d} could not be written (rank 0: [Errno 27] File "
    assert said.count("error: checkpoint ") == 1 and said.splitlines()[-1].startswith(failed)
    assert f"step-{second:08d} is complete and will be continued from" in said
    assert sorted((run / "checkpoints").iterdir()) == before

    done = launch("scripts/finetune.py", *arguments_of(demo, run), *options)
    assert f"continuing after step {second} from" in done.stdout and len(losses(run)) == 12
    assert done.stdout.splitlines()[-1] == f"model written to {run}/model; 10 checks made"
    assert "Traceback" not in said and "Traceback" not in done.stderr
    assert all(json.loads(line)["checkpoint_s"] >= 0 for line in (run / "metrics.jsonl").read_text().splitlines())
    # what is frozen came from the model that the run was started from
    state, base = result(run), LlavaNextForConditionalGeneration.from_pretrained(demo / "base").state_dict()
    frozen = [name for name in base if "vision_tower" in name]
    assert frozen and all(torch.equal(state[name], base[name].bfloat16()) for name in frozen)
    assert not torch.equal(state["lm_head.weight"], base["lm_head.weight"].bfloat16())


def stopped_at(run: Path) -> tuple[int, str]:
    """The step that a stopped run saved, and the command that continues it: its last two lines on the screen."""
    said, command = end_of(run).splitlines()[-2:]
    step = int(re.fullmatch(r"stopped after step (\d+); to continue:", said)[1])
    assert complete_checkpoints(run / "checkpoints")[-1].name == f"step-{step:08d}"
    assert command.startswith("accelerate launch --config_file ")
    return step, command


def launched(command: str, run: Path, package: str, **popen) -> subprocess.Popen:
    """Runs a command line that a run has printed."""
    environment = command_and_environment("")[1]
    environment["PYTHONPATH"] += os.pathsep + package
    words = [sys.executable, "-m", "accelerate.commands.launch", *shlex.split(command)[2:]]
    with open(f"{run}.txt", "a") as out:
        return subprocess.Popen(words, env=environment, cwd=ROOT, stdout=out, stderr=out, **popen)


def test_stop_begins_nothing_and_what_was_due_is_done_when_the_run_goes_on(demo, tmp_path):
    """Asked when a validation begins, and again when the checkpoint after it is saved: before an export."""
    run = tmp_path / "run"
    every = ["--data.validation_every", 2, "--checkpoint.every", 2, "--checkpoint.export_every", 2, "--max_steps", 4]
    arguments = [*arguments_of(demo, run), "--data.validation", demo / "shards", "--data.validation_steps", 2, *every]

    def validated() -> list[int]:
        return [line["step"] for line in read_lines(run / "validation.jsonl")]

    worker = "tests/support/workers/stopped.py"
    said = launch(worker, "loss", *arguments, processes=1).stdout
    assert "stopped after step 2; to continue:" in said and validated() == [] and len(losses(run)) == 2
    said = launch(worker, "save", *arguments, processes=1).stdout
    assert "stopped after step 2; to continue:" in said and validated() == [2]
    assert not (run / "model-step-2").exists()
    said = launch("scripts/finetune.py", *arguments, processes=1).stdout
    assert "model after step 2 written" in said and validated() == [2, 4] and len(losses(run)) == 4


def test_run_whose_place_is_held_elsewhere_writes_nothing(one_process, tmp_path, monkeypatch):
    """On another machine, which goes on renewing; by the lease of the run folder or of the checkpoints' own folder."""
    for place in ("run", "checkpoints"):
        storage, beats = Storage(tmp_path / place), itertools.count()
        about = {"token": "t", "host": "node-7", "machine": "m", "process": 12, "start": "5", "since": 1.0}

        def renew(seconds, storage=storage, beats=beats, about=about):  # while this machine waits
            storage.put(LEASE_FILE, json.dumps(about | {"beat": next(beats)}).encode())

        monkeypatch.setattr(leases.time, "sleep", renew)
        renew(0)
        config = RunConfig(run_dir=str(tmp_path / "run"))
        config.checkpoint.dir = str(tmp_path / "checkpoints")
        with pytest.raises(LeaseHeld, match=r"process 12 on node-7.*`touch .*/run/stop`.*--take_over"):
            hold_run(config, find_resume(config))
        storage.delete(LEASE_FILE)
        release_all()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


QLORA = ("--lora.r", 8, "--lora.alpha", 16, "--lora.dropout", 0.1, "--optim.rates.vision", "null", "--quantize", "nf4")


@pytest.mark.skipif(not KILLS, reason="takes half a minute a kill; set LLAVA_NEXT_KILLS=30 to run it")
@pytest.mark.parametrize("options", [(), QLORA], ids=["in_full", "qlora"])
def test_killed_and_stopped_runs_end_like_one_that_was_left_alone(demo, package, tmp_path, capsys, options):
    generator, table, wholes = random.Random(KILLS), [], {}
    kinds = itertools.cycle(("tree", "stop", "launcher", "rank", "node"))
    while len(table) < KILLS:
        kind, number = next(kinds), len(table)
        world = generator.choice((2, 4) if kind == "node" else (1, 2, 4))
        if world not in wholes:
            wholes[world] = tmp_path / f"whole-{world}"
            assert start(demo, wholes[world], package, *options, processes=world).wait(400) == 0
        run = tmp_path / f"killed-{number}"
        rows = killed_run(demo, run, package, options, world, kind, min(3, KILLS - number), generator)
        ours, theirs = result(run), result(wholes[world])
        equal = losses(run) == losses(wholes[world]) and all(torch.equal(ours[name], theirs[name]) for name in theirs)
        table += [f"{row}  {'bit-equal' if equal else 'DIFFERENT'}" for row in rows]
        assert equal, "\n".join(table)
        with capsys.disabled():
            print("", *table[-len(rows) :], sep="\n", end="", flush=True)


def killed_run(
    demo: Path,
    run: Path,
    package: str,
    options: tuple,
    world: int,
    kind: str,
    most: int,
    generator: random.Random,
) -> list[str]:
    """One run, killed (`stop`: asked to stop by SIGTERM) up to `most` times and started again until it is done.

    Returns:
        A line a kill.
    """
    rows, log, nodes = [], run / "metrics.jsonl", (0, 1) if kind == "node" else (None,)
    while True:
        launchers = [start(demo, run, package, *options, processes=world, node=node) for node in nodes]
        begin, done = time.monotonic(), len(read_complete(log))
        if len(rows) == most:
            assert [process.wait(400) for process in launchers] == [0] * len(nodes), end_of(run)
            return rows
        # a launcher waits a quarter of an hour for a node that ends while they find each other: not for this table
        if kind == "node" or generator.random() < 0.8:
            until_step(launchers[0], run, done + 1)
            time.sleep(generator.uniform(0, 1))
        else:  # a moment in the start, which takes about that long
            time.sleep(generator.uniform(0, 12))
        victim = generator.choice(launchers)
        whole = [member for process in launchers for member in tree(process)]
        alone = tree(victim)[:1]
        chosen = {"tree": whole, "node": tree(victim), "launcher": alone, "stop": alone, "rank": ranks_of(victim)[-1:]}
        killed = time.monotonic()
        for member in reversed(chosen[kind]):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.terminate() if kind == "stop" else member.kill()
        statuses = [process.wait(120) for process in launchers]
        assert psutil.wait_procs(whole, timeout=60)[1] == [], end_of(run)  # all is over, whoever was killed
        if (run / "model").exists():  # it had ended before
            return rows
        names = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
        phase = "training" if len(read_complete(log)) > done else "starting"
        rows.append(
            f"{kind:8}  {world:5}  {killed - begin:6.2f}  {time.monotonic() - killed:6.2f}  {phase:8}  "
            f"{' '.join(name.removeprefix('step-').lstrip('0') for name in names):20}  {statuses}"
        )


def tree(process: subprocess.Popen) -> list[psutil.Process]:
    """A launcher and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return []


def read_complete(log: Path) -> list[str]:
    """A log's lines, as far as it got."""
    return log.read_text().splitlines() if log.exists() else []
