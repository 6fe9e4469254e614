"""Samples on disk: what is written, that anybody can open it, and that hostile or damaged bytes are errors only."""

import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zlib

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from llava_next.anyres import ORIGINAL_336, AnyRes
from llava_next.data.format.index import read_dataset
from llava_next.data.format.shards import (
    MAX_JSON_BYTES,
    BadSample,
    RawSample,
    StripInfo,
    decode_strip,
    encode_strip,
    read_sample,
    sample_members,
)
from llava_next.data.format.writer import ShardFile, ShardWriter
from llava_next.data.storage.client import Storage
from support.launching import ROOT
from support.shards import SMALL, TURNS, description, tar_bytes


def photo() -> np.ndarray:
    """A photograph, uint8 [427, 640, 3], from scikit-learn."""
    return pytest.importorskip("sklearn.datasets").load_sample_image("china.jpg")


def page() -> Image.Image:
    """A drawn page of text."""
    image = Image.new("RGB", (640, 480), "white")
    for line in range(30):
        ImageDraw.Draw(image).text((10, 16 * line), f"{line}: the quick brown fox jumps over the lazy dog", "black")
    return image


def make_sample(number: int = 0, images: int = 1, codec: str = "jpeg") -> RawSample:
    rng = np.random.default_rng(number)
    strips = []
    for _ in range(images):
        width, height = (int(side) for side in rng.integers(20, 90, 2))
        tiles = SMALL.tiles(Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)))
        strips.append(StripInfo(width, height, *SMALL.grid(width, height), *encode_strip(tiles, codec)))
    return RawSample(f"{number:09d}", f"id/{number}.x", "noise", TURNS, strips)


def sample_bytes(sample: RawSample, tmp_path) -> bytes:
    with ShardFile(tmp_path / "one.tar") as shard:
        shard.write(sample)
    row = shard.rows.to_pylist()[0]
    return (tmp_path / "one.tar").read_bytes()[row["offset"] : row["offset"] + row["nbytes"]]


# Codecs


@pytest.mark.parametrize("codec", ["webp", "auto"])
def test_lossless_strip_returns_exactly_the_tiles(codec):
    tiles = AnyRes(336, 14, ORIGINAL_336).tiles(page())
    ext, data = encode_strip(tiles, codec)
    assert ext == "webp"
    assert np.array_equal(decode_strip(data, 336), tiles)


def test_jpeg_strip_of_a_photo_keeps_40_db():
    tiles = AnyRes(336, 14, ORIGINAL_336).tiles(Image.fromarray(photo()))
    ext, data = encode_strip(tiles, "jpeg")
    decoded = decode_strip(data, 336)
    assert ext == "jpg" and decoded.shape == tiles.shape == (5, 336, 336, 3)
    noise = np.mean((decoded.astype(float) - tiles) ** 2)
    assert 10 * np.log10(255**2 / noise) > 40


def test_jpeg_tile_borders_do_not_bleed():
    """Black and white tiles in turn: their borders are JPEG block borders, so no tile sees its neighbour."""
    tiles = np.zeros((4, 336, 336, 3), np.uint8)
    tiles[1::2] = 255
    assert np.array_equal(decode_strip(encode_strip(tiles, "jpeg")[1], 336), tiles)


def test_auto_takes_the_smaller_of_jpeg_and_lossless_webp():
    for image, ext in ((Image.fromarray(photo()), "jpg"), (page(), "webp")):
        tiles = AnyRes(336, 14, ORIGINAL_336).tiles(image)
        sizes = {found: len(data) for found, data in (encode_strip(tiles, codec) for codec in ("jpeg", "webp"))}
        assert min(sizes, key=sizes.get) == ext
        assert encode_strip(tiles, "auto") == encode_strip(tiles, {"jpg": "jpeg"}.get(ext, ext))


def test_strips_too_high_for_webp_fall_back_to_jpeg():
    tiles = np.zeros((40, 420, 420, 3), np.uint8)  # 16,800 px; WebP ends at 16,383
    assert encode_strip(tiles, "auto")[0] == "jpg"
    with pytest.raises(ValueError, match="too large for codec webp"):
        encode_strip(tiles, "webp")


