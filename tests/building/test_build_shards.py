"""The build tool, as a user runs it: whole data sets that do not depend on the workers, and reports of what is bad."""

import hashlib
import json
import re

import numpy as np
import pytest
import webdataset
from PIL import Image

from llava_next.anyres import HF_336, ORIGINAL_336, AnyRes
from llava_next.data.format.index import read_dataset
from llava_next.data.format.shards import decode_strip
from support.builds import (
    GEOMETRY,
    SMALL,
    TOOL,
    checksums,
    make_inputs,
    record,
    run,
    run_process,
    samples,
    turns,
    write_json,
)


def test_the_same_bytes_with_any_number_of_workers(inputs, built, tmp_path):
    expected = checksums(built)
    assert list(expected) == [
        "dataset.json",
        "index.parquet",
        "rejected.jsonl",
        *(f"shard-00000{n}.tar" for n in range(3)),
    ]
    result = run_process(inputs, tmp_path / "out", "--workers", 2)  # `built` is made without worker processes
    assert result.returncode == 0, result.stderr
    assert checksums(tmp_path / "out") == expected


def test_every_record_is_stored_with_the_tiles_of_its_pictures(inputs, built):
    records, stored = json.loads((inputs / "train.json").read_text()), samples(built)
    assert set(stored) == {str(record["id"]) for record in records}
    for row, source in enumerate(records):
        sample = stored[str(source["id"])]
        assert sample.key == f"{row:09d}"
        assert sample.conversations == source["conversations"]
        names = source.get("image") or []
        names = [names] if isinstance(names, str) else names
        assert sample.source == (names[0].split("/")[0] if names else "text")
        assert len(sample.images) == len(names)
        for name, strip in zip(names, sample.images, strict=True):
            image = Image.open(inputs / "images" / name)
            assert (strip.width, strip.height) == image.size and (strip.rows, strip.cols) == SMALL.grid(*image.size)
            if strip.ext == "webp":
                assert np.array_equal(decode_strip(strip.data, 32), SMALL.tiles(image))


def test_order_in_the_shards_is_a_shuffle_that_the_seed_decides(inputs, built, tmp_path):
    def keys(folder):
        url = f"file:{folder}/shard-{{000000..000002}}.tar"
        return [sample["__key__"] for sample in webdataset.WebDataset(url, shardshuffle=False)]

    run(inputs, tmp_path / "seed1", "--seed", 1)
    assert sorted(keys(built)) == sorted(keys(tmp_path / "seed1")) == [f"{row:09d}" for row in range(40)]
    assert keys(built) != keys(tmp_path / "seed1") != sorted(keys(built)) != keys(built)


def test_jsonl_gives_the_same_shards(inputs, built, tmp_path):
    lines = tmp_path / "train.json"
    lines.write_text("\n".join(json.dumps(r) for r in json.loads((inputs / "train.json").read_text())) + "\n")
    (tmp_path / "images").symlink_to(inputs / "images")
    assert run(tmp_path, tmp_path / "out").returncode == 0
    ours, theirs = checksums(tmp_path / "out"), checksums(built)
    assert all(ours[name] == theirs[name] for name in ours if name != "dataset.json")


def test_a_finished_build_is_not_repeated_and_never_mixed_with_another(inputs, built, monkeypatch):
    before = checksums(built), (built / "shard-000000.tar").stat().st_mtime_ns
    again = run(inputs, built)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    monkeypatch.setattr("build_shards.list_input", None)  # refused before the input is listed
    other = run(inputs, built, "--seed", 5)
    assert other.returncode == 1 and "holds a data set from other input or arguments" in other.stderr
    other = run(inputs, built / "shard-000000.tar")
    assert other.returncode == 1 and "shard-000000.tar is no folder; give another place" in other.stderr
    assert (checksums(built), (built / "shard-000000.tar").stat().st_mtime_ns) == before


