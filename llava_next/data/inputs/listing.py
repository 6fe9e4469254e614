"""Where each sample of an input lies, listed in one pass, and any sample by its address.

An input is listed once, in the main process, without being held: 24 bytes a sample. Worker processes get addresses and
read the samples themselves, in the shuffled order. So memory stays flat however large the file is.

JSON files (`json_stream.py`) and YAML mixtures are read here; parquet and shards of others by the tool that builds.
"""

import hashlib
import json
import math
import re
from array import array
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from llava_next.data.format.records import source_name
from llava_next.data.format.tar import BadSample
from llava_next.data.inputs.json_stream import READ_BYTES, BrokenFile, json_records
from llava_next.paths import PathError, local_path
from llava_next.shuffling import permutation

_STRATEGY = re.compile(r"(?:(first|end|random):)?(\d+)(%?)")


class Reader(Protocol):
    """The worker's half of an input; picklable."""

    def read(self, address: np.ndarray) -> dict:
        """The record at an address (int64 [3]), in any form that `records.read_record` takes. Raises BadSample."""


@dataclass(frozen=True)
class Listing:
    """The main process's half: n samples.

    Args:
        addresses: int64 [n, 3], for the reader.
        source_names, source int32 [n]: parts of the mixture, and each sample's position among them.
        sha256: of everything that was listed.
        reader: of the samples.
    """

    addresses: np.ndarray
    source_names: list[str]
    source: np.ndarray
    sha256: str
    reader: Reader

    def __len__(self) -> int:
        return len(self.addresses)

    def from_one_source(self, name: str) -> "Listing":
        """The same samples as one part of a mixture."""
        return replace(self, source_names=[name], source=np.zeros_like(self.source))

    def source_counts(self) -> dict[str, int]:
        """Samples by source name, in the order of the names."""
        counts = np.bincount(self.source, minlength=len(self.source_names)).tolist()
        return dict(sorted(zip(self.source_names, counts, strict=True)))


class Lister:
    """Collects a listing, row by row."""

    def __init__(self):
        self._addresses, self._codes, self._names = array("q"), array("i"), {}

    def __len__(self) -> int:
        return len(self._codes)

    def add(self, address: tuple[int, int, int], source: str) -> None:
        """One more sample."""
        self._addresses.extend(address)
        self._codes.append(self._names.setdefault(source, len(self._names)))

    def listing(self, sha256: str, reader: Reader, rows: np.ndarray | None = None) -> Listing:
        """The samples that were added; `rows` chooses some."""
        addresses = np.frombuffer(self._addresses, np.int64).reshape(-1, 3)
        codes = np.frombuffer(self._codes, np.int32)
        if rows is not None:
            addresses, codes = addresses[rows], codes[rows]
        used, codes = np.unique(codes, return_inverse=True)
        names = list(self._names)
        return Listing(addresses, [names[code] for code in used], codes.astype(np.int32), sha256, reader)


@dataclass(frozen=True)
class JsonReader:
    """Samples of LLaVA JSON files; an address is (file, first byte, bytes)."""

    files: tuple[Path, ...]

    def read(self, address: np.ndarray) -> dict:
        """See `Reader`."""
        file, start, length = address.tolist()
        with open(self.files[file], "rb") as stream:
            stream.seek(start)
            data = stream.read(length)
        try:
            record = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BadSample(f"bytes {start} to {start + length} of {self.files[file]} do not parse: {error}") from None
        if not isinstance(record, dict):
            raise BadSample(f"no object but {_kind(record)}: {data[:80]!r} at byte {start} of {self.files[file]}")
        return record


def list_json(path: Path, seed: int, root: Path | None = None) -> Listing:
    """A JSON list, JSONL, an object around a list, or a YAML mixture of those (`.yaml`, `.yml`).

    Args:
        seed: of a mixture's random samples.
        root: of images; it decides to which source absolute paths belong.

    Raises:
        ValueError: the file is missing or is none of these, and where it goes wrong.
    """
    if path.suffix.lower() in (".yaml", ".yml"):
        return _list_mixture(path, seed, root)
    lister, digest = Lister(), hashlib.sha256()
    _scan(path, 0, lister, digest, root)
    return lister.listing(digest.hexdigest(), JsonReader((path,)))


def _list_mixture(path: Path, seed: int, root: Path | None) -> Listing:
    """A YAML mixture: `datasets: [{json_path, sampling_strategy}, ...]`, paths relative to the file."""
    import yaml  # an extra: only mixtures need it

    try:
        entries = yaml.safe_load(path.read_bytes())["datasets"]
        entries = [
            (path.parent / local_path(str(entry["json_path"])), str(entry.get("sampling_strategy", "all")))
            for entry in entries
        ]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except PathError as error:
        raise ValueError(f"{path}: json_path: {error}") from None
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        text = str(error).splitlines()[0]
        raise ValueError(f"{path}: no mixture `datasets: [{{json_path, sampling_strategy}}]` ({text})") from None
    lister, digest, chosen = Lister(), hashlib.sha256(), []
    for number, (file, strategy) in enumerate(entries):
        start = len(lister)
        _scan(file, number, lister, digest, root)
        digest.update(f"{number} {strategy}\n".encode())
        chosen.append(start + _sampled(len(lister) - start, strategy, seed + number, path))
    rows = np.concatenate(chosen) if chosen else np.zeros(0, np.int64)
    return lister.listing(digest.hexdigest(), JsonReader(tuple(file for file, _ in entries)), rows)


def _sampled(total: int, strategy: str, seed: int, path: Path) -> np.ndarray:
    """Rows that a `sampling_strategy` keeps, ascending: all, first:N, end:N, random:N; N may be N% (rounded up).

    A bare N or N% is random. `random` depends on the seed, not on the file.
    """
    if strategy == "all":
        return np.arange(total)
    match = _STRATEGY.fullmatch(strategy)
    if match is None:
        raise ValueError(
            f"{path}: sampling_strategy {strategy!r} is not one of all, first:N, end:N, random:N, N% "
            "(N can be a share everywhere: first:10%)"
        )
    kind, count = match[1] or "random", int(match[2])
    count = min(math.ceil(count * total / 100) if match[3] else count, total)
    rows = permutation(total, seed) if kind == "random" else np.arange(total)
    return np.sort(rows[total - count :] if kind == "end" else rows[:count])


def _scan(path: Path, number: int, lister: Lister, digest, root: Path | None) -> None:
    """Adds every sample of one JSON file. Raises ValueError."""
    first, objects = len(lister), 0
    try:
        for start, length, record in json_records(path, digest):
            objects += isinstance(record, dict)
            lister.add((number, start, length), source_name(record, root) if isinstance(record, dict) else "text")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except BrokenFile as error:
        line = 1 + _count_lines(path, error.position)
        raise ValueError(
            f"{path}: {error} at byte {error.position} (line {line}), after {len(lister) - first} whole "
            "samples: the file is cut off or damaged, or neither a JSON list nor one JSON object a line"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not objects:
        found = f"{len(lister) - first} values that are no objects" if len(lister) > first else "none"
        raise ValueError(f"{path}: expected samples {{id, image, conversations}}, found {found}")


def _count_lines(path: Path, end: int) -> int:
    """Line breaks before byte `end`."""
    lines = 0
    with open(path, "rb") as file:
        while end > 0 and (data := file.read(min(end, READ_BYTES))):
            lines, end = lines + data.count(b"\n"), end - len(data)
    return lines


def _kind(value) -> str:
    """What JSON calls a value that is no object."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return {list: "a list", str: "a string"}.get(type(value), "a number")
