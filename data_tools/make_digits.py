"""Makes the demo data set: scanned digits in rows, columns and grids, as LLaVA JSON and PNG files.

    python data_tools/make_digits.py --out demo/digits --train 16000 --held_out 500 --seed 0

The scans are scikit-learn's `load_digits`: 1,797 real ones of 8 x 8 pixels, from the UCI Optical Recognition of
Handwritten Digits set. A picture holds one to six of them in cells of 28 to 31 pixels. With tiles of 32 pixels and a
canvas for every layout, AnyRes gives each digit a tile of its own, while the base tile squeezes a row of six to 5
pixels a digit. Training and held-out pictures share no scan. Needs scikit-learn; no network.

What it writes:
    DIR/train.json, DIR/held_out.json             lists of {id, image, conversations, source}
    DIR/captions.json                             training pictures of one digit, with its caption, for stage 1
    DIR/images/{train,held_out}/NNN/NNNNNN.png    8-bit grey; `image` is relative to DIR/images
    DIR/digits.json                               the arguments and hashes, written last: without it DIR is half built

The same arguments give the same bytes, whatever the number of workers. (PNG files of other Pillow versions may be
compressed otherwise; their pixels are the same.)
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from llava_next.paths import output_folder
from llava_next.versions import install

FORMAT_VERSION = 1
MANIFEST = "digits.json"
SPLITS = ("train", "held_out")
CAPTIONS, CAPTION_SAMPLES = "captions", 6000
HELD_OUT_SCANS = 360  # of 1,797, drawn with the same share of every digit
FOLDER_SIZE = 1000

# (rows, columns): share of the pictures. One or two digits are half: a model reads those first.
LAYOUTS = {
    (1, 1): 0.26, (1, 2): 0.18, (2, 1): 0.08,
    (1, 3): 0.10, (3, 1): 0.05,
    (1, 4): 0.07, (4, 1): 0.04, (2, 2): 0.06,
    (1, 5): 0.05, (5, 1): 0.03,
    (1, 6): 0.03, (6, 1): 0.02, (2, 3): 0.015, (3, 2): 0.015,
}  # fmt: skip
CELL_PIXELS = (28, 31)
TILT_DEGREES = 12
MULTI_TURN_SHARE = 0.3
TEXT_ONLY_SHARE = 0.03  # of the training samples; held-out ones all have a picture

QUESTION = "What number is written?"


@dataclass(frozen=True)
class Scans:
    """The scanned digits: `pixels` uint8 [N, 8, 8], 0 = paper and 255 = ink; `labels` int64 [N], 0 to 9."""

    pixels: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Composition:
    """What a picture shows: `scans` are indices into `Scans`, in reading order (row by row)."""

    rows: int
    cols: int
    scans: tuple[int, ...]

    def digits(self, labels: np.ndarray) -> str:
        """The digits in reading order, such as "407"."""
        return "".join(str(labels[scan]) for scan in self.scans)

    @property
    def source(self) -> str:
        """Name of the picture's kind, as `source` in the JSON: losses can be told apart by it."""
        if len(self.scans) == 1:
            return "digits_single"
        return "digits_row" if self.rows == 1 else "digits_column" if self.cols == 1 else "digits_grid"


def load_scans() -> Scans:
    """The scans of scikit-learn's `load_digits` (part of the package, nothing is downloaded).

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(f"the digits come from scikit-learn, which is missing: {install('demo')}") from None
    data = load_digits()
    return Scans(np.round(data.images * (255 / 16)).astype(np.uint8), data.target.astype(np.int64))


def split_scans(labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Disjoint scan indices for each of `SPLITS`, with every digit in proportion: 1,437 and 360."""
    from sklearn.model_selection import train_test_split

    train, held_out = train_test_split(
        np.arange(len(labels)), test_size=HELD_OUT_SCANS, stratify=labels, random_state=seed
    )
    return {"train": np.sort(train), "held_out": np.sort(held_out)}


def sample_rng(seed: int, split: str, index: int) -> np.random.Generator:
    """The one source of randomness of a sample, so that neither order nor number of workers matters."""
    return np.random.default_rng((seed, SPLITS.index(split), index))


def compose(rng: np.random.Generator, pool: np.ndarray) -> Composition:
    """Draws a layout by its share, and its digits from the scans in `pool`."""
    rows, cols = list(LAYOUTS)[rng.choice(len(LAYOUTS), p=list(LAYOUTS.values()))]
    return Composition(rows, cols, tuple(int(scan) for scan in rng.choice(pool, rows * cols)))


