"""Writes data sets: samples go into tars that take their names when they are complete, their rows into the index.

`dataset.json` comes last: until it is there, the folder is not a data set.
"""

import contextlib
import hashlib
import io
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llava_next.anyres import AnyRes
from llava_next.data.format.dataset import DATASET_FILE, DatasetInfo, ShardInfo
from llava_next.data.format.index import INDEX_FILE, LENGTH_PREFIXES, ROW_SCHEMA, SCHEMA, Index, Lengths, parse
from llava_next.data.format.shards import RawSample, sample_members
from llava_next.data.format.tar import BadSample
from llava_next.data.storage.client import Storage, written_aside

NEXT_FILE = "dataset.next.json"  # `dataset.json` of an index that is being replaced
_NOTHING = {
    **dict.fromkeys(("samples", "images", "tiles", "text_bytes", "index_bytes"), 0),
    **{"sources": {}, "index_sha256": "", "shards": ()},
}


def index_row(sample: RawSample, start: int, nbytes: int, crc32: int, grids: Sequence[tuple[int, int]]) -> dict:
    """The sample's row of the index, `ROW_SCHEMA`; `grids`: rows and columns of tiles of each picture."""
    return {
        "offset": start,
        "nbytes": nbytes,
        "crc32": crc32,
        "key": sample.key,
        "source": sample.source,
        "widths": [image.width for image in sample.images],
        "heights": [image.height for image in sample.images],
        "rows": [rows for rows, _ in grids],
        "cols": [cols for _, cols in grids],
        "text_bytes": sum(len(turn["value"].encode()) for turn in sample.conversations),
        "turns": len(sample.conversations),
    }


def length_fields(fingerprint: str) -> list[pa.Field]:
    """The columns of the index for a tokenizer with its template, in the order of `LENGTH_PREFIXES`."""
    return [pa.field(prefix + fingerprint, pa.int32()) for prefix in LENGTH_PREFIXES]


class IndexRows:
    """Rows of the index of one shard, collected one by one.

    Args:
        fingerprints: tokenizers (with template) whose lengths each sample brings.
    """

    def __init__(self, fingerprints: Sequence[str] = ()):
        self._schema = pa.schema([*ROW_SCHEMA, *(field for name in fingerprints for field in length_fields(name))])
        self.columns: dict[str, list] = {name: [] for name in self._schema.names}

    def add(self, row: dict, lengths: Mapping[str, Lengths]) -> None:
        """One more sample: what `index_row` gives, and its lengths by fingerprint."""
        for fingerprint, found in lengths.items():
            row = row | {prefix + fingerprint: getattr(found, prefix[:-1]) for prefix in LENGTH_PREFIXES}
        for name, column in self.columns.items():
            column.append(row[name])

    def table(self) -> pa.Table:
        """`ROW_SCHEMA` and the columns of lengths."""
        return pa.table(self.columns, schema=self._schema)


