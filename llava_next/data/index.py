"""The index of a data set: `dataset.json` (what it is) and `index.parquet` (where each sample lies, how large it is).

Both are small (about 60 bytes a sample in memory), so a plan over a million samples is made without reading a shard.
`dataset.json` names the index by its sha256 and is written last: a folder without it is not a data set, and one whose
index was swapped or cut off does not open.
"""

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llava_next.anyres import AnyRes
from llava_next.data.storage import MissingObjectError, Storage

FORMAT_VERSION = 1
DATASET_FILE = "dataset.json"
INDEX_FILE = "index.parquet"
TEXT_TOKENS_PREFIX = "text_tokens_"  # + a tokenizer's fingerprint: exact token counts, int32, template included

# One row a sample, one row group a shard, both in the order of the shards.
SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),  # position in dataset.json's list
        ("offset", pa.int64()),  # of the sample's first byte in the tar
        ("nbytes", pa.int32()),  # all its members, headers and padding included
        ("crc32", pa.uint32()),  # of those bytes
        ("key", pa.string()),
        ("source", pa.string()),
        ("widths", pa.list_(pa.int32())),  # of the original pictures, in pixels
        ("heights", pa.list_(pa.int32())),
        ("rows", pa.list_(pa.int16())),  # grid of tiles, without the base tile
        ("cols", pa.list_(pa.int16())),
        ("text_bytes", pa.int32()),  # UTF-8 bytes of all messages
        ("turns", pa.int32()),  # messages of the conversation, both sides
    ]
)
_IMAGE_COLUMNS = ("widths", "heights", "rows", "cols")


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
        codec: of the strips: auto, jpeg or webp.
        samples, images, tiles, text_bytes: totals.
        sources: samples by source name.
        index_bytes, index_sha256: of `index.parquet`.
        shards: in the order of the index.
        build: what the tool that made it wants to remember (arguments, hash of the input); not read by training.
        format_version: of the files.
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

    @property
    def anyres(self) -> AnyRes:
        """The geometry that the tiles were cut with."""
        return AnyRes(self.tile_size, self.patch_size, self.pinpoints)

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "DatasetInfo":
        """Parse the file's text. Raises ValueError saying what is wrong with it."""
        try:
            values = json.loads(text)
            version = values["format_version"]
            if version != FORMAT_VERSION:
                raise ValueError(
                    f"format version {version!r}, this program reads {FORMAT_VERSION}. "
                    "Use the version of the program that wrote it, or build the shards again."
                )
            values["pinpoints"] = tuple((int(height), int(width)) for height, width in values["pinpoints"])
            values["shards"] = tuple(ShardInfo(**shard) for shard in values["shards"])
            info = cls(**values)
            AnyRes(info.tile_size, info.patch_size, info.pinpoints)
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"not a {DATASET_FILE} ({type(error).__name__}: {error}).") from error
        for shard in info.shards:
            parts = shard.name.split("/")
            if not parts[0] or ".." in parts or "\\" in shard.name:
                raise ValueError(f"shard name {shard.name!r} leaves the data set's folder.")
        return info


class Location(NamedTuple):
    """Where a sample's bytes lie: position of its shard, byte range, crc32 of it, and its key."""

    shard: int
    offset: int
    nbytes: int
    crc32: int
    key: str


