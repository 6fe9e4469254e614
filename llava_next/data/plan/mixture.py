"""The data sets of a run as one plan: which samples each step holds, how large they are, where their bytes lie.

Only indexes are read here. The plan of a run can change on the way, when the user asks for it (a data set more, another
batch size); `legs.py` then keeps account of what was seen.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import PurePosixPath

import numpy as np

from llava_next.anyres import AnyRes
from llava_next.data.format.dataset import DatasetInfo, check_geometry, read_info
from llava_next.data.format.index import Index, Location, read_index
from llava_next.data.format.lazy_index import LazyIndex
from llava_next.data.inputs.unbuilt import Unbuilt
from llava_next.data.plan.dealing import CostModel, deal
from llava_next.data.plan.legs import Leg, differences, place, rest_of_epoch, split
from llava_next.data.plan.order import PLAN_FORMAT, Order, Source, num_steps, plan_hash
from llava_next.data.plan.profile import PREFIX, Profile
from llava_next.data.storage.client import Storage

RESIDENT_SAMPLES = 4_000_000  # a larger data set's index (65 bytes a sample) is read window by window
SURVEYED_SHARDS = 8  # of such a data set, to estimate what the whole one is like


@dataclass(frozen=True)
class SampleRef:
    """A sample of a micro-batch: its id in the plan, its slot in the step, and where its bytes lie."""

    sample_id: int
    slot: int
    source: int
    shard: str
    shard_bytes: int
    location: Location


@dataclass(frozen=True)
class Request:
    """Micro-batch `micro` of `num_micro` in step `step`, for one rank."""

    step: int
    micro: int
    num_micro: int
    samples: tuple[SampleRef, ...]


class Mixture:
    """The data sets of a run as one plan.

    Args:
        sources: (path, URL, `Storage` or, for a plan alone, `Unbuilt` or `Profile`; name or None; repeat) of each
            data set.
        anyres: the model's geometry; tiles cut for another one are refused.
        batch_size: samples of a step; epochs: passes over the mixture; seed: of the order.
        max_length: tokens that are kept of a sample.
        fingerprint: of tokenizer and template, to find exact text lengths in the index; without them lengths are
            estimated, which changes how full micro-batches get and nothing else.
        shuffle_shards: see `Order`.
        cost: what a sample costs, for dealing.
        resident_samples: a data set with more is not held in memory; see `LazyIndex`.

    Raises:
        ValueError: not a data set, cut for another model, nothing in it, or two sources of one name.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str | os.PathLike | Storage | Unbuilt | Profile, str | None, float]],
        anyres: AnyRes,
        batch_size: int,
        epochs: int = 1,
        seed: int = 42,
        max_length: int = 4096,
        fingerprint: str | None = None,
        shuffle_shards: int | None = None,
        cost: CostModel | None = None,
        resident_samples: int = RESIDENT_SAMPLES,
    ):
        self.anyres, self.batch_size, self.epochs, self.seed = anyres, batch_size, epochs, seed
        self.max_length, self.shuffle_shards, self.cost = max_length, shuffle_shards, cost
        self._fingerprint = fingerprint
        opened = (Storage, Unbuilt, Profile)
        self.storages = [path if isinstance(path, opened) else Storage(path) for path, _, _ in sources]
        names = [
            name or PurePosixPath(storage.label.removeprefix(PREFIX)).name
            for (_, name, _), storage in zip(sources, self.storages, strict=True)
        ]
        if len(set(names)) < len(names):
            raise ValueError(f"two sources have the same name in {names}; give each its own (data.sources, key name).")
        opened = [
            self._open(storage, name, resident_samples) for storage, name in zip(self.storages, names, strict=True)
        ]
        self.infos, self.indexes = zip(*opened, strict=True) if opened else ((), ())
        self.plan_sources = [
            Source(name, [shard.samples for shard in info.shards], repeat)
            for name, info, (_, _, repeat) in zip(names, self.infos, sources, strict=True)
        ]
        self._starts = np.cumsum([0, *(info.samples for info in self.infos)])
        self.samples_per_epoch = sum(source.epoch_samples for source in self.plan_sources)
        if not self.samples_per_epoch:
            raise ValueError(
                f"no samples to train on in {[storage.label for storage in self.storages]}: raise repeat, or build "
                "them from other input"
            )
        self.steps_per_epoch = num_steps(self.samples_per_epoch, batch_size)
        self.exact_lengths, self.exact_cut, self.num_too_long, self.num_all_cut, self.length_for_most = self._survey()
        self._order = lru_cache(maxsize=2)(self._order_of)
        self._begin([self._leg()])  # sets `total_steps`: each epoch ends with a step of what is left

    def _open(
        self, storage: Storage | Unbuilt | Profile, name: str, resident_samples: int
    ) -> tuple[DatasetInfo, Index | LazyIndex]:
        if not isinstance(storage, Storage):
            return storage.info, storage.index
        info, digest = read_info(storage)
        check_geometry(info, self.anyres, name)
        if info.samples <= resident_samples:
            return info, read_index(storage, info, digest)
        if self.shuffle_shards is None:
            raise ValueError(
                f"{name} has {info.samples:,} samples, too many to shuffle as a whole; set data.shuffle_shards (1,000 "
                "shards a window, say)"
            )
        # A stretch of the order may lie in two windows.
        return info, LazyIndex(storage, info, digest, keep_shards=2 * self.shuffle_shards)

    def _survey(self) -> tuple[bool, bool, int, int, int]:
        """Whether all lengths are exact, and whether the places of all first answers are; how many samples are too
        long; how many of an epoch lose all their answers; and the length at which each source keeps 99 % of its samples
        whole, and of those with pictures.

        Counts are estimated where the index is not held. Where it does not say at which token a sample's first answer
        stands, that is taken to follow the pictures at once: then at least so many lose them.
        """
        exact, exact_cut, too_long, all_cut, most = True, True, 0.0, 0.0, [0]
        for info, index, source in zip(self.infos, self.indexes, self.plan_sources, strict=True):
            part = index
            if isinstance(index, LazyIndex):
                ends = np.cumsum([shard.samples for shard in info.shards])
                some = np.unique(np.linspace(0, len(ends) - 1, SURVEYED_SHARDS).astype(int))
                part = index.take(np.concatenate([np.arange(ends[k] - info.shards[k].samples, ends[k]) for k in some]))
            text, is_exact = part.text_tokens(self._fingerprint)
            exact &= is_exact and part is index
            first, is_known = part.first_target(self._fingerprint, self.anyres)
            exact_cut &= is_known and part is index
            image = part.image_tokens(self.anyres)
            weight = info.samples / max(len(part), 1)
            too_long += (text + image > self.max_length).sum() * weight
            all_cut += (first >= self.max_length).sum() * source.epoch_samples / max(len(part), 1)
            lengths = text + image
            groups = [lengths, lengths[image > 0]]
            most += [int(np.quantile(group, 0.99, method="higher")) for group in groups if len(group)]
        return exact, exact_cut, round(too_long), round(all_cut), max(most)

    @property
    def names(self) -> list[str]:
        """Names of the sources."""
        return [source.name for source in self.plan_sources]

    @property
    def most_tiles(self) -> int:
        """Tiles of the largest sample, as far as indexes are held in memory."""
        held = (index.num_tiles for index in self.indexes if isinstance(index, Index))
        return max((int(tiles.max(initial=0)) for tiles in held), default=0)

    def state(self) -> dict:
        """What a checkpoint must remember to continue with this plan and no other. JSON."""
        repeats = [source.repeat for source in self.plan_sources]
        hashes = [index.hash() for index in self.indexes]
        return {
            "format": PLAN_FORMAT,
            "plan_hash": plan_hash(hashes, self.names, repeats, self.seed, self.batch_size, self.shuffle_shards),
            "sources": {
                name: {"index": h, "repeat": r} for name, h, r in zip(self.names, hashes, repeats, strict=True)
            },
            "seed": self.seed,
            "batch_size": self.batch_size,
            "shuffle_shards": self.shuffle_shards,
            "epochs": self.epochs,
            "legs": [asdict(leg) for leg in self.legs],
        }

    def resume(self, state: dict, allow_changed_plan: bool = False) -> list[str]:
        """Continue a run: at `state["step"]`, under this plan if that is allowed and the checkpoint's was another.

        Args:
            state: what `state()` gave when the checkpoint was written, and `step`, the steps done by then.
            allow_changed_plan: go on with those samples of this plan that the run has not seen in the current epoch.

        Returns:
            what differs, and what that means for the data; empty when the plan is the same.

        Raises:
            ValueError: another plan, naming every difference, unless it is allowed; a state of another format.
        """
        different = differences(state, self.state())
        legs = [Leg(**{**leg, "sources": tuple(leg["sources"])}) for leg in state.get("legs", ())]
        if (different and not allow_changed_plan) or state.get("format") != PLAN_FORMAT or not legs:
            raise ValueError(
                "the checkpoint was made with another plan, samples would repeat or be left out: "
                + "; ".join(different)
                + ". Give the data as they were, or set data.allow_changed_plan: true to go on with those samples that "
                "the run has not seen in this epoch."
            )
        if different:
            epoch = place(legs, state["step"])[0]
            legs.append(self._leg(state["step"], epoch))
            kept = {source["data"] for source in legs[-1].sources}
            different += [
                f"data.sources: {source['name']} is gone or has other shards now: what was seen of it is not left out"
                for source in legs[-2].sources
                if source["data"] not in kept
            ]
        self._begin(legs)
        return different

    def _leg(self, first_step: int = 0, epoch: int = 0) -> Leg:
        sources = []
        for source, info in zip(self.plan_sources, self.infos, strict=True):
            data = hashlib.sha256("".join(shard.sha256 for shard in info.shards).encode()).hexdigest()
            runs = [[size, len(list(run))] for size, run in itertools.groupby(source.shard_samples.tolist())]
            sources.append({"name": source.name, "repeat": source.repeat, "data": data, "shards": runs})
        return Leg(tuple(sources), self.seed, self.batch_size, self.shuffle_shards, first_step, epoch)

    def _begin(self, legs: list[Leg]) -> None:
        """Makes the last of `legs` the current one."""
        self.legs, self._rest = legs, rest_of_epoch(legs) if len(legs) > 1 else None
        self._order.cache_clear()
        first = self.steps_per_epoch if self._rest is None else num_steps(len(self._rest), self.batch_size)
        self.total_steps = legs[-1].first_step + first + self.steps_per_epoch * (self.epochs - legs[-1].epoch - 1)
        if self.total_steps <= legs[-1].first_step:
            raise ValueError(
                f"data.epochs is {self.epochs}: after {legs[-1].first_step} steps nothing of them is left to train on; "
                "give more epochs or another run_dir"
            )

    @property
    def first_step(self) -> int:
        """The first step of the present plan, counted from 0: steps before it were made under another."""
        return self.legs[-1].first_step

    def _order_of(self, epoch: int) -> Order:
        return Order(self.plan_sources, self.seed, epoch, self.shuffle_shards)

    def epoch(self, step: int) -> int:
        """The epoch, counted from 0, that a step of the current leg lies in."""
        return self._place(step)[0]

    def _place(self, step: int) -> tuple[int, int]:
        leg = self.legs[-1]
        if not leg.first_step <= step < self.total_steps:
            raise ValueError(f"step {step} is not one of {leg.first_step} to {self.total_steps - 1}")
        rest = None if self._rest is None else len(self._rest)
        return split(step - leg.first_step, leg.epoch, rest, self.samples_per_epoch, self.batch_size)

    def step_ids(self, step: int) -> np.ndarray:
        """Global sample ids of a step, int64 `[B]`, in slot order; the last step of an epoch may be smaller."""
        epoch, step_in_epoch = self._place(step)
        begin, end = step_in_epoch * self.batch_size, (step_in_epoch + 1) * self.batch_size
        if self._rest is not None and epoch == self.legs[-1].epoch:
            return self._rest[begin:end]
        return self._order(epoch).ids(begin, end)

    def step_sizes(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (at most `max_length`) and tiles of the samples of a step: int64 `[B]` each, in slot order."""
        ids = self.step_ids(step)
        source = self.source_of(ids)
        lengths, tiles = np.zeros_like(ids), np.zeros_like(ids)
        for number in np.unique(source):
            mine = source == number
            part = self.indexes[number].take(ids[mine] - self._starts[number])
            text = part.text_tokens(self._fingerprint)[0]
            lengths[mine] = np.minimum(text + part.image_tokens(self.anyres), self.max_length)
            tiles[mine] = part.num_tiles
        return lengths, tiles

    def source_of(self, ids: np.ndarray) -> np.ndarray:
        """Number of the source of each sample id: int64, as `ids`."""
        return np.searchsorted(self._starts, ids, side="right") - 1

    def deal(self, step: int, world: int, token_budget: int, tile_budget: int) -> list[list[np.ndarray]]:
        """Slots of a step by micro-batch and rank, see `deal`."""
        return deal(*self.step_sizes(step), world, token_budget, tile_budget, self.cost)

    def ref(self, sample_id: int, slot: int) -> SampleRef:
        """Where sample `sample_id` lies."""
        source = int(self.source_of(sample_id))
        location = self.indexes[source].take(np.array([sample_id - self._starts[source]])).locate(0)
        shard = self.infos[source].shards[location.shard]
        return SampleRef(int(sample_id), int(slot), source, shard.name, shard.bytes, location)

    def requests(self, rank: int, world: int, token_budget: int, tile_budget: int, start_step: int = 0):
        """This rank's micro-batches in training order, from a step on. Every rank gets the same number in each step."""
        for step in range(start_step, self.total_steps):
            ids = self.step_ids(step)
            bins = self.deal(step, world, token_budget, tile_budget)
            for micro, by_rank in enumerate(bins):
                refs = tuple(self.ref(ids[slot], slot) for slot in by_rank[rank])
                yield Request(step, micro, len(bins), refs)
