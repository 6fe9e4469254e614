"""Builds a data set for training: LLaVA JSON and image files become webdataset shards of ready-cut tiles.

    python data_tools/build_shards.py --json train.json --images ROOT --out DIR --tower clip-336

Writes to DIR: `shard-000000.tar`, ..., `index.parquet`, `rejected.jsonl` (samples left out: id, file, reason) and last
`dataset.json`. A folder without `dataset.json` is not a data set. The same input and arguments give the same bytes,
whatever the number of workers. data_tools/README.md describes the format.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import posixpath
import signal
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from PIL import Image

from llava_next.anyres import HF_336, ORIGINAL_336, ORIGINAL_384, AnyRes
from llava_next.data.index import DATASET_FILE, INDEX_FILE, DatasetInfo, ShardInfo, write_dataset, written_aside
from llava_next.data.plan import permutation
from llava_next.data.shards import CODECS, BadSample, RawSample, ShardFile, StripInfo, encode_strip, shard_name
from llava_next.templates import place_images, read_turns

TOWERS = {"clip-336": AnyRes(336, 14, ORIGINAL_336), "siglip-384": AnyRes(384, 14, ORIGINAL_384)}
PINPOINTS = {"original": None, "hf": HF_336}  # None: the tower's own
REPORT_FILE = "rejected.jsonl"
MARKER_FILE = "building.json"  # says that shards without a dataset.json are this tool's, left by a stopped build

# Read by content, not by name. Not all that Pillow knows: some of its formats start programs (EPS runs Ghostscript).
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 89_478_485  # Pillow's own limit, beyond which it warns of a decompression bomb


@dataclass(frozen=True)
class Job:
    """What a worker needs to know besides the samples of a shard."""

    images: Path
    out: Path
    anyres: AnyRes
    codec: str
    quality: int


@dataclass(frozen=True)
class BuiltShard:
    """A shard on disk (None when no sample was left), its rows of the index, and the samples left out."""

    info: ShardInfo | None
    rows: pa.Table | None
    rejected: list[dict]


def read_records(path: Path) -> tuple[list[dict], str]:
    """The samples of a LLaVA JSON list or JSONL file, and the file's sha256.

    Raises:
        ValueError: the file is missing or is neither, with the line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"--json {path}: {error.strerror}") from None
    text = data.removeprefix(b"\xef\xbb\xbf").lstrip()
    try:
        if text.startswith(b"["):
            records = json.loads(text)
        else:
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"--json {path}: neither a JSON list nor one JSON object a line ({error})") from None
    if not records or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"--json {path}: expected samples {{id, image, conversations}}, found none or something else")
    return records, hashlib.sha256(data).hexdigest()


def image_names(record: dict) -> list[str]:
    """The paths in a record's `image`, which is missing, a path, or a list of paths."""
    image = record.get("image")
    names = image if isinstance(image, list) else [] if image is None else [image]
    if not all(isinstance(name, str) and name for name in names):
        raise BadSample("image is neither a path nor a list of paths")
    return names


def open_picture(root: Path, name: str) -> Image.Image:
    """Open and decode the picture `name` under `root`.

    Raises:
        BadSample: not there, outside of `root`, not a picture, damaged, or too large.
    """
    if posixpath.isabs(name) or posixpath.normpath(name).split("/")[0] == "..":
        raise BadSample(f"path leaves the image root: {name}")
    try:
        if not (root / name).is_file():
            raise BadSample(f"no such image file: {root / name}")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(root / name, formats=IMAGE_FORMATS)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise BadSample(f"{image.width} x {image.height} px is more than {MAX_PIXELS} pixels")
            image.load()
            return image
    except BadSample:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, bomb errors and others
        raise BadSample(f"image cannot be read: {type(error).__name__}: {error}") from error


def cut_picture(job: Job, name: str) -> StripInfo:
    """One picture as a strip of tiles. Raises BadSample."""
    image = open_picture(job.images, name)
    try:
        rows, cols = job.anyres.grid(*image.size)
        ext, data = encode_strip(job.anyres.tiles(image), job.codec, job.quality)
    except ValueError as error:
        raise BadSample(str(error)) from error
    return StripInfo(*image.size, rows, cols, ext, data)