def test_one_corrupt_image_in_100_changes_nothing_for_the_rest(tmp_path):
    records = make_inputs(tmp_path, 100)
    assert run(tmp_path, tmp_path / "clean").returncode == 0
    path = tmp_path / "images" / records[42]["image"]
    path.write_bytes(path.read_bytes()[:100])
    result = run(tmp_path, tmp_path / "corrupt")
    assert result.returncode == 0 and "1 samples rejected" in result.stdout
    (entry,) = map(json.loads, (tmp_path / "corrupt" / "rejected.jsonl").read_text().splitlines())
    assert entry["id"] == "s42" and entry["file"] == records[42]["image"]
    assert "image cannot be read" in entry["reason"]
    clean, corrupt = samples(tmp_path / "clean"), samples(tmp_path / "corrupt")
    assert clean.pop("s42") and corrupt == clean


BAD = [
    ({"image": "coco/missing.png"}, "no such image file"),
    ({"image": "notes.png"}, "image cannot be read"),
    ({"image": "../secret.png"}, "path leaves the image root"),
    ({"image": "coco/../../secret.png"}, "path leaves the image root"),
    ({"image": "/etc/passwd"}, "path leaves the image root"),
    ({"image": "coco"}, "no such image file"),
    ({"image": 7}, "neither a path nor a list"),
    ({"image": "coco/0\0.png"}, "no such image file|image cannot be read"),
    ({"image": "bomb.png"}, "DecompressionBomb"),
    ({"image": "drawing.eps"}, "image cannot be read"),
    ({"conversations": [*turns(), *turns()[:1], *turns()[:1]]}, "turn 4 is from 'human' where 'gpt' is due"),
    ({"conversations": turns(answer=" \n")}, r"turn 2 \(gpt\) is empty"),
    ({"conversations": turns()[:1]}, r"ends with turn 1 \(human\)"),
    ({"conversations": []}, "no human turn"),
    ({"conversations": [7]}, "turn 1 is 7"),
    ({"conversations": "hello"}, "not a list of turns"),
    ({"conversations": [{"from": "human"}]}, "turn 1 holds None"),
    ({"conversations": turns("What?")}, "1 image.s. but 0 <image>"),
    ({"conversations": [*turns(), *turns()]}, "1 image.s. but 2 <image>"),
    ({"conversations": turns("\ud83d <image>")}, "half a surrogate pair"),
]


def test_every_kind_of_bad_sample_is_reported_with_its_reason(tmp_path):
    records = make_inputs(tmp_path, 19)
    (tmp_path / "secret.png").write_bytes((tmp_path / "images" / records[0]["image"]).read_bytes())
    (tmp_path / "images" / "notes.png").write_text("not a picture")
    (tmp_path / "images" / "drawing.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    Image.new("1", (14_000, 14_000)).save(tmp_path / "images" / "bomb.png")
    bad = [record(100 + number, **{"image": "coco/0.png"} | changes) for number, (changes, _) in enumerate(BAD)]
    write_json(tmp_path, records + bad)
    result = run(tmp_path, tmp_path / "out", "--max_rejected_share", 0.6)
    assert result.returncode == 0, result.stderr
    report = {entry["id"]: entry for entry in map(json.loads, (tmp_path / "out" / "rejected.jsonl").open())}
    assert set(report) == {f"s{100 + number}" for number in range(len(BAD))}
    for number, (_, reason) in enumerate(BAD):
        entry = report[f"s{100 + number}"]
        assert re.search(reason, entry["reason"]), entry
        assert entry["file"] == bad[number]["image"]
    assert set(samples(tmp_path / "out")) == {f"s{number}" for number in range(19)}


def test_too_many_bad_samples_fail_after_the_report_and_leave_no_data_set(tmp_path):
    records = make_inputs(tmp_path, 20)
    for row in (3, 4):
        (tmp_path / "images" / records[row]["image"]).unlink()
    result = run(tmp_path, tmp_path / "out")
    assert result.returncode == 1
    assert "2 of 20 samples rejected" in result.stderr and "no such image file (2)" in result.stderr
    assert len((tmp_path / "out" / "rejected.jsonl").read_text().splitlines()) == 2
    with pytest.raises(ValueError, match=r"no dataset\.json"):
        read_dataset(tmp_path / "out")
    assert run(tmp_path, tmp_path / "out", "--max_rejected_share", 0.2).returncode == 0
    assert len(samples(tmp_path / "out")) == 18


def test_images_are_opened_by_content_not_by_name(tmp_path):
    records = make_inputs(tmp_path, 4)
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 50, 3), np.uint8))
    formats = {"GIF": picture.quantize(16), "BMP": picture, "WEBP": picture, "JPEG": picture.convert("CMYK")}
    for number, (name, image) in enumerate(formats.items()):
        image.save(tmp_path / "images" / records[number]["image"], format=name)
    assert run(tmp_path, tmp_path / "out", "--codec", "webp").returncode == 0
    stored = samples(tmp_path / "out")
    for number, source in enumerate(records):
        expected = SMALL.tiles(Image.open(tmp_path / "images" / source["image"]))
        assert np.array_equal(decode_strip(stored[f"s{number}"].images[0].data, 32), expected)


