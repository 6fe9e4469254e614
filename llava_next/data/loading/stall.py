"""When work takes far too long: a file that says what the process was doing, while everything still stands."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path


class StallDump:
    """Watches one piece of work; when it takes too long, writes what is known and the stacks of all threads.

        with StallDump(folder / "stall-rank0.txt", 120, lambda: ["waiting for step 7"]):
            ...

    The work goes on: a dump changes nothing, and comes before any time limit of the network or of a collective.

    Args:
        path: written to (appended); None writes to the standard error stream.
        patience: seconds until the dump, and between that and the next ones.
        describe: called when it is written, gives lines of text.
    """

    def __init__(self, path: Path | None, patience: float, describe: Callable[[], Iterable[str]]):
        self._path, self._patience, self._describe = path, patience, describe
        self._timer: threading.Timer | None = None

    def __enter__(self) -> StallDump:
        self._begin = time.monotonic()
        self._start()
        return self

    def __exit__(self, *error) -> None:
        self._timer.cancel()

    def _start(self) -> None:
        self._timer = threading.Timer(self._patience, self._dump)
        self._timer.daemon = True
        self._timer.start()

    def _dump(self) -> None:
        waited = time.monotonic() - self._begin
        lines = [
            f"{time.strftime('%Y-%m-%d %H:%M:%S')} process {os.getpid()} has waited {waited:.0f} s",
            *self._describe(),
        ]
        print("\n".join(lines), file=sys.stderr, flush=True)
        if self._path is not None:
            try:
                with open(self._path, "a", encoding="utf-8") as file:
                    file.write("\n".join(lines) + "\n")
                    file.flush()
                    faulthandler.dump_traceback(file, all_threads=True)
                    file.write("\n")
            except OSError as error:
                print(f"{self._path} cannot be written: {error}", file=sys.stderr, flush=True)
        self._start()
