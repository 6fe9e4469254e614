"""The last word of a run: which rank's it is, which status, and what the launcher does for scripts of ours only."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from llava_next.training.watch import launcher
from llava_next.training.watch.launcher import LAUNCHER, Words, say_last, verdict
from support.launching import ROOT, installed


def failed(**exit_codes) -> SimpleNamespace:
    """ChildFailedError, as far as it is looked at: the earliest failure first."""
    failures = {
        int(name.removeprefix("rank")): SimpleNamespace(exitcode=code, timestamp=place, pid=100 + place)
        for place, (name, code) in enumerate(exit_codes.items())
    }
    return SimpleNamespace(failures=failures)


def signalled(number: int) -> SimpleNamespace:
    return SimpleNamespace(sigval=number)


SAVED = Words(0, 0, "stopped after step 7")
OTHER = Words(1, 0, "")
LOST = Words(1, 1, "error on rank 1: another rank is gone", follows=True)
CAUSE = Words(2, 1, "error on rank 2: no space")


@pytest.mark.parametrize(
    ("words", "error", "status", "text"),
    [
        ([SAVED, OTHER], None, 0, "stopped after step 7"),
        ([SAVED, OTHER], signalled(signal.SIGTERM), 0, "stopped after step 7"),
        ([OTHER], signalled(signal.SIGINT), 0, ""),  # another node's rank 0 says it
        ([], signalled(signal.SIGINT), 130, "stopped by SIGINT before the ranks had begun"),
        ([LOST, CAUSE], failed(rank1=1), 1, "error on rank 2: no space"),
        ([SAVED, CAUSE], signalled(signal.SIGTERM), 1, "error on rank 2: no space"),
        ([LOST], failed(rank0=-9, rank1=1), 137, "error on rank 0: process 100 was killed by SIGKILL"),
        ([LOST], failed(rank0=-11), 139, "error on rank 0: process 100 was killed by SIGSEGV"),
        ([LOST], failed(rank0=3), 3, "error on rank 0: it ended with exit status 3"),
        ([LOST], failed(rank1=1), 1, "error on rank 1: another rank is gone"),  # the cause is on another node
        ([Words(0, 0, "stopped by SIGTERM while starting"), LOST], failed(rank1=1), 0, "stopped by SIGTERM while"),
        ([], None, 0, ""),
        ([], ValueError("of the launcher itself"), 1, ""),
    ],
)
def test_verdict_is_the_cause_and_not_what_follows_from_it(words, error, status, text):
    said = verdict(words, error)
    assert (said.status, said.text[: len(text)]) == (status, text) and bool(said.text) == bool(text)


@pytest.mark.parametrize(
    ("command", "ours"),
    [
        (("/env/bin/accelerate", "launch", "--config_file", "c.yaml", "SCRIPT"), True),
        (("/env/accelerate/commands/launch.py", "SCRIPT"), True),
        (("/env/bin/torchrun", "SCRIPT"), True),
        (("/env/bin/torchrun", "other.py"), False),
        (("/env/pytest/__main__.py", "SCRIPT"), False),
    ],
)
def test_only_a_launcher_waits_for_last_words(tmp_path, command, ours):
    (tmp_path / "mine.py").write_text("from llava_next.training.loop import Trainer\n")
    assert launcher._launches_us([word.replace("SCRIPT", str(tmp_path / "mine.py")) for word in command]) == ours


def test_ranks_leave_their_last_words_with_a_launcher_that_lives_and_else_say_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(LAUNCHER, f"{os.getppid()}:{tmp_path}")
    say_last("kept", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["0.json"] and capsys.readouterr() == ("", "")
    monkeypatch.setenv(LAUNCHER, f"{os.getpid()}:{tmp_path}")  # not the parent: it was killed
    say_last("heard", 1)
    say_last("saved", 0)
    monkeypatch.setenv("RANK", "1")
    say_last("heard", 1, on_all_ranks=True)
    assert capsys.readouterr() == ("saved\n", "heard\n") and not tmp_path.exists()


# a process for each script, forked where torch is loaded and its launcher is not
LAUNCHED = """
import os, sys, torch
for script in sys.argv[1:]:
    if not os.fork():
        sys.argv = ["accelerate", "launch", script, "--seed", "1"]
        from torch.distributed.launcher.api import LaunchConfig
        print(script, LaunchConfig(1, 1, 1).shutdown_timeout, flush=True)
        os._exit(0)
    os.wait()
"""


def test_launcher_gives_our_ranks_a_day_to_save_and_leaves_other_scripts_alone(tmp_path):
    limits = {"scripts/finetune.py": 86400, "scripts/pretrain.py": 86400, "tests/conftest.py": 30}
    environment = {**os.environ, "PYTHONPATH": installed(tmp_path)}
    for name in (launcher.TIME_LIMIT, LAUNCHER, "TORCHELASTIC_RUN_ID"):
        environment.pop(name, None)
    command = [sys.executable, "-c", LAUNCHED, *limits]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "".join(f"{script} {seconds}\n" for script, seconds in limits.items()), done.stderr
