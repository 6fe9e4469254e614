"""Adds exact text lengths to a data set: of its shards, only the JSON members are read.

The JSON member comes last among a sample's, and the index knows how much text it holds, so one small ranged read finds
it: about 3 KB a sample of 150.
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import repeat
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llava_next.anyres import AnyRes
from llava_next.data.format.dataset import DatasetInfo, ShardInfo
from llava_next.data.format.index import INDEX_FILE, LENGTH_PREFIXES, Lengths, read_dataset
from llava_next.data.format.shards import parse_description, read_sample
from llava_next.data.format.tar import BadSample, tar_members
from llava_next.data.format.writer import length_fields, replace_index
from llava_next.data.inputs.text_lengths import text_lengths
from llava_next.data.storage.client import Storage, StorageError
from llava_next.progress import Progress, worker_pool

READ_THREADS = 32  # of a worker; each waits for the network
_BLOCK = 512


class Texts(NamedTuple):
    """Where the samples of a shard lie: its name, and columns of the index; the geometry of their tiles."""

    shard: str
    keys: list[str]
    offsets: list[int]
    nbytes: list[int]
    text_bytes: list[int]
    turns: list[int]
    widths: list[list[int]]
    heights: list[list[int]]
    is_raw: bool
    anyres: AnyRes


def add_lengths(storage: Storage, tokenizers: tuple[str, ...], workers: int) -> None:
    """Adds a column for each tokenizer (`NAME_OR_FOLDER:template`) that has none yet.

    Raises:
        ValueError: not a data set, or samples that a template refuses: nothing is changed then.
        StorageError: a read or a write failed.
    """
    info, index = read_dataset(storage)
    wanted = tuple(length for length in text_lengths(tokenizers) if length.fingerprint not in index.first_targets)
    if not wanted:
        print(f"{storage.label} has the lengths for {', '.join(tokenizers)} already; nothing to do")
        return
    arguments = tuple(length.argument for length in wanted)
    del index
    table = pq.ParquetFile(pa.BufferReader(storage.read_all(INDEX_FILE)))
    counts, problems, done = [], [], 0
    with worker_pool(workers) as pool, Progress(info.samples) as progress:
        for found, wrong in _counted(pool, storage, arguments, info, table):
            counts.append(found)
            problems += wrong
            done += found.shape[1]
            progress.show(done, len(problems))
    if problems:
        raise ValueError(
            f"{storage.label}: {len(problems)} samples cannot be counted, nothing was changed; for example "
            f"{problems[0]}. Build the data set with --tokenizer, which leaves such samples out."
        )
    parts = _with_columns(info, table, counts, [length.fingerprint for length in wanted])
    replace_index(storage, info, parts)
    print(f"{storage.label}: exact text lengths added for {', '.join(arguments)} to {info.samples} samples")


def _counted(
    pool: ProcessPoolExecutor | ThreadPoolExecutor,
    storage: Storage,
    arguments: tuple[str, ...],
    info: DatasetInfo,
    table: pq.ParquetFile,
) -> Iterator[tuple[np.ndarray, list[str]]]:
    """`count_shard` of every shard, in order."""
    columns = ["key", "offset", "nbytes", "text_bytes", "turns", "widths", "heights"]
    groups = (table.read_row_group(number, columns=columns) for number in range(table.num_row_groups))
    texts = (
        Texts(shard.name, *(rows[name].to_pylist() for name in columns), info.codec == "raw", info.anyres)
        for shard, rows in zip(info.shards, groups, strict=True)
    )
    yield from pool.map(count_shard, repeat(storage), repeat(arguments), texts)


def count_shard(storage: Storage, tokenizers: tuple[str, ...], texts: Texts) -> tuple[np.ndarray, list[str]]:
    """`Lengths` of a shard's samples, int32 [tokenizers, samples, 2], and what is wrong; runs in a worker."""
    lengths, problems = text_lengths(tokenizers), []
    counts = np.zeros((len(lengths), len(texts.keys), len(Lengths._fields)), np.int32)
    with ThreadPoolExecutor(READ_THREADS) as pool:
        samples = pool.map(partial(_conversation, storage, texts), range(len(texts.keys)))
        for row, sample in enumerate(samples):
            try:
                if isinstance(sample, BadSample):
                    raise sample
                image_lengths = list(map(texts.anyres.num_tokens, texts.widths[row], texts.heights[row]))
                counts[:, row] = [length.count(sample, image_lengths) for length in lengths]
            except BadSample as error:
                problems.append(f"{texts.shard}, sample {texts.keys[row]}: {error}")
    return counts, problems


def _conversation(storage: Storage, texts: Texts, row: int) -> list[dict] | BadSample:
    """Conversation of a sample."""
    key, offset, nbytes = texts.keys[row], texts.offsets[row], texts.nbytes[row]
    # the text, a header, names and sizes; escaped quotes and line breaks take two bytes
    guess = texts.text_bytes[row] * 5 // 4 + 64 * texts.turns[row] + 2 * _BLOCK + 512
    try:
        for length in (nbytes if texts.is_raw else min(nbytes, -(-guess // _BLOCK) * _BLOCK), nbytes):
            data = storage.read_range(texts.shard, offset + nbytes - length, length)
            text = None if texts.is_raw else _last_member(data, f"{key}.json")
            if text is not None:
                return parse_description(text)["conversations"]
        return read_sample(data, key).conversations
    except BadSample as error:
        return error
    except StorageError as error:
        raise StorageError(f"{error} (sample {key})") from None


def _last_member(data: bytes, name: str) -> bytes | None:
    """The member `name` if `data` ends with exactly that."""
    for position in range(0, len(data), _BLOCK):
        if data.startswith(name.encode() + b"\0", position):
            try:
                members = list(tar_members(data[position:]))
            except BadSample:
                continue
            if [found for found, _ in members] == [name]:
                return members[0][1]
    return None


def _with_columns(
    info: DatasetInfo, table: pq.ParquetFile, counts: list[np.ndarray], fingerprints: list[str]
) -> Iterator[tuple[ShardInfo, pa.Table]]:
    """The shards' rows with the new columns."""
    for number, shard in enumerate(info.shards):
        rows = table.read_row_group(number).drop_columns(["shard"])
        for fingerprint, lengths in zip(fingerprints, counts[number], strict=True):
            for field in length_fields(fingerprint):
                if field.name in rows.schema.names:  # of an index that had text lengths alone
                    rows = rows.drop_columns([field.name])
                column = Lengths._fields.index(field.name.removesuffix(f"_{fingerprint}"))
                rows = rows.append_column(field, pa.array(lengths[:, column]))
        names = sorted(name for name in rows.schema.names if name.startswith(LENGTH_PREFIXES))
        yield shard, rows.select([name for name in rows.schema.names if name not in names] + names)
