"""`dataset.json` and `index.parquet`: what they tell, and that a set that is not whole does not open."""

import dataclasses
import json
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llava_next.anyres import HF_336, ORIGINAL_336, ORIGINAL_384, AnyRes
from llava_next.data.format.dataset import DATASET_FILE, DatasetInfo, ShardInfo, check_geometry
from llava_next.data.format.index import INDEX_FILE, SCHEMA, read_dataset
from llava_next.data.format.shards import RawSample
from llava_next.data.format.writer import ShardWriter, write_dataset
from support.shards import SIZES, SMALL, rewrite_index, with_column, write_samples


def test_columns_tell_what_was_written(tmp_path):
    written = write_samples(tmp_path)
    info, index = read_dataset(tmp_path)
    assert info == written and len(index) == 7
    assert info.anyres == SMALL and info.build == {"tool": "test"}
    assert (info.samples, info.images, info.sources) == (7, 8, {"pictures": 5, "text": 2})
    assert [shard.samples for shard in info.shards] == [3, 3, 1]
    assert all((tmp_path / shard.name).stat().st_size == shard.bytes for shard in info.shards)
    assert index.shard.tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert [index.source_names[code] for code in index.source] == ["text", *["pictures"] * 3, "text", *["pictures"] * 2]
    assert [index.image_sizes(row) for row in range(7)] == SIZES
    assert index.text_bytes.tolist() == [3 + 2 * number for number in range(7)]
    assert index.turns.tolist() == [2] * 7
    assert [index.locate(row).key for row in range(7)] == [f"k{number}" for number in range(7)]


def test_tiles_and_image_tokens_equal_those_of_each_picture(tmp_path):
    info = write_samples(tmp_path)
    _, index = read_dataset(tmp_path)
    assert index.num_tiles.tolist() == [sum(SMALL.num_tiles(*size) for size in sizes) for sizes in SIZES]
    assert index.num_tiles.sum() == info.tiles
    for anyres in (SMALL, AnyRes(336, 14, ORIGINAL_336)):
        expected = [sum(anyres.num_tokens(*size) for size in sizes) for sizes in SIZES]
        assert index.image_tokens(anyres).tolist() == expected


def test_text_only_data_set(tmp_path):
    with ShardWriter(tmp_path, SMALL) as writer:
        writer.write(RawSample("a", "a", "text", [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}], []))
    _, index = read_dataset(tmp_path)
    assert index.num_tiles.tolist() == index.image_tokens(SMALL).tolist() == [0]


def test_one_row_group_a_shard(tmp_path):
    write_samples(tmp_path)
    metadata = pq.read_metadata(tmp_path / INDEX_FILE)
    assert [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)] == [3, 3, 1]


def test_text_tokens_are_exact_with_the_fingerprint_and_estimated_without(tmp_path):
    write_samples(tmp_path)
    table = pq.read_table(tmp_path / INDEX_FILE)
    rewrite_index(tmp_path, table.append_column("text_tokens_abc123", pa.array(range(10, 17), pa.int64())))
    _, index = read_dataset(tmp_path)
    lengths, exact = index.text_tokens("abc123")
    assert exact and lengths.tolist() == list(range(10, 17))
    lengths, exact = index.text_tokens("other", bytes_per_token=2, tokens_per_turn=10, tokens_per_sample=1)
    assert not exact and lengths.tolist() == [int(np.ceil((3 + 2 * number) / 2)) + 21 for number in range(7)]
    assert index.text_tokens()[1] is False


def test_hash_tells_data_sets_apart_and_is_the_same_for_copies(tmp_path):
    for name in ("a", "b"):
        write_samples(tmp_path / name)
    write_samples(tmp_path / "c", shard_samples=2)
    a, b, c = (read_dataset(tmp_path / name)[1].hash() for name in "abc")
    assert a == b != c and len(a) == 64


def test_a_folder_without_dataset_json_says_what_to_do(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"no dataset\.json: it is not a data set.*build_shards\.py"):
            read_dataset(folder)


def test_unknown_format_version_is_refused(tmp_path):
    write_samples(tmp_path)
    values = json.loads((tmp_path / DATASET_FILE).read_text())
    (tmp_path / DATASET_FILE).write_text(json.dumps(values | {"format_version": 99}))
    with pytest.raises(ValueError, match=r"dataset\.json: format version 99, this program reads 1"):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"tile_size": "big"}, {"tile_size": 0}, {"pinpoints": [[1, 2, 3]]}, {"shards": [1]}, {"surprise": 1},
        {"pinpoints": None}, {"shards": [{"name": "../x.tar", "bytes": 1, "samples": 1, "sha256": ""}]},
        {"shards": [{"name": "/etc/x.tar", "bytes": 1, "samples": 1, "sha256": ""}]},
    ],
)  # fmt: skip
def test_malformed_dataset_json_is_an_error_naming_the_file(tmp_path, change):
    write_samples(tmp_path)
    values = json.loads((tmp_path / DATASET_FILE).read_text())
    (tmp_path / DATASET_FILE).write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=r"dataset\.json: "):
        read_dataset(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "{}"])
