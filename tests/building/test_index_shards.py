"""Shards that others wrote, trained on where they lie: strict reading, raw images, and text lengths added later."""

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import AutoTokenizer

import build_shards
import index_shards
from building.adding_lengths import add_lengths
from llava_next.data.format.index import FIRST_TARGET_PREFIX, INDEX_FILE, read_dataset
from llava_next.data.format.shards import BadSample, read_sample
from llava_next.data.format.writer import NEXT_FILE, replace_index
from llava_next.data.loading.encode import Encoder, picture_tiles
from llava_next.data.storage.client import Storage, StorageError
from llava_next.templates import get_template
from llava_next.tokenise import fingerprint
from support.builds import GEOMETRY, SMALL, Result, arguments_for, call, make_inputs, tool_result
from support.faults import FaultServer, S3Server
from support.real_tokenizers import mistral

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]


def index(folder, *more) -> Result:
    """Runs the tool's main function."""
    return call(index_shards.main, folder, "--workers", 0, *more)


def noise(number: int, kind: str = "JPEG") -> bytes:
    rng, buffer = np.random.default_rng(number), io.BytesIO()
    height, width = rng.integers(10, 100, 2)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(buffer, format=kind)
    return buffer.getvalue()


def member(name: str, data: bytes, kind: bytes = tarfile.REGTYPE, format: int = tarfile.USTAR_FORMAT) -> bytes:
    header = tarfile.TarInfo(name)
    header.size, header.type = len(data), kind
    return header.tobuf(format) + data + bytes(-len(data) % 512)


END = bytes(1024)


def sample(number: int, key: str | None = None) -> bytes:
    """A sample as others write it."""
    key, fields = key or f"k{number}", {"id": number, "conversations": TURNS, "source": "ab"[number % 2]}
    return member(f"{key}.jpg", noise(number)) + member(f"{key}.json", json.dumps(fields).encode())


def write_foreign(folder: Path, shards: int = 3, count: int = 5) -> None:
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        data = b"".join(sample(number) for number in range(shard * count, (shard + 1) * count))
        (folder / f"part-{shard}.tar").write_bytes(data + END)


def stored(folder) -> list:
    info, rows = read_dataset(folder)
    where = map(rows.locate, range(len(rows)))
    read = Storage(folder).read_range
    return [read_sample(read(info.shards[w.shard].name, w.offset, w.nbytes), w.key) for w in where]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("model"), mistral()
    get_template("mistral").prepare_tokenizer(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def test_raw_images_are_tiled_on_read_with_the_same_pixels(tmp_path, tokenizer_folder):
    write_foreign(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    result = index(tmp_path, *GEOMETRY)
    assert result.returncode == 0, result.stderr
    assert {path: path.read_bytes() for path in before} == before
    info, rows = read_dataset(tmp_path)
    assert info.codec == "raw" and info.anyres == SMALL and info.sources == {"a": 8, "b": 7}
    assert [shard.samples for shard in info.shards] == [5, 5, 5]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    encoder = Encoder(get_template("mistral"), tokenizer, image_token, SMALL, 4096)
    for number, raw in enumerate(stored(tmp_path)):
        image = Image.open(io.BytesIO(noise(number)))
        example = encoder.encode(raw, number, number, 0)
        assert np.array_equal(example.tiles, SMALL.tiles(image))
        assert len(example.tiles) == rows.num_tiles[number] and rows.image_sizes(number) == [image.size]
        assert len(example.feature_index) == rows.image_tokens(SMALL)[number]


def test_shards_with_any_readable_name_read_equal_over_file_http_and_s3(tmp_path, monkeypatch):
    """Spaces, what URLs give a meaning to, and Unicode: listed, indexed and read, one sample of each shard."""
    folder, names = tmp_path / "a set", ["a b.tar", "c #1.tar", "d?e&f=g+h.tar", "ä 日本.tar"]
    folder.mkdir()
    for number, name in enumerate(names):
        (folder / name).write_bytes(sample(number) + END)
    with FaultServer(folder) as web, S3Server(folder) as s3:
        s3.use(monkeypatch)
        for url in (folder, s3.url):
            assert index(url, *GEOMETRY).returncode == 0
        assert Storage(s3.url).read_all("dataset.json") == (folder / "dataset.json").read_bytes()
        assert [shard.name for shard in read_dataset(folder)[0].shards] == names
        found = [stored(url) for url in (folder, web.url, s3.url)]
    assert found[0] == found[1] == found[2]
    assert [raw.images[0].data for raw in found[0]] == [noise(number) for number in range(4)]


@pytest.mark.parametrize("name", ["50%.tar", "a%20b.tar", "a:b.tar", "a\\b.tar", "a\u202eb.tar"])
def test_a_shard_name_that_no_run_would_read_is_refused_before_anything_is_read(tmp_path, name):
    write_foreign(tmp_path, 1)
    (tmp_path / name).write_bytes(b"not even a tar")
    result = index(tmp_path, *GEOMETRY)
    assert result.returncode == 1 and f"shard name {name!r} is not a plain path" in result.stderr
    assert "rename the file" in result.stderr and not (tmp_path / "rejected.jsonl").exists()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_a_raw_picture_is_known_by_its_content_and_gives_pillows_rgb_or_is_refused(tmp_path, kind):
    """Under the name .jpg. TIFF, BMP and PPM are for builds only."""
    frames = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (40, 60, 3), np.uint8)) for n in (0, 1)]
    more = {"save_all": True, "append_images": frames[1:]} if kind in ("GIF", "WEBP") else {}
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, **more)
    (tmp_path / "a.tar").write_bytes(member("k.jpg", buffer.getvalue()) + member("k.json", FIELDS) + sample(1) + END)
    assert index(tmp_path, *GEOMETRY, "--max_rejected_share", 0.5).returncode == 0
    found = {raw.key: raw for raw in stored(tmp_path)}
    if kind in ("BMP", "TIFF", "PPM"):
        assert list(found) == ["k1"] and "not a picture of a known format" in (tmp_path / "rejected.jsonl").read_text()
    else:
        expected = SMALL.tiles(Image.open(buffer).convert("RGB"))
        assert np.array_equal(picture_tiles(found["k"].images[0], 0, SMALL), expected)