def test_every_shard_opens_with_plain_webdataset(built):
    url = f"file:{built}/shard-{{000000..000002}}.tar"
    stored, seen = samples(built), 0
    for sample in webdataset.WebDataset(url, shardshuffle=False).decode("rgb8"):
        strips = stored[sample["json"]["id"]].images
        assert sample["json"]["conversations"] == stored[sample["json"]["id"]].conversations
        for number, strip in enumerate(strips):
            assert sample[f"{number}.{strip.ext}"].shape == ((1 + strip.rows * strip.cols) * 32, 32, 3)
        seen += 1
    assert seen == 40


def unusual_pictures() -> dict[str, tuple[Image.Image, dict]]:
    """Pictures as published data sets hold them, and how to save them."""
    colors = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 50, 3), np.uint8))
    grey16 = Image.fromarray(np.random.default_rng(2).integers(0, 65536, (40, 50), np.uint16))
    clear = colors.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    other, rotated = Image.new("P", (50, 40)), Image.Exif()
    rotated[0x0112] = 6  # orientation: turn by 90 degrees
    return {
        "cmyk": (colors.convert("CMYK"), {"format": "JPEG"}),
        "palette": (colors.quantize(16), {"format": "PNG"}),
        "grey": (colors.convert("L"), {"format": "JPEG"}),
        "grey16": (grey16, {"format": "PNG"}),
        "alpha": (clear, {"format": "PNG"}),
        "grey_alpha": (clear.convert("LA"), {"format": "PNG"}),
        "one_bit": (colors.convert("1"), {"format": "TIFF"}),
        "animated": (colors.quantize(8), {"format": "GIF", "save_all": True, "append_images": [other]}),
        "rotated": (colors, {"format": "JPEG", "exif": rotated}),
    }  # fmt: skip


def test_pixels_are_those_of_a_plain_convert_to_rgb(tmp_path):
    """As the original: EXIF orientation ignored, transparency dropped, first frame. 16-bit grey: the upper bits."""
    pictures, records = unusual_pictures(), []
    (tmp_path / "images").mkdir()
    for name, (picture, options) in pictures.items():
        picture.save(tmp_path / "images" / f"{name}.jpg", **options)  # by content, whatever the name
        records.append(record(len(records), f"{name}.jpg", id=name))
    write_json(tmp_path, records)
    assert run(tmp_path, tmp_path / "out", "--codec", "webp").returncode == 0
    stored = samples(tmp_path / "out")
    for name in pictures:
        image = Image.open(tmp_path / "images" / f"{name}.jpg")
        if name == "grey16":
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
        assert image.size == (50, 40)
        expected = SMALL.tiles(image.convert("RGB"))
        assert np.array_equal(decode_strip(stored[name].images[0].data, 32), expected), name


