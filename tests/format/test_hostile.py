"""Data sets made to do harm: nothing in them runs, fills the memory, hangs, leaves its folder or writes to a terminal.

What single functions refuse stands in the tests of each. Here are samples, whole folders as training opens them, and
three fuzzers (`workers/fuzz.py`); LLAVA_NEXT_FUZZ_SECONDS lets each of these run on with new examples.
"""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from llava_next.data.format.dataset import ShardInfo
from llava_next.data.format.index import INDEX_FILE, ROW_SCHEMA, read_dataset
from llava_next.data.format.pictures import open_picture
from llava_next.data.format.shards import BadSample, decode_strip, encode_strip, read_sample
from llava_next.data.format.writer import write_dataset
from llava_next.data.loading.encode import Encoder
from llava_next.data.loading.loader import LoaderOptions, build_loader
from llava_next.data.plan.mixture import Mixture
from llava_next.model.folders.dry import corpus_texts, train_tokenizer
from llava_next.templates import get_template
from llava_next.training.watch.metrics import JsonLines
from support.shards import SMALL, TURNS, description, rewrite_index, tar_bytes, write_samples

FUZZ = Path(__file__).parents[1] / "support" / "workers" / "fuzz.py"
FUZZ_SECONDS = os.environ.get("LLAVA_NEXT_FUZZ_SECONDS", "0")
ESCAPES = "\x1b[2J\n\x9b31m\u202e"  # clear the screen, new line, red, right to left
PICTURE = {"width": 32, "height": 32, **dict(zip(("rows", "cols"), SMALL.grid(32, 32), strict=True))}
TILES = SMALL.tiles(Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)))
JPEG = encode_strip(TILES, "jpeg")[1]


class Loud:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return (os.mkdir, (str(self.folder),))


@pytest.fixture
def alarm(tmp_path):
    """The folder that a pickle would make, and that pickle, which is shown to work."""
    folder = tmp_path / "a pickle was run"
    payload = pickle.dumps(Loud(folder))
    pickle.loads(payload)
    folder.rmdir()
    yield folder, payload
    assert not folder.exists()


def write_hostile(folder: Path, samples: dict[str, bytes]) -> None:
    """A data set of one shard that holds these bytes; its index promises a picture of 32 x 32 px in each sample."""
    folder.mkdir()
    data = b"".join(samples.values()) + bytes(1024)
    (folder / "shard-000000.tar").write_bytes(data)
    sizes = [len(sample) for sample in samples.values()]
    columns = {
        "offset": np.cumsum([0, *sizes])[:-1], "nbytes": sizes, "crc32": [zlib.crc32(s) for s in samples.values()],
        "key": list(samples), "source": ["s"] * len(samples), "text_bytes": [30] * len(samples),
        "turns": [2] * len(samples), "widths": [[32]] * len(samples), "heights": [[32]] * len(samples),
        "rows": [[PICTURE["rows"]]] * len(samples), "cols": [[PICTURE["cols"]]] * len(samples),
    }  # fmt: skip
    table = pa.table({name: columns[name] for name in ROW_SCHEMA.names}, schema=ROW_SCHEMA)
    write_dataset(folder, SMALL, "auto", [(ShardInfo("shard-000000.tar", len(data), len(samples), "0" * 64), table)])


def load(folder: Path):
    """The data set's packed batches, as training makes them: tokenizer, template, dealing and all."""
    template = get_template("mistral")
    tokenizer = train_tokenizer(corpus_texts([{"conversations": TURNS}], "mistral"), 400, "mistral")
    encoder = Encoder(template, tokenizer, template.prepare_tokenizer(tokenizer), SMALL, 4096)
    mixture = Mixture([(folder, None, 1.0)], SMALL, batch_size=8, max_length=4096)
    return list(build_loader(mixture, encoder, 0, 1, 4096, 64, options=LoaderOptions(num_workers=0)))


def sample(key: str, *others: tuple[str, bytes], text: bytes | None = None, picture: bytes = JPEG) -> bytes:
    """A sample with one picture, whose text or picture may be replaced, after `others` (extension and bytes)."""
    text = description(images=[PICTURE]) if text is None else text
    return tar_bytes(*((f"{key}.{ext}", data) for ext, data in (*others, ("0.jpg", picture), ("json", text))))


# Whole folders


