"""The steps of a rank, loaded ahead of the training loop by a thread."""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

from torch.utils.data import DataLoader

from llava_next.data.loading.batch import PackedBatch
from llava_next.data.loading.stall import StallDump

READY = 8  # micro-batches that wait for the loop at most


class Feed:
    """Iterates over (step, its micro-batches). What the loader raises is raised here, in its place.

    A thread takes micro-batches from the loader, so that planning, dealing and the hand-over from worker processes
    happen while the loop computes. Close it when done: that ends the worker processes.

    Args:
        loader: as made by `build_loader`.
        patience: seconds without a micro-batch until a dump is written to `dump` (see `StallDump`); the wait goes on.
    """

    def __init__(self, loader: DataLoader, patience: float = 120.0, dump: Path | None = None):
        self._queue: queue.Queue = queue.Queue(READY)
        self._patience, self._dump, self._last = patience, dump, "nothing yet"
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(loader,), name="feed", daemon=True)
        self._thread.start()
        # At exit Python would end workers by SIGTERM, which they ignore, and wait for them.
        atexit.register(self.close)

    @property
    def ready(self) -> int:
        """Micro-batches that wait for the loop: 0 before a step means that the loop is faster than its data."""
        return self._queue.qsize()

    def __iter__(self) -> Iterator[tuple[int, list[PackedBatch]]]:
        return self

    def __next__(self) -> tuple[int, list[PackedBatch]]:
        first = self._take()
        return first.step, [first, *(self._take() for _ in range(first.num_micro - 1))]

    def close(self) -> None:
        """Stops loading and ends the worker processes. Can be called again."""
        self._closing.set()
        self._thread.join(timeout=30)
        atexit.unregister(self.close)

    def _take(self) -> PackedBatch:
        try:
            item = self._queue.get_nowait()
        except queue.Empty:
            with StallDump(self._dump, self._patience, lambda: [f"no micro-batch from the loader; last: {self._last}"]):
                item = self._queue.get()
        if isinstance(item, BaseException):
            self._put(item)  # for whoever asks again
            raise item
        self._last = f"step {item.step}, micro-batch {item.micro} of {item.num_micro}"
        return item

    def _run(self, loader: DataLoader) -> None:
        batches = None
        try:
            batches = iter(loader)
            for batch in batches:
                if not self._put(batch):
                    return
            self._put(StopIteration())
        except BaseException as error:
            self._put(error)
        finally:
            # An error's traceback would keep the iterator, and it ends its workers only when nothing holds it.
            if loader.num_workers and batches is not None:
                batches._shutdown_workers()

    def _put(self, item) -> bool:
        """False when the feed was closed before there was room."""
        while not self._closing.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False