@dataclass(frozen=True, eq=False)
class Index:
    """The samples of a data set as columns: n samples, m images.

    Args:
        shard int32 [n], offset int64 [n], nbytes int32 [n], crc32 uint32 [n]: where a sample lies, see `SCHEMA`.
        keys: strings [n].
        source_names, source int32 [n]: the sources, and each sample's position among them.
        image_offsets: int64 [n + 1]; the images of sample i are [image_offsets[i], image_offsets[i + 1]).
        widths, heights int32 [m], rows, cols int16 [m]: of the images.
        text_bytes, turns: int32 [n].
        exact_text_tokens: int32 [n] by tokenizer fingerprint.
        digest: sha256 of the two files, see `hash`.
    """

    shard: np.ndarray
    offset: np.ndarray
    nbytes: np.ndarray
    crc32: np.ndarray
    keys: pa.Array
    source_names: tuple[str, ...]
    source: np.ndarray
    image_offsets: np.ndarray
    widths: np.ndarray
    heights: np.ndarray
    rows: np.ndarray
    cols: np.ndarray
    text_bytes: np.ndarray
    turns: np.ndarray
    exact_text_tokens: dict[str, np.ndarray]
    digest: str

    def __len__(self) -> int:
        return len(self.shard)

    def hash(self) -> str:
        """Sha256 (hex) of dataset.json and, through the sha256 in it, of index.parquet: the data set's identity."""
        return self.digest

    def locate(self, sample: int) -> Location:
        """Where the sample in row `sample` lies."""
        columns = (self.shard, self.offset, self.nbytes, self.crc32)
        return Location(*(int(column[sample]) for column in columns), self.keys[sample].as_py())

    def image_sizes(self, sample: int) -> list[tuple[int, int]]:
        """(width, height) of the sample's original pictures, in pixels."""
        images = slice(self.image_offsets[sample], self.image_offsets[sample + 1])
        return list(zip(self.widths[images].tolist(), self.heights[images].tolist(), strict=True))

    @cached_property
    def num_tiles(self) -> np.ndarray:
        """Tiles of each sample, base tiles included: int64 [n]."""
        return self._per_sample(1 + self.rows.astype(np.int64) * self.cols)

    def image_tokens(self, anyres: AnyRes) -> np.ndarray:
        """Image tokens of each sample, newlines included: int64 [n]. Each distinct size is computed once."""
        sizes, inverse = np.unique((self.widths.astype(np.int64) << 32) | self.heights, return_inverse=True)
        if len(sizes) == 0:
            return np.zeros(len(self), np.int64)
        return self._per_sample(anyres.num_tokens_many(sizes >> 32, sizes & 0xFFFFFFFF)[inverse])

    def text_tokens(
        self,
        fingerprint: str | None = None,
        *,
        bytes_per_token: float = 3.6,
        tokens_per_turn: float = 5.0,
        tokens_per_sample: float = 8.0,
    ) -> tuple[np.ndarray, bool]:
        """Tokens of each sample's text with its template, without image tokens.

        Args:
            fingerprint: of tokenizer and template. When the index has its column, that is returned.
            bytes_per_token: for the estimate otherwise; English prose gives 3.5 to 4.5 with 32K to 150K vocabularies.
            tokens_per_turn: template tokens around a message.
            tokens_per_sample: template tokens of a sample, system prompt included (Vicuna's takes about 35).

        Returns:
            int64 [n], and whether the numbers are exact.
        """
        if fingerprint is not None and fingerprint in self.exact_text_tokens:
            return self.exact_text_tokens[fingerprint].astype(np.int64), True
        estimate = self.text_bytes / bytes_per_token + self.turns * tokens_per_turn + tokens_per_sample
        return np.ceil(estimate).astype(np.int64), False

    def _per_sample(self, values: np.ndarray) -> np.ndarray:
        """Sums over the images of each sample: int64 [m] -> [n]."""
        sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        return sums[self.image_offsets[1:]] - sums[self.image_offsets[:-1]]


def read_dataset(url: str | os.PathLike | Storage) -> tuple[DatasetInfo, Index]:
    """Read `dataset.json` and `index.parquet` of a data set.

    Raises:
        ValueError: not a data set, an unknown format, or files that do not belong together; names file and cure.
        StorageError: a read failed.
    """
    storage = url if isinstance(url, Storage) else Storage(url)
    try:
        text = storage.read_all(DATASET_FILE)
    except MissingObjectError:
        raise ValueError(
            f"{storage.label} has no {DATASET_FILE}: it is not a data set, or one that was not built to the end. "
            f"Run `python data_tools/build_shards.py --json ... --images ... --out {storage.label}` (again)."
        ) from None
    try:
        info = DatasetInfo.from_json(text)
    except ValueError as error:
        raise ValueError(f"{storage.address(DATASET_FILE)}: {error}") from None
    data = storage.read_all(INDEX_FILE)
    if len(data) != info.index_bytes or hashlib.sha256(data).hexdigest() != info.index_sha256:
        raise ValueError(
            f"{storage.address(INDEX_FILE)} is not the one that {DATASET_FILE} was written with ({len(data)} bytes, "
            f"expected {info.index_bytes}). Copy both files of one build."
        )
    try:
        index = _parse(data, hashlib.sha256(text).hexdigest())
        _check(info, index)
        pa.default_memory_pool().release_unused()  # Arrow keeps what it freed: 60 MB for a million samples
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        raise ValueError(f"{storage.address(INDEX_FILE)}: {error}. Build the data set again.") from error
    return info, index


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
            f"{a.tile_size} px tiles, {a.patch_size} px patches, pinpoints (h, w) {a.pinpoints}"
            for a in (info.anyres, anyres)
        )
        raise ValueError(
            f"{name} was cut for another model: it has {theirs}; the model takes {ours}. Build the shards again for "
            "this model (build_shards.py --tower ... --pinpoints ...), or train the model that they were cut for."
        )


