"""What a run reports: one JSON line a step, one console line now and then."""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from pathlib import Path


def duration(seconds: float) -> str:
    """`1:02:03`, or `4:05` below an hour."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def si(value: float, unit: str) -> str:
    """Three digits with the unit's SI prefix: `84.6 GB`, `213 MB`, `1.02 PFLOP`."""
    prefixes = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
    scale, prefix = next(((s, p) for s, p in prefixes if value >= 0.9995 * s), (1, ""))  # 999.6 M is 1 G
    return f"{value / scale:.3g} {prefix}{unit}"


class JsonLines:
    """Appends JSON objects to a file, one a line, each flushed: a killed run loses none. No line, no file.

    JSON has no word for NaN and infinities: they become null.
    """

    def __init__(self, path: Path):
        self._path, self._file = path, None

    def write(self, record: dict) -> None:
        if self._file is None:
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)
        self._file.write(json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Returns when the lines are on the disk: a power cut loses none either."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file until there is another line."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _finite(value):
    """`value` of a JSON object with None for each number in it that is not finite."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Progress:
    """Steps done, speed over the last steps, and the time that is left.

    Args:
        total: steps of the run; done: steps before this start.
        window: steps the speed is averaged over.
    """

    def __init__(self, total: int, done: int, window: int = 50):
        self.total, self.done = total, done
        self._marks: deque[float] = deque([time.monotonic()], maxlen=window + 1)

    def advance(self) -> None:
        """Counts one step."""
        self.done += 1
        self._marks.append(time.monotonic())

    @property
    def step_seconds(self) -> float:
        """Mean time of the last steps."""
        steps = len(self._marks) - 1
        return (self._marks[-1] - self._marks[0]) / steps if steps else 0.0

    @property
    def eta_seconds(self) -> float:
        """Seconds that the remaining steps take at the present speed."""
        return self.step_seconds * (self.total - self.done)

    @property
    def eta(self) -> str:
        """Time that the remaining steps take at the present speed."""
        return duration(self.eta_seconds)


def console_line(record: dict, progress: Progress) -> str:
    """The step as one line of text; `record` with what `Journal.derived` adds."""
    cut = f"  {record['unsupervised']} without a target" if record.get("unsupervised") else ""
    return (
        f"step {record['step']}/{progress.total}  loss {record['loss']:.4f}  grad {record['grad_norm']:.3f}  "
        f"{record['samples_per_s']:.1f} samples/s  {record['tokens_per_s']:,.0f} tokens/s  "
        f"data {100 * record['data_wait_share']:.0f} %  ETA {progress.eta}{cut}"
    )


def flat(values: dict, prefix: str = "") -> dict:
    """Nested dictionaries and lists of them as one level: `data/sources/0/path`. What trackers can take."""
    found = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, (list, tuple)) and not all(isinstance(v, (int, float)) for v in value):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            found |= flat(value, f"{name}/")
        elif isinstance(value, (list, tuple)):
            found |= {f"{name}/{number}": v for number, v in enumerate(value)}
        else:
            found[name] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return found