def make_sample(job: Job, row: int, record: dict) -> RawSample:
    """The record in row `row` of the input as a sample. Raises BadSample."""
    names = image_names(record)
    conversations = record.get("conversations")
    if not isinstance(conversations, list):
        raise BadSample("conversations is missing or not a list of turns")
    try:
        place_images(read_turns(conversations), len(names))  # the rules of training; what they return is not stored
    except ValueError as error:
        raise BadSample(str(error)) from error
    turns = [{"from": t.get("from", t.get("role")), "value": t.get("value", t.get("content"))} for t in conversations]
    # Recipes name the parts of a mixture by image root: coco, gqa, ocr_vqa, ...
    root = names[0].split("/")[0] if names and "/" in names[0] else "image" if names else "text"
    source = record.get("source") or record.get("data_source") or root
    images = [cut_picture(job, name) for name in names]
    return RawSample(f"{row:09d}", str(record.get("id", row)), str(source), turns, images)


_job: Job | None = None
_counters = None  # shared between processes, see DONE, REJECTED, STOP
DONE, REJECTED, STOP = range(3)


def start_worker(job: Job, counters, in_process: bool) -> None:
    """Keeps what all shards share. An interrupt is the main process's business: it sets STOP."""
    global _job, _counters
    _job, _counters = job, counters
    if not in_process:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def count(counter: int) -> None:
    """Adds one for the progress line."""
    with _counters.get_lock():
        _counters[counter] += 1


def build_shard(number: int, samples: list[tuple[int, dict]]) -> BuiltShard:
    """Builds one shard from (row, record) pairs; runs in a worker."""
    rejected = []
    with ShardFile(_job.out / shard_name(number)) as shard:
        for row, record in samples:
            if _counters[STOP]:
                raise InterruptedError("stopped")
            try:
                shard.write(make_sample(_job, row, record))
            except BadSample as error:
                rejected.append({"id": record.get("id", row), "file": record.get("image"), "reason": str(error)})
                count(REJECTED)
            count(DONE)
    return BuiltShard(shard.info, shard.rows, rejected)


def build_all(job: Job, samples: list[tuple[int, dict]], shard_samples: int, workers: int) -> list[BuiltShard]:
    """All shards, in order; 0 workers: in this process. A worker's error ends the build."""
    context = multiprocessing.get_context("forkserver")
    counters = context.Array("q", 3)
    if workers:
        pool = ProcessPoolExecutor(workers, context, start_worker, (job, counters, False))
    else:
        pool = ThreadPoolExecutor(1, initializer=start_worker, initargs=(job, counters, True))
    starts = range(0, len(samples), shard_samples)
    with pool, Progress(len(samples)) as progress:
        try:
            futures = [
                pool.submit(build_shard, number, samples[start : start + shard_samples])
                for number, start in enumerate(starts)
            ]
            waiting: set[Future] = set(futures)
            while waiting:
                done, waiting = wait(waiting, timeout=0.5)
                progress.show(counters[DONE], counters[REJECTED])
                for future in done:
                    future.result()  # raises what the worker raised
        except BaseException:
            counters[STOP] = 1
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


class Progress:
    """How many samples are done, at which rate, and how long the rest takes: a bar on a terminal, else plain lines."""

    def __init__(self, total: int, seconds_between_lines: float = 10):
        self.total, self.seconds_between_lines = total, seconds_between_lines
        self.started, self.told, self.bar = time.monotonic(), time.monotonic(), None

    def __enter__(self) -> "Progress":
        with contextlib.suppress(ImportError):  # rich is in the extras; lines do without
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            console = Console(stderr=True)
            if console.is_terminal:
                columns = (TextColumn("{task.completed}/{task.total} samples"), BarColumn(), TimeRemainingColumn())
                self.bar = Progress(*columns, TextColumn("{task.description}"), console=console)
                self.bar.start()
                self.task = self.bar.add_task("", total=self.total)
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, done: int, rejected: int) -> None:
        """Tell the state; plain lines at most every `seconds_between_lines`."""
        now = time.monotonic()
        rate = done / (now - self.started)
        if self.bar is not None:
            self.bar.update(self.task, completed=done, description=f"{rate:.1f}/s, {rejected} rejected")
        elif done and now - self.told > self.seconds_between_lines:
            self.told = now
            left = (self.total - done) / rate / 60
            text = f"{done}/{self.total} samples, {rate:.1f}/s, {rejected} rejected, about {left:.1f} min left"
            print(text, file=sys.stderr, flush=True)


