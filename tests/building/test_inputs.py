"""What a build reads besides records in files: expected counts, parquet and foreign shards."""

import io
import json
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import webdataset
from PIL import Image

from building import inputs
from building.cutting import Cutter
from building.embedded import list_hub, list_shards
from llava_next.anyres import AnyRes
from llava_next.data.format.shards import decode_strip
from llava_next.data.format.tar import BadSample
from llava_next.data.inputs.listing import Listing, list_json
from support.builds import GEOMETRY, samples, tool_result, turns

TOOLS = Path(inputs.__file__).parents[1]
SMALL = AnyRes(32, 8, [(32, 64), (64, 32), (64, 64)])
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This, \u00e9 \U0001f41e."}]


def read_all(listing: Listing) -> list[dict]:
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


def expectation(folder: Path, **values) -> Path:
    path = folder / "expect.json"
    path.write_text(json.dumps({"total": None, "sources": {}, "complete": False} | values))
    return path


def test_expected_counts_are_checked_and_every_difference_is_named(tmp_path):
    rows = [{"image": f"{source}/a.jpg"} for source in ("coco", "coco", "vg")] + [{}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    listing = list_json(tmp_path / "a.json", 0)
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
    cutter = Cutter(None, SMALL, codec="webp")
    for number, row in enumerate(rows):
        sample = cutter.make_sample(number, row)
        assert sample.conversations[1] == TURNS[1] and len(sample.images) == (number % 5 > 0)
        assert sample.source == ("chart", "photo")[number % 5 % 2]
        if sample.images:
            kind = row["id"].split("-")[0]
            expected = SMALL.tiles(Image.open(io.BytesIO(encoded(kind, 10 * (number % 5)))))
            assert np.array_equal(decode_strip(sample.images[0].data, 32), expected)


def test_a_hub_data_set_out_of_reach_says_how_to_fetch_it(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'org/none' on the Hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=unreachable))
    with pytest.raises(ValueError, match=r"--hf org/none: ConnectionError: .* `hf download org/none --repo"):
        list_hub("org/none", "train")


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
