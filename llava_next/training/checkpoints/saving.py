"""Checkpoints of a run: what is trained and how far the run is, for any world size to continue.

All ranks copy their pieces to host memory, which is all that training waits for; a thread of each rank writes them to
disk while training goes on. When every rank has said that its file is on disk, rank 0 adds the manifest and renames
the folder: one named `step-...` is complete, and no older one is touched before. Only trainable parameters are in it;
the frozen ones are in the model that the run started from.
"""

from __future__ import annotations

import copy
import errno
import json
import random
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from llava_next.model.folders.export import replace_folder
from llava_next.training.checkpoints.mirror import MANIFEST, Mirror
from llava_next.training.checkpoints.recovery import (
    FORMAT,
    CheckpointError,
    checkpoint_name,
    checkpoint_step,
    complete_checkpoints,
    remove_checkpoint,
    state_checksum,
)
from llava_next.training.checkpoints.sharded import Layout, rank_file, read_tensors
from llava_next.training.recipe.config import CheckpointConfig
from llava_next.training.watch.metrics import si

TENSORS = "tensors.json"
OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)
ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Make room there, or keep fewer (checkpoint.keep_last)"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "Make it writable, or give another checkpoint.dir"),
}


class Checkpoints:
    """Writes the checkpoints of a run, one at a time. Made and called by all ranks alike.

    Args:
        folder: where they go; on several machines, on a file system that all of them share.
        optimizer: the plain torch optimizer, not Accelerate's wrapper.
        options: how many are kept, and whether they are written in the background.
        facts: of the run, go into every checkpoint's state; JSON.
        mirror: where complete ones are copied to.
        say: called with a line of text when a checkpoint is complete, from the writing thread.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        options: CheckpointConfig,
        facts: dict | None = None,
        mirror: Mirror | None = None,
        say: Callable[[str], None] = lambda text: None,
    ):
        self.folder, self.model, self.optimizer, self.options = folder, model, optimizer, options
        self.facts, self.mirror, self.say = facts or {}, mirror, say
        self.saved_step: int | None = None  # of the last `save`
        # The threads talk to each other beside the training: in one group, messages would be taken for one another.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
        self.rank = dist.get_rank()
        self._layout: Layout | None = None
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self._not_copied = ""
        self._stalled = 0.0

    @property
    def failed(self) -> bool:
        """Whether the last checkpoint is known to have failed. Ranks learn it at different moments: agree on it, then
        let all of them `wait`, which raises on all."""
        return self._error is not None

    def take_stalled(self) -> float:
        """Seconds that the caller stood still for checkpoints since it last asked."""
        stalled, self._stalled = self._stalled, 0.0
        return stalled

    def save(self, step: int, state: dict) -> None:
        """Begins checkpoint `step`; the one before is finished first. A collective.

        Args:
            state: of the run (plan, counters), the same on all ranks; JSON.

        Raises:
            CheckpointError: on all ranks: this one (or, when asynchronous, the one before) could not be written.
        """
        begin = time.monotonic()
        self.wait()
        tensors = state_tensors(self.model, self.optimizer) | rng_tensors(self.rank)
        if self._layout is None:
            self._layout = Layout(tensors, self.group)
        self.saved_step = step
        # a copy: the caller goes on counting
        state = copy.deepcopy(self.facts | state)
        manifest = {"format": FORMAT, "step": step, "world_size": dist.get_world_size(), "state": state}
        manifest["state_crc32"] = state_checksum(state)
        if self.options.asynchronous:
            pieces = self._layout.stage(tensors)
            stood = time.monotonic() - begin
            run = threading.Thread(target=self._run, args=(manifest, pieces, stood), name="checkpoint", daemon=True)
            self._thread = run
            run.start()
        else:
            self._run(manifest, self._layout.pieces(tensors), None)
            self.wait()
        self._stalled += time.monotonic() - begin

    def wait(self) -> None:
        """Returns when the checkpoint in flight is complete.

        Raises:
            CheckpointError: on all ranks: it could not be written.
        """
        self.settle()
        if self._error is not None:
            raise self._error

    def settle(self) -> None:
        """Returns when nothing is in flight, whatever came of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Waits for the last checkpoint and its copy.

        Raises:
            CheckpointError: on all ranks: it could not be written, or not copied to the URL.
        """
        self.wait()
        if self._not_copied:
            raise CheckpointError(f"{self._not_copied}. It is complete in {self.folder}; copy it by hand")

    def load(self, path: Path) -> None:
        """Loads weights, optimizer state and random number generators in place, at any world size. A collective."""
        description = json.loads((path / TENSORS).read_bytes())
        tensors = state_tensors(self.model, self.optimizer)
        # a rank that the writing run did not have keeps its own random numbers
        random_state = {name: t for name, t in rng_tensors(self.rank).items() if name in description}
        read_tensors(path, description, tensors | random_state, self.group)
        load_state_tensors(self.model, self.optimizer, tensors)
        set_rng(random_state)

    def _run(self, manifest: dict, pieces: list[torch.Tensor], stood: float | None) -> None:
        path = self.folder / checkpoint_name(manifest["step"])
        try:
            self._write(path, manifest, pieces, stood)
        except RankFailure as failure:
            self._error = self._explained(path, failure)
        except Exception as error:  # another rank is gone; the launcher ends this one too
            self._error = CheckpointError(f"checkpoint {path} was given up: {error}")
        else:
            if self.mirror:
                self._copy(path)

    def _write(self, path: Path, manifest: dict, pieces: list[torch.Tensor], stood: float | None) -> None:
        begin, aside = time.monotonic(), path.with_name(path.name + ".tmp")
        files = self._together(lambda: self._write_mine(aside, pieces))
        manifest["files"] = {rank_file(rank): facts for rank, facts in enumerate(files)}
        self._together(lambda: self._commit(aside, path, manifest) if self.rank == 0 else None)
        if self.rank == 0:
            size, seconds = sum(facts["bytes"] for facts in files), time.monotonic() - begin
            stood = seconds if stood is None else stood
            self.say(f"checkpoint {path.name}: {si(size, 'B')} in {seconds:.2f} s, training stood {stood:.2f} s")

    def _write_mine(self, aside: Path, pieces: list[torch.Tensor]) -> dict:
        aside.mkdir(parents=True, exist_ok=True)
        return self._layout.write(aside / rank_file(self.rank), pieces)

    def _commit(self, aside: Path, path: Path, manifest: dict) -> None:
        """Adds the descriptions, manifest last, and gives the folder its name; then the oldest ones go."""
        description = json.dumps(self._layout.description).encode()
        (aside / TENSORS).write_bytes(description)
        manifest["files"][TENSORS] = {"bytes": len(description), "crc32": zlib.crc32(description)}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=2))
        replace_folder(aside, path)
        found = {checkpoint_step(p): p for p in complete_checkpoints(self.folder)}
        for step in self._superseded(found):
            remove_checkpoint(found[step])

    def _superseded(self, steps: Iterable[int]) -> list[int]:
        """Of these steps' checkpoints, those that are no longer kept."""
        old = sorted(steps)[: -self.options.keep_last]
        return [step for step in old if not self.options.keep_every or step % self.options.keep_every]

    def _copy(self, path: Path) -> None:
        """Copies a complete checkpoint to the URL. What goes wrong there does not end the run: the next one follows."""
        try:
            self._together(lambda: self.mirror.upload(path, rank_file(self.rank)))
            self._together(lambda: self._copy_manifest(path) if self.rank == 0 else None)
            self._not_copied = ""
        except Exception as error:
            self._not_copied = f"{path.name} was not copied to {self.mirror.label} ({error})"
            if self.rank == 0:
                self.say(f"warning: {self._not_copied}; the next one will be")

    def _copy_manifest(self, path: Path) -> None:
        self.mirror.upload(path, TENSORS)
        self.mirror.upload(path, MANIFEST)
        found = {checkpoint_step(Path(name)): name for name in self.mirror.complete()}
        for step in self._superseded(found):
            self.mirror.remove(found[step])

    def _together(self, work: Callable[[], object]) -> list:
        """Runs `work` on every rank and returns every rank's result.

        Raises:
            RankFailure: on all ranks when it failed on one.
        """
        result = failure = None
        try:
            result = work()
        except Exception as error:
            failure = (self.rank, str(error), getattr(error, "errno", None))
        answers = [None] * dist.get_world_size()
        dist.all_gather_object(answers, (result, failure), group=self.group)
        for _, failure in answers:
            if failure:
                raise RankFailure(*failure)
        return [result for result, _ in answers]

    def _explained(self, path: Path, failure: RankFailure) -> CheckpointError:
        if self.rank == 0:
            shutil.rmtree(path.with_name(path.name + ".tmp"), ignore_errors=True)  # a full disk needs the room
        found = [p for p in complete_checkpoints(self.folder) if p != path]
        usable = f"{found[-1].name} is complete and will be continued from" if found else "there is no earlier one"
        return CheckpointError(
            f"checkpoint {path} could not be written ({failure}); {usable}. "
            f"{ADVICE.get(failure.number, 'See that files can be written there')}, then start the run again"
        )


