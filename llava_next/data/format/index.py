"""The index of a data set, `index.parquet`: where each sample lies and how large it is, one row a sample.

It is small (about 60 bytes a sample in memory), so a plan over a million samples is made without reading a shard.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llava_next.anyres import MAX_SIDE, AnyRes
from llava_next.data.format.dataset import DATASET_FILE, MAX_TILES, DatasetInfo, read_info
from llava_next.data.format.tar import one_line
from llava_next.data.storage.client import Storage, StorageError

INDEX_FILE = "index.parquet"
# Two columns for each tokenizer with its template, int32, named by its fingerprint; see `Lengths`.
FIRST_TARGET_PREFIX, TEXT_TOKENS_PREFIX = LENGTH_PREFIXES = ("first_target_", "text_tokens_")

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
ROW_SCHEMA = SCHEMA.remove(SCHEMA.get_field_index("shard"))  # what is known of a sample before its shard has a place
_IMAGE_COLUMNS = ("widths", "heights", "rows", "cols")


class Location(NamedTuple):
    """Where a sample's bytes lie: position of its shard, byte range, crc32 of it, and its key."""

    shard: int
    offset: int
    nbytes: int
    crc32: int
    key: str


class Lengths(NamedTuple):
    """What a tokenizer with a chat template makes of a sample.

    Args:
        text_tokens: tokens of it, template included, without image tokens.
        first_target: position, image tokens counted, of its first supervised token: cut there or before, a sample
            teaches nothing.
    """

    text_tokens: int
    first_target: int


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
        exact_text_tokens, first_targets: int32 [n] by tokenizer fingerprint, see `Lengths`.
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
    first_targets: dict[str, np.ndarray]
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

    def take(self, samples: np.ndarray) -> "Index":
        """The index of these samples (rows, int64 [k]) in this order."""
        counts = self.image_offsets[samples + 1] - self.image_offsets[samples]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        images = np.repeat(self.image_offsets[samples] - offsets[:-1], counts) + np.arange(offsets[-1])
        per_sample = ("shard", "offset", "nbytes", "crc32", "source", "text_bytes", "turns")
        return replace(
            self,
            **{name: getattr(self, name)[samples] for name in per_sample},
            **{name: getattr(self, name)[images] for name in _IMAGE_COLUMNS},
            keys=self.keys.take(pa.array(samples)),
            image_offsets=offsets,
            exact_text_tokens={name: column[samples] for name, column in self.exact_text_tokens.items()},
            first_targets={name: column[samples] for name, column in self.first_targets.items()},
        )

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

    def first_target(self, fingerprint: str | None, anyres: AnyRes) -> tuple[np.ndarray, bool]:
        """Position of each sample's first supervised token: int64 [n], and whether the numbers are exact.

        Without the column of `fingerprint` they are the least possible ones: answers follow the pictures.
        """
        if fingerprint is not None and fingerprint in self.first_targets:
            return self.first_targets[fingerprint].astype(np.int64), True
        return self.image_tokens(anyres), False

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
    info, digest = read_info(storage)
    return info, read_index(storage, info, digest)


def read_index(storage: Storage, info: DatasetInfo, digest: str) -> Index:
    """Read `index.parquet` of a data set.

    Args:
        info, digest: its `dataset.json` and that file's sha256, as `read_info` gives them.

    Raises:
        ValueError: not the file that `dataset.json` was written with; names file and cure.
        StorageError: a read failed.
    """
    data = storage.read_all(INDEX_FILE)
    if len(data) != info.index_bytes or hashlib.sha256(data).hexdigest() != info.index_sha256:
        raise ValueError(
            f"{storage.address(INDEX_FILE)} is not the one that {DATASET_FILE} was written with ({len(data)} bytes, "
            f"expected {info.index_bytes}). Copy both files of one build."
        )
    with index_errors(storage):
        # Column by column and in this thread: half the peak memory of reading the table, and Arrow starts no threads.
        file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=["source"], pre_buffer=False)
        check_footer(info, file.metadata)
        index = parse(file, digest)
        _check(info, index)
        pa.default_memory_pool().release_unused()  # Arrow keeps what it freed: 60 MB for a million samples
    return index


@contextlib.contextmanager
def index_errors(storage: Storage) -> Iterator[None]:
    """Turns what a damaged index makes of Arrow and the checks into a ValueError that names the file and the cure."""
    try:
        yield
    except StorageError:
        raise
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        reason = one_line(str(error))
        raise ValueError(f"{storage.address(INDEX_FILE)}: {reason}. Build the data set again.") from error


def parse(file: pq.ParquetFile, digest: str) -> Index:
    """The columns of an index file. Raises ArrowException, KeyError or ValueError when they are not as in `SCHEMA`."""
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
        exact_text_tokens=_by_fingerprint(file, TEXT_TOKENS_PREFIX),
        first_targets=_by_fingerprint(file, FIRST_TARGET_PREFIX),
        digest=digest,
    )


