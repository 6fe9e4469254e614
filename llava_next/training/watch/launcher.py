"""How a run ends for whoever started it: one message, last on the screen, and an exit status that says what happened.

`accelerate launch` and `torchrun` know nothing of their ranks but exit statuses: after a stop that was asked for they
print a traceback and fail, each rank prints its own error, and 30 s after a signal ranks are killed whatever they do.
Two halves of this file mend that. In the launcher, torch loads what the installed package declares under
`torchrun.handlers` (see setup.cfg): `join` gives ranks the time they need, a folder for their last words, and prints
the one that tells most when all have ended. In a rank, `say_last` leaves its last words there. Without the launcher's
half (a checkout that is not installed, a launcher that was killed, no launcher) a rank prints them itself.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

LAUNCHER = "LLAVA_NEXT_LAUNCHER"  # for ranks: the launcher's process and its folder, `1234:/tmp/...`
TIME_LIMIT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # of torch 2.12 and newer
LAUNCHERS = ("accelerate", "accelerate-launch", "torchrun", "launch.py", "run.py")  # as commands, and by `python -m`
PATIENCE = 24 * 3600  # seconds; a rank that hangs ends by itself, a second signal ends all of them at once


class Words(NamedTuple):
    """What a rank said last.

    Args:
        rank: of the run.
        status: it exits with; 0: all is well, or the run was asked to stop and lost nothing.
        text: one message for the user; empty when another rank says it.
        follows: it ends because another rank did.
    """

    rank: int
    status: int
    text: str
    follows: bool = False


def say_last(text: str, status: int, on_all_ranks: bool = False, follows: bool = False) -> None:
    """The last words of this rank, which is about to exit with `status`.

    Args:
        text: empty: nothing to say but the status.
        on_all_ranks: all ranks say the same, so one of them is enough to be heard.
        follows: see `Words`.
    """
    rank = int(os.environ.get("RANK", "0"))
    folder = launcher_folder()
    if folder is not None:
        with contextlib.suppress(OSError):
            aside = folder / f"{rank}.writing"
            aside.write_text(json.dumps(Words(rank, status, text, follows)))
            os.replace(aside, folder / f"{rank}.json")
            return
    elif LAUNCHER in os.environ:  # it was killed, or started this process by way of another
        shutil.rmtree(os.environ[LAUNCHER].partition(":")[2], ignore_errors=True)
    if text and not (on_all_ranks and rank):
        print(text, file=sys.stderr if status else sys.stdout, flush=True)


def launcher_folder() -> Path | None:
    """Where the launcher that started this process waits for last words, while it does."""
    process, _, folder = os.environ.get(LAUNCHER, "").partition(":")
    return Path(folder) if process == str(os.getppid()) else None


def launcher_process() -> int | None:
    """The process that started this rank and restarts or kills it; None without a launcher."""
    if LAUNCHER in os.environ:
        return int(os.environ[LAUNCHER].partition(":")[0])
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None


def time_limit(run_dir: str) -> list[str]:
    """A line for people where the launcher will kill ranks that take long to save; none where it will not."""
    release = tuple(int(number) for number in version("torch").split(".")[:2])
    if "TORCHELASTIC_RUN_ID" not in os.environ or (launcher_folder() is not None and release >= (2, 12)):
        return []
    cure = f"install torch 2.12 or newer, not {version('torch')}"
    if launcher_folder() is None:
        cure = "`pip install -e .` in this project lets it wait"
    return [f"launcher   it kills ranks 30 s after a signal to stop ({cure}); `touch {run_dir}/stop` has no limit"]


def join():
    """Entry point `torchrun.handlers`: called in every process that imports torch's launcher.

    Does nothing unless this process launches a script of this project. Returns a creator of rendezvous, which the
    entry point is meant for and which nobody asks this package for.
    """
    with contextlib.suppress(Exception):  # a launcher must not fail by what only makes its messages better
        if "TORCHELASTIC_RUN_ID" not in os.environ and _launches_us(sys.argv):
            _Launcher()
    return _no_rendezvous


def _no_rendezvous(parameters):
    raise ValueError("llava_next has no rendezvous of its own; choose static or c10d")


def _launches_us(arguments: list[str]) -> bool:
    if Path(arguments[0]).name not in LAUNCHERS:  # others import the launcher too, and may name a file of this project
        return False
    script = next((Path(word) for word in arguments[1:] if word.endswith(".py")), None)
    if script is None or not script.exists():
        return False
    files = {script, script.with_name("finetune.py")}  # pretrain.py is the same program
    return any("llava_next.training" in file.read_text(errors="replace") for file in files if file.exists())


class _Launcher:
    """Waits in the launcher for the end."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="llava-next-"))
        self.error: BaseException | None = None
        self._excepthook = sys.excepthook
        os.environ.setdefault(TIME_LIMIT, str(PATIENCE))
        os.environ[LAUNCHER] = f"{os.getpid()}:{self.folder}"
        sys.excepthook = self._on_error
        atexit.register(self._end)

    def _on_error(self, kind, error, trace) -> None:
        self.error = error
        if kind.__name__ not in ("ChildFailedError", "SignalException"):
            self._excepthook(kind, error, trace)

    def _end(self) -> None:
        """Runs among the last exit handlers, this being among the first that were registered."""
        words = [Words(*json.loads(path.read_text())) for path in sorted(self.folder.glob("*.json"))]
        shutil.rmtree(self.folder, ignore_errors=True)
        said = verdict(words, self.error)
        if said.text:
            print(said.text, file=sys.stderr if said.status else sys.stdout)
        sys.stdout.flush()
        sys.stderr.flush()
        if self.error is not None:  # else the launcher's own status is right
            logging.shutdown()
            os._exit(said.status)


def verdict(words: list[Words], error: BaseException | None) -> Words:
    """Of the ranks' last words those that tell why the run ended.

    Args:
        error: what the launcher would have shown: ChildFailedError, SignalException, another one, or None.
    """
    causes = [w for w in words if w.status and not w.follows]
    stops = [w for w in words if not w.status]
    failures = sorted(getattr(error, "failures", {}).items(), key=lambda item: item[1].timestamp)
    silent = [(rank, failure) for rank, failure in failures if rank not in {w.rank for w in words}]
    if causes:
        return causes[0]
    if silent:  # a rank ended without a word
        rank, failure = silent[0]
        number = -failure.exitcode
        if number <= 0:
            return Words(rank, failure.exitcode or 1, f"error on rank {rank}: it ended with exit status {-number}")
        text = f"error on rank {rank}: process {failure.pid} was killed by {signal.Signals(number).name}"
        if number == signal.SIGKILL:
            text += ", as the system does when memory runs out (see dmesg); or by hand"
        return Words(rank, 128 + number, f"{text}. Start the run again: it continues from its newest checkpoint")
    if stops:
        return next((w for w in stops if w.text), stops[0])
    if words:
        return words[0]
    number = getattr(error, "sigval", None)
    if number is not None:
        return Words(0, 128 + number, f"stopped by {signal.Signals(number).name} before the ranks had begun")
    return Words(0, 1 if error is not None else 0, "")
