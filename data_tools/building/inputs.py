"""What a build reads: a list of where each sample lies, made in one pass, and any sample by its address.

An input is listed once, in the main process, without being held: 24 bytes a sample. Worker processes get addresses and
read the samples themselves, in the shuffled order. So memory stays flat however large the file is.

LLaVA JSON and YAML mixtures are read here; data sets with embedded images in `embedded.py`.
"""

import hashlib
import json
import math
import posixpath
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from llava_next.data.format.tar import BadSample
from llava_next.data.plan.order import permutation

READ_BYTES = 4 << 20
MAX_RECORD_BYTES = 64 << 20  # of one sample in a JSON file; what is larger is not a list of samples

_SPACE = re.compile(r"[ \t\r\n]*")
_COMMA = re.compile(r"[ \t\r\n]*,[ \t\r\n]*")
_LIST_END = re.compile(r"[ \t\r\n]*\][ \t\r\n]*")
_STRATEGY = re.compile(r"(?:(first|end|random):)?(\d+)(%?)")


class Picture(NamedTuple):
    """A picture that lies in the data set itself: what to call it in reports, and its bytes."""

    name: str
    data: bytes


class Reader(Protocol):
    """The worker's half of an input; picklable."""

    def read(self, address: np.ndarray) -> dict:
        """The sample at an address (int64 [3]): LLaVA's fields, `image` a path, a `Picture`, or a list. BadSample."""


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
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BadSample(f"bytes {start} to {start + length} of {self.files[file]} do not parse: {error}") from None


def list_json(path: Path, seed: int) -> Listing:
    """A LLaVA JSON list, JSONL, or a YAML mixture of those (`.yaml`, `.yml`).

    Raises:
        ValueError: the file is missing or is none of these, and where it goes wrong.
    """
    if path.suffix.lower() in (".yaml", ".yml"):
        return _list_mixture(path, seed)
    lister, digest = Lister(), hashlib.sha256()
    _scan(path, 0, lister, digest)
    return lister.listing(digest.hexdigest(), JsonReader((path,)))


def image_names(record: dict) -> list:
    """What a record's `image` (or `images`) names: missing, one thing, or a list. Raises BadSample."""
    image = record.get("image", record.get("images"))
    names = image if isinstance(image, list) else [] if image is None else [image]
    if not all(isinstance(name, Picture) or (isinstance(name, str) and name) for name in names):
        raise BadSample("image is neither a path nor a list of paths")
    return names


def source_name(record: dict) -> str:
    """The part of a mixture that a record belongs to: its `source` or `data_source`, else its first image's folder.

    Recipes name the parts of a mixture by image root: coco, gqa, ocr_vqa, ...
    """
    try:
        names = image_names(record)
    except BadSample:
        names = []
    first = names[0] if names else None
    root = "text" if first is None else first.split("/")[0] if isinstance(first, str) and "/" in first else "image"
    return str(record.get("source") or record.get("data_source") or root)


def _list_mixture(path: Path, seed: int) -> Listing:
    """A YAML mixture: `datasets: [{json_path, sampling_strategy}, ...]`, paths relative to the file."""
    import yaml  # an extra: only mixtures need it

    try:
        entries = yaml.safe_load(path.read_bytes())["datasets"]
        entries = [
            (path.parent / str(entry["json_path"]), str(entry.get("sampling_strategy", "all"))) for entry in entries
        ]
    except OSError as error:
        raise ValueError(f"--json {path}: {error.strerror}") from None
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        text = str(error).splitlines()[0]
        raise ValueError(f"--json {path}: no mixture `datasets: [{{json_path, sampling_strategy}}]` ({text})") from None
    lister, digest, chosen = Lister(), hashlib.sha256(), []
    for number, (file, strategy) in enumerate(entries):
        start = len(lister)
        _scan(file, number, lister, digest)
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
            f"--json {path}: sampling_strategy {strategy!r} is not one of all, first:N, end:N, random:N, N% "
            "(N can be a share everywhere: first:10%)"
        )
    kind, count = match[1] or "random", int(match[2])
    count = min(math.ceil(count * total / 100) if match[3] else count, total)
    rows = permutation(total, seed) if kind == "random" else np.arange(total)
    return np.sort(rows[total - count :] if kind == "end" else rows[:count])


def _scan(path: Path, number: int, lister: Lister, digest) -> None:
    """Adds every sample of one JSON file. Raises ValueError."""
    count = len(lister)
    try:
        for start, length, record in _records(path, digest):
            if not isinstance(record, dict):
                kind = type(record).__name__
                raise ValueError(f"sample {len(lister) - count} at byte {start} is a {kind}, not {{id, conversations}}")
            lister.add((number, start, length), source_name(record))
    except OSError as error:
        raise ValueError(f"--json {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--json {path}: neither a JSON list nor one JSON object a line ({error})") from None
    if len(lister) == count:
        raise ValueError(f"--json {path}: expected samples {{id, image, conversations}}, found none")


