"""The demo data set: same arguments, same bytes; answers are what the pictures show; no scan on both sides."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_next.anyres import AnyRes
from llava_next.model.folders.dry import DEMO_PINPOINTS

pytest.importorskip("sklearn")
SCRIPT = Path(__file__).parents[2] / "data_tools" / "make_digits.py"
sys.path.insert(0, str(SCRIPT.parent))
import make_digits  # noqa: E402  (a script beside the package, not a module of it)

# The geometry the demo model is trained with; pinpoints are (height, width).
DEMO_ANYRES = AnyRes(32, 16, DEMO_PINPOINTS)
TRAIN, HELD_OUT, SEED = 2300, 300, 5  # three folders of training pictures, the last one not full


def file_hashes(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    assert make_digits.build(out, TRAIN, HELD_OUT, SEED)
    return out


@pytest.fixture(scope="module")
def records(folder):
    return {split: json.loads((folder / f"{split}.json").read_text()) for split in make_digits.SPLITS}


@pytest.fixture(scope="module")
def scans():
    return make_digits.load_scans()


@pytest.fixture(scope="module")
def pools(scans):
    return make_digits.split_scans(scans.labels, SEED)


@pytest.fixture(scope="module")
def samples(scans, pools):
    """(record, composition) of every sample that has a picture, made again from seed, split and index alone."""
    counts = {"train": TRAIN, "held_out": HELD_OUT}
    made = {s: [make_digits.make_sample(s, i, SEED, scans, pools[s]) for i in range(n)] for s, n in counts.items()}
    return {s: [(record, composition) for record, composition, _ in entries] for s, entries in made.items()}


def pictured(records):
    return [record for record in records if "image" in record]


def first_answer(record):
    return record["conversations"][1]["value"]


def test_same_arguments_give_the_same_bytes_with_any_number_of_workers(folder, tmp_path):
    arguments = [f"--out={tmp_path}", f"--train={TRAIN}", f"--held_out={HELD_OUT}", f"--seed={SEED}", "--workers=2"]
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=True)
    assert f"made {TRAIN} training and {HELD_OUT} held-out samples" in done.stdout
    assert f"{TRAIN + HELD_OUT}/{TRAIN + HELD_OUT} samples" in done.stderr  # plain lines when it is no terminal
    assert "\x1b" not in done.stderr
    assert file_hashes(tmp_path) == file_hashes(folder)


def test_another_seed_gives_other_pictures_and_another_split(scans, pools):
    other = make_digits.split_scans(scans.labels, SEED + 1)
    assert set(other["held_out"]) != set(pools["held_out"])
    first, second = (
        make_digits.make_sample("held_out", 0, seed, scans, pools["held_out"]) for seed in (SEED, SEED + 1)
    )
    assert first[1] != second[1]


def test_folder_holds_the_two_lists_the_pictures_and_the_manifest_only(folder, records):
    pictures = {"images/" + record["image"] for split in records for record in pictured(records[split])}
    assert set(file_hashes(folder)) == pictures | {"train.json", "held_out.json", "captions.json", "digits.json"}
    folders = Counter(str(Path(picture).parent) for picture in pictures)
    assert set(folders) == {"images/train/000", "images/train/001", "images/train/002", "images/held_out/000"}
    assert max(folders.values()) <= 1000


def test_train_and_held_out_share_no_scan(scans, pools, samples):
    assert len(pools["train"]) == 1437 and len(pools["held_out"]) == 360
    assert not set(pools["train"]) & set(pools["held_out"])
    for split in make_digits.SPLITS:
        used = {scan for _, composition in samples[split] if composition for scan in composition.scans}
        assert used <= set(pools[split].tolist())
        assert len(used) > 0.75 * len(pools[split])
        shares = np.bincount(scans.labels[pools[split]], minlength=10) / len(pools[split])
        assert np.abs(shares - np.bincount(scans.labels) / len(scans.labels)).max() < 0.005


def test_answers_are_the_composed_digits_in_reading_order(scans, records, samples):
    for split in make_digits.SPLITS:
        for written, (record, composition) in zip(records[split], samples[split], strict=True):
            assert written == record
            if composition is None:
                continue
            digits = first_answer(record)
            assert digits == "".join(str(label) for label in scans.labels[list(composition.scans)])
            expected = {"How many digits?": str(len(digits)), "The first one?": digits[0], "The last one?": digits[-1]}
            turns = [turn["value"] for turn in record["conversations"]]
            assert turns[0] == "<image>\nWhat number is written?"
            follow_ups = dict(zip(turns[2::2], turns[3::2], strict=True))
            assert len(follow_ups) == len(turns) // 2 - 1  # no question twice
            assert all(expected[question] == answer for question, answer in follow_ups.items())


@pytest.mark.parametrize(("rows", "cols"), list(make_digits.LAYOUTS))
def test_pictures_read_row_by_row(rows, cols):
    levels = np.linspace(40, 255, rows * cols).astype(np.uint8)
    plates = make_digits.Scans(
        np.tile(levels[:, None, None], (1, 8, 8)), np.arange(rows * cols)
    )  # one grey per "digit"
    composition = make_digits.Composition(rows, cols, tuple(range(rows * cols)))
    for seed in range(20):
        picture = np.asarray(make_digits.render(composition, plates, np.random.default_rng(seed)))
        bands = [np.array_split(band, cols, axis=1) for band in np.array_split(picture, rows, axis=0)]
        centres = [int(cell[cell.shape[0] // 2, cell.shape[1] // 2]) for band in bands for cell in band]
        assert centres == sorted(set(centres))


def test_roles_alternate_and_only_the_first_turn_holds_the_image_token(records):
    ids = [record["id"] for split in records for record in records[split]]
    assert len(ids) == len(set(ids)) == TRAIN + HELD_OUT
    for record in records["train"] + records["held_out"]:
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2) and turns
        tokens = [turn["value"].count("<image>") for turn in turns]
        assert tokens == [int("image" in record)] + [0] * (len(turns) - 1)
        assert set(record) - {"image"} == {"id", "conversations", "source"}


def test_shares_are_the_stated_ones(records):
    pictures = pictured(records["train"])
    assert sum(len(first_answer(record)) <= 2 for record in pictures) / len(pictures) == pytest.approx(0.52, abs=0.04)
    assert set(Counter(len(first_answer(record)) for record in pictures)) == {1, 2, 3, 4, 5, 6}
    assert 1 - len(pictures) / TRAIN == pytest.approx(0.03, abs=0.012)
    for split in records:
        several = [len(record["conversations"]) > 2 for record in pictured(records[split])]
        assert np.mean(several) == pytest.approx(0.3, abs=0.08)
    assert sum(make_digits.LAYOUTS.values()) == pytest.approx(1)


def test_held_out_samples_all_have_a_picture(records):
    assert len(pictured(records["held_out"])) == len(records["held_out"]) == HELD_OUT


def test_text_only_samples_are_right_and_of_one_closed_family(records):
    texts = [record for record in records["train"] if "image" not in record]
    assert texts and {record["source"] for record in texts} == {"digits_text"}
    for record in texts:
        question, answer = (turn["value"] for turn in record["conversations"])
        *words, number = question.rstrip("?").split()
        assert " ".join(words) in ("What comes after", "What comes before") and 1 <= int(number) <= 98
        assert int(answer) == int(number) + (1 if words[-1] == "after" else -1)


def test_every_picture_opens_and_has_cells_of_28_to_31_pixels(folder, samples):
    for split in make_digits.SPLITS:
        for record, composition in samples[split]:
            if composition is None:
                continue
            with Image.open(folder / "images" / record["image"]) as image:
                image.load()
            assert image.mode == "L" and image.format == "PNG"
            width, height = image.size
            assert 28 * composition.cols <= width <= 31 * composition.cols
            assert 28 * composition.rows <= height <= 31 * composition.rows
            ground, ink = np.percentile(image, [5, 99.5])
            assert ground <= 50 and ink > 120


@pytest.mark.parametrize("layout", list(make_digits.LAYOUTS))
def test_every_layout_gets_a_canvas_with_a_tile_for_each_digit(scans, layout):
    rows, cols = layout
    composition = make_digits.Composition(rows, cols, tuple(range(rows * cols)))
    for seed in range(20):
        width, height = make_digits.render(composition, scans, np.random.default_rng(seed)).size
        assert DEMO_ANYRES.grid(width, height) == layout


def test_a_second_run_changes_nothing_and_says_so(folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    make_digits.main([f"--out={folder}", f"--train={TRAIN}", f"--held_out={HELD_OUT}", f"--seed={SEED}"])
    assert "complete already, nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("damage", ["picture missing", "manifest missing", "list changed"])
def test_an_incomplete_folder_is_made_whole_again(tmp_path, damage):
    make_digits.build(tmp_path, 20, 5, 0)
    before = file_hashes(tmp_path)
    victim = {"picture missing": "images/held_out/000/000003.png", "manifest missing": "digits.json"}
    if damage in victim:
        (tmp_path / victim[damage]).unlink()
    else:
        (tmp_path / "train.json").write_text("[]")
    assert make_digits.build(tmp_path, 20, 5, 0)
    assert file_hashes(tmp_path) == before
    assert not make_digits.build(tmp_path, 20, 5, 0)


def test_a_folder_made_with_other_arguments_is_left_alone(folder):
    before = file_hashes(folder)
    with pytest.raises(SystemExit, match=r"made with other arguments.*Give another --out"):
        make_digits.main([f"--out={folder}", "--train=10"])
    assert file_hashes(folder) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5, 0, 1), "--train is 0; it must be 1 to 1000000"),
        ((5, -1, 0, 1), "--held_out is -1"),
        ((5, 5, -1, 1), "--seed is -1"),
        ((5, 5, 0, 0), "--workers is 0"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_digits.build(tmp_path / "new", *arguments)
    assert not (tmp_path / "new").exists()
