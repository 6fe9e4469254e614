"""The training loop.

One optimizer step: take the step's micro-batches, agree on the number of supervised tokens of every sample (one small
message between the hosts), weigh the targets, run forward and backward on each micro-batch, clip, update. The loss
comes back from the device one step later, so that the host never waits for the step it has just queued.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator

from llava_next.data.batch import PackedBatch
from llava_next.training.checkpoint import save_checkpoint
from llava_next.training.config import RunConfig
from llava_next.training.metrics import JsonLines, Progress, console_line, duration
from llava_next.training.optim import rate_multiplier, set_rates
from llava_next.training.parallel import agree

GROUP = 8  # samples of a group in `micro_batch_mean`: one micro-batch of the original runs


def slot_weights(supervised: torch.Tensor, weighting: str) -> torch.Tensor:
    """Weight of each supervised token, by the slot of its sample in the step; a step's weights sum to 1.

    Args:
        supervised: float64 `[B]`, supervised tokens of the sample in each slot (0: none, or a hole).
        weighting: `token`, `sample` or `micro_batch_mean` (see `OptimConfig`).

    Returns:
        float32 `[B]`; zeros when nothing is supervised.
    """
    if weighting == "token":
        weights = torch.full_like(supervised, 1.0) / supervised.sum()
    elif weighting == "sample":
        weights = 1.0 / supervised / (supervised > 0).sum()
    elif weighting == "micro_batch_mean":
        group = torch.arange(len(supervised)) // GROUP
        totals = torch.zeros(int(group[-1]) + 1, dtype=supervised.dtype).index_add(0, group, supervised)
        weights = (1.0 / totals / (totals > 0).sum())[group]
    else:
        raise ValueError(f"loss_weighting {weighting!r} is not token, sample or micro_batch_mean")
    return torch.where(supervised > 0, weights, 0.0).float()


class StopSignal:
    """SIGTERM and SIGINT ask for a stop after the running step; a second one stops at once."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number, frame) -> None:
        self.asked = True
        signal.signal(number, signal.SIG_DFL)


@dataclass
class StepCounts:
    """What all ranks know of a step before its forward: summed over ranks."""

    supervised: torch.Tensor  # float64 [B]
    samples: int
    tokens: int
    tiles: int
    truncated: int
    holes: int
    stop: bool
    failed: bool


def agree_on_step(micros: list[PackedBatch], batch_size: int, stop: bool, failed: bool = False) -> StepCounts:
    """Sums what the ranks hold of a step: one message of B + 7 numbers.

    Args:
        micros: this rank's micro-batches.
        stop: this rank was asked to stop.
        failed: this rank could not get its data; then all ranks learn it here instead of waiting for it for ever.
    """
    message = torch.zeros(batch_size + 7, dtype=torch.float64)
    for batch in micros:
        if batch.slots:
            message[torch.tensor(batch.slots)] = torch.tensor(batch.supervised, dtype=torch.float64)
        totals = (len(batch.slots), batch.num_tokens, batch.num_tiles, batch.num_truncated, len(batch.holes), 0, 0)
        message[batch_size:] += torch.tensor(totals, dtype=torch.float64)
    message[-2:] = torch.tensor([stop, failed], dtype=torch.float64)
    agree(message)
    samples, tokens, tiles, truncated, holes, stops, failures = (int(x) for x in message[batch_size:])
    return StepCounts(message[:batch_size], samples, tokens, tiles, truncated, holes, stops > 0, failures > 0)