def test_what_is_not_a_dataset_json_is_an_error_naming_the_file(tmp_path, text):
    (tmp_path / DATASET_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"dataset\.json: "):
        read_dataset(tmp_path)


def test_index_of_another_build_is_refused(tmp_path):
    write_samples(tmp_path / "a")
    write_samples(tmp_path / "b", shard_samples=2)
    (tmp_path / "a" / INDEX_FILE).write_bytes((tmp_path / "b" / INDEX_FILE).read_bytes())
    with pytest.raises(ValueError, match="Copy both files of one build"):
        read_dataset(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda table: table.slice(1), "6 rows"),
        (lambda table: table.drop_columns(["crc32"]), "crc32"),
        (lambda table: with_column(table, "shard", [0, 0, 1, 0, 1, 1, 2]), "order of the shards"),
        (lambda table: with_column(table, "shard", [0, 0, 1, 1, 1, 1, 2]), "samples per shard"),
        (lambda table: with_column(table, "shard", [0, 0, 0, 1, 1, 1, 9]), "samples per shard"),
        (lambda table: with_column(table, "shard", [0, 0, 0, 1, 1, 1, 2**31 - 1]), "samples per shard"),
        (lambda table: with_column(table, "offset", [10**9] * 7), "key 'k0'. points outside its shard"),
        (lambda table: with_column(table, "nbytes", [0] * 7), "points outside its shard"),
        (lambda table: with_column(table, "offset", [None] * 7), "column offset has empty entries"),
        (lambda table: with_column(table, "widths", [[1]] * 7), "disagree on the number of images"),
        (lambda table: table.set_column(0, "shard", pa.array(["x"] * 7)), "index.parquet"),
    ],
)
def test_index_that_contradicts_the_shards_is_refused(tmp_path, change, reason):
    write_samples(tmp_path)
    rewrite_index(tmp_path, change(pq.read_table(tmp_path / INDEX_FILE)))
    with pytest.raises(ValueError, match=reason) as error:
        read_dataset(tmp_path)
    assert INDEX_FILE in str(error.value) and "Build the data set again" in str(error.value)


def test_tiles_of_another_vision_tower_are_refused_naming_both_and_the_cure():
    info = DatasetInfo(336, 14, ORIGINAL_336, "auto", 0, 0, 0, 0, {}, 0, "", ())
    check_geometry(info, AnyRes(336, 14, ORIGINAL_336))
    for anyres in (AnyRes(384, 14, ORIGINAL_384), AnyRes(336, 14, HF_336), AnyRes(336, 28, ORIGINAL_336)):
        with pytest.raises(ValueError, match="mix665k was cut for another model") as error:
            check_geometry(info, anyres, "mix665k")
        assert "336 px tiles" in str(error.value) and f"{anyres.tile_size} px tiles" in str(error.value)
        assert str(anyres.pinpoints) in str(error.value) and "build_shards.py" in str(error.value)


def test_a_million_samples_take_less_than_100_mb(tmp_path):
    """Synthetic index of 1,000 shards, with one picture a sample as mix665K has."""
    rng, n = np.random.default_rng(0), 1000
    sizes = rng.choice([480, 640, 427, 1024], (2, n)).tolist()
    columns = {
        "offset": np.arange(n) * 153_600, "nbytes": [153_600] * n, "crc32": rng.integers(0, 2**32, n),
        "key": [f"{row:09d}" for row in range(n)], "source": rng.choice(["coco", "gqa", "vg"], n),
        "widths": [[side] for side in sizes[0]], "heights": [[side] for side in sizes[1]],
        "rows": [[2]] * n, "cols": [[2]] * n, "text_bytes": rng.integers(50, 4000, n), "turns": [2] * n,
    }  # fmt: skip
    rows = pa.table(columns, schema=SCHEMA.remove(0))
    parts = [(ShardInfo(f"shard-{number:06d}.tar", 153_600 * n + 10_240, n, "0" * 64), rows) for number in range(1000)]
    write_dataset(tmp_path, AnyRes(336, 14, ORIGINAL_336), "auto", parts)
    assert (tmp_path / INDEX_FILE).stat().st_size / 1e6 < 100  # bytes a sample
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    _, index = read_dataset(tmp_path)
    assert tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - before < 100e6
    tracemalloc.stop()
    columns = [getattr(index, field.name) for field in dataclasses.fields(index)]
    assert sum(column.nbytes for column in columns if hasattr(column, "nbytes")) < 75e6
    assert index.image_tokens(AnyRes(336, 14, ORIGINAL_336)).shape == (1_000_000,)