def test_pickles_beside_a_sample_are_not_run_and_those_in_its_place_are_holes(tmp_path, alarm):
    folder, payload = alarm
    array, weights = io.BytesIO(), io.BytesIO()
    np.save(array, np.array([Loud(folder)], object), allow_pickle=True)
    torch.save({"x": Loud(folder)}, weights)
    others = [(ext, payload) for ext in ("pkl", "pickle", "pyd", "cls", "jpg.pkl", "0.jpg.pickle")]
    others += [("npy", array.getvalue()), ("npz", array.getvalue()), ("pth", weights.getvalue())]
    samples = {
        "plain": sample("plain"),
        "beside": sample("beside", *others),
        "text": sample("text", text=payload),
        "picture": sample("picture", picture=payload),
    }
    write_hostile(tmp_path / "set", samples)
    batches = load(tmp_path / "set")
    holes = {hole.key: hole.reason for batch in batches for hole in batch.holes}
    assert sorted(holes) == ["picture", "text"]
    assert ".json member does not parse" in holes["text"] and "does not decode" in holes["picture"]
    assert sorted(i for batch in batches for i in batch.sample_ids) == [0, 1]
    tiles = torch.cat([batch.tiles for batch in batches if batch.sample_ids])
    assert np.array_equal(tiles.numpy(), np.concatenate([decode_strip(JPEG, 32)] * 2))


def test_a_pickle_in_the_index_is_not_run(tmp_path, alarm):
    """Arrow once unpickled the description of a column's type (CVE-2023-47248)."""
    write_samples(tmp_path / "set")
    table = pq.read_table(tmp_path / "set" / INDEX_FILE)
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": alarm[1]}
    fields = [field.with_metadata(metadata) if field.name == "offset" else field for field in table.schema]
    rewrite_index(tmp_path / "set", table.cast(pa.schema(fields)))
    assert alarm[1] in pq.read_schema(tmp_path / "set" / INDEX_FILE).field("offset").metadata.values()
    assert len(read_dataset(tmp_path / "set")[1]) == 7


@pytest.mark.parametrize(
    "url", ["pipe:touch {}", "PIPE:touch {}", "pipe://touch {}", "|touch {}", "$(touch {})", "`touch {}`"]
)
def test_a_url_is_never_a_command(tmp_path, url):
    target = tmp_path / "a command was run"
    with pytest.raises(ValueError, match=r"is not a kind of URL that is read here|is not a data set"):
        Mixture([(url.format(f"'{target}'"), None, 1.0)], SMALL, batch_size=8)
    assert not target.exists()


