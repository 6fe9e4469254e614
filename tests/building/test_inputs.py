"""What a build reads: files of any size listed by byte, mixtures, expected counts, parquet and foreign shards."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from building import inputs, json_stream
from building.cutting import Cutter
from building.embedded import list_hub, list_shards
from llava_next.anyres import AnyRes
from llava_next.data.format.records import source_name
from llava_next.data.format.shards import decode_strip
from llava_next.data.format.tar import BadSample
from support.builds import GEOMETRY, samples, tool_result, turns

TOOLS = Path(inputs.__file__).parents[1]
SMALL = AnyRes(32, 8, [(32, 64), (64, 32), (64, 64)])
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This, \u00e9 \U0001f41e."}]


def read_all(listing: inputs.Listing) -> list[dict]:
    return [listing.reader.read(address) for address in listing.addresses]


def encoded(kind: str, color: int = 0, size=(40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (color, 100, 200)).save(buffer, format=kind)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


texts = st.text(max_size=20)
plain = st.recursive(st.none() | st.booleans() | st.integers() | texts, lambda inner: st.lists(inner, max_size=3))
records = st.lists(st.dictionaries(texts, plain, max_size=4), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(records, st.booleans(), st.booleans(), st.sampled_from([None, 1, "\t"]), st.integers(16, 200))
def test_any_json_list_and_jsonl_is_listed_record_by_record(tmp_path_factory, rows, as_list, ascii, indent, chunk):
    """Also when records lie across the borders of what is read at once."""
    path = tmp_path_factory.mktemp("json") / "a.json"
    if as_list:
        text = json.dumps(rows, ensure_ascii=ascii, indent=indent)
    else:
        rows = [row | {"messages": None} for row in rows]  # an object with no key of a sample could be around a list
        text = "\r\n\n".join(json.dumps(row, ensure_ascii=ascii) for row in rows)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "READ_BYTES", chunk)
        listing = inputs.list_json(path, 0)
    assert read_all(listing) == rows
    names = [source_name(row) for row in rows]
    assert [listing.source_names[code] for code in listing.source] == names


def test_byte_order_mark_and_whitespace_do_not_matter(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf \n[ {"id": 1} \n,{"id": 2}]\n\n ')
    assert read_all(inputs.list_json(tmp_path / "a.json", 0)) == [{"id": 1}, {"id": 2}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found none"),
        ("[]", "found none"),
        ('[{"id": 1}', "expected , or ] at byte 10"),
        ('[{"id": 1},', "Expecting value at byte 11"),
        ('[{"id": 1} {"id": 2}]', "expected , or ] at byte 10"),
        ('[{"id": 1}] more', r"something follows the end of the list or object at byte 12 \(line 1\), after 1 whole"),
        ("[7, [8], null]", "found 3 values that are no objects"),
        ('{"id": 1}\n{"id": ', r"Expecting value at byte 17 \(line 2\), after 1 whole samples: the file is cut off"),
        ('[\n{"id": 1},\n{"id": "2', r"Unterminated string starting at at byte 20 \(line 3\), after 1 whole samples"),
        ("[" * 100_000, "no objects|recursion|Expecting"),
        ("no json", r"Expecting value at byte 0 \(line 1\), after 0 whole samples"),
        (
            '{"version": 2, "items": "x"}',
            "one object with the keys version, items: it is no sample, and it holds no list",
        ),
        ('{"train": [{"id": 1}], "test": [{"id": 2}]}', "holds 2 lists, under train, test. Give a list of samples"),
        ('{"data": [{"id": 1}, ', r"Expecting value at byte 21 \(line 1\), after 1 whole samples"),
        ('{"id": 1, "conversations": [{"from": "hu', r"Unterminated string starting at at byte 37 .*, after 0 whole"),
        ("\ufeff[]".encode("utf-16").decode("latin-1"), "it is UTF-16: save it as UTF-8"),
    ],
)
def test_what_is_no_list_of_samples_is_an_error_that_names_the_byte(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message) as error:
        inputs.list_json(tmp_path / "a.json", 0)
    assert f"--json {tmp_path / 'a.json'}: " in str(error.value)


def test_listing_100_mb_takes_less_than_100_mb(tmp_path):
    """Peak memory of the process, against one that lists a single sample."""
    turns = json.dumps([{"from": "human", "value": "x" * 500}, {"from": "gpt", "value": "y" * 1000}] * 2)
    with open(tmp_path / "large.json", "w") as file:
        file.write("[" + ",".join(f'{{"id": {n}, "conversations": {turns}}}' for n in range(32_000)) + "]")
    (tmp_path / "small.json").write_text('[{"id": 1}]')
    assert (tmp_path / "large.json").stat().st_size > 95e6
    script = (
        "import sys; from pathlib import Path; from building import inputs;"
        "listing = inputs.list_json(Path(sys.argv[1]), 0);"
        # not ru_maxrss: that of a process begins with what its parent had
        "print(len(listing), Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    found = {}
    for name in ("small", "large"):
        command = [sys.executable, "-c", script, str(tmp_path / f"{name}.json")]
        done = subprocess.run(command, cwd=TOOLS, capture_output=True, text=True, check=True)
        found[name] = tuple(map(int, done.stdout.split()))
    assert found["large"][0] == 32_000
    assert (found["large"][1] - found["small"][1]) * 1024 < 40e6


def write_mixture(folder: Path, *strategies: str) -> Path:
    for number in range(len(strategies)):
        rows = [{"id": f"{number}-{row}", "conversations": []} for row in range(10)]
        (folder / f"{number}.json").write_text(json.dumps(rows))
    entries = "\n".join(f"  - json_path: {n}.json\n    sampling_strategy: '{s}'" for n, s in enumerate(strategies))
    (folder / "mixture.yaml").write_text(f"datasets:\n{entries}\n")
    return folder / "mixture.yaml"


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("all", range(10)),
        ("first:3", range(3)),
        ("first:25%", range(3)),  # rounded up
        ("end:3", range(7, 10)),
        ("end:0", range(0)),
        ("first:99", range(10)),
        ("end:99", range(10)),
    ],
)
def test_sampling_strategies_keep_the_samples_they_name(tmp_path, strategy, expected):
    listing = inputs.list_json(write_mixture(tmp_path, "all", strategy), 0)
    assert [record["id"] for record in read_all(listing)] == [
        *(f"0-{row}" for row in range(10)),
        *(f"1-{row}" for row in expected),
    ]


@pytest.mark.parametrize(("strategy", "count"), [("random:4", 4), ("random:35%", 4), ("40%", 4), ("5", 5)])
def test_random_sampling_is_decided_by_the_seed_and_differs_between_files(tmp_path, strategy, count):
    path = write_mixture(tmp_path, strategy, strategy)
    drawn = [[record["id"] for record in read_all(inputs.list_json(path, seed))] for seed in (0, 0, 7)]
    assert drawn[0] == drawn[1] != drawn[2]
    first, second = ([id[2:] for id in drawn[0] if id.startswith(number)] for number in "01")
    assert len(first) == len(second) == count and first != second
    assert first == sorted(first) and len(set(first)) == count


def test_wrong_mixtures_are_clear_errors(tmp_path):
    for strategy in ("some", "first:", "first:-1", "last:3", "first:3.5"):
        with pytest.raises(ValueError, match=r"sampling_strategy '.*' is not one of all, first:N"):
            inputs.list_json(write_mixture(tmp_path, strategy), 0)
    for text in ("- a\n", "datasets: 7\n", "datasets:\n  - sampling_strategy: all\n", "a: [\n"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match="no mixture `datasets"):
            inputs.list_json(tmp_path / "bad.yaml", 0)


def test_the_hash_tells_inputs_apart(tmp_path):
    hashes = [inputs.list_json(write_mixture(tmp_path, s), 0).sha256 for s in ("all", "first:10", "first:9")]
    hashes.append(inputs.list_json(tmp_path / "0.json", 0).sha256)
    assert len(set(hashes)) == 4


def expectation(folder: Path, **values) -> Path:
    path = folder / "expect.json"
    path.write_text(json.dumps({"total": None, "sources": {}, "complete": False} | values))
    return path


def test_expected_counts_are_checked_and_every_difference_is_named(tmp_path):
    rows = [{"image": f"{source}/a.jpg"} for source in ("coco", "coco", "vg")] + [{}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    listing = inputs.list_json(tmp_path / "a.json", 0)
    assert listing.source_counts() == {"coco": 2, "text": 1, "vg": 1}
    counts = {"coco": 2, "vg": None, "text": 1}
    inputs.check_expected(expectation(tmp_path, total=4, sources=counts, complete=True), listing)
    inputs.check_expected(expectation(tmp_path, about=4), listing)
    with pytest.raises(ValueError, match="4 samples, expected 5; source coco: 2, expected 3; source gqa: 0") as error:
        wrong = {"coco": 3, "gqa": None}
        inputs.check_expected(expectation(tmp_path, total=5, sources=wrong, complete=True), listing)
    assert "source text: 1, expected none; source vg: 1, expected none" in str(error.value)
    with pytest.raises(ValueError, match="4 samples, expected about 5"):
        inputs.check_expected(expectation(tmp_path, about=5), listing)
    for text, message in (("[]", "no file of expected counts"), ("{", "no file of expected counts")):
        (tmp_path / "expect.json").write_text(text)
        with pytest.raises(ValueError, match=f"--expect {tmp_path}/expect.json: {message}"):
            inputs.check_expected(tmp_path / "expect.json", listing)


def test_the_shipped_expectations_add_up():
    files = {path.stem: json.loads(path.read_bytes()) for path in (TOOLS / "expect").glob("*.json")}
    assert set(files) == {"llava-pretrain-558k", "mix665k", "mix1m", "llava-next-data"}
    totals = {name: values["total"] for name, values in files.items()}
    assert totals == {"llava-pretrain-558k": 558_128, "mix665k": 665_298, "mix1m": None, "llava-next-data": 779_289}
    assert sum(files["mix665k"]["sources"].values()) == 665_298 and files["mix665k"]["complete"]
    for values in files.values():
        assert {"total", "sources", "complete"} <= set(values) <= {"about", "total", "sources", "complete", "note"}


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> Path:
    """Two files of the layout of LLaVA-NeXT-Data: embedded images of several kinds, and rows without one."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("parquet")
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "image": datasets.Image(),
            "conversations": [{"from": datasets.Value("string"), "value": datasets.Value("string")}],
            "data_source": datasets.Value("string"),
        }
    )
    for number, kind in enumerate(("JPEG", "PNG")):
        rows = [
            {
                "id": f"{kind}-{row}",
                "image": {"bytes": encoded(kind, 10 * row), "path": None} if row else None,
                "conversations": TURNS if row else [{**TURNS[0], "value": "Hi"}, TURNS[1]],
                "data_source": ("chart", "photo")[row % 2],
            }
            for row in range(5)
        ]
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"train-{number}.parquet")
    return folder


