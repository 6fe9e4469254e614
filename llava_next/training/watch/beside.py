"""Commands in a process beside the run, which ends with it: their end, whatever it is, is no more than a status to it.

The run holds a pipe to a keeper, a process of its own session that runs the commands. When the pipe closes, because the
run closes it or is gone, however it was ended, the keeper kills whatever the commands have started. Nothing of the
launcher that started this rank reaches them.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

# what launchers tell their ranks, and this project its own: a process that reads it takes itself for one of them
OF_LAUNCHERS = ("ACCELERATE_", "FSDP_", "MASTER_", "PARALLELISM_CONFIG_", "TORCHELASTIC_", "TORCH_ELASTIC_", "ROLE_")
OF_LAUNCHERS += ("TORCH_NCCL_", "TORCH_FR_", "PMI_", "OMPI_COMM_", "MV2_COMM_", "LLAVA_NEXT_LAUNCHER")
RANKS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")
PATIENCE = 10.0  # seconds until a keeper that does not end is killed itself


def own_environment(changes: Mapping[str, str]) -> dict[str, str]:
    """This process' environment without what makes it a rank.

    Args:
        changes: variables that are set besides.
    """
    kept = {k: v for k, v in os.environ.items() if k not in RANKS and not k.startswith(OF_LAUNCHERS)}
    return kept | changes


class Beside:
    """Runs commands one after the other, until one fails.

    Args:
        commands: words of each.
        log: file that what they print is added to.
        environment: of the commands, this package on their PYTHONPATH.

    Raises:
        OSError: they cannot be started, or the log not be written.
    """

    def __init__(self, commands: Sequence[Sequence[str]], log: Path, environment: dict[str, str]):
        words = [sys.executable, "-m", __spec__.name, json.dumps([list(map(str, words)) for words in commands])]
        with open(log, "ab") as file:
            self._keeper = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment, start_new_session=True
            )

    def poll(self) -> int | None:
        """None while they run, then the exit status of the last one; minus the number of the signal that ended it."""
        status = self._keeper.poll()
        return status if status is None or status < 128 else 128 - status

    def end(self) -> None:
        """Ends them, if they have not ended."""
        with contextlib.suppress(OSError):
            self._keeper.stdin.close()
        try:
            self._keeper.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()


def keep(commands: list[list[str]]) -> int:
    """The keeper: runs the commands. Returns an exit status, of a signal as shells do."""
    ending = threading.Event()
    thread = threading.Thread(target=_end_with_the_run, args=(ending,), daemon=True)
    thread.start()
    for words in commands:
        status = subprocess.call(words, stdin=subprocess.DEVNULL)
        if ending.is_set():
            thread.join()
        if status:
            return 128 - status if status < 0 else status
    return 0


def _end_with_the_run(ending: threading.Event) -> None:
    while os.read(0, 1):  # nothing ever comes: it returns when the other end is closed
        pass
    ending.set()
    started = psutil.Process().children(recursive=True)
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(started, PATIENCE / 2)  # what they held is free when this one ends
    os._exit(1)


if __name__ == "__main__":
    sys.exit(keep(json.loads(sys.argv[1])))
