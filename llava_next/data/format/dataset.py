"""What a data set is, `dataset.json`: geometry of its tiles, totals, and its shards.

It names the index by its sha256 and is written last: a folder without it is not a data set, and one whose index was
swapped or cut off does not open.
"""

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import get_origin

from llava_next.anyres import AnyRes
from llava_next.data.format.tar import one_line
from llava_next.data.storage.client import MissingObjectError, Storage

FORMAT_VERSION = 1
DATASET_FILE = "dataset.json"
MAX_DATASET_BYTES = 32 << 20  # of dataset.json: 150,000 shards
MAX_TILES = 144  # of one picture, enough for a canvas of 11 x 13; a larger strip is a decompression bomb


@dataclass(frozen=True)
class ShardInfo:
    """One tar: file name, size in bytes, number of samples, sha256 of the file (hex)."""

    name: str
    bytes: int
    samples: int
    sha256: str


@dataclass(frozen=True)
class DatasetInfo:
    """`dataset.json`.

    Args:
        tile_size, patch_size: of the vision tower the tiles were cut for, in pixels.
        pinpoints: canvases, (height, width) in pixels, in the order that breaks ties.
        codec: of the strips: auto, jpeg or webp; raw: no strips, others' pictures that are cut when they are read.
        samples, images, tiles, text_bytes: totals.
        sources: samples by source name.
        index_bytes, index_sha256: of `index.parquet`.
        shards: in the order of the index.
        build: what the tool that made it wants to remember: arguments, hash of the input, counts of samples.
        format_version: of the files.
        square: see `AnyRes`.
    """

    tile_size: int
    patch_size: int
    pinpoints: tuple[tuple[int, int], ...]
    codec: str
    samples: int
    images: int
    tiles: int
    text_bytes: int
    sources: dict[str, int]
    index_bytes: int
    index_sha256: str
    shards: tuple[ShardInfo, ...]
    build: dict = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    square: bool = False

    @property
    def anyres(self) -> AnyRes:
        """The geometry that the tiles were cut with."""
        return AnyRes(self.tile_size, self.patch_size, self.pinpoints, self.square)

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "DatasetInfo":
        """Parse the file's text. Raises ValueError saying, in one printable line, what is wrong with it."""
        try:
            if len(text) > MAX_DATASET_BYTES:
                raise ValueError(f"{len(text)} bytes are over the limit of {MAX_DATASET_BYTES}.")
            values = json.loads(text)
            version = values.get("format_version") if isinstance(values, dict) else None
            if type(version) is not int or version != FORMAT_VERSION:
                raise ValueError(
                    f"format version {version!r}, this program reads {FORMAT_VERSION}. "
                    "Use the version of the program that wrote it, or build the shards again."
                )
            _check_entries(cls, values, "it")
            for shard in values["shards"]:
                _check_entries(ShardInfo, shard, "an entry of 'shards'")
            values["shards"] = tuple(ShardInfo(**shard) for shard in values["shards"])
            values["pinpoints"] = tuple(tuple(pair) for pair in values["pinpoints"])
            info = cls(**values)
            info.anyres  # noqa: B018 (raises when there is no such geometry)
            _check_shards(info)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(one_line(f"not a sound {DATASET_FILE}: {error}")) from None
        return info


def _check_entries(kind: type, values, what: str) -> None:
    """Raises ValueError when `values` of a JSON file are not the fields of the dataclass `kind`, each of its type."""
    if not isinstance(values, dict):
        raise ValueError(f"{what} is not an object.")
    known = {entry.name: entry for entry in fields(kind)}
    missing = [name for name, entry in known.items() if entry.default is entry.default_factory is MISSING]
    for name in [*values, *missing]:
        if name not in known or name not in values:
            raise ValueError(f"{what} {'lacks' if name in known else 'has an unknown'} entry {name!r}.")
        value, expected = values[name], get_origin(known[name].type) or known[name].type
        expected = list if expected is tuple else expected
        if type(value) is not expected:
            raise ValueError(f"entry {name!r} is of type {type(value).__name__}, it must be {expected.__name__}.")
        if expected is int and not 0 <= value < 2**63:
            raise ValueError(f"entry {name!r} is {value}; it must be 0 to 2**63 - 1.")


def check_shard_name(name: str) -> None:
    """Raises ValueError for a name that could lead elsewhere.

    Storage encodes what has a meaning in URLs. Servers that decode twice, or take a colon or a backslash for a path's,
    could still leave the folder.
    """
    if not {"", ".", ".."}.isdisjoint(name.split("/")) or not name.isprintable() or set(name) & set("\\%:"):
        raise ValueError(
            f"shard name {name!r} is not a plain path in the data set's folder; rename the file "
            "(no \\, %, : or control characters)."
        )


def _check_shards(info: DatasetInfo) -> None:
    """Raises ValueError for names that could lead elsewhere, and for totals that the shards have no room for."""
    names = [shard.name for shard in info.shards]
    for name in names:
        check_shard_name(name)
    if len(set(names)) < len(names):
        raise ValueError("a shard comes twice.")
    if sum(shard.samples for shard in info.shards) != info.samples:
        raise ValueError("the samples of its shards do not add up to its total.")
    # A member takes a tar header at least, a row of the index more than a byte: so memory stays in proportion to files.
    room = sum(shard.bytes for shard in info.shards)
    if 512 * (info.samples + info.images) > room or info.samples > info.index_bytes:
        raise ValueError(f"{info.samples} samples with {info.images} images do not fit into its files.")


def read_info(storage: Storage) -> tuple[DatasetInfo, str]:
    """Read `dataset.json`: what it says, and its sha256 (hex), which is the data set's identity (`Index.hash`).

    Raises:
        ValueError: not a data set, or an unknown format; names file and cure.
        StorageError: a read failed.
    """
    try:
        text = storage.read_all(DATASET_FILE)
    except MissingObjectError:
        raise ValueError(
            f"{storage.label} has no {DATASET_FILE}: it is not a data set, or one that was not built to the end. "
            f"Run `python data_tools/build_shards.py --json ... --images ... --out {storage.label}` (again)."
        ) from None
    try:
        return DatasetInfo.from_json(text), hashlib.sha256(text).hexdigest()
    except ValueError as error:
        raise ValueError(f"{storage.address(DATASET_FILE)}: {error}") from None


def check_geometry(info: DatasetInfo, anyres: AnyRes, name: str = "the data set") -> None:
    """Refuse tiles that were cut for another vision tower or other pinpoints than the model's.

    Args:
        info: of the data set.
        anyres: the model's geometry.
        name: of the data set, for the message.

    Raises:
        ValueError: naming both geometries and the cure.
    """
    if info.anyres != anyres:
        theirs, ours = (
            f"{a.tile_size} px tiles, {a.patch_size} px patches, "
            + ("one square from the middle" if a.square else f"pinpoints (h, w) {a.pinpoints}")
            for a in (info.anyres, anyres)
        )
        raise ValueError(
            f"{name} was cut for another model: it has {theirs}; the model takes {ours}. Build the shards again for "
            "this model (build_shards.py --tower ... --pinpoints ..., --square for data.images: square), or train the "
            "model that they were cut for."
        )