def test_parquet_folder_gives_every_row_with_its_own_image_bytes(parquet, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    listing = list_hub(str(parquet), "train")
    rows = read_all(listing)
    assert [row["id"] for row in rows] == [f"{kind}-{row}" for kind in ("JPEG", "PNG") for row in range(5)]
    assert listing.source_counts() == {"chart": 6, "photo": 4}
    cutter = Cutter(None, SMALL, "webp")
    for number, row in enumerate(rows):
        sample = cutter.make_sample(number, row)
        assert sample.conversations[1] == TURNS[1] and len(sample.images) == (number % 5 > 0)
        assert sample.source == ("chart", "photo")[number % 5 % 2]
        if sample.images:
            kind = row["id"].split("-")[0]
            expected = SMALL.tiles(Image.open(io.BytesIO(encoded(kind, 10 * (number % 5)))))
            assert np.array_equal(decode_strip(sample.images[0].data, 32), expected)


def test_what_is_no_hub_data_set_is_a_clear_error(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.Dataset.from_list([{"a": 1}]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=f"--hf {tmp_path}: no column conversations .*, only a"):
        list_hub(str(tmp_path), "train")
    (tmp_path / "a.parquet").write_bytes(b"broken")
    with pytest.raises(ValueError, match=f"--hf {tmp_path}: "):
        list_hub(str(tmp_path), "train")


def test_shards_of_others_give_their_samples(tmp_path):
    fields = {"id": 7, "conversations": TURNS, "data_source": "charts"}
    members = [
        ("000/a.jpg", encoded("PNG")),  # content decides, not the name
        ("000/a.json", json.dumps(fields).encode()),
        ("b.png", encoded("GIF")),
        ("b.txt", "A red é.".encode()),
        ("c.json", json.dumps({"conversations": TURNS[1:]}).encode()),
    ]
    write_tar(tmp_path / "x.tar", members)
    listing = list_shards(str(tmp_path))
    a, b, c = read_all(listing)
    assert (a["id"], a["source"], a["conversations"], a["image"][0].name) == ("7", "charts", TURNS, "000/a.jpg")
    caption = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A red é."}]
    assert (b["id"], b["source"], b["conversations"]) == ("b", "image", caption)
    assert ("image" in c, c["source"]) == (False, "text")
    assert listing.source_counts() == {"charts": 1, "image": 1, "text": 1}
    assert Cutter(None, SMALL).make_sample(0, a).images[0].width == 40


def test_damaged_shards_of_others_are_all_named(tmp_path):
    for name in "abc":
        write_tar(tmp_path / f"{name}.tar", [("k.jpg", encoded("JPEG")), ("k.txt", b"caption")])
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[:700])
    (tmp_path / "b.tar").write_bytes(data[:512].replace(b"k.jpg", b"x.jpg") + data[512:])
    with pytest.raises(ValueError, match="2 damaged shard") as error:
        list_shards(str(tmp_path))
    assert "a.tar: member 'k.jpg' is cut off: 188 of" in str(error.value)
    assert "b.tar: no tar header at byte 0" in str(error.value)
    with pytest.raises(ValueError, match=r"holds no \.tar files"):
        list_shards(str(tmp_path / "nowhere"))


def test_tiles_are_not_cut_a_second_time(tmp_path):
    description = {"id": "a", "source": "s", "conversations": TURNS, "images": [
        {"width": 40, "height": 30, "rows": 1, "cols": 2}
    ]}  # fmt: skip
    write_tar(tmp_path / "x.tar", [("k.0.jpg", encoded("JPEG")), ("k.json", json.dumps(description).encode())])
    listing = list_shards(str(tmp_path))
    with pytest.raises(BadSample, match="holds tiles already"):
        listing.reader.read(listing.addresses[0])


def test_shards_of_others_become_shards_of_tiles(tmp_path):
    picture = Image.new("RGB", (40, 30), (200, 10, 10))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    (tmp_path / "raw").mkdir()
    with webdataset.TarWriter(str(tmp_path / "raw" / "x.tar"), encoder=False) as tar:
        for number in range(6):
            broken = number == 4
            tar.write(
                {"__key__": f"k{number}", "png": b"no picture" if broken else buffer.getvalue(), "txt": b"A cap."}
            )
    options = ["--shards", tmp_path / "raw", "--out", tmp_path / "out", *GEOMETRY, "--workers", 0]
    assert tool_result(*options, "--max_rejected_share", 0.2, "--codec", "webp").returncode == 0
    stored = samples(tmp_path / "out")
    assert set(stored) == {f"k{number}" for number in (0, 1, 2, 3, 5)}
    assert np.array_equal(decode_strip(stored["k3"].images[0].data, 32), SMALL.tiles(picture))
    assert stored["k3"].conversations == turns("<image>", "A cap.")
    (entry,) = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    assert "image cannot be read" in entry["reason"]