def test_a_raw_picture_that_does_not_decode_is_a_bad_sample(tmp_path, tokenizer_folder):
    data = noise(0)
    data = data[: len(data) // 2]  # its header tells the size
    fields = json.dumps({"conversations": TURNS}).encode()
    (tmp_path / "a.tar").write_bytes(member("k.jpg", data) + member("k.json", fields) + END)
    assert index(tmp_path, *GEOMETRY).returncode == 0
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    encoder = Encoder(get_template("mistral"), tokenizer, image_token, SMALL, 4096)
    with pytest.raises(BadSample, match="image cannot be read: OSError"):
        encoder.encode(stored(tmp_path)[0], 0, 0, 0)


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


GOOD = sample(0) + sample(1)
DAMAGED = [
    (flipped(GOOD + END, 10), "no tar header at byte 0"),
    (flipped(GOOD + END, len(sample(0)) + 3), f"no tar header at byte {len(sample(0))}"),
    (GOOD[:-400], "member 'k1.json' is cut off|the last member is not complete"),
    (GOOD, "without an end-of-archive marker: it was cut off"),
    (GOOD[:-512], "cut off"),
    (GOOD + END + sample(2), "something follows the end-of-archive marker"),
    (GOOD + member("k2.jpg", b"", tarfile.SYMTYPE) + END, "is a link, folder or device"),
    (GOOD + member("k2.jpg", b"", tarfile.LNKTYPE) + END, "is a link, folder or device"),
    (GOOD + member("k2.jpg", b"", tarfile.FIFOTYPE) + END, "is a link, folder or device"),
    (b"", "holds no|ends at byte 0"),
]


@pytest.mark.parametrize(("data", "reason"), DAMAGED)
def test_a_damaged_shard_is_an_error_with_its_reason_and_never_a_silent_end(tmp_path, data, reason):
    write_foreign(tmp_path, 2)
    (tmp_path / "part-1.tar").write_bytes(data)
    result = index(tmp_path, *GEOMETRY)
    assert result.returncode == 1 and "1 damaged shard(s)" in result.stderr and "part-1.tar" in result.stderr
    (entry,) = map(json.loads, (tmp_path / "rejected.jsonl").read_text().splitlines())
    assert entry["shard"] == "part-1.tar" and entry["key"] is None
    assert re.search(reason, entry["reason"]), entry
    assert not (tmp_path / "dataset.json").exists()


FIELDS = json.dumps({"conversations": TURNS}).encode()
BAD = [
    (member("/u0.jpg", noise(1)) + member("/u0.json", FIELDS), "'/u0.jpg' is not KEY.EXTENSION"),
    (member("../u1.jpg", noise(1)), "'../u1.jpg' is not KEY.EXTENSION"),
    (member("README", b"x"), "'README' is not KEY.EXTENSION"),
    (member("u3.a.jpg", noise(1)) + member("u3.a.json", FIELDS), "a key with a dot in it"),
    (member("u4.jpg", noise(1)) * 2 + member("u4.json", FIELDS), "'u4.jpg' comes twice"),
    (sample(0, "g0"), "key 'g0' comes again"),
    (member("u5.jpg", noise(1)) + member("u5.png", noise(1)) + member("u5.json", FIELDS), "has the pictures jpg, png"),
    (member("u6.jpg", b"no picture") + member("u6.json", FIELDS), "image cannot be read"),
    (member("u7.jpg", noise(1)), "no .json member with conversations, nor a picture with a caption"),
    (member("u8.json", json.dumps({"conversations": TURNS[:1]}).encode()), "ends with turn 1"),
    (member("u9.jpg", noise(1)) + member("u9.json", b"{"), "does not parse"),
    (member("u10.jpg", noise(1)) + member("u10.json", b'{"conversations": 7}'), "not a list"),
    (member("u11\t.jpg", noise(1)) + member("u11\t.json", FIELDS), "control characters"),
]


def test_every_unusable_sample_is_left_out_and_listed_with_its_reason(tmp_path):
    """In one shard, between good ones."""
    parts = []
    for number, (data, _) in enumerate(BAD):
        parts += [sample(number, f"g{number}"), data]
    parts.append(sample(50, "last"))
    (tmp_path / "a.tar").write_bytes(b"".join(parts) + END)
    result = index(tmp_path, *GEOMETRY, "--max_rejected_share", 0.6)
    assert result.returncode == 0, result.stderr
    entries = list(map(json.loads, (tmp_path / "rejected.jsonl").read_text().splitlines()))
    offsets = np.cumsum([0, *map(len, parts)])[1:-1:2].tolist()
    by_offset = {entry["offset"]: entry["reason"] for entry in entries}
    for offset, (_, reason) in zip(offsets, BAD, strict=True):
        assert re.search(reason, by_offset[offset]), (reason, by_offset[offset])
    assert [s.key for s in stored(tmp_path)] == [*(f"g{n}" for n in range(len(BAD))), "last"]
    too_many = index(tmp_path, *GEOMETRY)  # is a data set now
    assert too_many.returncode == 0 and "is a data set already" in too_many.stdout


def test_too_many_unusable_samples_fail(tmp_path):
    (tmp_path / "a.tar").write_bytes(sample(0) + member("k.jpg", b"no picture") + member("k.json", FIELDS) + END)
    result = index(tmp_path, *GEOMETRY)
    assert result.returncode == 1 and "1 of 2 samples cannot be used" in result.stderr
    assert not (tmp_path / "dataset.json").exists()


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_folders_and_long_names_of_every_tar_dialect_are_read(tmp_path, format):
    long = "folder/" * 30
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        names = ["a"] if format == tarfile.USTAR_FORMAT else [f"{long}a", f"{long}b"]
        for number, name in enumerate(names):
            for kind in ("folder", "jpg", "txt"):
                header = tarfile.TarInfo(f"x{number}" if kind == "folder" else f"{name}.{kind}")
                data = {"folder": b"", "jpg": noise(number), "txt": b"caption"}[kind]
                header.size, header.type = len(data), tarfile.DIRTYPE if kind == "folder" else tarfile.REGTYPE
                tar.addfile(header, io.BytesIO(data))
    assert index(tmp_path, *GEOMETRY).returncode == 0
    assert [s.key for s in stored(tmp_path)] == names


def test_an_index_of_our_own_shards_that_was_lost_is_made_again(tmp_path):
    make_inputs(tmp_path, 40)
    out = tmp_path / "out"
    assert tool_result(*arguments_for(tmp_path, out)).returncode == 0
    info, rows = read_dataset(out)
    (out / "dataset.json").unlink()
    (out / INDEX_FILE).unlink()
    wrong = index(out, "--tower", "clip-336")
    assert wrong.returncode == 1 and "cut into tiles for another model" in wrong.stderr
    assert index(out, *GEOMETRY).returncode == 0
    again, same = read_dataset(out)
    assert (again.shards, again.sources, again.images, again.tiles) == (
        info.shards,
        info.sources,
        info.images,
        info.tiles,
    )
    assert [same.locate(row) for row in range(40)] == [rows.locate(row) for row in range(40)]
    assert np.array_equal(same.rows, rows.rows) and np.array_equal(same.text_bytes, rows.text_bytes)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    records = make_inputs(folder, 40)
    records[3]["conversations"][1]["value"] = 'x\n"\\\t' * 3000  # escapes make the JSON longer than the text
    records[4]["conversations"][1]["value"] = "k.json\0ustar" * 200
    (folder / "train.json").write_text(json.dumps(records))
    assert tool_result(*arguments_for(folder, folder / "out")).returncode == 0
    return folder / "out"


def copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


@pytest.mark.parametrize("workers", [0, 1])
def test_text_lengths_added_later_are_those_of_the_build(built, tmp_path, tokenizer_folder, workers):
    out = copy(built, tmp_path / "set")
    argument = f"{tokenizer_folder}:mistral"
    result = index(out, "--tokenizer", argument, "--workers", workers)
    assert result.returncode == 0 and "added" in result.stdout, result.stderr
    inputs = ["--json", built.parent / "train.json", "--images", built.parent / "images", "--out", tmp_path / "direct"]
    options = [*inputs, *GEOMETRY, "--workers", 0, "--shard_samples", 16, "--tokenizer", argument]
    assert tool_result(*options).returncode == 0
    assert (out / INDEX_FILE).read_bytes() == (tmp_path / "direct" / INDEX_FILE).read_bytes()
    name = fingerprint(AutoTokenizer.from_pretrained(tokenizer_folder), "mistral")
    counts, exact = read_dataset(out)[1].text_tokens(name)
    assert exact and len(counts) == 40 and counts.min() > 5
    again = index(out, "--tokenizer", argument)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert index(out, "--tokenizer", f"{tokenizer_folder}:llama_3").returncode == 1


def test_an_index_with_text_lengths_alone_gets_the_places_of_first_answers(built, tmp_path, tokenizer_folder):
    out, argument = copy(built, tmp_path / "set"), f"{tokenizer_folder}:mistral"
    assert index(out, "--tokenizer", argument).returncode == 0
    whole, info, file = (out / INDEX_FILE).read_bytes(), read_dataset(out)[0], pq.ParquetFile(out / INDEX_FILE)
    tables = [file.read_row_group(number).drop_columns(["shard"]) for number in range(len(info.shards))]
    first = [name for name in tables[0].schema.names if name.startswith(FIRST_TARGET_PREFIX)]
    replace_index(Storage(out), info, zip(info.shards, [table.drop_columns(first) for table in tables], strict=True))
    assert read_dataset(out)[1].exact_text_tokens and not read_dataset(out)[1].first_targets
    assert index(out, "--tokenizer", argument).returncode == 0 and (out / INDEX_FILE).read_bytes() == whole


def test_adding_lengths_reads_only_the_json_members(tmp_path, tokenizer_folder):
    """Of shards with pictures of the real size."""
    folder = tmp_path / "in"
    (folder / "images").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "images" / "a.png")
    rows = [{"id": n, "image": "a.png", "conversations": TURNS} for n in range(6)]
    (folder / "train.json").write_text(json.dumps(rows))
    arguments = arguments_for(folder, tmp_path / "out", "--codec", "jpeg", geometry=["--tower", "clip-336"])
    assert tool_result(*arguments).returncode == 0
    with FaultServer(tmp_path / "out") as server, pytest.MonkeyPatch.context() as patch:
        remote, local = Storage(server.url), Storage(tmp_path / "out")
        for name in ("put", "delete"):  # a web server takes none
            patch.setattr(remote, name, getattr(local, name))
        add_lengths(remote, (f"{tokenizer_folder}:mistral",), 0)
        read = [r.range for r in server.requests if r.name.endswith(".tar") and r.method == "GET"]
    lengths = [int(end) - int(start) + 1 for start, end in (r.removeprefix("bytes=").split("-") for r in read)]
    size = (tmp_path / "out" / "shard-000000.tar").stat().st_size
    assert len(lengths) == 6 and max(lengths) <= 4096 and size > 1e6
    assert read_dataset(tmp_path / "out")[1].exact_text_tokens


