"""From requests to packed micro-batches: read, encoded and packed in worker processes.

The main process sends workers only the byte ranges of one micro-batch at a time, so a worker holds no index and
resuming at a step reads nothing before it. With each request comes the one that the same worker will get next: its
reads begin at once and wait for the network while the present samples are decoded.
"""

from __future__ import annotations

import itertools
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from llava_next.data.format.shards import BadSample, read_sample
from llava_next.data.loading.batch import Example, Hole, PackedBatch, pack
from llava_next.data.loading.encode import ENCODER_VARIABLE, Encoder, SharedEncoder
from llava_next.data.loading.stall import StallDump
from llava_next.data.plan.mixture import Mixture, Request, SampleRef
from llava_next.data.storage.client import IOStats, Storage

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class LoaderOptions:
    """How a rank loads; nothing of it changes what is loaded.

    Args:
        num_workers: worker processes; 0 loads in a thread of the training process.
        reads_in_flight: reads of a rank that wait for the network at a time, over all its workers.
        patience: seconds without a micro-batch until a dump of what is in flight is written.
        dump_folder: for those dumps (`stall-...txt`); None writes to the standard error stream only.
    """

    num_workers: int = 4
    reads_in_flight: int = 64
    patience: float = 120.0
    dump_folder: Path | None = None

    def dump_file(self, name: str) -> Path | None:
        """Path of a dump."""
        return self.dump_folder and self.dump_folder / f"stall-{name}.txt"


