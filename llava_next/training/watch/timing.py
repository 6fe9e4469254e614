"""What the device tells of a step, its results and how long its parts take, without waiting for more than that step."""

from __future__ import annotations

import itertools
import time

import torch

PHASES = ("forward", "backward", "optimizer")


class Reading:
    """Values of a tensor that the host will want later, when it has given the device more to do.

    Read from the tensor then, they would come behind all of that: the host would wait for work that it has just queued.
    """

    def __init__(self, values: torch.Tensor):
        self._values, self._there = values, None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()

    def tolist(self) -> list[float]:
        """The values; waits for what was queued before they were asked for."""
        if self._there is not None:
            self._there.synchronize()
        return self._values.tolist()


class StepTimer:
    """Marks where a step's phases begin; the times are read a step later, when the device has passed the marks.

    On CUDA a mark is an event in the stream, so that a phase's time is what the device spent and not what the host
    took to queue it; elsewhere it is the clock.
    """

    def __init__(self, device: torch.device):
        self._on_cuda = device.type == "cuda"
        self._marks: list[tuple[str, object]] = []

    def mark(self, phase: str) -> None:
        """The phase `phase` begins here, and the one before ends; any name ends a step."""
        if self._on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def take(self) -> list[tuple[str, object]]:
        """The marks of the step that ends, to be given to `seconds` later."""
        marks, self._marks = self._marks, []
        return marks

    def seconds(self, marks: list[tuple[str, object]], phases: tuple[str, ...] = PHASES) -> dict[str, float]:
        """Seconds of each of `phases`, as `forward_s`, ...: summed over a step's micro-batches."""
        spent = dict.fromkeys(phases, 0.0)
        for (phase, begin), (_, end) in itertools.pairwise(marks):
            if phase in spent:
                spent[phase] += begin.elapsed_time(end) / 1000 if self._on_cuda else end - begin
        return {f"{phase}_s": seconds for phase, seconds in spent.items()}
