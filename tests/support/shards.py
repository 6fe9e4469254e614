"""Small data sets, indexes that are changed afterwards, and tar members of any kind."""

import hashlib
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from llava_next.anyres import AnyRes
from llava_next.data.format.dataset import DATASET_FILE, DatasetInfo
from llava_next.data.format.index import INDEX_FILE, SCHEMA
from llava_next.data.format.shards import RawSample, StripInfo, encode_strip
from llava_next.data.format.writer import ShardWriter

SMALL = AnyRes(32, 8, [(32, 64), (64, 32), (64, 64)])
SIZES = [[], [(40, 30)], [(64, 64), (20, 90)], [(40, 30)], [], [(300, 20)], [(1, 1), (2, 2), (3, 1)]]
TURNS = [{"from": "human", "value": "<image>\nWas ist das?"}, {"from": "gpt", "value": "Ein Käfer 🐞"}]


def write_samples(folder, shard_samples: int = 3) -> DatasetInfo:
    """A data set of seven samples with 0 to 3 pictures each, from two sources."""
    with ShardWriter(folder, SMALL, shard_samples=shard_samples, build={"tool": "test"}) as writer:
        for number, sizes in enumerate(SIZES):
            images = [
                StripInfo(*size, *SMALL.grid(*size), *encode_strip(SMALL.tiles(Image.new("RGB", size))))
                for size in sizes
            ]
            turns = [{"from": "human", "value": "é" * number}, {"from": "gpt", "value": "abc"}]
            writer.write(RawSample(f"k{number}", str(number), "text" if not sizes else "pictures", turns, images))
    return writer.info


def rewrite_index(folder, table: pa.Table) -> None:
    """Replace the index and make `dataset.json` agree with the new file."""
    pq.write_table(table, folder / INDEX_FILE)
    accept_index(folder)


def accept_index(folder) -> None:
    """Make `dataset.json` agree with the index as it is."""
    data = (folder / INDEX_FILE).read_bytes()
    values = json.loads((folder / DATASET_FILE).read_text())
    values |= {"index_bytes": len(data), "index_sha256": hashlib.sha256(data).hexdigest()}
    (folder / DATASET_FILE).write_text(json.dumps(values))


def with_column(table: pa.Table, name: str, values) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values, SCHEMA.field(name).type))


def tar_bytes(*members, format=tarfile.USTAR_FORMAT) -> bytes:
    """The bytes of a tar's members, without end marker; a member is (name, content) or a TarInfo."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for member in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member[0])
            content = b"" if info is member else member[1]
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        size = tar.offset
    return buffer.getvalue()[:size]


def description(**changes) -> bytes:
    values = {"id": "a", "source": "s", "conversations": TURNS, "images": []}
    return json.dumps(values | changes).encode()
