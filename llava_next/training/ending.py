"""How the process of a rank ends: what it says last, and its exit status."""

from __future__ import annotations

import os
import sys
import traceback
from typing import NoReturn

from llava_next.data.storage.client import StorageError
from llava_next.data.storage.lease import LeaseHeld
from llava_next.training.checkpoints.recovery import CheckpointError
from llava_next.training.devices.agreement import RanksDisagree, RunStopped
from llava_next.training.devices.parallel import end_process
from llava_next.training.scoring import ScoringError
from llava_next.training.watch.launcher import launcher_folder, say_last
from llava_next.training.watch.stopping import StoppedEarly, say_early
from llava_next.training.watch.trackers import TrackerError

# of gloo, NCCL and the rendezvous, when a process at the other end is gone
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo/transport", "recvValue failed")


def refuse(error: Exception) -> NoReturn:
    """What the user gave cannot work, on any rank: one line, before anything is loaded."""
    say_and_exit(f"error: {error}", on_all_ranks=True)


def fail(error: BaseException) -> NoReturn:
    """The end of a run by an error: one line where the user can do something, a traceback before it where not."""
    rank = os.environ.get("RANK", "0")
    if isinstance(error, StoppedEarly):
        say_early(str(error))
        end_process(0)
    lost = any(text in str(error) for text in LOST)
    said_on_all = (CheckpointError, RanksDisagree, LeaseHeld, TrackerError, ScoringError)
    if isinstance(error, said_on_all) and not lost:
        say_and_exit(f"error: {error}", on_all_ranks=True)
    if isinstance(error, (StorageError, RunStopped)):
        say_and_exit(f"error on rank {rank}: {error}", follows="another rank" in str(error))
    if lost:
        say_and_exit(f"error on rank {rank}: another rank is gone ({error})", follows=True)
    traceback.print_exception(error)
    say_and_exit(f"error on rank {rank}: {type(error).__name__}: {error}\n(where: see the traceback above)")


def say_and_exit(text: str, on_all_ranks: bool = False, follows: bool = False) -> NoReturn:
    """Leaves the message with the launcher, or prints it, and exits with status 1."""
    if launcher_folder() is not None:
        say_last(text, 1, on_all_ranks, follows)
        sys.exit(1)
    sys.exit(1 if on_all_ranks and os.environ.get("RANK", "0") != "0" else text)
