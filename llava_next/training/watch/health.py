"""What keeps a long run alive, or says why it is not: skipped updates, heartbeats, scheduled garbage collection."""

from __future__ import annotations

import gc
import json
import os
import time
from pathlib import Path

import torch

from llava_next.data.loading.stall import StallDump


class NonFinite:
    """Skips the update of a step whose loss or gradient is not finite, without waiting for the device.

    The fused AdamW reads `found_inf` on the device and leaves parameters, moments and step counts as they are. The
    gradient norm is the same number on every rank, so all ranks skip. The host learns of it with the step's sums.

    Args:
        limit: updates skipped in a row after which the run stops.
    """

    def __init__(self, limit: int):
        self.limit, self.in_a_row = limit, 0

    @staticmethod
    def guard(optimizer: torch.optim.Optimizer, grad_norm: torch.Tensor) -> torch.Tensor:
        """Makes the coming `optimizer.step()` conditional. Returns float32 `[]`: 1 when it will be skipped, else 0.

        A loss that is not finite gives a norm that is not: each target's loss reaches the gradient with its weight.
        """
        skipped = torch.logical_not(torch.isfinite(grad_norm)).to(torch.float32)
        optimizer.grad_scale, optimizer.found_inf = None, skipped
        return skipped

    def count(self, skipped: bool) -> bool:
        """Notes a step's outcome. True when the run must stop."""
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        return self.in_a_row >= self.limit


class GarbageCollection:
    """Collects every `every` steps and never in between: a spontaneous collection on one rank stops all of them.

    Objects made before (model, modules, configuration) are frozen: they are not looked at again.
    """

    def __init__(self, every: int = 100):
        self.every = every
        gc.collect()
        gc.freeze()
        gc.disable()

    def after_step(self, step: int) -> None:
        """Collects when it is time."""
        if step % self.every == 0:
            gc.collect()

    def close(self) -> None:
        """Puts Python's own schedule back."""
        gc.unfreeze()
        gc.enable()


class Heartbeat:
    """A file per rank with its last step, and a dump of all stacks when no step ends for too long.

    `heartbeats/rank-N.json` holds step, time (Unix seconds), host and process: whoever looks after the run sees which
    rank stands still, also when no rank can speak.

    Args:
        run_dir: of the run.
        rank: of this process.
        patience: seconds without a step until `stall-rankN.txt` is written.
    """

    def __init__(self, run_dir: Path, rank: int, patience: float):
        self._path = run_dir / "heartbeats" / f"rank-{rank}.json"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._dump, self._patience, self._watch = run_dir / f"stall-rank{rank}.txt", patience, None

    def beat(self, step: int) -> None:
        """Notes that `step` has begun, and watches for the next beat."""
        self.close()
        record = {"step": step, "time": time.time(), "host": os.uname().nodename, "process": os.getpid()}
        aside = self._path.with_suffix(".tmp")
        aside.write_text(json.dumps(record))
        os.replace(aside, self._path)
        self._watch = StallDump(self._dump, self._patience, lambda: [f"in step {step} of training"])
        self._watch.__enter__()

    def close(self) -> None:
        """Ends the watch."""
        if self._watch is not None:
            self._watch.__exit__()
            self._watch = None


def record_communication(run_dir: Path) -> None:
    """Has NCCL's flight recorder keep the last collectives and write them when one times out. Before the first group.

    Set in the environment already, the user's own values stay.
    """
    for name, value in (
        ("TORCH_FR_BUFFER_SIZE", "2000"),
        ("TORCH_NCCL_DUMP_ON_TIMEOUT", "1"),
        ("TORCH_FR_DUMP_TEMP_FILE", str(run_dir / "nccl-trace-rank")),
    ):
        os.environ.setdefault(name, value)
