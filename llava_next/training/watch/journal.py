"""What a run says about itself: a JSON line a step, numbers for the trackers, and lines or a bar on the console."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from llava_next.data.loading.batch import PackedBatch
from llava_next.data.plan.mixture import Mixture
from llava_next.training.forecast.flops import FlopsModel
from llava_next.training.recipe.config import RunConfig
from llava_next.training.watch.metrics import JsonLines, Progress, console_line, flat
from llava_next.training.watch.trackers import track

KEPT = ("value", "metric", "samples", "noise")  # of a score


class Journal:
    """Completes the record of each step and hands it on; the main process speaks, the others keep their holes only.

    Args:
        progress: of the run.
        flops: of the model as it is trained; with `peak`, the device's FLOP/s, it gives MFU and HFU.
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        mixture: Mixture,
        progress: Progress,
        flops: FlopsModel | None = None,
        peak: float | None = None,
    ):
        self.config, self.accelerator, self.mixture, self.progress = config, accelerator, mixture, progress
        self.flops, self.peak, self.main = flops, peak, accelerator.is_main_process
        run_dir, rank = Path(config.run_dir), accelerator.process_index
        self.metrics = JsonLines(run_dir / "metrics.jsonl")
        self.validation = JsonLines(run_dir / "validation.jsonl")
        self.changes = JsonLines(run_dir / "changes.jsonl")
        # a file each: appends from several nodes to one would mix
        self.skipped = JsonLines(run_dir / (f"skipped-rank{rank}.jsonl" if rank else "skipped.jsonl"))
        self._logs = (self.metrics, self.validation, self.changes, self.skipped)
        self.bar = _Bar(progress) if self.main and sys.stdout.isatty() else None

    def holes(self, step: int, micros: Iterable[PackedBatch]) -> None:
        """Writes down the samples that this rank could not use in a step."""
        for batch in micros:
            for hole in batch.holes:
                self.skipped.write({"step": step, **asdict(hole)})

    def write(self, record: dict) -> None:
        """Completes and writes the record of a step; see `derived` for what is added."""
        if not self.main:
            return
        record |= self.derived(record)
        self.metrics.write(record)
        if record["step"] % self.config.log_every == 0 or record["step"] == self.progress.total:
            self.say(console_line(record, self.progress))
            self._track({k: v for k, v in flat(record).items() if isinstance(v, (int, float))}, record["step"])
        if self.bar:
            self.bar.update(record)

    def validated(self, step: int, losses: dict[str, float]) -> None:
        """Writes the held-out losses after a step: `validation.jsonl`, trackers, console."""
        if not self.main:
            return
        self.validation.write({"step": step, **{f"loss/{name}": loss for name, loss in losses.items()}})
        self.say(f"step {step}: held-out loss " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
        self._track({f"validation/{name}": loss for name, loss in losses.items()}, step)

    def scored(self, step: int, scores: dict[str, dict], failed: str = "") -> None:
        """Writes scores of the model after a step: a line of `metrics.jsonl` for itself, trackers, console.

        Args:
            step: may lie behind what the run has reached.
            scores: as scores.json has them.
            failed: why there are none, or not all.
        """
        if not self.main:
            return
        kept = {name: {key: found.get(key) for key in KEPT} for name, found in scores.items()}
        self.metrics.write({"step": step, "scores": kept, **({"failed": failed} if failed else {})})
        if kept:
            said = ", ".join(f"{name} {found['value']:.4g}" for name, found in kept.items())
            self.say(f"step {step}: scores {said}")
            values = {f"scores/{name}": found["value"] for name, found in kept.items()}
            track(self.accelerator, values, step, self.say, now=self.progress.done)
        if failed:
            self.say(f"warning: step {step}: {failed}")

    def changed(self, notes: Iterable[str]) -> None:
        """Writes down what a start has changed of a run: `changes.jsonl`, with the first step that is done so."""
        for note in notes if self.main else ():
            self.changes.write({"step": self.progress.done + 1, "change": note})

    def _track(self, values: dict, step: int) -> None:
        track(self.accelerator, values, step, self.say)

    def derived(self, record: dict) -> dict:
        """Rates and shares that follow from a step's counts and times; speeds are per GPU where the name says so."""
        seconds, world = max(record["step_s"], 1e-9), self.accelerator.num_processes
        added = {
            "samples_per_s": record["samples"] / seconds,
            "tokens_per_s": record["tokens"] / seconds,
            "tokens_per_s_per_gpu": record["tokens"] / seconds / world,
            "data_wait_share": record["data_wait_s"] / seconds,
            "read_mb_per_s": record["bytes"] / 1e6 / seconds,
            "memory_gb": memory_bytes(self.accelerator.device) / 1e9,
            "eta_s": round(self.progress.eta_seconds, 1),
        }
        if self.flops is not None:
            work = (record[name] for name in ("tokens", "squared_lengths", "tiles", "supervised", "chunked"))
            model, hardware = self.flops.step_flops(*work)
            added["tflops_per_gpu"] = model.total / seconds / world / 1e12
            added["vision_share"] = model.vision / max(model.total, 1e-9)
            if self.peak:
                added["mfu"] = model.total / seconds / world / self.peak
                added["hfu"] = hardware.total / seconds / world / self.peak
        return added

    def shares(self, step: int, so_far: dict[str, int]) -> dict[str, list[float]]:
        """Of each source its share of the samples so far and in the plan; counts this step into `so_far`.

        Args:
            step: counted from 0.
        """
        counts = np.bincount(self.mixture.source_of(self.mixture.step_ids(step)), minlength=len(self.mixture.names))
        for name, count in zip(self.mixture.names, counts.tolist(), strict=True):
            so_far[name] = so_far.get(name, 0) + count
        total, planned = sum(so_far.values()), self.mixture.samples_per_epoch
        return {
            source.name: [round(so_far[source.name] / total, 5), round(source.epoch_samples / planned, 5)]
            for source in self.mixture.plan_sources
        }

    def say(self, text: str) -> None:
        """A line on the console."""
        if self.bar:
            self.bar.say(text)
        elif self.main:
            print(text, flush=True)

    def sync(self) -> None:
        """Returns when all lines are on the disk: before a checkpoint says that their steps need not be done again."""
        for log in self._logs:
            log.sync()

    def close(self) -> None:
        """Closes files and bar; trackers end with the Accelerator."""
        for log in self._logs:
            log.close()
        if self.bar:
            self.bar.close()


class _Bar:
    """A progress bar at the foot of a terminal, above it the lines."""

    def __init__(self, progress: Progress):
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[eta]}"),
        )
        self._progress, self._bar = progress, Bar(*columns)
        self._task = self._bar.add_task("training", total=progress.total, completed=progress.done, eta="")
        self._bar.start()

    def update(self, record: dict) -> None:
        self._bar.update(
            self._task,
            completed=record["step"],
            description=f"loss {record['loss']:.4f}",
            eta=f"{record['samples_per_s']:.1f} samples/s  ETA {self._progress.eta}",
        )

    def say(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


def memory_bytes(device: torch.device) -> int:
    """The most memory this process has had in use: on the GPU what tensors took, on a CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open("/proc/self/status") as file:  # Linux's ru_maxrss may be that of the process this one was started by
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
