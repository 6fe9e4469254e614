"""From a plan to packed micro-batches: which samples, read, encoded and packed in worker processes.

`Mixture` knows every sample's length from the indexes and deals each step to the ranks; the main process sends workers
only the byte ranges of one micro-batch at a time, so a worker holds no index and resuming at a step reads nothing
before it.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from llava_next.anyres import AnyRes
from llava_next.data import plan
from llava_next.data.batch import Example, Hole, PackedBatch, pack
from llava_next.data.encode import Encoder
from llava_next.data.index import Location, check_geometry, read_dataset
from llava_next.data.shards import BadSample, read_sample
from llava_next.data.storage import Storage, StorageError

READ_THREADS = 8  # reads of one micro-batch in flight


@dataclass(frozen=True)
class SampleRef:
    """A sample of a micro-batch: its id in the plan, its slot in the step, and where its bytes lie."""

    sample_id: int
    slot: int
    source: int
    shard: str
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
        sources: (path or URL, name or None, repeat) of each data set.
        anyres: the model's geometry; tiles cut for another one are refused.
        batch_size: samples of a step; epochs: passes over the mixture; seed: of the order.
        max_length: tokens that are kept of a sample.
        fingerprint: of tokenizer and template, to find exact text lengths in the index; without them lengths are
            estimated, which changes how full micro-batches get and nothing else.
        shuffle_shards: see `plan.order`.

    Raises:
        ValueError: not a data set, cut for another model, or nothing in it.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str, str | None, float]],
        anyres: AnyRes,
        batch_size: int,
        epochs: int = 1,
        seed: int = 42,
        max_length: int = 4096,
        fingerprint: str | None = None,
        shuffle_shards: int | None = None,
    ):
        self.anyres, self.batch_size, self.epochs, self.seed = anyres, batch_size, epochs, seed
        self.shuffle_shards = shuffle_shards
        self.storages = [Storage(path) for path, _, _ in sources]
        self.infos, self.indexes = zip(*(read_dataset(storage) for storage in self.storages), strict=True)
        names = [
            name or PurePosixPath(storage.label).name
            for (_, name, _), storage in zip(sources, self.storages, strict=True)
        ]
        self.plan_sources = []
        for name, info, (_, _, repeat) in zip(names, self.infos, sources, strict=True):
            check_geometry(info, anyres, name)
            self.plan_sources.append(plan.Source(name, [shard.samples for shard in info.shards], repeat))
        texts = [index.text_tokens(fingerprint) for index in self.indexes]
        images = [index.image_tokens(anyres) for index in self.indexes]
        self.exact_lengths = all(exact for _, exact in texts)
        full = np.concatenate([text + image for (text, _), image in zip(texts, images, strict=True)])
        self.num_too_long = int((full > max_length).sum())
        self.lengths = np.minimum(full, max_length)
        self.tiles = np.concatenate([index.num_tiles for index in self.indexes])
        self._starts = np.cumsum([0, *(len(index) for index in self.indexes)])
        self._epoch_ids = lru_cache(maxsize=1)(self._order)
        self.samples_per_epoch = sum(source.epoch_samples for source in self.plan_sources)
        if not self.samples_per_epoch:
            raise ValueError(f"no samples to train on in {[storage.label for storage in self.storages]}")
        self.steps_per_epoch = plan.num_steps(self.samples_per_epoch, batch_size)

    @property
    def names(self) -> list[str]:
        """Names of the sources."""
        return [source.name for source in self.plan_sources]

    @property
    def total_steps(self) -> int:
        """Steps of the run: each epoch ends with a step of what is left."""
        return self.steps_per_epoch * self.epochs

    def state(self) -> dict:
        """What a checkpoint must remember to continue with this plan and no other."""
        repeats = [source.repeat for source in self.plan_sources]
        hashes = [index.hash() for index in self.indexes]
        return {
            "format": plan.PLAN_FORMAT,
            "plan_hash": plan.plan_hash(hashes, self.names, repeats, self.seed, self.batch_size, self.shuffle_shards),
            "sources": {
                name: {"index": h, "repeat": r} for name, h, r in zip(self.names, hashes, repeats, strict=True)
            },
            "seed": self.seed,
            "batch_size": self.batch_size,
            "epochs": self.epochs,
        }

    def check_state(self, state: dict) -> None:
        """Refuses to continue a run whose plan was another one.

        Raises:
            ValueError: naming every difference.
        """
        ours = self.state()
        different = [f"{key}: {state.get(key)!r} -> {ours[key]!r}" for key in ours if state.get(key) != ours[key]]
        if different:
            raise ValueError(
                "the checkpoint was made with another plan, samples would repeat or be left out: "
                + "; ".join(different)
            )

    def _order(self, epoch: int) -> np.ndarray:
        return plan.order(self.plan_sources, self.seed, epoch, self.shuffle_shards)

    def step_ids(self, step: int) -> np.ndarray:
        """Global sample ids of a step, int64 `[B]`, in slot order."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return plan.step_ids(self._epoch_ids(epoch), step_in_epoch, self.batch_size)

    def deal(self, step: int, world: int, token_budget: int, tile_budget: int) -> list[list[np.ndarray]]:
        """Slots of a step by micro-batch and rank, see `plan.deal`."""
        ids = self.step_ids(step)
        return plan.deal(self.lengths[ids], self.tiles[ids], world, token_budget, tile_budget)

    def ref(self, sample_id: int, slot: int) -> SampleRef:
        """Where sample `sample_id` lies."""
        source = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        location = self.indexes[source].locate(int(sample_id - self._starts[source]))
        return SampleRef(int(sample_id), int(slot), source, self.infos[source].shards[location.shard].name, location)

    def requests(
        self, rank: int, world: int, token_budget: int, tile_budget: int, start_step: int = 0
    ) -> Iterator[Request]:
        """This rank's micro-batches in training order, from a step on. Every rank gets the same number in each step."""
        for step in range(start_step, self.total_steps):
            ids = self.step_ids(step)
            bins = self.deal(step, world, token_budget, tile_budget)
            for micro, by_rank in enumerate(bins):
                refs = tuple(self.ref(ids[slot], slot) for slot in by_rank[rank])
                yield Request(step, micro, len(bins), refs)