class Trainer:
    """Runs steps until the plan ends, a signal comes, or too many samples turn out bad.

    Args:
        steps: yields (step, micro-batches of this rank), from `start_step` on.
        total_steps: of the whole run; the schedule depends on it.
        source_names: of the mixture, for the loss per source.
        state: JSON-serialisable plan state; goes into every checkpoint beside the step and counters.
        counters: from the checkpoint that the run continues, else empty.
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: Generator[tuple[int, list[PackedBatch]], None, None],
        start_step: int,
        total_steps: int,
        source_names: list[str],
        state: dict,
        counters: dict | None = None,
    ):
        self.config, self.accelerator, self.model, self.optimizer = config, accelerator, model, optimizer
        self.steps, self.total_steps, self.source_names, self.state = steps, total_steps, source_names, state
        self.last_step = min(total_steps, config.max_steps or total_steps)
        self.counters = {"samples": 0, "tokens": 0, "supervised": 0, "holes": 0, "truncated": 0, **(counters or {})}
        self.run_dir = Path(config.run_dir)
        self.main = accelerator.is_main_process
        self.metrics = JsonLines(self.run_dir / "metrics.jsonl") if self.main else None
        rank = accelerator.process_index  # a file each: appends from several nodes to one would mix
        self.skipped = JsonLines(self.run_dir / (f"skipped-rank{rank}.jsonl" if rank else "skipped.jsonl"))
        self.progress = Progress(self.last_step, start_step)
        self.step = start_step
        self.stop = StopSignal()

    def train(self) -> bool:
        """Runs to the end. Returns False when a signal stopped the run before."""
        self.model.train()
        started, pending = time.monotonic(), None
        try:
            while self.step < self.last_step:
                record, sums, counts = self._step()
                self._report(pending)
                pending = (record, sums)
                self._after_step(counts)
                if counts.stop and self.step < self.last_step:
                    self._report(pending)
                    self._save()
                    return False
            self._report(pending)
            self._say(f"{self.step} steps in {duration(time.monotonic() - started)}")
            return True
        finally:
            self.steps.close()  # ends the loader's worker processes
            self.skipped.close()
            if self.metrics:
                self.metrics.close()

    def _step(self) -> tuple[dict, torch.Tensor, StepCounts]:
        """One optimizer step. Returns its record, device-side sums that belong to it, and the agreed counts."""
        begin = time.monotonic()
        micros, counts = self._next_micros()
        waited = time.monotonic() - begin
        weights = slot_weights(counts.supervised, self.config.optim.loss_weighting)
        rates = set_rates(self.optimizer, rate_multiplier(self.step, self.total_steps, self.config.optim.warmup_ratio))
        sums = torch.zeros(1 + 2 * len(self.source_names), device=self.accelerator.device)
        for batch in micros:
            inputs = batch.weighted(weights).model_inputs(self.accelerator.device)
            output = self.model(**inputs, num_sources=len(self.source_names))
            # FSDP averages gradients over ranks; the weights are already those of the whole step.
            (output.loss * self.accelerator.num_processes).backward()
            sums += torch.cat([output.loss.detach()[None], output.source_loss, output.source_tokens])
        grad_norm = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        dist.all_reduce(sums)
        self.step += 1
        self.progress.advance()
        self._log_holes(micros)
        record = {
            "step": self.step,
            "samples": counts.samples,
            "tokens": counts.tokens,
            "supervised": int(counts.supervised.sum()),
            "tiles": counts.tiles,
            "holes": counts.holes,
            "truncated": counts.truncated,
            "micro_batches": len(micros),
            "rates": rates,
            "data_wait_s": waited,
            "step_s": time.monotonic() - begin,
        }
        return record, torch.cat([grad_norm.reshape(1).to(sums), sums]), counts

    def _next_micros(self) -> tuple[list[PackedBatch], StepCounts]:
        """This rank's micro-batches of the step, and what all ranks have of it.

        Raises:
            Exception: what the loader raised, here or (as RuntimeError) on another rank.
        """
        micros, error = [], None
        try:
            step, micros = next(self.steps)
            if step != self.step:
                raise RuntimeError(f"the loader gave step {step} where {self.step} was due")
        except Exception as caught:
            error = caught
        counts = agree_on_step(micros, self.config.data.batch_size, self.stop.asked, failed=error is not None)
        if error is not None:
            raise error
        if counts.failed:
            raise RuntimeError("another rank could not load its data; its own message says what and where")
        return micros, counts

    def _clip(self) -> torch.Tensor:
        limit = self.config.optim.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), float("inf") if limit is None else limit)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _after_step(self, counts: StepCounts) -> None:
        for name in ("samples", "tokens", "holes", "truncated"):
            self.counters[name] += getattr(counts, name)
        self.counters["supervised"] += int(counts.supervised.sum())
        seen = self.counters["samples"] + self.counters["holes"]
        # The share is judged against at least 1,000 samples: the first bad one must not end a run.
        if self.counters["holes"] > self.config.data.max_skip_share * max(seen, 1000):
            self._save()
            raise RuntimeError(
                f"{self.counters['holes']} of {seen} samples could not be used, more than data.max_skip_share "
                f"{self.config.data.max_skip_share}; see {self.run_dir}/skipped*.jsonl for each one's reason"
            )
        every = self.config.checkpoint.every
        if (every and self.step % every == 0) or self.step == self.last_step:
            self._save()

    def _save(self) -> None:
        save_checkpoint(
            self.run_dir / "checkpoints",
            self.step,
            self.model,
            getattr(self.optimizer, "optimizer", self.optimizer),
            {**self.state, "step": self.step, "counters": self.counters},
            self.config.checkpoint.keep_last,
        )

    def _report(self, pending: tuple[dict, torch.Tensor] | None) -> None:
        """Writes a finished step's record; reads its sums from the device, which has moved on by a step."""
        if pending is None or not self.main:
            return
        record, sums = pending
        grad_norm, loss, *by_source = sums.tolist()
        losses, tokens = by_source[: len(self.source_names)], by_source[len(self.source_names) :]
        record |= {
            "loss": loss,
            "grad_norm": grad_norm,
            "source_loss": {n: v / t for n, v, t in zip(self.source_names, losses, tokens, strict=True) if t},
            "samples_per_s": record["samples"] / record["step_s"],
            "tokens_per_s": record["tokens"] / record["step_s"],
        }
        self.metrics.write(record)
        if record["step"] % self.config.log_every == 0 or record["step"] == self.last_step:
            self._say(console_line(record, self.progress))

    def _log_holes(self, micros: list[PackedBatch]) -> None:
        for batch in micros:
            for hole in batch.holes:
                self.skipped.write({"step": self.step, **asdict(hole)})

    def _say(self, text: str) -> None:
        if self.main:
            print(text, flush=True)
