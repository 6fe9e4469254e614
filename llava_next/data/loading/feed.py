"""The steps of a rank, loaded ahead of the training loop by a thread."""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.utils.data import DataLoader

from llava_next.data.loading.batch import PackedBatch
from llava_next.data.loading.stall import StallDump

READY = 8  # micro-batches that wait for the loop at most
LOOK = 0.5  # seconds between looks at whether the wait is still wanted


class NotWaitedFor(Exception):
    """The caller no longer wants the step that is not there yet."""


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
        return self.take()

    def take(self, unless: Callable[[], bool] = lambda: False) -> tuple[int, list[PackedBatch]]:
        """The next step and its micro-batches.

        Args:
            unless: asked while the step is waited for.

        Raises:
            NotWaitedFor: `unless` has become true; the rest of the step is not to be taken.
            StopIteration: there is none.
        """
        first = self._take(unless)
        return first.step, [first, *(self._take(unless) for _ in range(first.num_micro - 1))]

    def close(self) -> None:
        """Stops loading and ends the worker processes. Can be called again."""
        self._closing.set()
        self._thread.join(timeout=30)
        atexit.unregister(self.close)

    def _take(self, unless: Callable[[], bool]) -> PackedBatch:
        try:
            item = self._queue.get_nowait()
        except queue.Empty:
            with StallDump(self._dump, self._patience, lambda: [f"no micro-batch from the loader; last: {self._last}"]):
                item = self._wait(unless)
        if isinstance(item, BaseException):
            self._put(item)  # for whoever asks again
            raise item
        self._last = f"step {item.step}, micro-batch {item.micro} of {item.num_micro}"
        return item

    def _wait(self, unless: Callable[[], bool]):
        while not unless():
            with contextlib.suppress(queue.Empty):
                return self._queue.get(timeout=LOOK)
        raise NotWaitedFor

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