def test_holes_say_which_sample_and_why_in_one_printable_line_each(tmp_path):
    """Terminal escapes in names and texts reach neither the message nor skipped.jsonl."""
    turn = json.dumps({"conversations": [{"from": ESCAPES, "value": "x"}], "id": "a", "source": "s", "images": []})
    samples = {
        "member": tar_bytes((f"{ESCAPES}.json", description())),
        "role": tar_bytes(("role.json", turn.encode())),
        "unlisted": sample("unlisted", (f"{ESCAPES}.jpg", JPEG)),
        "half": sample("half", text=description(conversations=[{"from": "human", "value": "\ud800<image>"}])),
        "number": sample("number", text=b'{"id": ' + b"9" * 100_000 + b"}"),
        "digits": sample("digits", text=description(images=[PICTURE | {"width": 10**4000}])),
        "deep": sample("deep", text=b'{"images":' * 50_000),
        "good": sample("good"),
    }
    write_hostile(tmp_path / "set", samples)
    batches = load(tmp_path / "set")
    log = JsonLines(tmp_path / "skipped.jsonl")
    for hole in (hole for batch in batches for hole in batch.holes):
        log.write(asdict(hole))
    log.close()
    lines = (tmp_path / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    reasons = {hole["key"]: hole["reason"] for hole in map(json.loads, lines)}
    assert reasons.keys() == samples.keys() - {"good"} and "turn 0 is not valid Unicode" in reasons["half"]
    assert all(line.isprintable() and len(line) < 800 for line in lines)
    assert [i for batch in batches for i in batch.sample_ids] == [7]


# One sample


def header(name: str, size: int | bytes, kind: bytes = b"0") -> bytes:
    """A tar header with any size and type, and a right checksum."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def extended(kind: bytes, content: bytes) -> bytes:
    return header("x", len(content), kind) + content + bytes(-len(content) % 512)


def record(key: str, value: str) -> bytes:
    """A record of a pax header, which begins with its own length."""
    body = f" {key}={value}\n"
    return next(f"{n}{body}".encode() for n in range(len(body), len(body) + 9) if n == len(f"{n}{body}".encode()))


TEXT = tar_bytes(("k.json", description()))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (header("k.txt", 0, tarfile.CHRTYPE) + TEXT, "link, folder or device"),
        (header("k.txt", 0, tarfile.BLKTYPE) + TEXT, "link, folder or device"),
        (header("k.txt", 0, tarfile.GNUTYPE_SPARSE) + TEXT, "link, folder or device"),
        (extended(b"g", record("path", "k.txt")) + TEXT, "link, folder or device"),
        (extended(b"x", record("path", "../../k.json")) + TEXT, "is not KEY.EXTENSION"),
        (extended(b"x", record("path", "/k.json")) + TEXT, "is not KEY.EXTENSION"),
        (extended(b"x", record("path", "j.json")) + TEXT, "does not belong to sample 'k'"),
        (extended(b"L", b"..\\k.json\0") + TEXT, "is not KEY.EXTENSION"),
        (extended(b"L", b"k/" * 4000 + b".json\0") + TEXT, "name of 8005 bytes is over the limit"),
        (extended(b"L", b"k.json\0") + TEXT[:512] + TEXT, "cut off|comes twice|no tar header"),
        (extended(b"x", record("size", "99999999999")) + TEXT, r"cut off: \d+ of 99999999999 bytes"),
        (extended(b"x", record("size", "-1")) + TEXT, "no readable size"),
        (extended(b"x", record("size", "0")) + TEXT, "no tar header at byte 1536"),
        (extended(b"x", record("GNU.sparse.major", "1")) + TEXT, "sparse file"),
        (extended(b"x", b"999999 path=k.json\n") + TEXT, "extended tar header does not parse"),
        (extended(b"x", record("path", "k.json")), "last member is not complete"),
        (header("k.txt", b"-0000000001\0") + TEXT, "no readable size"),
        (header("k.txt", b"\x80" + bytes(10) + b"\x01") + TEXT, "no readable size"),
        (header("k.txt", b"\xff" * 12) + TEXT, "no readable size"),
        (header("k.txt", b"777777777777") + TEXT, "cut off"),
        (TEXT[:148] + b"000000\0 " + TEXT[156:], "wrong checksum"),
        (TEXT[:-1], "cut off|not complete"),
        (TEXT + TEXT[:512], "cut off"),
        (tar_bytes(("k.json", description()), ("j.txt", b"")), "does not belong to sample 'k'"),
    ],
)  # fmt: skip
def test_tar_tricks_are_refused(data, reason):
    with pytest.raises(BadSample, match=reason):
        read_sample(data, "k")


def test_padding_holds_nothing_that_matters():
    padded = TEXT[:-1] + b"\xff"
    assert TEXT[-1:] == b"\0" and read_sample(padded, "k") == read_sample(TEXT, "k")


def test_an_extended_header_of_many_records_takes_linear_time():
    """120,000 records: seconds when each copies the rest, and hours at the 100 MB that a tar may hold."""
    start = os.times().user
    assert read_sample(extended(b"x", record("a", "b") * 120_000) + TEXT, "k").key == "k"
    assert os.times().user - start < 3
    with pytest.raises(BadSample, match="extended tar header of 6000000 bytes is over the limit"):
        read_sample(extended(b"x", record("a", "b") * 1_000_000) + TEXT, "k")


def test_every_entry_of_a_description_is_checked_for_its_type():
    wrong = [None, True, 0, 1.5, "x", [], {}, [[]], [None], [{}], float("inf"), float("nan"), 10**30, "\ud800"]
    right = {"id": str, "source": str, "conversations": list, "images": list}
    for name, kind in right.items():
        for value in wrong:
            foreign = name == "images" and value is None  # as others leave it empty
            if not (isinstance(value, kind) and value in ("x", [])) and not foreign:
                with pytest.raises(BadSample):
                    read_sample(tar_bytes(("k.json", description(**{name: value}))), "k")
    for name in PICTURE:
        for value in (*wrong, -1):
            if not (name in ("rows", "cols") and value == 0 and type(value) is int):
                text = description(images=[PICTURE | {name: value}])
                with pytest.raises(BadSample, match="image 0 "):
                    read_sample(sample("k", text=text), "k")


def test_odd_json_has_one_meaning():
    text = b'{"id":"a","id":"b","source":"\\u0000","conversations":[],"images":[],"x":1e999999,"y":NaN,"\\ud800":0}'
    read = read_sample(tar_bytes(("k.json", text)), "k")
    assert (read.id, read.source) == ("b", "\0")


# Pictures


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of two black tiles of 32 px with chunks before its pixels."""
    head, pixels = (b"IHDR", struct.pack(">IIBBBBB", 32, 64, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(64 * 97)))
    parts = [head, *chunks, pixels, (b"IEND", b"")]
    body = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def moving(kind: str) -> bytes:
    frames = [Image.fromarray(np.full((64, 32, 3), grey, np.uint8)) for grey in (0, 100, 200)]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def many_scans(number: int) -> bytes:
    """A progressive JPEG of 30 flat tiles whose last scan, some 10 bytes, comes many times."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 960)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * number + data[-2:]


ZEROS = zlib.compress(bytes(64 << 20), 9)  # 64 KB that hold 64 MB
VP8X = b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\0" * 4 + b"\xff\x3f\0" * 2


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png((b"iCCP", b"a\0\0" + ZEROS)), "Decompressed data too large"),
        (png((b"zTXt", b"a\0\0" + ZEROS)), "Decompressed data too large"),
        (png((b"iTXt", b"a\0\1\0\0\0" + ZEROS)), "Decompressed data too large"),
        (png(*[(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000)))] * 80), "Too much memory used in text chunks"),
        (encode_strip(TILES, "webp")[1][:-20], "does not decode"),
        (VP8X, "does not decode|does not hold"),
        (moving("WEBP"), "3 frames"),
        (moving("WEBP")[:-20], "does not decode"),
        (moving("PNG"), "3 frames"),
        (many_scans(200), "more than 100 scans"),
    ],
)
def test_bombs_in_pictures_are_refused(data, reason):
    with pytest.raises(BadSample, match=reason):
        decode_strip(data, 32)


def test_a_tiff_whose_own_tiles_are_larger_than_a_picture_may_be_is_refused_before_it_is_decoded():
    """Such a tile is decoded as a whole: 1.5 MB that say 64 x 64 px took 1.6 GB."""
    for tile, reason in ((40_000, "tiles of more than 89478485 pixels"), (64, "image cannot be read: OSError")):
        tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile, 324: 134, 325: 9}
        data = b"II*\0" + struct.pack("<IH", 8, len(tags))
        data += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()) + bytes(4)
        assert len(data) == 134
        with pytest.raises(BadSample, match=reason):
            open_picture(data + zlib.compress(bytes(64)))


def test_what_resembles_a_bomb_but_is_none_is_read():
    assert decode_strip(many_scans(20), 32).shape == (30, 32, 32, 3)
    assert decode_strip(png((b"tEXt", b"a\0" + b"x" * 100_000)), 32).shape == (2, 32, 32, 3)


def test_a_sample_of_many_flat_pictures_is_refused_before_one_is_decoded():
    """2 KB each hold 140 tiles: what decodes to gigabytes fits into the range of one sample."""
    picture = {"width": 32, "height": 32, "rows": 10, "cols": 14}
    flat = encode_strip(np.zeros((141, 32, 32, 3), np.uint8), "webp")[1]
    members = [(f"k.{number}.webp", flat) for number in range(8)]
    assert len(flat) < 2000
    assert len(read_sample(tar_bytes(*members[:7], ("k.json", description(images=[picture] * 7)))).images) == 7
    with pytest.raises(BadSample, match="8 images of 1128 tiles are over the limit of 1024"):
        read_sample(tar_bytes(*members, ("k.json", description(images=[picture] * 8))))


# Fuzzers


@pytest.mark.parametrize("kind", ["samples", "indexes", "descriptions"])
def test_mutated_files_give_a_sound_value_or_a_clear_error(tmp_path, kind):
    """A segmentation fault of a parser, a hang, or more than 1 GB of memory fails it too."""
    write_samples(tmp_path)
    command = [sys.executable, str(FUZZ), kind, str(tmp_path), FUZZ_SECONDS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120 + 2 * float(FUZZ_SECONDS), check=False)
    assert done.returncode == 0, f"exit {done.returncode}, see {tmp_path}/last\n{done.stderr[-3000:]}"
    examples, read, refused, peak = (int(part.split()[0]) for part in done.stdout.split(", "))
    assert examples == read + refused >= 300 and read >= 10 and refused >= 100 and peak < 1000, done.stdout