class RankFailure(Exception):
    """What went wrong on one rank, as all of them know it."""

    def __init__(self, rank: int, text: str, number: int | None):
        super().__init__(f"rank {rank}: {text}")
        self.number = number


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """`model.NAME` and `optimizer.NAME.exp_avg` to tensor, of what is trained. The tensors themselves, not copies."""
    tensors = {f"model.{name}": t for name, t in get_model_state_dict(model, options=OPTIONS).items()}
    for name, state in get_optimizer_state_dict(model, optimizer, options=OPTIONS)["state"].items():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
    return tensors


def load_state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """The reverse of `state_tensors`. Rates and other options of the optimizer stay those it was made with."""
    weights = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    set_model_state_dict(model, weights, options=OPTIONS)
    state = get_optimizer_state_dict(model, optimizer, options=OPTIONS)
    for name, values in state["state"].items():
        values.update({key: tensors[f"optimizer.{name}.{key}"] for key in values})
    set_optimizer_state_dict(model, optimizer, state, options=OPTIONS)


def rng_tensors(rank: int) -> dict[str, torch.Tensor]:
    """State of this rank's random number generators; nothing in training draws from them today."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 (the one that libraries draw from)
    tensors = {
        "torch": torch.get_rng_state(),
        # 32-bit words are exact in float64
        "python": torch.tensor([*words, gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss, cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return {f"rng.{rank}.{name}": tensor for name, tensor in tensors.items()}


def set_rng(tensors: dict[str, torch.Tensor]) -> None:
    """The reverse of `rng_tensors`; generators that are not in `tensors` stay as they are."""
    for name, tensor in tensors.items():
        kind = name.rpartition(".")[2]
        if kind == "torch":
            torch.set_rng_state(tensor)
        elif kind == "cuda":
            torch.cuda.set_rng_state(tensor)
        else:
            *words, has_gauss, cached = tensor.tolist()
            words = [int(word) for word in words]
            if kind == "python":
                random.setstate((3, tuple(words), cached if has_gauss else None))
            else:
                np.random.set_state(("MT19937", words[:-1], words[-1], int(has_gauss), cached))  # noqa: NPY002