def test_links_inside_the_image_root_are_followed(tmp_path):
    """Roots are put together of links; what a data set may not do is to name what lies outside."""
    make_inputs(tmp_path, 4)
    (tmp_path / "images" / "coco").rename(tmp_path / "elsewhere")
    (tmp_path / "images" / "coco").symlink_to(tmp_path / "elsewhere")
    assert run(tmp_path, tmp_path / "out").returncode == 0
    assert len(samples(tmp_path / "out")) == 4


def test_one_source_name_for_all_and_expected_counts(inputs, tmp_path):
    expect = tmp_path / "expect.json"
    expect.write_text(json.dumps({"total": 41, "sources": {"coco": 20}, "complete": False}))
    wrong = run(inputs, tmp_path / "out", "--expect", expect)
    assert wrong.returncode == 1 and "40 samples, expected 41" in wrong.stderr and not (tmp_path / "out").exists()
    expect.write_text(json.dumps({"total": 40, "sources": {"captions": 40}, "complete": True}))
    assert run(inputs, tmp_path / "out", "--expect", expect, "--source", "captions").returncode == 0
    assert read_dataset(tmp_path / "out")[0].sources == {"captions": 40}


def test_tar_files_of_others_are_never_touched(inputs, tmp_path):
    (tmp_path / "shard-000000.tar").write_bytes(b"precious")
    result = run(inputs, tmp_path)
    assert result.returncode == 1 and "tar files that this tool did not write" in result.stderr
    assert checksums(tmp_path) == {"shard-000000.tar": hashlib.sha256(b"precious").hexdigest()}


@pytest.mark.parametrize(
    ("arguments", "geometry", "message"),
    [
        ((), [], "give --model or --tower, or all of"),
        ((), ["--tile_size", "32", "--patch_size", "8", "--pinpoints", "32,64"], "expected HEIGHTxWIDTH"),
        ((), ["--tile_size", "32", "--patch_size", "8", "--pinpoints", "33x64"], "not a multiple of tile_size 32"),
        (("--json", "nowhere.json"), GEOMETRY, "--json nowhere.json: No such file"),
        (("--json", TOOL), GEOMETRY, "neither a JSON list nor one JSON object a line"),
        (("--images", "nowhere"), GEOMETRY, "--images nowhere is not a folder"),
        (("--workers", "-1"), GEOMETRY, "--workers must be 0 or more"),
        (("--surprise",), GEOMETRY, "unrecognized arguments"),
    ],
)
def test_wrong_arguments_are_clear_errors(inputs, tmp_path, arguments, geometry, message):
    result = run(inputs, tmp_path / "out", *arguments, geometry=geometry)
    assert result.returncode != 0 and message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("pinpoints", "expected"), [("original", ORIGINAL_336), ("hf", HF_336)])
def test_towers_have_the_published_geometry(tmp_path, pinpoints, expected):
    make_inputs(tmp_path, 2)
    result = run(tmp_path, tmp_path / "out", geometry=["--tower", "clip-336", "--pinpoints", pinpoints])
    assert result.returncode == 0, result.stderr
    assert read_dataset(tmp_path / "out")[0].anyres == AnyRes(336, 14, expected)


def test_turns_with_role_and_content_are_stored_as_from_and_value(tmp_path):
    (source,) = make_inputs(tmp_path, 1)
    source["conversations"] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>\nWhat?"},
        {"role": "assistant", "content": "This."},
    ]
    write_json(tmp_path, [source])
    assert run(tmp_path, tmp_path / "out").returncode == 0
    expected = [{"from": turn["role"], "value": turn["content"]} for turn in source["conversations"]]
    assert samples(tmp_path / "out")["s0"].conversations == expected