def test_raw_data_sets_get_lengths_as_well(tmp_path, tokenizer_folder):
    write_foreign(tmp_path / "one")
    write_foreign(tmp_path / "two")
    option = ["--tokenizer", f"{tokenizer_folder}:mistral"]
    assert index(tmp_path / "one", *GEOMETRY, *option).returncode == 0
    assert index(tmp_path / "two", *GEOMETRY).returncode == 0
    assert index(tmp_path / "two", *option).returncode == 0
    first, second = (read_dataset(tmp_path / name)[1].exact_text_tokens for name in ("one", "two"))
    assert list(first) == list(second) and len(first) == 1
    for name in first:
        assert np.array_equal(first[name], second[name]) and len(first[name]) == 15


def test_a_template_that_refuses_a_sample_changes_nothing(built, tmp_path, tokenizer_folder):
    out = copy(built, tmp_path / "set")
    result = index(out, "--tokenizer", f"{tokenizer_folder}:plain")
    assert result.returncode == 1 and "1 samples cannot be counted, nothing was changed" in result.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in built.iterdir()
    }


@pytest.mark.parametrize("lost", [NEXT_FILE, INDEX_FILE, "dataset.json"])
def test_a_lost_connection_while_files_are_replaced_is_mended_by_running_again(
    built, tmp_path, tokenizer_folder, monkeypatch, lost
):
    out, put, option = copy(built, tmp_path / "set"), Storage.put, ["--tokenizer", f"{tokenizer_folder}:mistral"]

    def losing(storage, name, data):
        if name == lost:
            raise StorageError(f"{storage.address(name)}: connection lost")
        return put(storage, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "put", losing)
        assert index(out, *option).returncode == 1
    if lost == "dataset.json":  # the index is new, dataset.json is not
        with pytest.raises(ValueError, match=r"is not the one that dataset\.json was written with"):
            read_dataset(out)
    else:
        assert not read_dataset(out)[1].exact_text_tokens
    result = index(out, *option)
    assert result.returncode == 0, result.stderr
    assert len(read_dataset(out)[1].exact_text_tokens) == 1 and not (out / NEXT_FILE).exists()
    assert build_shards.Output(str(out)).files().keys() == {path.name for path in built.iterdir()}