def write_dataset(
    folder: Path, anyres: AnyRes, codec: str, parts: Iterable[tuple[ShardInfo, pa.Table]], build: dict | None = None
) -> DatasetInfo:
    """Write the index, then `dataset.json`, each under a temporary name that is renamed: the folder becomes a data set.

    Args:
        folder: local folder that holds the finished shards.
        anyres, codec: geometry of the tiles, codec of the strips.
        parts: per shard its description and the rows of its samples (`SCHEMA` without `shard`), in order.
        build: kept in `dataset.json`.
    """
    totals, sources, shards = Counter(), Counter(), []
    with written_aside(folder / INDEX_FILE) as temporary, pq.ParquetWriter(temporary, SCHEMA) as writer:
        for number, (shard, rows) in enumerate(parts):
            column = pa.array(np.full(len(rows), number, np.int32))
            writer.write_table(rows.add_column(0, "shard", column).cast(SCHEMA), row_group_size=max(len(rows), 1))
            shards.append(shard)
            sources.update(rows["source"].to_pylist())
            grids = [np.asarray(rows[name].combine_chunks().flatten(), np.int64) for name in ("rows", "cols")]
            totals["samples"] += len(rows)
            totals["images"] += len(grids[0])
            totals["tiles"] += int((1 + grids[0] * grids[1]).sum())
            totals["text_bytes"] += int(np.asarray(rows["text_bytes"], np.int64).sum())
    index = (folder / INDEX_FILE).read_bytes()
    info = DatasetInfo(
        anyres.tile_size,
        anyres.patch_size,
        anyres.pinpoints,
        codec,
        *(totals[name] for name in ("samples", "images", "tiles", "text_bytes")),
        sources=dict(sorted(sources.items())),
        index_bytes=len(index),
        index_sha256=hashlib.sha256(index).hexdigest(),
        shards=tuple(shards),
        build=build or {},
    )
    with written_aside(folder / DATASET_FILE) as temporary:
        temporary.write_text(info.to_json(), encoding="utf-8")
    return info


def _parse(data: bytes, digest: str) -> Index:
    """The columns of an index file. Raises ArrowException, KeyError or ValueError when they are not as in `SCHEMA`."""
    # Column by column and in this thread: half the peak memory of reading the table, and Arrow starts no threads.
    file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=["source"], pre_buffer=False)
    plain = {
        name: _column(file, name).to_numpy() for name in ("shard", "offset", "nbytes", "crc32", "text_bytes", "turns")
    }
    lists = {name: _column(file, name) for name in _IMAGE_COLUMNS}
    counts = lists["widths"].value_lengths().to_numpy()
    for name, column in lists.items():
        if not np.array_equal(column.value_lengths(), counts) or column.flatten().null_count:
            raise ValueError(f"columns widths and {name} disagree on the number of images of a sample")
    source = _column(file, "source", pa.dictionary(pa.int32(), pa.string()))
    return Index(
        **plain,
        **{name: column.flatten().to_numpy() for name, column in lists.items()},
        keys=_column(file, "key"),
        source_names=tuple(source.dictionary.to_pylist()),
        source=source.indices.to_numpy(),
        image_offsets=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
        exact_text_tokens={
            name.removeprefix(TEXT_TOKENS_PREFIX): _column(file, name, pa.int32()).to_numpy()
            for name in file.schema_arrow.names
            if name.startswith(TEXT_TOKENS_PREFIX)
        },
        digest=digest,
    )


def _column(file: pq.ParquetFile, name: str, kind: pa.DataType | None = None) -> pa.Array:
    kind = kind or SCHEMA.field(name).type
    column = file.read(columns=[name], use_threads=False)[name]
    if column.null_count:
        raise ValueError(f"column {name} has empty entries")
    return pa.concat_arrays(column.cast(kind).unify_dictionaries().chunks or [pa.array([], kind)])


def _check(info: DatasetInfo, index: Index) -> None:
    """Raises ValueError when the rows cannot belong to the shards that `dataset.json` lists."""
    if len(index) != info.samples:
        raise ValueError(f"it has {len(index)} rows, {DATASET_FILE} speaks of {info.samples} samples")
    if (np.diff(index.shard) < 0).any():
        raise ValueError("its rows are not in the order of the shards")
    known = index.shard[(index.shard >= 0) & (index.shard < len(info.shards))]
    if np.bincount(known, minlength=len(info.shards)).tolist() != [shard.samples for shard in info.shards]:
        raise ValueError(f"its samples per shard are not those of {DATASET_FILE}")
    sizes = np.array([shard.bytes for shard in info.shards], np.int64)
    ends = index.offset + index.nbytes
    outside = (index.offset < 0) | (index.nbytes < 1) | (ends > sizes[index.shard]) | (index.offset % 512 != 0)
    if outside.any():
        row = int(outside.argmax())
        raise ValueError(f"row {row} (key {index.keys[row]}) points outside its shard")
    if index.widths.size and min(index.widths.min(), index.heights.min()) < 1:
        raise ValueError("it has a picture of no size")
    if index.rows.size and min(index.rows.min(), index.cols.min()) < 0:
        raise ValueError("it has a negative number of tiles")


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside `path`; renames it to `path` when the block ends well, else removes it.

    The data are on the disk before the name is, so that a crash leaves the old file, the new one, or none.
    """
    temporary = path.with_name(f".{path.name}.writing")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