class MicroBatches(Dataset):
    """Item = (`Request`, the worker's next one or None), value = `PackedBatch`. Lives in worker processes."""

    def __init__(
        self, storages: Sequence[Storage], encoder: Encoder | SharedEncoder, options: LoaderOptions, rank: int = 0
    ):
        self.storages, self.encoder, self.options, self.rank = list(storages), encoder, options, rank
        self._threads: ThreadPoolExecutor | None = None
        self._started: dict[tuple[int, int], list[Future]] = {}
        self._reported = IOStats()

    def __getitem__(self, asked: tuple[Request, Request | None]) -> PackedBatch:
        """Reads, encodes and packs.

        Raises:
            StorageError: bytes that cannot be read or are not those of the index: the run must not go on without them.
        """
        request, following = asked
        if self._threads is None:
            share = -(-self.options.reads_in_flight // max(self.options.num_workers, 1))
            self._threads = ThreadPoolExecutor(share, thread_name_prefix="read")
        reads = self._started.pop((request.step, request.micro), None) or self._start(request)
        if following is not None:
            self._started[following.step, following.micro] = self._start(following)
        dump = self.options.dump_file(f"rank{self.rank}-process{os.getpid()}")
        with StallDump(dump, self.options.patience, lambda: self._describe(request)):
            return self._load(request, reads)

    def _start(self, request: Request) -> list[Future]:
        return [self._threads.submit(self._read, ref) for ref in request.samples]

    def _load(self, request: Request, reads: list[Future]) -> PackedBatch:
        examples, holes, waited, begin = [], [], 0.0, time.monotonic()
        for ref, read in zip(request.samples, reads, strict=True):
            before = time.monotonic()
            data = read.result()
            waited += time.monotonic() - before
            try:
                examples.append(self._encode(ref, data))
            except BadSample as error:
                where = ref.location
                holes.append(Hole(ref.sample_id, ref.slot, where.key, ref.shard, where.offset, str(error)))
        anyres = self.encoder.anyres
        batch = pack(
            examples,
            anyres.tile_size,
            anyres.patches_per_tile,
            holes,
            step=request.step,
            micro=request.micro,
            num_micro=request.num_micro,
        )
        stats = sum((storage.stats() for storage in self.storages), IOStats())
        io, self._reported = stats - self._reported, stats
        batch.io = {**io.as_dict(), "wait_s": waited, "encode_s": time.monotonic() - begin - waited}
        return batch

    def _read(self, ref: SampleRef) -> bytes:
        storage, where = self.storages[ref.source], ref.location
        return storage.read_range(ref.shard, where.offset, where.nbytes, ref.shard_bytes, where.crc32)

    def _encode(self, ref: SampleRef, data: bytes) -> Example:
        return self.encoder.encode(read_sample(data, ref.location.key), ref.sample_id, ref.slot, ref.source)

    def _describe(self, request: Request) -> list[str]:
        yield f"loading step {request.step}, micro-batch {request.micro}, samples:"
        yield from (f"  {self.storages[r.source].address(r.shard)} {r.location.key}" for r in request.samples)
        yield "reads in flight:"
        for storage in self.storages:
            for address, start, length, seconds in storage.in_flight():
                yield f"  {address}, bytes {start} to {start + length}, for {seconds:.0f} s"


class _Requests:
    """Sampler over a mixture: each request with the one `stride` further on. A fresh pass each time it is iterated."""

    def __init__(self, stride: int, mixture: Mixture, *arguments):
        self.stride, self.mixture, self.arguments = stride, mixture, arguments

    def __iter__(self) -> Iterator[tuple[Request, Request | None]]:
        requests = self.mixture.requests(*self.arguments)
        window = deque(itertools.islice(requests, self.stride))
        while window:
            request, following = window.popleft(), next(requests, None)
            if following is not None:
                window.append(following)
            yield request, following


def build_loader(
    mixture: Mixture,
    encoder: Encoder,
    rank: int,
    world: int,
    token_budget: int,
    tile_budget: int,
    start_step: int = 0,
    options: LoaderOptions | None = None,
) -> DataLoader:
    """A DataLoader that yields this rank's `PackedBatch`es in plan order. Not to be given to `accelerator.prepare`."""
    options = options or LoaderOptions()
    workers = {}
    if options.num_workers:
        start_worker_server(encoder)
        encoder = SharedEncoder(_ENCODER_FILES[encoder])
        # A process that was itself started by multiprocessing has the folder from its parent, which goes on using it.
        own_folder = multiprocessing.parent_process() is None
        init = _WorkerInit(multiprocessing.util.get_temp_dir() if own_folder else None)
        workers = {"multiprocessing_context": "forkserver", "prefetch_factor": 2, "worker_init_fn": init}
    return DataLoader(
        MicroBatches(mixture.storages, encoder, options, rank),
        sampler=_Requests(max(options.num_workers, 1), mixture, rank, world, token_budget, tile_budget, start_step),
        batch_size=None,
        num_workers=options.num_workers,
        pin_memory=torch.cuda.is_available(),
        **workers,
    )


# Where an encoder was written for workers; `preload.py` removes the file when the rank has ended.
_ENCODER_FILES: weakref.WeakKeyDictionary[Encoder, str] = weakref.WeakKeyDictionary()


def start_worker_server(encoder: Encoder) -> None:
    """Starts the process that worker processes are forked from, with the modules of `data/` and those below it, and the
    encoder loaded: called early, it imports torch and transformers (some seconds) while the model loads, and workers
    then start in a tenth of a second and share the encoder's memory. Where it runs already, it stays as it is: a worker
    that is to use another encoder loads that from its file.

    Neither it nor its workers ever see the signals that ask a job to stop: a launcher's, a scheduler's and Ctrl-C reach
    all processes, and the rank still needs them to finish its step. They are blocked before the server exists, not
    ignored, because what starts a worker (multiprocessing, torch) sets handlers of its own.
    """
    if not os.path.exists(_ENCODER_FILES.get(encoder, "")):
        number, path = tempfile.mkstemp(prefix="encoder-", dir=multiprocessing.util.get_temp_dir())
        with open(number, "wb") as file:
            pickle.dump(encoder, file)
        _ENCODER_FILES[encoder] = path
    loaded = [name for name in sys.modules if name.startswith("llava_next.data.")]
    multiprocessing.get_context("forkserver").set_forkserver_preload([*loaded, "llava_next.data.loading.preload"])
    multiprocessing.resource_tracker.ensure_running()  # which the server would start, and unblock signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # inherited, by new programs too
    os.environ[ENCODER_VARIABLE] = _ENCODER_FILES[encoder]
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        del os.environ[ENCODER_VARIABLE]
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass(frozen=True)
class _WorkerInit:
    """Runs in a new worker, which does not outlive its rank.

    Args:
        rank_folder: the rank's folder of sockets, which it removes itself unless it is killed.
    """

    rank_folder: str | None

    def __call__(self, worker: int) -> None:
        tempfile.tempdir = self.rank_folder or tempfile.tempdir  # the worker's own sockets go with it
        threading.Thread(target=self._follow, name="follow", daemon=True).start()

    def _follow(self) -> None:
        # torch's own watch looks at the process that forked the worker: the server, which lives as long as workers do.
        multiprocessing.parent_process().join()
        if self.rank_folder is not None:
            shutil.rmtree(self.rank_folder, ignore_errors=True)
        os._exit(1)