def already_built(out: Path, anyres: AnyRes, codec: str, build: dict) -> DatasetInfo | None:
    """The data set in `out` if it is the one that was asked for; None when there is none.

    Raises:
        ValueError: another data set, or shards of somebody else.
    """
    if (out / DATASET_FILE).exists():
        info = DatasetInfo.from_json((out / DATASET_FILE).read_bytes())
        if (info.anyres, info.codec) != (anyres, codec) or not build.items() <= info.build.items():
            raise ValueError(f"{out} holds a data set from other input or arguments. Give another --out or delete it.")
        for name, size in [(shard.name, shard.bytes) for shard in info.shards] + [(INDEX_FILE, info.index_bytes)]:
            if not (out / name).is_file() or (out / name).stat().st_size != size:
                raise ValueError(f"{out / name} is missing or was changed. Delete {out} and build it again.")
        return info
    if list(out.glob("*.tar")) and not (out / MARKER_FILE).exists():
        raise ValueError(f"{out} holds tar files that this tool did not write. Give another --out.")
    return None


def prepare(out: Path, build: dict) -> None:
    """Makes the folder, marks it as being built, and removes what a stopped build left."""
    out.mkdir(parents=True, exist_ok=True)
    with written_aside(out / MARKER_FILE) as temporary:
        temporary.write_text(json.dumps(build))
    for pattern in ("shard-*.tar", ".shard-*.tar.writing", INDEX_FILE, REPORT_FILE):
        for path in out.glob(pattern):
            path.unlink()


def write_report(path: Path, rejected: list[dict]) -> None:
    """One JSON object a line; an empty file when nothing was rejected."""
    with written_aside(path) as temporary:
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in rejected), encoding="utf-8")


def summarise(info: DatasetInfo, out: Path, rejected: list[dict], seconds: float) -> None:
    """Prints what was built."""
    size = sum(shard.bytes for shard in info.shards)
    print(
        f"{out}: {info.samples} samples, {info.images} images, {info.tiles} tiles in {len(info.shards)} shards, "
        f"{size / 1e6:.1f} MB ({size / info.samples / 1e3:.1f} kB a sample), in {seconds:.0f} s "
        f"({info.images / seconds:.1f} images/s)"
    )
    print("sources: " + ", ".join(f"{name} {count}" for name, count in info.sources.items()))
    if rejected:
        print(f"{len(rejected)} samples rejected, see {out / REPORT_FILE}; for example: {rejected[0]['reason']}")