class ShardFile:
    """Writes one shard. A context manager: the tar takes its name when the block ends well, and never before.

    The same samples give the same bytes: times are 0, owners empty, members sorted.

    Args:
        path: of the tar.
        fingerprints: as for `IndexRows`.

    Attributes (when closed):
        info: the shard's `ShardInfo`; None when no sample was written, and then there is no file.
        rows: its part of the index, see `IndexRows`.
    """

    def __init__(self, path: Path, fingerprints: Sequence[str] = ()):
        self.path = path
        self.info: ShardInfo | None = None
        self.rows: pa.Table | None = None
        self._rows = IndexRows(fingerprints)
        self._keys: set[str] = set()
        self._tar = None

    def __len__(self) -> int:
        return len(self._keys)

    def __enter__(self) -> "ShardFile":
        return self

    def write(self, sample: RawSample, lengths: Mapping[str, Lengths] | None = None) -> None:
        """Append a sample; `lengths`: by fingerprint.

        Raises BadSample, and leaves the tar as it was, when the sample cannot be stored.
        """
        members = sample_members(sample)
        if sample.key in self._keys:
            raise BadSample(f"key {sample.key} is already in {self.path.name}; the members of two samples would mix")
        if self._tar is None:
            self._open()
        start = self._tar.offset
        for name, content in sorted(members.items()):
            member = tarfile.TarInfo(f"{sample.key}.{name}")
            member.size, member.mode = len(content), 0o444
            self._tar.addfile(member, io.BytesIO(content))
        self._keys.add(sample.key)
        row = index_row(
            sample,
            start,
            self._tar.offset - start,
            0,  # taken from the file when it is complete
            [(image.rows, image.cols) for image in sample.images],
        )
        self._rows.add(row, lengths or {})

    def _open(self):
        stack = self._stack = contextlib.ExitStack()
        self._temporary = stack.enter_context(written_aside(self.path))
        # not webdataset's writer, which writes the same bytes: with it each worker of a build would import torch
        self._tar = stack.enter_context(tarfile.open(self._temporary, "w", format=tarfile.USTAR_FORMAT))  # noqa: SIM115
        stack.push(self._finish)

    def __exit__(self, *error) -> None:
        if self._tar is not None:
            self._stack.__exit__(*error)

    def _finish(self, error_type, *_):
        """Completes the tar and takes its checksums, before the stack closes it and gives it its name."""
        if error_type is not None:
            return
        self._tar.close()
        digest, size = hashlib.sha256(), 0
        with open(self._temporary, "rb") as file:
            for row, nbytes in enumerate(self._rows.columns["nbytes"]):  # samples follow each other without gaps
                data = file.read(nbytes)
                self._rows.columns["crc32"][row] = zlib.crc32(data)
                digest.update(data)
                size += nbytes
            end = file.read()
        digest.update(end)
        self.rows = self._rows.table()
        self.info = ShardInfo(self.path.name, size + len(end), len(self), digest.hexdigest())


def shard_name(number: int) -> str:
    """File name of a shard: shard-000000.tar, ..."""
    return f"shard-{number:06d}.tar"


class ShardWriter:
    """Writes samples, one after the other, as a data set. A context manager.

        with ShardWriter(folder, AnyRes(336, 14, ORIGINAL_336)) as writer:
            writer.write(sample)

    Shards appear under their names when complete; index and `dataset.json` come last, when the block ends well.

    Args:
        folder: local folder, made when missing; it must not hold a data set yet.
        anyres: geometry of the tiles.
        codec: of the strips, as told to `encode_strip`; kept in `dataset.json`.
        shard_samples: samples a shard.
        build: kept in `dataset.json`.

    When closed, its attribute `info` is the `DatasetInfo` written.
    Raises ValueError when the folder holds a data set.
    """

    def __init__(
        self,
        folder: str | Path,
        anyres: AnyRes,
        codec: str = "auto",
        shard_samples: int = 1000,
        build: dict | None = None,
    ):
        self.folder, self.anyres, self.codec = Path(folder), anyres, codec
        self.shard_samples, self.build = shard_samples, build
        if (self.folder / DATASET_FILE).exists():
            raise ValueError(f"{self.folder} already holds a data set; choose another folder, or delete it first.")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.info: DatasetInfo | None = None
        self._parts: list[tuple[ShardInfo, pa.Table]] = []
        self._shard: ShardFile | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def write(self, sample: RawSample) -> None:
        """Append a sample. Raises BadSample, and leaves it out, when it cannot be stored."""
        if self._shard is None:
            self._shard = ShardFile(self.folder / shard_name(len(self._parts)))
        self._shard.write(sample)
        if len(self._shard) == self.shard_samples:
            self._close_shard()

    def _close_shard(self, *error):
        shard, self._shard = self._shard, None
        shard.__exit__(*(error or (None, None, None)))
        if shard.info is not None:
            self._parts.append((shard.info, shard.rows))

    def __exit__(self, *error) -> None:
        if self._shard is not None:
            self._close_shard(*error)
        if error[0] is None:
            self.info = write_dataset(self.folder, self.anyres, self.codec, self._parts, self.build)


def write_dataset(
    folder: Path | Storage,
    anyres: AnyRes,
    codec: str,
    parts: Iterable[tuple[ShardInfo, pa.Table]],
    build: dict | None = None,
) -> DatasetInfo:
    """Write the index, then `dataset.json`, each complete before it is seen: the folder becomes a data set.

    Args:
        folder: local folder, or storage, that holds the finished shards.
        anyres, codec: geometry of the tiles, codec of the strips (`raw`: of pictures that are cut when they are read).
        parts: per shard its description and the rows of its samples (`IndexRows`, of the same tokenizers in every
            shard), in order. Only one shard's rows are held at a time.
        build: kept in `dataset.json`.

    Raises:
        StorageError: nothing more could be written; the folder is then not a data set.
    """
    storage = folder if isinstance(folder, Storage) else Storage(folder)
    with _index_file(_about(anyres, codec, build), parts) as (path, info):
        storage.put(INDEX_FILE, path)
    storage.put(DATASET_FILE, info.to_json().encode())
    return info


