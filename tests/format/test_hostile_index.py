"""Indexes made to do harm: dataset.json and index.parquet that lie about names, types, sizes and totals."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llava_next.data.format.dataset import DATASET_FILE, MAX_DATASET_BYTES, DatasetInfo
from llava_next.data.format.index import INDEX_FILE, read_dataset
from support.shards import accept_index, rewrite_index, with_column, write_samples

ESCAPES = "\x1b[2J\n\x9b31m\u202e"  # clear the screen, new line, red, right to left


def shards(number: int = 0, **changes):
    """A change of dataset.json: entries of one of its shards."""
    return lambda values: values["shards"][number].update(changes)


BAD_NAMES = [
    "a/../x", "..", ".", "./x", "a//b", "/x", "a/", "", "http://host/x.tar", "pipe:cat", "C:x", "a\\b",
    "%2e%2e/x", "x%00", "x\n", "x\0", ESCAPES, "\ud800",
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        *[(shards(name=name), "is not a plain path in the data set's folder") for name in BAD_NAMES],
        (shards(name="shard-000001.tar"), "a shard comes twice"),
        (shards(name=3), "entry 'name' is of type int"),
        (shards(bytes=-1), "it must be 0 to"),
        (shards(bytes=2**63), "it must be 0 to"),
        (shards(bytes=True), "entry 'bytes' is of type bool"),
        (shards(samples=3.0), "entry 'samples' is of type float"),
        (shards(samples=2), "do not add up to its total"),
        (shards(bytes=0), "index.parquet: .*points outside|do not fit"),
        (shards(**{ESCAPES: 1}), r"has an unknown entry '\\x1b\[2J\\n"),
        (shards(**{"x" * 5000: 1}), "has an unknown entry 'xxxxx.* [.]{3}$"),
        (lambda values: values["shards"].pop(), "do not add up to its total"),
        (lambda values: values["shards"][0].pop("sha256"), "lacks entry 'sha256'"),
        (lambda values: values.update(shards={}), "entry 'shards' is of type dict"),
        (lambda values: values.update(shards=["x"]), "an entry of 'shards' is not an object"),
        (lambda values: values.pop("tile_size"), "lacks entry 'tile_size'"),
        (lambda values: values.update(tile_size=10**400), "entry 'tile_size' is 1000"),
        (lambda values: values.update(tile_size=True), "entry 'tile_size' is of type bool"),
        (lambda values: values.update(pinpoints=[[float("inf"), 32]]), "must be a whole number"),
        (lambda values: values.update(pinpoints=[["32", "64"]]), "must be a whole number"),
        (lambda values: values.update(pinpoints=5), "entry 'pinpoints' is of type int"),
        (lambda values: values.update(format_version=True), "format version True"),
        (lambda values: values.update(format_version=1.0), "format version 1.0"),
        (lambda values: values.update(format_version=[ESCAPES]), r"format version \['\\x1b"),
        (lambda values: values.update(samples=float("nan")), "entry 'samples' is of type float"),
        (lambda values: values.update(samples=8), "do not add up to its total"),
        (lambda values: values.update(images=9), "index.parquet: .*the totals of dataset.json"),
        (lambda values: values.update(tiles=1), "index.parquet: .*the totals of dataset.json"),
        (lambda values: values.update(text_bytes=0), "index.parquet: .*the totals of dataset.json"),
        (lambda values: values.update(sources={"text": 7}), "index.parquet: .*the totals of dataset.json"),
        (lambda values: values.update(sources=[]), "entry 'sources' is of type list"),
        (lambda values: values.update(images=2**60), "do not fit into its files"),
        (lambda values: values.update(build=[]), "entry 'build' is of type list"),
    ],
)
def test_a_hostile_dataset_json_is_refused_in_one_line_that_names_it(tmp_path, change, reason):
    write_samples(tmp_path)
    values = json.loads((tmp_path / DATASET_FILE).read_text())
    change(values)
    (tmp_path / DATASET_FILE).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=reason) as error:
        read_dataset(tmp_path)
    assert type(error.value) is ValueError and str(error.value).isprintable() and len(str(error.value)) < 800
    assert f"{tmp_path}/" in str(error.value)


def test_a_dataset_json_over_the_limit_is_not_parsed():
    with pytest.raises(ValueError, match=f"are over the limit of {MAX_DATASET_BYTES}"):
        DatasetInfo.from_json(b" " * (MAX_DATASET_BYTES + 1))


def raw_strings(values: list[bytes]) -> pa.Array:
    """A column that claims to be text and is not UTF-8; Parquet files may hold it."""
    ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
    return pa.Array.from_buffers(pa.string(), len(values), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(values))])


def each(table: pa.Table, name: str, value: int) -> pa.Table:
    """A column of lists with all entries replaced."""
    return with_column(table, name, [[value] * len(entry) for entry in table[name].to_pylist()])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda table: with_column(table, "offset", [2**63 - 512] * 7), "points outside its shard"),
        (lambda table: with_column(table, "offset", [-512, *range(0, 3072, 512)]), "points outside its shard"),
        (lambda table: with_column(table, "nbytes", [-512] * 7), "points outside its shard"),
        (lambda table: with_column(table, "offset", [0] * 7), "rows overlap"),
        (lambda table: with_column(table, "shard", [-(2**31), 0, 0, 1, 1, 1, 2]), "order of the shards"),
        (lambda table: with_column(table, "key", ["k\x1b[2J", *"abcdef"]), "key with control characters"),
        (lambda table: table.set_column(4, "key", raw_strings([b"\xff"] * 7)), "Invalid UTF8"),
        (lambda table: table.set_column(5, "source", raw_strings([b"\xed\xa0\x80"] * 7)), "Invalid UTF8"),
        (lambda table: with_column(table, "source", [ESCAPES] * 7), "the totals of dataset.json"),
        (lambda table: with_column(table, "text_bytes", [-1] * 7), "text of negative length"),
        (lambda table: with_column(table, "turns", [-(2**31)] * 7), "text of negative length"),
        (lambda table: table.append_column("text_tokens_x", pa.array([-1] * 7)), "text of negative length"),
        (lambda table: table.append_column("text_tokens_x", pa.array(["\x1b"] * 7)), r"'\\x1b'"),
        (lambda table: each(table, "widths", 2**31 - 1), "side of 1 or 2147483647 px"),
        (lambda table: each(table, "heights", 0), "side of 0 or"),
        (lambda table: each(each(table, "rows", 2**15 - 1), "cols", 2**15 - 1), "more than 144"),
        (lambda table: each(table, "rows", -1), "negative number of tiles"),
        (lambda table: with_column(table, "rows", [[1] * 1000] + [[]] * 6), "values, more than its rows and images"),
        (lambda table: each(table, "rows", None), "disagree on the number of images"),
        (lambda table: table.append_column("shard", table["shard"]), "exists 2 times"),
        (lambda table: table.set_column(4, "key", pa.array([{"a": 1}] * 7)), "Unsupported cast"),
        (lambda table: table.set_column(1, "offset", pa.array([0.5] * 7)), "truncated"),
        (lambda table: table.set_column(1, "offset", pa.array([2**64 - 1] * 7, pa.uint64())), "not in range"),
        (lambda table: table.set_column(5, "source", pa.array([["a"]] * 7)), "source"),
    ],
)
def test_a_hostile_index_is_refused_in_one_line_that_names_it(tmp_path, change, reason):
    write_samples(tmp_path)
    rewrite_index(tmp_path, change(pq.read_table(tmp_path / INDEX_FILE)))
    with pytest.raises(ValueError, match=reason) as error:
        read_dataset(tmp_path)
    assert type(error.value) is ValueError and str(error.value).isprintable() and len(str(error.value)) < 800
    assert f"{tmp_path}/{INDEX_FILE}" in str(error.value)


@pytest.mark.parametrize(
    ("mutate", "reason"),
    [
        (lambda data: data[:-4] + b"PARX", "magic bytes not found"),
        (lambda data: data[:-1000], "magic bytes not found"),
        (lambda data: b"PAR1PAR1", "magic bytes|smaller than"),
        (lambda data: b"", "do not fit into its files"),
        (lambda data: data[:-8] + b"\xff\xff\xff\x7fPAR1", "smaller than the size reported"),
        (lambda data: data[:-8] + b"\xff\xff\xff\xffPAR1", "smaller than the size reported"),
        (lambda data: data[:-8] + b"\1\0\0\0PAR1", "index.parquet"),
        (lambda data: data[:4] + bytes(len(data) // 4) + data[4 + len(data) // 4 :], "index.parquet"),
    ],
)
def test_what_is_no_parquet_file_is_refused(tmp_path, mutate, reason):
    write_samples(tmp_path)
    (tmp_path / INDEX_FILE).write_bytes(mutate((tmp_path / INDEX_FILE).read_bytes()))
    accept_index(tmp_path)
    with pytest.raises(ValueError, match=reason) as error:
        read_dataset(tmp_path)
    assert str(error.value).isprintable() and str(tmp_path) in str(error.value)


LIMITED = """
import resource, sys
from pathlib import Path
from llava_next.data.format.index import read_dataset
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 500_000_000,) * 2)
try:
    read_dataset(sys.argv[1])
except ValueError as error:
    print(type(error).__name__, error)
"""


def test_an_index_of_twelve_million_equal_rows_is_refused_within_500_mb(tmp_path):
    """300 KB that would take a gigabyte."""
    write_samples(tmp_path)
    many = pq.read_table(tmp_path / INDEX_FILE).slice(4, 1).take(pa.array(np.zeros(1_000_000, np.int64)))
    with pq.ParquetWriter(tmp_path / INDEX_FILE, many.schema, compression="zstd") as writer:
        for _ in range(12):
            writer.write_table(many, row_group_size=1_000_000)
    accept_index(tmp_path)
    assert (tmp_path / INDEX_FILE).stat().st_size < 1e6
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout.startswith("ValueError") and "it has 12000000 rows" in done.stdout, done.stderr