def test_exact_text_lengths_are_those_of_training(tmp_path):
    """Also when the tokenizer is the published one, and the run has the composed model's folder."""
    inputs = tmp_path / "in"
    make_inputs(inputs, 40)
    published, composed = tmp_path / "published", tmp_path / "composed"
    mistral().save_pretrained(published)
    tokenizer = AutoTokenizer.from_pretrained(published)
    image_token = get_template("mistral").prepare_tokenizer(tokenizer)
    tokenizer.save_pretrained(composed)
    options = ["--tokenizer", f"{published}:mistral", "--tokenizer", f"{composed}:plain", "--max_rejected_share", 0.1]
    result = tool_result(*arguments_for(inputs, tmp_path / "out", *options))
    assert result.returncode == 0, result.stderr
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out" / "rejected.jsonl").open()]
    assert len(reasons) == 1 and reasons[0].startswith("template 'plain' takes one prompt")
    _, rows = read_dataset(tmp_path / "out")
    run_tokenizer = AutoTokenizer.from_pretrained(composed)
    for name in ("mistral", "plain"):
        template = get_template(name)
        template.check_tokenizer(run_tokenizer)
        counts, exact = rows.text_tokens(fingerprint(run_tokenizer, name))
        assert exact and len(rows.exact_text_tokens) == 2
        image_tokens = rows.image_tokens(SMALL)
        for row, sample in enumerate(stored(tmp_path / "out")):
            lengths = [SMALL.num_tokens(image.width, image.height) for image in sample.images]
            ids, _ = template.encode(sample.conversations, run_tokenizer, image_token, lengths)
            assert len(ids) == counts[row] + image_tokens[row]