def render(composition: Composition, scans: Scans, rng: np.random.Generator) -> Image.Image:
    """Draws a composition: light ink on a dark ground, 8-bit grey, `cols * cell` x `rows * cell` pixels.

    Cell, brightness, and the size, tilt and place of every digit in its cell vary a little. The ground is dark as
    AnyRes' padding is, so the picture's border is no edge to learn.
    """
    cell = int(rng.integers(CELL_PIXELS[0], CELL_PIXELS[1] + 1))
    ground, ink = rng.uniform(0, 50), rng.uniform(190, 255)
    coverage = np.zeros((composition.rows * cell, composition.cols * cell))
    for position, scan in enumerate(composition.scans):
        row, col = divmod(position, composition.cols)
        size = round(cell * rng.uniform(0.75, 0.95))
        y, x = np.array([row * cell, col * cell]) + rng.integers(0, cell - size + 1, 2)
        # Two calls, because the order of the two passes of one call depends on the Pillow version.
        digit = Image.fromarray(scans.pixels[scan]).resize((size, 8), Image.Resampling.BICUBIC)
        digit = digit.resize((size, size), Image.Resampling.BICUBIC)
        digit = digit.rotate(rng.uniform(-TILT_DEGREES, TILT_DEGREES), Image.Resampling.BICUBIC)
        coverage[y : y + size, x : x + size] = np.asarray(digit) / 255
    return Image.fromarray(np.round(ground + (ink - ground) * coverage).astype(np.uint8))


def picture_conversation(digits: str, rng: np.random.Generator) -> list[dict[str, str]]:
    """The question about the whole number; in `MULTI_TURN_SHARE` of the cases one to three more after it."""
    turns = [(f"<image>\n{QUESTION}", digits)]
    if rng.random() < MULTI_TURN_SHARE:
        more = [
            ("How many digits?", str(len(digits))),
            ("The first one?", digits[0]),
            ("The last one?", digits[-1]),
        ]
        turns += [more[i] for i in rng.permutation(len(more))[: rng.integers(1, len(more) + 1)]]
    return _conversation(turns)


def text_conversation(rng: np.random.Generator) -> list[dict[str, str]]:
    """One question without a picture, of a small closed family: the neighbour of a number from 1 to 98."""
    number = int(rng.integers(1, 99))
    word, answer = ("after", number + 1) if rng.random() < 0.5 else ("before", number - 1)
    return _conversation([(f"What comes {word} {number}?", str(answer))])


def _conversation(turns: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for turn in turns for role, text in zip(("human", "gpt"), turn, strict=True)]


def caption(record: dict) -> dict:
    """A training picture for stage 1: only the question and its answer, the digit."""
    return record | {"id": f"caption-{record['id']}", "conversations": record["conversations"][:2]}


def make_sample(split: str, index: int, seed: int, scans: Scans, pool: np.ndarray):
    """One sample, a pure function of its arguments.

    Returns:
        record: the JSON entry.
        composition: what its picture shows, None for a text-only sample.
        image: the picture, None for a text-only sample.
    """
    rng = sample_rng(seed, split, index)
    record = {"id": f"{split}-{index:06d}"}
    if split == "train" and rng.random() < TEXT_ONLY_SHARE:
        return record | {"conversations": text_conversation(rng), "source": "digits_text"}, None, None
    composition = compose(rng, pool)
    record["image"] = f"{split}/{index // FOLDER_SIZE:03d}/{index:06d}.png"
    record["conversations"] = picture_conversation(composition.digits(scans.labels), rng)
    record["source"] = composition.source
    return record, composition, render(composition, scans, rng)


def make_folder(job: tuple[str, int, int], out: Path, seed: int, scans: Scans, pools: dict) -> list[dict]:
    """Writes the pictures of samples `start` to `stop` of a split, given as job = (split, start, stop).

    Returns:
        Their JSON entries, in order.
    """
    split, start, stop = job
    (out / "images" / split / f"{start // FOLDER_SIZE:03d}").mkdir(parents=True, exist_ok=True)
    records = []
    for index in range(start, stop):
        record, _, image = make_sample(split, index, seed, scans, pools[split])
        if image is not None:
            image.save(out / "images" / record["image"])
        records.append(record)
    return records