def test_what_is_no_stack_of_tiles_is_not_encoded():
    for tiles in (np.zeros((1, 4, 5, 3), np.uint8), np.zeros((1, 4, 4, 3)), np.zeros((4, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"must be uint8 \[n, S, S, 3\]"):
            encode_strip(tiles)
    with pytest.raises(ValueError, match="codec 'png' is not one of"):
        encode_strip(np.zeros((1, 4, 4, 3), np.uint8), "png")


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header claims any size; its pixels are missing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png_of_size(32, 32 * 100_000), "does not hold 1 to 144 tiles"),
        (png_of_size(2**31 - 1, 2**31 - 1), "DecompressionBomb"),
        (png_of_size(33, 64), "33 x 64 px does not hold"),
        (png_of_size(32, 50), "32 x 50 px does not hold"),
        (png_of_size(32, 64), "does not decode"),
        (pickle.dumps([1]), "does not decode"),
        (b"", "does not decode"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n", "does not decode"),
    ],
)
def test_bombs_and_other_files_are_refused_as_strips(data, reason):
    with pytest.raises(BadSample, match=reason):
        decode_strip(data, 32)


def test_truncated_and_grey_strips_are_refused():
    data = encode_strip(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8), "jpeg")[1]
    with pytest.raises(BadSample, match="truncated"):
        decode_strip(data[: len(data) // 2], 32)
    grey = io.BytesIO()
    Image.new("L", (32, 32)).save(grey, "PNG")
    with pytest.raises(BadSample, match="colour mode L"):
        decode_strip(grey.getvalue(), 32)


# Writing


@pytest.mark.parametrize("images", [0, 1, 3, 12])
def test_sample_survives_the_round_trip(tmp_path, images):
    sample = make_sample(7, images)
    assert read_sample(sample_bytes(sample, tmp_path), "000000007") == sample


def test_same_samples_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        with ShardWriter(tmp_path / name, SMALL, shard_samples=4) as writer:
            for number in range(10):
                writer.write(make_sample(number, images=number % 3))
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in "ab"]
    expected = ["dataset.json", "index.parquet", "shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert files == [expected, expected]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in expected)


def test_shards_are_webdatasets_own_bytes(tmp_path):
    samples = [make_sample(number, images=number % 13) for number in range(14)]
    with ShardFile(tmp_path / "ours.tar") as shard:
        for sample in samples:
            shard.write(sample)
    with webdataset.TarWriter(str(tmp_path / "theirs.tar"), user="", group="", encoder=False, mtime=0) as tar:
        for sample in samples:
            tar.write({"__key__": sample.key, **sample_members(sample)})
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()


def test_shards_are_written_without_torch(tmp_path):
    """Each worker of a build is a process of its own: torch takes two seconds and 185 MB in each."""
    code = """
import sys
from pathlib import Path
from building.jobs import ShardFile
from llava_next.data.format.shards import RawSample
with ShardFile(Path(sys.argv[1])) as shard:
    shard.write(RawSample("k", "a", "s", [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], []))
assert shard.info.samples == 1 and "torch" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'data_tools'}"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "s.tar"], env=environment, check=True)


def test_shards_open_with_plain_webdataset(tmp_path):
    samples = [make_sample(number, images=number % 3) for number in range(10)]
    with ShardWriter(tmp_path, SMALL, shard_samples=4) as writer:
        for sample in samples:
            writer.write(sample)
    url = f"file:{tmp_path}/shard-{{000000..000002}}.tar"
    opened = list(webdataset.WebDataset(url, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in opened] == [sample.key for sample in samples]
    for ours, theirs in zip(samples, opened, strict=True):
        assert theirs["json"]["conversations"] == ours.conversations
        for number, strip in enumerate(ours.images):
            assert theirs[f"{number}.{strip.ext}"].shape == (32 * (1 + strip.rows * strip.cols), 32, 3)


def test_index_rows_are_the_samples_byte_ranges(tmp_path):
    samples = [make_sample(number, images=number % 3) for number in range(10)]
    with ShardWriter(tmp_path, SMALL, shard_samples=4) as writer:
        for sample in samples:
            writer.write(sample)
    info, index = read_dataset(tmp_path)
    storage = Storage(tmp_path)
    for row, sample in enumerate(samples):
        where = index.locate(row)
        data = storage.read_range(info.shards[where.shard].name, where.offset, where.nbytes)
        assert zlib.crc32(data) == where.crc32
        assert read_sample(data, where.key) == sample


def test_members_have_no_extended_headers(tmp_path):
    """A short text member is a header and a block of content; a float mtime would add 1 KiB."""
    data = sample_bytes(RawSample("k", "a", "s", TURNS, []), tmp_path)
    assert len(data) == 1024
    assert tarfile.TarInfo.frombuf(data[:512], "utf-8", "strict").mtime == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"key": "a.b"}, "key 'a.b' must be"),
        ({"key": "../x"}, "must be 1 to 64"),
        ({"conversations": [{"from": "human", "value": "\ud800"}]}, "not valid Unicode"),
        ({"conversations": [{"from": "human", "value": "x" * MAX_JSON_BYTES}]}, "over the limit"),
        ({"conversations": [{"from": "human"}]}, "turn 0 is not"),
        ({"images": [StripInfo(1, 1, 0, 0, "gif", b"")]}, "extension 'gif'"),
    ],
)
def test_a_sample_that_cannot_be_stored_leaves_the_shard_as_it_was(tmp_path, changes, reason):
    good = make_sample(1)
    with ShardFile(tmp_path / "s.tar") as shard:
        with pytest.raises(BadSample, match=reason):
            shard.write(RawSample(**{**make_sample(0, images=0).__dict__, **changes}))
        shard.write(good)
        with pytest.raises(BadSample, match=r"already in s\.tar"):
            shard.write(good)
    assert len(shard.rows) == shard.info.samples == 1
    assert len(list(webdataset.WebDataset(f"file:{tmp_path}/s.tar", shardshuffle=False))) == 1


def test_a_writer_that_fails_leaves_no_data_set(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, SMALL, shard_samples=2) as writer:
        for number in range(3):
            writer.write(make_sample(number))
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["shard-000000.tar"]
    with pytest.raises(ValueError, match=r"has no dataset\.json"):
        read_dataset(tmp_path)


def test_a_data_set_is_not_written_over(tmp_path):
    with ShardWriter(tmp_path, SMALL) as writer:
        writer.write(make_sample())
    with pytest.raises(ValueError, match="already holds a data set"):
        ShardWriter(tmp_path, SMALL)


# Reading damaged and hostile bytes


def test_every_truncation_is_refused(tmp_path):
    data = sample_bytes(make_sample(3, images=2), tmp_path)
    for length in {*range(0, len(data), 512), *range(1, len(data), 97)}:
        with pytest.raises(BadSample):
            read_sample(data[:length])


def test_every_flipped_header_bit_is_refused(tmp_path):
    data = bytearray(sample_bytes(make_sample(3), tmp_path))
    headers = [0, len(data) - 1024]  # the picture's, and that of the one-block .json
    for position in (start + byte for start in headers for byte in (*range(148), *range(156, 512))):
        data[position] ^= 1 << (position % 8)
        with pytest.raises(BadSample):
            read_sample(bytes(data))
        data[position] ^= 1 << (position % 8)


@pytest.fixture(scope="module")
def two_pictures(tmp_path_factory) -> bytes:
    return sample_bytes(make_sample(3, images=2), tmp_path_factory.mktemp("two_pictures"))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_bytes_raise_nothing_but_bad_sample(two_pictures, data):
    mutated = bytearray(two_pictures)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(mutated)))
        mutated[start : start + data.draw(st.integers(0, 600))] = data.draw(st.binary(max_size=600))
    try:
        for image in read_sample(bytes(mutated)).images:
            decode_strip(image.data, 32)
    except BadSample:
        pass


def link(kind: bytes, name: str = "k.0.jpg") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


ONE_IMAGE = [{"width": 32, "height": 32, "rows": 1, "cols": 1}]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([link(tarfile.SYMTYPE), ("k.json", description())], "link, folder or device"),
        ([link(tarfile.LNKTYPE), ("k.json", description())], "link, folder or device"),
        ([link(tarfile.DIRTYPE, "k"), ("k.json", description())], "link, folder or device"),
        ([link(tarfile.FIFOTYPE), ("k.json", description())], "link, folder or device"),
        ([("/k.json", description())], "is not KEY.EXTENSION"),
        ([("../k.json", description())], "is not KEY.EXTENSION"),
        ([("a/../../k.json", description())], "is not KEY.EXTENSION"),
        ([("k", description())], "is not KEY.EXTENSION"),
        ([("k.json", description()), ("j.json", description())], "does not belong to sample 'k'"),
        ([("k.json", description()), ("k.json", description())], "comes twice"),
        ([("k.txt", b"x")], "no .json member"),
        ([("k.json", b"x" * (MAX_JSON_BYTES + 1))], "over the limit"),
        ([("k.json", b"{'id': 1}")], "does not parse"),
        ([("k.json", b"[" * 100_000)], "does not parse"),
        ([("k.json", b"\xff\xfe\xfd")], "does not parse"),
        ([("k.json", b"[]")], "not an object"),
        ([("k.json", description(id=3))], "'id' of the description"),
        ([("k.json", description(conversations=[{"from": "gpt"}]))], "turn 0 is not"),
        ([("k.json", description(images=[{"width": 1}]))], "whole numbers"),
        ([("k.json", description(images=[{**ONE_IMAGE[0], "width": True}]))], "whole numbers"),
        ([("k.json", description(images=[{**ONE_IMAGE[0], "width": -1}]))], "not possible"),
        ([("k.json", description(images=[{**ONE_IMAGE[0], "rows": 10**9}]))], "not possible"),
        ([("k.json", description(images=ONE_IMAGE))], "image 0 has 0 members"),
        ([("k.0.jpg", b""), ("k.0.png", b""), ("k.json", description(images=ONE_IMAGE))], "image 0 has 2 members"),
        ([("k.0.jpg", b""), ("k.json", description())], "'0.jpg' is not listed"),
    ],
)
def test_hostile_and_malformed_members_are_refused(members, reason):
    with pytest.raises(BadSample, match=reason):
        read_sample(tar_bytes(*members))


def test_a_sample_under_another_key_is_refused():
    with pytest.raises(BadSample, match="does not belong to sample 'other'"):
        read_sample(tar_bytes(("k.json", description())), "other")


def test_an_archive_end_inside_a_sample_is_refused():
    with pytest.raises(BadSample, match="end-of-archive marker"):
        read_sample(tar_bytes(("k.json", description())) + bytes(1024))


class Loud:
    """Its pickle raises when it is loaded."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle from a shard was run')",))


def test_members_of_other_kinds_are_never_decoded():
    payload = pickle.dumps(Loud())
    members = [(f"k.{ext}", payload) for ext in ("pkl", "pickle", "pyd", "npy", "cls", "0.jpg.pkl")]
    assert read_sample(tar_bytes(*members, ("k.json", description()))).id == "a"


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_of_every_tar_dialect_are_read(format):
    """Shards that others wrote: keys with folders, beyond the 100 bytes of a plain header."""
    key = "/".join(["folder"] * 19) + "/k"
    data = tar_bytes((f"{key}.json", description()), format=format)
    assert read_sample(data, key).key == key


def test_float_mtimes_of_others_are_read():
    info = tarfile.TarInfo("k.txt")
    info.mtime = 1.5
    assert read_sample(tar_bytes(info, ("k.json", description()), format=tarfile.PAX_FORMAT)).key == "k"