def index_only(
    anyres: AnyRes, codec: str, parts: Iterable[tuple[ShardInfo, pa.Table]], build: dict
) -> tuple[DatasetInfo, Index]:
    """What `write_dataset` would write, in memory, of shards that need not exist. Arguments as there."""
    with _index_file(_about(anyres, codec, build), parts) as (path, info):
        digest = hashlib.sha256(info.to_json().encode()).hexdigest()
        return info, parse(pq.ParquetFile(path, read_dictionary=["source"]), digest)


def _about(anyres: AnyRes, codec: str, build: dict | None) -> DatasetInfo:
    """A data set with nothing in it."""
    geometry = {"tile_size": anyres.tile_size, "patch_size": anyres.patch_size, "square": anyres.square}
    return DatasetInfo(**geometry, pinpoints=anyres.pinpoints, codec=codec, **_NOTHING, build=build or {})


def replace_index(storage: Storage, info: DatasetInfo, parts: Iterable[tuple[ShardInfo, pa.Table]]) -> DatasetInfo:
    """Gives a data set new rows, `parts` as for `write_dataset`.

    Two files change, one after the other. `dataset.next.json` is there meanwhile: when this is cut short, between the
    two nothing opens the data set, and `finish_replacing` ends or forgets the change.
    """
    with _index_file(info, parts) as (path, info):
        storage.put(NEXT_FILE, info.to_json().encode())
        storage.put(INDEX_FILE, path)
    finish_replacing(storage)
    return info


def finish_replacing(storage: Storage) -> None:
    """Ends a `replace_index` that was cut short. Raises StorageError."""
    if storage.exists(NEXT_FILE):
        text = storage.read_all(NEXT_FILE)
        if hashlib.sha256(storage.read_all(INDEX_FILE)).hexdigest() == DatasetInfo.from_json(text).index_sha256:
            storage.put(DATASET_FILE, text)
        storage.delete(NEXT_FILE)


@contextlib.contextmanager
def _index_file(about: DatasetInfo, parts: Iterable[tuple[ShardInfo, pa.Table]]) -> Iterator[tuple[Path, DatasetInfo]]:
    """A temporary index file, and `about` with what follows from it."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / INDEX_FILE
        totals, sources, shards = _write_index(path, parts)
        data = path.read_bytes()
        yield (
            path,
            replace(
                about,
                **{name: totals[name] for name in ("samples", "images", "tiles", "text_bytes")},
                sources=dict(sorted(sources.items())),
                index_bytes=len(data),
                index_sha256=hashlib.sha256(data).hexdigest(),
                shards=tuple(shards),
            ),
        )


def _write_index(path: Path, parts: Iterable[tuple[ShardInfo, pa.Table]]) -> tuple[Counter, Counter, list[ShardInfo]]:
    """Writes the index file; gives totals, samples by source, and the shards."""
    totals, sources, shards, writer = Counter(), Counter(), [], None
    with contextlib.ExitStack() as stack:
        for number, (shard, rows) in enumerate(parts):
            extra = [rows.schema.field(name) for name in rows.schema.names if name.startswith(LENGTH_PREFIXES)]
            schema = pa.schema([*SCHEMA, *extra])
            writer = writer or stack.enter_context(pq.ParquetWriter(path, schema))
            column = pa.array(np.full(len(rows), number, np.int32))
            rows = rows.add_column(0, "shard", column).select(schema.names).cast(schema)
            writer.write_table(rows, row_group_size=max(len(rows), 1))
            shards.append(shard)
            sources.update(rows["source"].to_pylist())
            grids = [np.asarray(rows[name].combine_chunks().flatten(), np.int64) for name in ("rows", "cols")]
            totals["samples"] += len(rows)
            totals["images"] += len(grids[0])
            totals["tiles"] += int((1 + grids[0] * grids[1]).sum())
            totals["text_bytes"] += int(np.asarray(rows["text_bytes"], np.int64).sum())
        if writer is None:
            pq.write_table(SCHEMA.empty_table(), path)
    return totals, sources, shards