class MicroBatches(Dataset):
    """Item = `Request`, value = `PackedBatch`. Lives in worker processes."""

    def __init__(self, storages: Sequence[Storage], encoder: Encoder):
        self.storages, self.encoder = list(storages), encoder
        self._threads: ThreadPoolExecutor | None = None

    def __getstate__(self):
        return {**self.__dict__, "_threads": None}

    def __getitem__(self, request: Request) -> PackedBatch:
        """Reads, encodes and packs.

        Raises:
            StorageError: bytes that cannot be read or are not those of the index: the run must not go on without them.
        """
        self._threads = self._threads or ThreadPoolExecutor(READ_THREADS)
        examples, holes = [], []
        for ref, data in zip(request.samples, self._threads.map(self._read, request.samples), strict=True):
            try:
                examples.append(self._encode(ref, data))
            except BadSample as error:
                where = ref.location
                holes.append(Hole(ref.sample_id, ref.slot, where.key, ref.shard, where.offset, str(error)))
        anyres = self.encoder.anyres
        return pack(
            examples,
            anyres.tile_size,
            anyres.patches_per_tile,
            holes,
            step=request.step,
            micro=request.micro,
            num_micro=request.num_micro,
        )

    def _read(self, ref: SampleRef) -> bytes:
        storage, where = self.storages[ref.source], ref.location
        data = storage.read_range(ref.shard, where.offset, where.nbytes)
        if zlib.crc32(data) != where.crc32:
            raise StorageError(
                f"{storage.address(ref.shard)}, bytes {where.offset} to {where.offset + where.nbytes} (sample "
                f"{where.key}): checksum differs from the index. The shard was changed or damaged; copy it again, or "
                "rebuild the data set."
            )
        return data

    def _encode(self, ref: SampleRef, data: bytes) -> Example:
        return self.encoder.encode(read_sample(data, ref.location.key), ref.sample_id, ref.slot, ref.source)


class _Requests:
    """Sampler over a mixture; a fresh pass each time it is iterated."""

    def __init__(self, mixture: Mixture, *arguments):
        self.mixture, self.arguments = mixture, arguments

    def __iter__(self) -> Iterator[Request]:
        return self.mixture.requests(*self.arguments)


def build_loader(
    mixture: Mixture,
    encoder: Encoder,
    rank: int,
    world: int,
    token_budget: int,
    tile_budget: int,
    start_step: int = 0,
    num_workers: int = 4,
) -> DataLoader:
    """A DataLoader that yields this rank's `PackedBatch`es in plan order. Not to be given to `accelerator.prepare`."""
    workers = {"multiprocessing_context": "forkserver", "prefetch_factor": 4} if num_workers else {}
    return DataLoader(
        MicroBatches(mixture.storages, encoder),
        sampler=_Requests(mixture, rank, world, token_budget, tile_budget, start_step),
        batch_size=None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        **workers,
    )


def steps(loader: DataLoader) -> Generator[tuple[int, list[PackedBatch]], None, None]:
    """Groups a loader's batches: (step, all its micro-batches)."""
    batches = iter(loader)
    for first in batches:
        yield first.step, [first, *itertools.islice(batches, first.num_micro - 1)]
