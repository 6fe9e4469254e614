"""When memory is not enough: said with everything that is known of it, and remembered for the next plan."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from llava_next.data.loading.batch import PackedBatch
from llava_next.training.devices.agreement import RunStopped
from llava_next.training.devices.hardware import Hardware
from llava_next.training.forecast.budget import estimate
from llava_next.training.forecast.picking import MARGIN, Candidate, Picking
from llava_next.training.watch.journal import memory_bytes
from llava_next.training.watch.metrics import JsonLines, si

LOG = "out-of-memory"  # .jsonl in the run folder, a file a rank


def measured_factor(run_dir: Path, hardware: Hardware) -> float:
    """What estimates must be multiplied with, by what was too little on this machine before; 0 when nothing was.

    Raises:
        ValueError: a log that cannot be read.
    """
    factors = [0.0]
    for path in sorted(run_dir.glob(f"{LOG}*.jsonl")):
        try:
            entries = [json.loads(line) for line in path.read_text().splitlines()]
            factors += [entry["factor"] for entry in entries if entry["machine"] == hardware.name]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it, and the run plans as if it had fit") from None
    return max(factors)


class MemoryWatch:
    """Turns the end of a device's memory into a message that says what to do, and a line for the next start.

    Args:
        picking: what the run was planned for; picked: what it does.
    """

    def __init__(self, run_dir: Path, rank: int, device: torch.device, picking: Picking, picked: Candidate):
        self.log = run_dir / (f"{LOG}-rank{rank}.jsonl" if rank else f"{LOG}.jsonl")
        self.device, self.picking, self.picked = device, picking, picked

    @contextlib.contextmanager
    def computing(self, what: str, step: int, batch: PackedBatch | None = None) -> Iterator[None]:
        """Around something that may take too much.

        Args:
            what: is computed, for people; step: counted from 1.

        Raises:
            RunStopped: it did.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise RunStopped(self.remember(what, step, batch, error)) from error

    def remember(self, what: str, step: int, batch: PackedBatch | None, error: Exception) -> str:
        """Writes the line for the next start, and gives the message."""
        picking, picked = self.picking, self.picked
        sizes = (picked.tokens, picked.tiles)
        if batch is not None:
            sizes = (len(batch.input_ids), len(batch.tiles), len(batch.target_ids))
        shape = (picking.config, picking.counts, picking.rates, picked.policy, picking.layout)
        expected, peak = estimate(*shape, *sizes).total, memory_bytes(self.device)
        # what was refused comes on top of the peak: a GPU's whole memory was not enough
        needed = max(peak, picking.hardware.memory) if picking.hardware.on_gpu else peak
        factor = MARGIN * max(1.0, needed / expected)
        where = f"step {step}"
        if batch is not None:
            where = (
                f"micro-batch {batch.micro + 1} of {batch.num_micro} of step {step}: {sizes[0]:,} tokens, {sizes[1]} "
                f"tiles, samples {batch.sample_ids}"
            )
        line = {"step": step, "what": what, "machine": picking.hardware.name, "policy": picked.policy, "factor": factor}
        line |= {"token_budget": picked.tokens, "tile_budget": picked.tiles, "estimate": expected, "peak": peak}
        if batch is not None:
            line |= {"micro": batch.micro, "tokens": sizes[0], "tiles": sizes[1], "samples": batch.sample_ids}
        log = JsonLines(self.log)
        with contextlib.suppress(OSError):  # the message is worth more than the line
            log.write(line)
            log.sync()
            log.close()
        return (
            f"out of memory in {what}, {where}. Estimated {si(expected, 'B')}, in use at most {si(peak, 'B')}, of "
            f"{si(picking.hardware.memory, 'B')} a rank ({str(error).splitlines()[0]}). {self._advice(factor)}"
        )

    def _advice(self, factor: float) -> str:
        """What to set, and what the next start does by itself."""
        picking, picked = self.picking, self.picked
        tokens = max(picking.steps.longest, picked.tokens // 2)
        smaller = f"--data.token_budget {tokens} --data.tile_budget {max(picking.steps.most_tiles, picked.tiles // 2)}"
        return (
            f"Start again: what is auto is then picked for {factor:.2f} times the estimate ({self.log}; without that "
            f"file, for {MARGIN}); or set {smaller} --activation_checkpointing full"
        )