def _records(path: Path, digest) -> Iterator[tuple[int, int, object]]:
    """First byte, bytes and value of every element of a JSON list, or of every value of a JSONL file.

    The file is read as Latin-1, one character a byte: JSON's structure is ASCII, so values end where they do in UTF-8
    and positions are those of bytes. Texts that are not ASCII are garbled in the values given here, but for the name of
    the sample's source.
    """
    decoder = json.JSONDecoder()
    with open(path, "rb") as file:
        window = _Window(file, digest)
        window.skip_mark()
        in_list = window.take(re.compile(r"[ \t\r\n]*\["))
        if in_list and window.take(_LIST_END):
            return window.expect_end()
        while True:
            window.take(_SPACE)
            if not in_list and window.at_end():
                return None
            start = window.position
            value = window.decode(decoder)
            yield start, window.position - start, value
            if in_list and not window.take(_COMMA):
                if not window.take(_LIST_END):
                    raise ValueError(f"expected , or ] at byte {window.position}")
                return window.expect_end()


class _Window:
    """A sliding window of a file as Latin-1 text; hashes what it reads."""

    def __init__(self, file, digest):
        self._file, self._digest, self._text, self._place, self._before, self._ended = file, digest, "", 0, 0, False
        self._fill()

    @property
    def position(self) -> int:
        """Next byte of the file."""
        return self._before + self._place

    def _fill(self, least: int = READ_BYTES) -> bool:
        """Reads on; False at the file's end."""
        data = self._file.read(max(least, READ_BYTES))
        self._digest.update(data)
        self._before += self._place
        self._text, self._place = self._text[self._place :] + data.decode("latin-1"), 0
        self._ended = not data
        return bool(data)

    def skip_mark(self) -> None:
        """Skips a byte-order mark."""
        if self._text.startswith("\xef\xbb\xbf"):
            self._place = 3

    def take(self, pattern: re.Pattern) -> bool:
        """Goes past `pattern` if it comes next."""
        match = pattern.match(self._text, self._place)
        while (match is None or match.end() == len(self._text)) and not self._ended:
            if match is None and _SPACE.match(self._text, self._place).end() < len(self._text):
                return False
            self._fill()
            match = pattern.match(self._text, self._place)
        self._place = match.end() if match else self._place
        return match is not None

    def at_end(self) -> bool:
        """Whether nothing is left."""
        return self._place == len(self._text) and (self._ended or not self._fill())

    def expect_end(self) -> None:
        """Raises ValueError when something is left."""
        if not self.at_end():
            raise ValueError(f"something follows the list's end, at byte {self.position}")

    def decode(self, decoder: json.JSONDecoder):
        """The value that comes next."""
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._place)
                start, self._place = self._place, end
                break
            except json.JSONDecodeError as error:
                left = len(self._text) - self._place
                if self._ended or left > MAX_RECORD_BYTES or not self._fill(left):
                    raise ValueError(f"{error.msg} at byte {self._before + error.pos}") from None
        if isinstance(value, dict) and not source_name(value).isascii():
            value = json.loads(self._text[start:end].encode("latin-1"))
        return value


def check_expected(path: Path, listing: Listing) -> None:
    """Compares the samples of an input with a file of expected counts, before anything is built.

    The file: `{"total": N or null, "about": N or absent, "sources": {name: N or null}, "complete": bool}`. A count of
    null asks only that the source is there; `about` holds within 1 %; `complete`: no other source may appear.

    Raises:
        ValueError: naming every difference.
    """
    expected, found = json.loads(path.read_bytes()), Counter(listing.source_counts())
    wrong = []
    if expected.get("total") is not None and expected["total"] != len(listing):
        wrong.append(f"{len(listing)} samples, expected {expected['total']}")
    if abs(len(listing) - (expected.get("about") or len(listing))) > 0.01 * len(listing):
        wrong.append(f"{len(listing)} samples, expected about {expected['about']}")
    for name, count in expected["sources"].items():
        if not found[name] or count not in (None, found[name]):
            wrong.append(f"source {name}: {found[name]}, expected {'some' if count is None else count}")
    others = sorted(set(found) - set(expected["sources"])) if expected["complete"] else []
    wrong += [f"source {name}: {found[name]}, expected none" for name in others[:10]]
    if wrong:
        raise ValueError(f"--expect {path}: the input is not what the file says: {'; '.join(wrong)}")


def leaves_root(name: str) -> bool:
    """Whether an image path points outside of the image root."""
    return posixpath.isabs(name) or posixpath.normpath(name).split("/")[0] == ".."
