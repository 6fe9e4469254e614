"""The training loop.

One optimizer step: take the step's micro-batches, agree on the number of supervised tokens of every sample (one small
message between the hosts), weigh the targets, run forward and backward on each micro-batch, clip, update. The loss
comes back from the device one step later, so that the host never waits for the step it has just queued.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator

from llava_next.data.loading.feed import Feed
from llava_next.data.plan.mixture import Mixture
from llava_next.training.checkpoints.exports import export_run
from llava_next.training.checkpoints.recovery import CheckpointError
from llava_next.training.checkpoints.saving import Checkpoints
from llava_next.training.devices.agreement import RunStopped, StepCounts, any_rank, slot_weights, take_step
from llava_next.training.provenance import card_writer
from llava_next.training.recipe.config import RunConfig
from llava_next.training.recipe.optim import rate_multiplier, set_rates
from llava_next.training.scores import is_scored
from llava_next.training.scoring import Scoring
from llava_next.training.validate import Validation
from llava_next.training.watch.health import GarbageCollection, Heartbeat, NonFinite
from llava_next.training.watch.journal import Journal
from llava_next.training.watch.memory import MemoryWatch
from llava_next.training.watch.metrics import duration
from llava_next.training.watch.profile import StepProfiler
from llava_next.training.watch.stopping import StopRequest
from llava_next.training.watch.timing import Reading, StepTimer

COUNTERS = ("samples", "tokens", "supervised", "holes", "truncated", "unsupervised", "skipped_steps", "retries")
# after a step, in this order: what the logs say of it is saved with it
DUE = ("validation", "checkpoint", "export", "scores")


class Trainer:
    """Runs steps until the plan ends, a signal comes, too many samples turn out bad, or losses are no numbers.

    Args:
        feed: the micro-batches of this rank, from `start_step` on.
        mixture: the plan; the schedule depends on its number of steps.
        journal: gets a record of every step.
        checkpoints: writes them.
        validation: held-out data, or None.
        scoring: of the model while it trains, or None.
        resumed: state of the checkpoint that the run continues, or that of a fresh start.
        stop: tells that this rank was asked to stop.
        memory: tells what to do when it is not enough.
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        feed: Feed,
        mixture: Mixture,
        journal: Journal,
        checkpoints: Checkpoints,
        resumed: dict,
        stop: StopRequest,
        validation: Validation | None = None,
        scoring: Scoring | None = None,
        memory: MemoryWatch | None = None,
    ):
        self.config, self.accelerator, self.model, self.optimizer = config, accelerator, model, optimizer
        self._keeps_weights = accelerator.state.fsdp_plugin.reshard_after_forward is False
        self.feed, self.mixture, self.journal, self.validation = feed, mixture, journal, validation
        self.checkpoints, self.scoring = checkpoints, scoring
        self._computing = memory.computing if memory else lambda *_: contextlib.nullcontext()
        self.pending: tuple[dict, Reading, list] | None = None  # of the last step, until it is settled
        self._step_begin = self._beside = 0.0
        self.last_step = journal.progress.total
        self.counters = {**dict.fromkeys(COUNTERS, 0), "by_source": {}, **resumed["counters"]}
        self.run_dir, self.step = Path(config.run_dir), resumed["step"]
        self.due: list[str] = list(resumed.get("due", []))  # of DUE, what the last step has left to do
        self._unchanged = (self.step, self.due.copy())  # as long as this is so, there is nothing new to save
        self.heart = Heartbeat(self.run_dir, accelerator.process_index, config.hang_seconds)
        self.stop, self.timer = stop, StepTimer(accelerator.device)
        self.non_finite = NonFinite(config.optim.max_skipped_steps)
        self.profiler = StepProfiler(
            config.profile.steps, self.run_dir, accelerator.device, accelerator.is_main_process
        )

    def train(self) -> bool:
        """Runs to the end. Returns False when the run was asked to stop before: then all that was done is saved."""
        self.model.train()
        self.stop.begin(
            self.run_dir if self.accelerator.is_main_process else None, self.journal.say, self.config.hang_seconds
        )
        started = time.monotonic()
        collection = GarbageCollection()
        try:
            going_on = self._do_due() and self._await_scores()  # of a run before this one
            while going_on and self.step < self.last_step:
                self.heart.beat(self.step)
                self.stop.step_begins()
                with self.profiler.step(self.step + 1):
                    unsettled, counts = self._step()
                self.stop.step_ends()
                self._settle()
                self.pending = unsettled
                going_on = not counts.stop and self._after_step(counts)
                collection.after_step(self.step)
            self._settle()
            if not going_on or any_rank(self.stop.asked):
                if self.scoring:
                    self.scoring.close()
                self._save(asked=True)
                self.checkpoints.close()
                return False
            self.checkpoints.close()
            self.journal.say(f"{self.step} steps in {duration(time.monotonic() - started)}")
            return True
        finally:
            self.checkpoints.settle()  # what is being written when an error ends the run is not lost
            self.heart.close()
            collection.close()
            self.feed.close()  # ends the loader's worker processes
            self.journal.close()

    def _step(self) -> tuple[tuple[dict, Reading, list] | None, StepCounts]:
        """One optimizer step, unless a rank was asked to stop before all had its data.

        Returns:
            what `_settle` takes when the device has finished it (None: no step was made), and the agreed counts.
        """
        # A step takes until the next one begins: the host, which only queues it, may be ahead of the device.
        if self.pending:
            self.pending[0]["step_s"] = self._elapsed()
        self._step_begin, self._beside = time.monotonic(), 0.0
        ready = self.feed.ready
        micros, counts = take_step(
            self.feed, self.step, self.config.data.batch_size, lambda: self.stop.asked, self.checkpoints.failed
        )
        if counts.unsaved:
            self.checkpoints.wait()  # raises, with what happened
        if counts.stop:
            return None, counts
        weights = slot_weights(counts.supervised, self.config.optim.loss_weighting)
        multiplier = rate_multiplier(self.step, self.mixture.total_steps, self.config.optim.warmup_ratio)
        rates = set_rates(self.optimizer, multiplier)
        num_sources = len(self.mixture.names)
        sums = torch.zeros(1 + 2 * num_sources, device=self.accelerator.device)
        for batch in micros:
            self.timer.mark("forward")
            with self._computing("the forward", self.step + 1, batch):
                inputs = batch.weighted(weights).model_inputs(self.accelerator.device)
                output = self.model(**inputs, num_sources=num_sources)
            self.timer.mark("backward")
            if self._keeps_weights:  # they change with the update: only then do they have to be gathered again
                self.model.set_reshard_after_backward(batch is micros[-1])
            with self._computing("the backward", self.step + 1, batch):
                # FSDP averages gradients over ranks; the weights are already those of the whole step.
                (output.loss * self.accelerator.num_processes).backward()
            sums += torch.cat([output.loss.detach()[None], output.source_loss, output.source_tokens])
        self.timer.mark("optimizer")
        with self._computing("the update", self.step + 1):
            grad_norm, skipped = self._update()
        self.timer.mark("end")
        dist.all_reduce(sums)
        self.step += 1
        self.journal.progress.advance()
        self.journal.holes(self.step, micros)
        record = {
            "step": self.step,
            "epoch": self.mixture.epoch(self.step - 1),
            **counts.counts,
            "supervised": int(counts.supervised.sum()),
            **counts.io,
            "micro_batches": len(micros),
            "ready": ready,
            "rates": rates,
            "data_wait_s": counts.data_wait_s,
            "checkpoint_s": self.checkpoints.take_stalled(),  # before this step
            "source_share": self.journal.shares(self.step - 1, self.counters["by_source"]),
        }
        found = Reading(torch.cat([torch.stack([grad_norm, skipped]).to(sums), sums]))
        return (record, found, self.timer.take()), counts

    def _update(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Clips and updates. Returns the gradient norm before clipping, and 1 if the update was skipped, else 0."""
        limit = self.config.optim.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), float("inf") if limit is None else limit)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        skipped = self.non_finite.guard(getattr(self.optimizer, "optimizer", self.optimizer), norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm, skipped

    def _settle(self) -> None:
        """Completes the last step's record with what comes from the device, which has moved on by a step since.

        Raises:
            RunStopped: too many updates in a row were skipped; a checkpoint of the state before them is saved.
        """
        if self.pending is None:
            return
        (record, found, marks), self.pending = self.pending, None
        grad_norm, skipped, loss, *by_source = found.tolist()
        record.setdefault("step_s", self._elapsed())  # when no other step has begun
        names = self.mixture.names
        losses, tokens = by_source[: len(names)], by_source[len(names) :]
        record |= {
            "loss": loss,
            "grad_norm": grad_norm,
            "source_loss": {n: v / t for n, v, t in zip(names, losses, tokens, strict=True) if t},
            **self.timer.seconds(marks),
        }
        if skipped:
            self.counters["skipped_steps"] += 1
            record["skipped_update"] = self.mixture.step_ids(record["step"] - 1).tolist()
            self.journal.say(
                f"step {record['step']}: loss {loss}, gradient norm {grad_norm}: not finite, the update is skipped; "
                "the step's sample ids are in metrics.jsonl"
            )
        self.journal.write(record)
        if self.non_finite.count(bool(skipped)):
            self._save()  # skipped updates changed nothing: this is the last good state
            self.checkpoints.wait()
            raise RunStopped(
                f"{self.non_finite.limit} updates in a row were skipped because loss or gradient were not finite (see "
                f"skipped_update in {self.run_dir}/metrics.jsonl for the samples). The state before them is saved; "
                "lower the rates, or look at the data"
            )

    def _elapsed(self) -> float:
        """Seconds since the present step began, without what the loop did beside it."""
        return time.monotonic() - self._step_begin - self._beside

    @contextlib.contextmanager
    def _beside_the_step(self) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self._beside += time.monotonic() - begin

    def _after_step(self, counts: StepCounts) -> bool:
        """Counts, and does what is due. Returns False when the run was asked to stop before all of that was done."""
        if self.scoring:
            with self._beside_the_step():
                self.scoring.poll()
        for name in ("samples", "tokens", "holes", "truncated", "unsupervised"):
            self.counters[name] += counts.counts[name]
        self.counters["supervised"] += int(counts.supervised.sum())
        self.counters["retries"] += counts.io["retries"]
        seen = self.counters["samples"] + self.counters["holes"]
        # The share is judged against at least 1,000 samples: the first bad one must not end a run.
        if self.counters["holes"] > self.config.data.max_skip_share * max(seen, 1000):
            self._save()
            self.checkpoints.wait()
            raise RunStopped(
                f"{self.counters['holes']} of {seen} samples could not be used, more than data.max_skip_share "
                f"{self.config.data.max_skip_share}; see {self.run_dir}/skipped*.jsonl for each one's reason. "
                "Mend the data, or raise that share, and start again"
            )
        last, checkpoint = self.step == self.last_step, self.config.checkpoint
        self._report_unsupervised(counts, last)
        scores = self._scores_are_due(last)
        wanted = {
            "validation": self.validation and (self._is_due(self.config.data.validation_every) or last),
            "checkpoint": self._is_due(checkpoint.every) or last,
            "export": (self._is_due(checkpoint.export_every) and not last) or scores,
            "scores": scores,
        }
        self.due = [name for name in DUE if wanted[name]]
        return self._do_due()

    def _report_unsupervised(self, counts: StepCounts, last: bool) -> None:
        """Says when a step had no target. Raises RunStopped at the end of a run that never had one."""
        if not counts.supervised.any():
            self.journal.say(
                f"step {self.step}: none of its {counts.counts['samples']} samples has a supervised token, its loss "
                f"of 0 means nothing; {counts.counts['truncated']} were cut at data.max_length "
                f"{self.config.data.max_length}"
            )
        if last and not self.counters["supervised"]:
            self._settle()
            self.checkpoints.wait()
            raise RunStopped(
                f"no sample of the run had a supervised token, so nothing was learnt and no model is written; "
                f"{self.counters['truncated']} of {self.counters['samples']} samples were cut at data.max_length "
                f"{self.config.data.max_length}: raise it, or look at the answers with data_tools/inspect_shards.py"
            )

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _scores_are_due(self, last: bool) -> bool:
        """Whether the model is to be scored after this step; the last one's is when the run's result is written."""
        if self.scoring is None or last or not self._is_due(self.config.evaluate.every):
            return False
        if any_rank(self.scoring.full):
            self.scoring.leave_out(self.step)
            return False
        return True

    def _do_due(self) -> bool:
        """Does what the last step has left to do. Returns False, with the rest in `due`, when asked to stop before."""
        while self.due:
            if any_rank(self.stop.asked):
                return False
            self._settle()
            if self.due[0] == "checkpoint":
                del self.due[0]  # what it says is left comes after it
                self._save()
                continue
            with self._beside_the_step():
                if not {"validation": self._validate, "export": self._export, "scores": self._score}[self.due[0]]():
                    return False
            del self.due[0]
        return True

    def _save(self, asked: bool = False) -> None:
        """Saves a checkpoint of this step, once.

        Args:
            asked: the run ends here, and needs no checkpoint when it has done nothing.
        """
        self._settle()  # a step's line is in the log before a checkpoint says that it need not be done again
        if self.checkpoints.saved_step == self.step or (asked and (self.step, self.due) == self._unchanged):
            return
        epoch = self.mixture.epoch(self.step - 1)
        counts = {"step": self.step, "counters": self.counters, "due": self.due}
        with self._beside_the_step():
            self.journal.sync()
            self.checkpoints.save(self.step, {**self.mixture.state(), "epoch": epoch, **counts})

    def _validate(self) -> bool:
        if self.validation is None:  # no longer wanted
            return True
        with self._computing("the held-out loss", self.step):
            losses = self.validation.loss(self.model, self.accelerator, lambda: self.stop.asked)
        if losses is not None:
            self.journal.validated(self.step, losses)
        return losses is not None

    def _export(self) -> bool:
        """Writes the model as it is now to `model-step-N/`, and its adapter, in the layout of the final ones."""
        ending = f"-step-{self.step}"
        before = self.step == self._unchanged[0]  # the run was stopped
        if before and ((self.run_dir / f"model{ending}").exists() or is_scored(self.run_dir, self.step)):
            return True
        tell = card_writer(self.config, self.mixture, self.step)
        try:
            folder = export_run(self.model, self.config, self.checkpoints.folder, ending, tell=tell)
        except CheckpointError as error:
            if self._is_due(self.config.checkpoint.export_every):
                raise
            self.due.remove("scores")  # all that it was for, and no reason to end a run
            self.journal.scored(self.step, {}, f"not scored: {error}")
            return True
        self.journal.say(f"model after step {self.step} written to {folder}")
        return True

    def _score(self) -> bool:
        """Has the model that was just exported scored."""
        if self.scoring is None:  # no longer wanted
            return True
        self.scoring.submit(self.step, passing=not self._is_due(self.config.checkpoint.export_every))
        return self._await_scores()

    def _await_scores(self) -> bool:
        """Waits for scores that are made on this run's devices."""
        if self.scoring is None or self.scoring.beside:
            return True
        return self.scoring.wait(lambda: self.stop.asked, lambda: self.heart.beat(self.step))

    def score_result(self) -> bool:
        """Scores the run's result, which has been written. Returns False when asked to stop before that was done."""
        if self.scoring is None:
            return True
        is_done = self.scoring.score_result(self.step, lambda: self.stop.asked)
        self.journal.close()
        return is_done