def build(options: argparse.Namespace) -> None:
    """The whole build. Raises ValueError for what the user can mend."""
    started = time.monotonic()
    anyres = geometry(options)
    if not options.images.is_dir():
        raise ValueError(f"--images {options.images} is not a folder")
    records, json_sha256 = read_records(options.json)
    arguments = {name: getattr(options, name) for name in ("quality", "shard_samples", "seed")}
    asked = {"tool": "build_shards", "json_sha256": json_sha256, **arguments}
    if already_built(options.out, anyres, options.codec, asked) is not None:
        print(f"{options.out} is complete already and was built from this input with these arguments; nothing to do")
        return
    prepare(options.out, asked)
    job = Job(options.images, options.out, anyres, options.codec, options.quality)
    shuffled = [(int(row), records[row]) for row in permutation(len(records), options.seed)]
    shards = build_all(job, shuffled, options.shard_samples, options.workers)
    rejected = [entry for shard in shards for entry in shard.rejected]
    write_report(options.out / REPORT_FILE, rejected)
    if len(rejected) == len(records) or len(rejected) > options.max_rejected_share * len(records):
        reasons = Counter(entry["reason"].partition(":")[0] for entry in rejected).most_common(3)
        raise ValueError(
            f"{len(rejected)} of {len(records)} samples rejected, more than --max_rejected_share "
            f"{options.max_rejected_share} allows; no data set written. See {options.out / REPORT_FILE}; most often: "
            + "; ".join(f"{reason} ({number})" for reason, number in reasons)
        )
    parts = [(shard.info, shard.rows) for shard in shards if shard.info is not None]
    info = write_dataset(options.out, anyres, options.codec, parts, {**asked, "rejected": len(rejected)})
    (options.out / MARKER_FILE).unlink()
    summarise(info, options.out, rejected, time.monotonic() - started)


def geometry(options: argparse.Namespace) -> AnyRes:
    """The tiles' geometry from --model, --tower, or --tile_size, --patch_size and --pinpoints. Raises ValueError."""
    if options.model is not None:
        return model_geometry(options.model)
    named = TOWERS.get(options.tower)
    if named is None and None in (options.tile_size, options.patch_size, options.pinpoints):
        raise ValueError("give --model or --tower, or all of --tile_size, --patch_size and --pinpoints")
    pinpoints = PINPOINTS.get(options.pinpoints or "original", options.pinpoints)
    if isinstance(pinpoints, str):
        try:
            pinpoints = [(int(height), int(width)) for height, width in (p.split("x") for p in pinpoints.split(","))]
        except ValueError:
            raise ValueError(f"--pinpoints {pinpoints}: expected HEIGHTxWIDTH,HEIGHTxWIDTH,... in pixels") from None
    tile_size = options.tile_size or named.tile_size
    return AnyRes(tile_size, options.patch_size or named.patch_size, pinpoints or named.pinpoints)


def model_geometry(folder: Path) -> AnyRes:
    """The geometry that a LLaVA-NeXT model folder's config.json asks for. Raises ValueError when it holds none."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        vision = config["vision_config"]
        return AnyRes(vision["image_size"], vision["patch_size"], config["image_grid_pinpoints"])
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"--model {folder}: no LLaVA-NeXT config.json there ({type(error).__name__}: {error})"
        ) from None


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--json", type=Path, required=True, help="LLaVA JSON list, or JSONL: {id, image?, conversations}")
    add("--images", type=Path, required=True, help="folder that the image paths are relative to")
    add("--out", type=Path, required=True, help="folder to write")
    add("--model", type=Path, help="cut tiles for this LLaVA-NeXT model folder")
    add("--tower", choices=TOWERS, help="instead of --model: vision tower to cut tiles for")
    add("--tile_size", type=int, help="instead of --tower: side of a tile in pixels")
    add("--patch_size", type=int, help="instead of --tower: side of a patch in pixels")
    add("--pinpoints", help="original (default), hf, or canvases as HEIGHTxWIDTH,HEIGHTxWIDTH,... in pixels")
    add("--codec", choices=CODECS, default="auto", help="of the strips (default: the smaller of jpeg and webp)")
    add("--quality", type=int, default=95, help="of JPEG (default: %(default)s)")
    add("--shard_samples", type=int, default=1000, help="samples a shard (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the order in the shards (default: %(default)s)")
    add("--workers", type=int, default=os.cpu_count(), help="processes; 0: none (default: the number of CPUs)")
    add("--max_rejected_share", type=float, default=0.05, help="of the samples (default: %(default)s)")
    options = parser.parse_args(arguments)
    for name, least in (("quality", 1), ("shard_samples", 1), ("seed", 0), ("workers", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be {least} or more")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    try:
        build(options)
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: a worker process was killed
        sys.exit(f"build_shards: {error}")
    except KeyboardInterrupt:
        sys.exit("build_shards: interrupted; no data set written")


if __name__ == "__main__":
    main()
