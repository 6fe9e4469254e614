"""What happens inside of chosen steps: a trace of host and device, and on CUDA a history of the memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

MOST_EVENTS = 200_000  # allocations and frees that a memory history keeps


class StepProfiler:
    """Profiles chosen steps into `RUN_DIR/profile/`, on the main process only; to the others they are slow steps.

    Of each step: `step-N.json.gz`, a trace for chrome://tracing or ui.perfetto.dev; `step-N.txt`, the operations that
    took most; on CUDA `step-N-memory.pickle`, for pytorch.org/memory_viz.

    Args:
        steps: counted from 1, as in the log.
        device: that the steps run on.
    """

    def __init__(self, steps: list[int], run_dir: Path, device: torch.device, is_main_process: bool = True):
        self._steps = frozenset(steps) if is_main_process else frozenset()
        self._folder, self._on_cuda = run_dir / "profile", device.type == "cuda"
        self.operators = []  # of the last profiled step, torch's `key_averages`

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around step `number`: does nothing unless it was chosen. Then the step is slower and waits for the device."""
        if number not in self._steps:
            yield
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_cuda else [])]
        with self._memory_history(number), profile(activities=activities, record_shapes=True) as profiler:
            yield
            if self._on_cuda:
                torch.cuda.synchronize()
        profiler.export_chrome_trace(str(self._folder / f"step-{number}.json.gz"))
        order = "self_device_time_total" if self._on_cuda else "self_cpu_time_total"
        self.operators = profiler.key_averages()
        table = self.operators.table(sort_by=order, row_limit=40, max_name_column_width=60)
        (self._folder / f"step-{number}.txt").write_text(table + "\n")

    @contextlib.contextmanager
    def _memory_history(self, number: int) -> Iterator[None]:
        if not self._on_cuda:
            yield
            return
        torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS)
        try:
            yield
            torch.cuda.memory._dump_snapshot(str(self._folder / f"step-{number}-memory.pickle"))
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)
