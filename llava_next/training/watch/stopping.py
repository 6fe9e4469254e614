"""Why a run is to stop before its end: a signal, a file `stop` in its folder, or a launcher that is gone."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from llava_next.data.storage.lease import release_all
from llava_next.training.watch.launcher import launcher_process, say_last

STOP_FILE = "stop"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StoppedEarly(BaseException):
    """A stop was asked for before training began: nothing was done and nothing is saved."""


class StopRequest:
    """Notes that this rank was asked to stop; the loop tells the others and saves. A context of the main thread.

    Until `begin` a signal raises StoppedEarly where the program stands. Afterwards it only sets `reason`; a second one
    ends the process at once. A thread counts them: the main one may be waiting for other ranks in C++, where no Python
    handler runs.

    A launcher passes signals on to its ranks. When it is killed itself its ranks, which have sessions of their own,
    would go on without anybody who could see or stop them, so its end is a request to stop as well.
    """

    ECHO = 2.0  # seconds: a signal may reach a rank twice, from a scheduler and passed on by the launcher
    POLL = 1.0  # seconds between looks at the launcher and the file
    START = 10.0  # seconds that StoppedEarly may take to end a start

    def __init__(self):
        self.reason = ""
        self._asked_at: float | None = None
        self._begun, self._closed, self._run_dir, self._say = False, False, None, None
        self._launcher = launcher_process()
        self._busy_since: float | None = None
        self._patience = float("inf")
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._count_signals, name="signals", daemon=True).start()
        if self._launcher is not None:
            threading.Thread(target=self._watch_launcher, name="launcher", daemon=True).start()

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(self, *_) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._closed = True
        os.close(self._writer)  # ends the thread that counts

    @property
    def asked(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._asked_at is not None

    def ask(self, reason: str) -> None:
        """Asks for a stop."""
        if self._asked_at is None:
            self.reason, self._asked_at = reason, time.monotonic()

    def begin(self, run_dir: Path | None = None, say: Callable[[str], None] = print, patience: float = 600.0) -> None:
        """From here on there is something to save.

        Args:
            run_dir: on rank 0, the folder to look for `stop` in.
            say: told, on rank 0, why the run is about to stop.
            patience: seconds after which a step is given up that does not end when the launcher is gone.
        """
        self._begun, self._run_dir, self._say, self._patience = True, run_dir, say, patience
        if run_dir is not None:
            threading.Thread(target=self._watch_file, name="stop", daemon=True).start()

    def step_begins(self) -> None:
        """A step takes this rank's time, which is limited only when no launcher could end it."""
        self._busy_since = time.monotonic()

    def step_ends(self) -> None:
        """What comes now may take as long as it does."""
        self._busy_since = None

    def _on_signal(self, number, frame) -> None:
        if not self._begun:
            raise StoppedEarly(signal.Signals(number).name)

    def _count_signals(self) -> None:
        while numbers := os.read(self._reader, 64):
            for number in filter(SIGNALS.__contains__, numbers):
                self._count(number)
        os.close(self._reader)

    def _count(self, number: int) -> None:
        if self._asked_at is None:
            self.ask(signal.Signals(number).name)
            if not self._begun:
                threading.Thread(target=self._end_start, name="start", daemon=True).start()
        elif time.monotonic() - self._asked_at > self.ECHO:
            os._exit(128 + number)

    def _end_start(self) -> None:
        time.sleep(self.START)
        if not self._begun and not self._closed:  # it waits for other ranks
            release_all()
            say_early(self.reason)
            os._exit(0)

    def _watch_launcher(self) -> None:
        while os.getppid() == self._launcher:
            time.sleep(self.POLL)
        if not self._begun:
            os.kill(os.getpid(), signal.SIGTERM)  # raises in the main thread
        self.ask("its launcher is gone")
        while not self._closed:
            time.sleep(self.POLL)
            since = self._busy_since
            if since is not None and time.monotonic() - since > self._patience:
                give_up(f"its launcher is gone and the running step does not end in {self._patience:g} s")

    def _watch_file(self) -> None:
        path = self._run_dir / STOP_FILE
        if _removed(path):
            self._say(f"{path} was there before this run began: removed")
        while not self.asked:
            time.sleep(self.POLL)
            if _removed(path):
                self.ask(f"{path}, now removed")
        self._say(f"asked to stop ({self.reason}): the running step is finished and saved, nothing else is begun")


def say_early(reason: str) -> None:
    """The last words of a rank that was stopped before there was anything to save."""
    say_last(f"stopped by {reason} while starting: nothing was begun, nothing is lost", 0, on_all_ranks=True)


def _removed(path: Path) -> bool:
    try:
        path.unlink()
        return True
    except OSError:
        return False


def give_up(text: str) -> None:
    """Ends this process now, from any thread."""
    release_all()
    say_last(f"error on rank {os.environ.get('RANK', '0')}: {text}", 1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
