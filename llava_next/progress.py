"""Work in many processes, and how far it is: a bar on a terminal, else a plain line now and then."""

import contextlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor

# Fork would copy the threads' locks of the parent; spawn would start each worker from nothing.
PROCESSES = multiprocessing.get_context("forkserver")


@contextlib.contextmanager
def worker_pool(workers: int, initializer: Callable | None = None, initargs: tuple = ()) -> Iterator[Executor]:
    """`workers` processes, or with 0 a thread of this one. An error in the block cancels what has not begun.

    The processes end with this one, however it ends.
    """
    if workers:
        pool = ProcessPoolExecutor(workers, PROCESSES, _start, (initializer, initargs))
    else:
        pool = ThreadPoolExecutor(1, initializer=initializer, initargs=initargs)
    with pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start(initializer: Callable | None, initargs: tuple) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(*initargs)


def _end_with_parent() -> None:
    """A worker waits for its next task on a pipe that its fellows hold open, so it would not see the end."""
    multiprocessing.parent_process().join()
    os._exit(1)


class Progress:
    """How many samples are done, at which rate, and how long the rest takes.

    Args:
        total: samples; done: those that an earlier run finished, which do not count for the rate.
        unit: what is counted; bad: what is said of those that are no good.
        seconds_between_lines: for plain lines.
    """

    def __init__(
        self,
        total: int,
        done: int = 0,
        unit: str = "samples",
        seconds_between_lines: float = 10,
        bad: str = "rejected",
    ):
        self.unit, self.total, self.before, self.seconds, self.bad = unit, total, done, seconds_between_lines, bad
        self.started, self.told, self.bar = time.monotonic(), time.monotonic(), None

    def __enter__(self) -> "Progress":
        with contextlib.suppress(ImportError):  # rich is in the extras; lines do without
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            console = Console(stderr=True)
            if console.is_terminal:
                columns = (
                    TextColumn(f"{{task.completed}}/{{task.total}} {self.unit}"),
                    BarColumn(),
                    TimeRemainingColumn(),
                )
                self.bar = Progress(*columns, TextColumn("{task.description}"), console=console)
                self.bar.start()
                self.task = self.bar.add_task("", total=self.total)
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, done: int, rejected: int) -> None:
        """Tell the state; `done` counts from this run's start."""
        now = time.monotonic()
        rate = done / (now - self.started)
        reached = self.before + done
        if self.bar is not None:
            self.bar.update(self.task, completed=reached, description=f"{rate:.1f}/s, {rejected} {self.bad}")
        elif done and now - self.told > self.seconds:
            self.told = now
            left = (self.total - reached) / rate / 60
            text = f"{reached}/{self.total} {self.unit}, {rate:.1f}/s, {rejected} {self.bad}, about {left:.1f} min left"
            print(text, file=sys.stderr, flush=True)