def build(out: Path, train: int, held_out: int, seed: int, workers: int = 1) -> bool:
    """Makes the data set in folder `out`, with `train` + `held_out` samples.

    Returns:
        False when `out` already holds exactly this, complete; nothing is touched then.

    Raises:
        ValueError: an argument is out of range, scikit-learn is missing, or `out` holds another set of digits.
    """
    check_arguments(train, held_out, seed, workers)
    asked = {"held_out": held_out, "seed": seed, "train": train, "version": FORMAT_VERSION}
    if is_complete(out, asked):
        return False
    scans = load_scans()
    write_folder = partial(make_folder, out=out, seed=seed, scans=scans, pools=split_scans(scans.labels, seed))
    jobs = [
        (split, start, min(start + FOLDER_SIZE, count))
        for split, count in (("train", train), ("held_out", held_out))
        for start in range(0, count, FOLDER_SIZE)
    ]
    records = {split: [] for split in SPLITS}
    for (split, _, _), folder in zip(
        jobs, show_progress(run(write_folder, jobs, workers), train + held_out), strict=True
    ):
        records[split] += folder
    pictures = [record for record in records["train"] if record["source"] == "digits_single"]
    records[CAPTIONS] = [caption(record) for record in pictures[:CAPTION_SAMPLES]]
    hashes = {f"{name}.json": write_records(out / f"{name}.json", records[name]) for name in records}
    write_atomically(out / MANIFEST, json.dumps({"asked": asked, "sha256": hashes}, indent=1, sort_keys=True) + "\n")
    return True


def check_arguments(train: int, held_out: int, seed: int, workers: int) -> None:
    """Raises ValueError when a number is out of range."""
    for name, value, low, high in (
        ("--train", train, 1, 1_000_000),  # names have six digits
        ("--held_out", held_out, 0, 1_000_000),
        ("--seed", seed, 0, 2**32 - 1),  # what scikit-learn's split takes
        ("--workers", workers, 1, 256),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}; it must be {low} to {high}.")


def is_complete(out: Path, asked: dict) -> bool:
    """Whether `out` holds what was asked for, with every picture in place.

    Raises:
        ValueError: `out` holds a finished set made with other arguments.
    """
    try:
        manifest = json.loads((out / MANIFEST).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    if manifest.get("asked") != asked:
        raise ValueError(
            f"{out} holds digits made with other arguments: {manifest.get('asked')}, asked for: {asked}. "
            "Give another --out or delete that folder."
        )
    for name, sha256 in manifest["sha256"].items():
        path = out / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            return False
        images = (record["image"] for record in json.loads(path.read_bytes()) if "image" in record)
        if not all((out / "images" / image).is_file() for image in images):
            return False
    return True


def run(function, jobs: list, workers: int) -> Iterator:
    """`map(function, jobs)` in order, in `workers` processes when there are several."""
    if workers == 1:
        yield from map(function, jobs)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(function, jobs)


def write_records(path: Path, records: list[dict]) -> str:
    """Writes a JSON list with one entry a line and sorted keys. Returns the file's sha256."""
    lines = ",\n".join(json.dumps(record, sort_keys=True) for record in records)
    text = f"[\n{lines}\n]\n"
    write_atomically(path, text)
    return hashlib.sha256(text.encode()).hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Writes under another name and renames: the file is never there in part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(path.name + ".partial")
    partial_path.write_bytes(text.encode())
    os.replace(partial_path, path)


def show_progress(folders: Iterable[list], total: int) -> Iterator[list]:
    """Passes `folders` through and tells on stderr how many samples are done: a bar in a terminal, else plain lines."""
    if sys.stderr.isatty() and find_spec("rich"):
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task("samples", total=total)
            for folder in folders:
                bar.advance(task, len(folder))
                yield folder
        return
    started, told, done = time.monotonic(), 0.0, 0
    for folder in folders:
        done += len(folder)
        elapsed = time.monotonic() - started
        if elapsed - told > 5 or done == total:
            told = elapsed
            print(f"{done}/{total} samples, about {elapsed / done * (total - done):.0f} s left", file=sys.stderr)
        yield folder


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=output_folder, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=16000, help="training samples (default: %(default)s)")
    parser.add_argument("--held_out", type=int, default=500, help="held-out samples (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other pictures (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        made = build(**vars(options))
    except (ValueError, OSError) as error:
        sys.exit(f"make_digits: {error}")
    what = f"{options.train} training and {options.held_out} held-out samples in {options.out}"
    print(f"made {what}" if made else f"{what} are complete already, nothing to do")


if __name__ == "__main__":
    main()