def _by_fingerprint(file: pq.ParquetFile, prefix: str) -> dict[str, np.ndarray]:
    """The columns whose names begin with `prefix`, by what follows it."""
    names = [name for name in file.schema_arrow.names if name.startswith(prefix)]
    return {name.removeprefix(prefix): _column(file, name, pa.int32()).to_numpy() for name in names}


def _column(file: pq.ParquetFile, name: str, kind: pa.DataType | None = None) -> pa.Array:
    kind = kind or SCHEMA.field(name).type
    column = file.read(columns=[name], use_threads=False)[name]
    if column.null_count:
        raise ValueError(f"column {name} has empty entries")
    column.validate(full=True)  # Parquet promises neither that text is UTF-8 nor that codes are in their dictionary
    return pa.concat_arrays(column.cast(kind).unify_dictionaries().chunks or [pa.array([], kind)])


def check_footer(info: DatasetInfo, footer: pq.FileMetaData) -> None:
    """Raises ValueError when the file claims other numbers of rows or values than `dataset.json`.

    It comes before a column is read: 50 million rows of one value are 2 MB in the file and 4 GB in memory.
    """
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    rows = [group.num_rows for group in groups]
    if sum(rows) != info.samples or min(rows, default=0) < 0:
        raise ValueError(f"it has {sum(rows)} rows, {DATASET_FILE} speaks of {info.samples} samples")
    for column in range(footer.num_columns):
        values = [group.column(column).num_values for group in groups]
        if sum(values) > info.samples + info.images or min(values, default=0) < 0:  # an empty list counts as a value
            raise ValueError(f"column {column} has {sum(values)} values, more than its rows and images")


def _check(info: DatasetInfo, index: Index) -> None:
    """Raises ValueError when the rows cannot belong to the shards that `dataset.json` lists."""
    columns = [index.offset, index.nbytes, index.crc32, index.keys, index.source, index.text_bytes, index.turns]
    if {len(column) for column in [index.shard, *columns]} != {info.samples}:
        raise ValueError(f"its columns do not have the {info.samples} rows that {DATASET_FILE} speaks of")
    if (np.diff(index.shard) < 0).any():
        raise ValueError("its rows are not in the order of the shards")
    known = index.shard[(index.shard >= 0) & (index.shard < len(info.shards))]
    if np.bincount(known, minlength=len(info.shards)).tolist() != [shard.samples for shard in info.shards]:
        raise ValueError(f"its samples per shard are not those of {DATASET_FILE}")
    check_rows(index, np.array([shard.bytes for shard in info.shards], np.int64))
    if ((index.offset[:-1] + index.nbytes[:-1] > index.offset[1:]) & (np.diff(index.shard) == 0)).any():
        raise ValueError("its rows overlap")
    counts = np.bincount(index.source, minlength=len(index.source_names)).tolist()
    sources = {name: count for name, count in zip(index.source_names, counts, strict=True) if count}
    totals = (len(index.widths), int(index.num_tiles.sum()), int(index.text_bytes.sum(dtype=np.int64)), sources)
    if totals != (info.images, info.tiles, info.text_bytes, info.sources):
        raise ValueError(f"its images, tiles, bytes of text or sources do not add up to the totals of {DATASET_FILE}")


def check_rows(index: Index, sizes: np.ndarray) -> None:
    """Raises ValueError for a row that cannot be right. `sizes`: bytes of all shards, int64."""
    starts_too_late = index.offset > sizes[index.shard] - index.nbytes  # the sum offset + nbytes could overflow
    outside = (index.offset < 0) | (index.nbytes < 1) | starts_too_late | (index.offset % 512 != 0)
    if outside.any():
        row = int(outside.argmax())
        raise ValueError(f"row {row} (key {index.keys[row].as_py()!r}) points outside its shard")
    if not pc.all(pc.utf8_is_printable(index.keys), min_count=0).as_py():
        raise ValueError("it has a key with control characters")
    sides = np.concatenate([index.widths, index.heights])
    if sides.size and not 1 <= sides.min() <= sides.max() <= MAX_SIDE:
        raise ValueError(f"it has a picture with a side of {sides.min()} or {sides.max()} px, not 1 to {MAX_SIDE}")
    tiles = 1 + index.rows.astype(np.int64) * index.cols
    if tiles.size and (min(index.rows.min(), index.cols.min()) < 0 or tiles.max() > MAX_TILES):
        raise ValueError(f"it has a picture with a negative number of tiles, or more than {MAX_TILES}")
    lengths = (*index.exact_text_tokens.values(), *index.first_targets.values())
    for column in (index.text_bytes, index.turns, *lengths):
        if column.size and column.min() < 0:
            raise ValueError("it has a text of negative length")
