"""The index of a data set that is too large to be held: the rows of a shard are read when a step needs them.

`index.parquet` has one row group a shard, and a row group lies in one piece. So the samples of a shuffle window cost
one ranged read of some 60 KB for each of its shards, and memory holds the window's rows and the file's footer (1.3 KB
a shard) however large the data set is. What cannot be checked without reading everything is the index file's sha256;
its size is, every row's plausibility, and every sample's own checksum when it is read.
"""

import io
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llava_next.data.format.dataset import DatasetInfo
from llava_next.data.format.index import INDEX_FILE, Index, check_footer, check_rows, index_errors, parse
from llava_next.data.storage.client import Storage

READ_THREADS = 16


class LazyIndex:
    """Rows of an index by ranged reads.

    Args:
        storage: folder of the data set.
        info, digest: its `dataset.json` and that file's sha256.
        keep_shards: shards whose rows are kept, those used last.

    Raises:
        ValueError: not a Parquet file of the size that `dataset.json` names, or one with other row groups.
        StorageError: a read failed.
    """

    def __init__(self, storage: Storage, info: DatasetInfo, digest: str, keep_shards: int):
        self._storage, self._info, self._digest, self._keep = storage, info, digest, keep_shards
        self._shard_bytes = np.array([shard.bytes for shard in info.shards], np.int64)
        self._ends = np.cumsum([shard.samples for shard in info.shards])
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()
        with index_errors(storage):
            self._footer = self._read_footer()
            check_footer(info, self._footer)
            groups = [self._footer.row_group(k).num_rows for k in range(self._footer.num_row_groups)]
            if groups != [shard.samples for shard in info.shards]:
                raise ValueError("its row groups are not the shards of dataset.json")

    def __len__(self) -> int:
        return self._info.samples

    def hash(self) -> str:
        """As `Index.hash`."""
        return self._digest

    def take(self, samples: np.ndarray) -> Index:
        """The index of these samples (rows, int64 [k]) in this order; raises as the constructor does."""
        shards = np.searchsorted(self._ends, samples, side="right")
        needed, which = np.unique(shards, return_inverse=True)
        with index_errors(self._storage):
            self._load([shard for shard in needed.tolist() if shard not in self._tables])
            tables = [self._tables[shard] for shard in needed.tolist()]
            begins = np.cumsum([0, *map(len, tables)])[:-1]  # of each needed shard in the joint table
            first = np.concatenate([[0], self._ends])[needed]
            table = pa.concat_tables(tables).unify_dictionaries().take(pa.array(begins[which] + samples - first[which]))
            index = parse(_TableFile(table), self._digest)
            if not np.array_equal(index.shard, shards):
                raise ValueError("its rows are not in the order of the shards")
            check_rows(index, self._shard_bytes)
        for shard in needed.tolist():
            self._tables.move_to_end(shard)
        while len(self._tables) > max(self._keep, len(needed)):
            self._tables.popitem(last=False)
        return index

    def _load(self, shards: list[int]) -> None:
        with ThreadPoolExecutor(READ_THREADS) as pool:  # a window has many shards, and each read waits for the network
            for shard, (start, data) in zip(shards, pool.map(self._read_group, shards), strict=True):
                file = pq.ParquetFile(
                    _Piece(start, data, self._info.index_bytes),
                    metadata=self._footer,
                    read_dictionary=["source"],
                    pre_buffer=False,
                )
                self._tables[shard] = file.read_row_group(shard, use_threads=False)

    def _read_group(self, shard: int) -> tuple[int, bytes]:
        """The bytes of a row group and where they start."""
        group = self._footer.row_group(shard)
        columns = [group.column(k) for k in range(group.num_columns)]
        starts = [c.dictionary_page_offset if c.has_dictionary_page else c.data_page_offset for c in columns]
        ends = [start + c.total_compressed_size for start, c in zip(starts, columns, strict=True)]
        start, length = min(starts), max(ends) - min(starts)
        if start < 0 or not 0 < length < 1 << 30:
            raise ValueError(f"row group {shard} claims the bytes {start} to {start + length}")
        return start, self._storage.read_range(INDEX_FILE, start, length)

    def _read_footer(self) -> pq.FileMetaData:
        size = self._info.index_bytes
        if size < 12:
            raise ValueError(f"{size} bytes are no Parquet file")
        length = min(size, 1 << 16)  # Arrow asks for 64 KiB first, whatever the footer's length
        data = self._storage.read_range(INDEX_FILE, size - length, length)
        footer = int.from_bytes(data[-8:-4], "little") + 8
        if data[-4:] != b"PAR1" or footer > size:
            raise ValueError("it does not end as a Parquet file")
        if footer > length:
            length, data = footer, self._storage.read_range(INDEX_FILE, size - footer, footer)
        return pq.read_metadata(_Piece(size - length, data, size))


class _Piece(io.BufferedIOBase):
    """A file of which only the bytes from `start` on are known; reading any others is an error."""

    def __init__(self, start: int, data: bytes, size: int):
        self._start, self._data, self._size, self._place = start, memoryview(data), size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def read(self, length: int = -1) -> bytes:
        begin = self._place - self._start
        end = len(self._data) if length < 0 else begin + length
        if not 0 <= begin <= end <= len(self._data):
            raise ValueError(f"bytes {self._place} to {self._place + length} lie outside of the row group")
        self._place = self._start + end
        return bytes(self._data[begin:end])


class _TableFile:
    """A table behind the two calls of `pq.ParquetFile` that `parse` makes."""

    def __init__(self, table: pa.Table):
        self._table, self.schema_arrow = table, table.schema

    def read(self, columns: list[str], use_threads: bool) -> pa.Table:
        return self._table.select(columns)
