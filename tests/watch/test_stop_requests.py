"""What asks a run to stop: signals, a file, the end of its launcher; before training, during it, and when it hangs."""

import os
import signal
import subprocess
import sys
import time

import pytest

from llava_next.training.watch import stopping
from llava_next.training.watch.stopping import StoppedEarly, StopRequest
from support.launching import ROOT


@pytest.fixture
def exits(monkeypatch):
    """Statuses that the process would have ended with."""
    found = []
    monkeypatch.setattr(stopping.os, "_exit", found.append)  # of the thread that counts signals
    return found


def until(condition) -> None:
    deadline = time.perf_counter() + 30
    while not condition():
        assert time.perf_counter() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_second_signal_exits_but_an_echo_of_the_first_does_not(monkeypatch, exits, first):
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    with StopRequest() as stop:
        stop.begin()
        assert not stop.asked
        os.kill(os.getpid(), first)
        until(lambda: stop.asked)
        now[0] += 0.5
        stop._count(signal.SIGINT)
        now[0] += 5
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: exits)
        assert stop.reason == first.name and exits == [128 + signal.SIGTERM]


def test_signal_before_training_ends_the_start_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedEarly, match="SIGTERM"), StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) == before


def test_file_in_the_run_folder_stops_and_is_removed_and_an_old_one_does_not(monkeypatch, tmp_path):
    monkeypatch.setattr(StopRequest, "POLL", 0.01)
    said, path = [], tmp_path / "stop"
    path.touch()
    with StopRequest() as stop:
        stop.begin(tmp_path, said.append)
        until(lambda: said)
        assert not path.exists() and not stop.asked and "was there before this run began" in said[0]
        path.touch()
        until(lambda: len(said) == 2)
    assert stop.asked and not path.exists()
    assert said[1].startswith(f"asked to stop ({path}, now removed): ")


CHILD = """
import os, sys, time
os.dup2(os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY), 2)  # the parent's pipe ends with it
from llava_next.training.watch.stopping import StopRequest, StoppedEarly
StopRequest.POLL = 0.05
try:
    with StopRequest() as stop:
        if "begun" in sys.argv:
            stop.begin(patience=0.5)
        if "hangs" in sys.argv:
            stop.step_begins()
        print("ready", flush=True)
        while not stop.asked or "hangs" in sys.argv:
            time.sleep(0.02)
        print(stop.reason, file=sys.stderr)
except StoppedEarly as early:
    print("early", early, file=sys.stderr)
"""
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]], stdout=subprocess.PIPE, text=True)
print(child.stdout.readline(), end="", flush=True)
child.wait()
"""


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (["begun"], "its launcher is gone\n"),
        ([], "early SIGTERM\n"),
        (["begun", "hangs"], "error on rank 0: its launcher is gone and the running step does not end in 0.5 s\n"),
    ],
    ids=["training", "starting", "hanging"],
)
def test_rank_whose_launcher_was_killed_stops(state, said, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHELASTIC_RUN_ID": "none"}
    command = [sys.executable, "-c", PARENT, CHILD, tmp_path / "said", *state]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert launcher.stdout.readline() == "ready\n"
    launcher.kill()
    until(lambda: (tmp_path / "said").read_text().endswith("\n"))
    assert (tmp_path / "said").read_text() == said
    launcher.wait()
    launcher.stdout.close()
