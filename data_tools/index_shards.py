"""Indexes webdataset shards that others wrote, or adds exact text lengths to a data set, where the shards lie.

    python data_tools/index_shards.py URL --tower clip-336 --workers 16
    python data_tools/index_shards.py URL --tokenizer models/vicuna-7b:vicuna_v1

The first reads every byte once and writes `index.parquet` and `dataset.json` beside the shards, which stay as they are:
raw images are cut into tiles when a run reads them. What is wrong is listed in `rejected.jsonl` (shard, offset, key,
reason). A damaged shard (wrong header checksum, cut off, no end marker, links) ends in an error when all were read, and
so do too many unusable samples; then nothing else is written.

The second reads only the texts, and replaces the two files. Do not run it while a run trains on the data set.
"""

import argparse
import json
import os
import sys
import zlib
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import pyarrow as pa

from building.adding_lengths import add_lengths
from building.cutting import add_geometry_arguments, check_images, geometry
from building.jobs import REPORT_FILE, hold
from building.shard_walk import Found, Stream, samples_in, shard_files
from llava_next.anyres import AnyRes
from llava_next.data.format.dataset import DATASET_FILE, DatasetInfo, ShardInfo, check_shard_name
from llava_next.data.format.index import Lengths
from llava_next.data.format.pictures import open_picture
from llava_next.data.format.shards import RawSample, read_sample
from llava_next.data.format.tar import BadSample
from llava_next.data.format.writer import NEXT_FILE, IndexRows, finish_replacing, index_row, write_dataset
from llava_next.data.inputs.samples import check_text
from llava_next.data.inputs.text_lengths import fingerprints, text_lengths
from llava_next.data.storage.client import Storage
from llava_next.progress import Progress, worker_pool


@dataclass(frozen=True)
class Indexing:
    """What a worker needs to know; `tokenizers` as on the command line."""

    storage: Storage
    anyres: AnyRes
    source: str | None
    tokenizers: tuple[str, ...]
    allow_text_image_token: bool


class Indexed(NamedTuple):
    """A shard that was read: description and rows (None when it is damaged), what is wrong, samples seen."""

    info: ShardInfo | None
    rows: pa.Table | None
    problems: list[dict]
    seen: int
    is_raw: bool | None  # None: no pictures in it


def index_shard(job: Indexing, shard: tuple[str, int]) -> Indexed:
    """Reads one shard; runs in a worker."""
    stream, rows = Stream(job.storage, *shard), IndexRows(fingerprints(job.tokenizers))
    problems, kinds, seen = [], set(), 0
    try:
        for found in samples_in(stream):
            seen += 1
            try:
                sample, row, lengths = _read(job, found)
            except BadSample as error:
                problems.append(_problem(shard[0], found.start, found.key, error))
                continue
            kinds |= {image.is_raw for image in sample.images}
            rows.add(row, lengths)
        if len(kinds) > 1:
            raise BadSample("it holds both raw images and strips of tiles; keep them in data sets of their own")
    except BadSample as error:
        problems.append(_problem(shard[0], None, None, error))
        return Indexed(None, None, problems, seen, None)
    table = rows.table()
    info = ShardInfo(stream.name, stream.size, len(table), stream.sha256())
    return Indexed(info, table, problems, seen, next(iter(kinds), None))


def _read(job: Indexing, found: Found) -> tuple[RawSample, dict, dict[str, Lengths]]:
    """A sample as a run would read it, its row of the index, and its lengths by fingerprint. Raises BadSample."""
    if found.problem:
        raise BadSample(found.problem)
    sample = read_sample(found.data, found.key)
    if not sample.key.isprintable():
        raise BadSample(f"key {sample.key!r} holds control characters")
    check_text(sample.conversations, len(sample.images))
    if not job.allow_text_image_token:
        check_images(sample.conversations, len(sample.images))
    grids = []
    for number, image in enumerate(sample.images):
        grid, size = job.anyres.grid(image.width, image.height), job.anyres.tile_size
        height = size * (1 + image.rows * image.cols)
        if not image.is_raw and (
            (image.rows, image.cols) != grid or open_picture(image.data, load=False).size != (size, height)
        ):
            raise BadSample(f"image {number} was cut into tiles for another model than this geometry's")
        grids.append(grid)
    row = index_row(sample, found.start, len(found.data), zlib.crc32(found.data), grids)
    if job.source is not None:
        row["source"] = job.source
    images = [job.anyres.num_tokens(image.width, image.height) for image in sample.images]
    counters = text_lengths(job.tokenizers)
    return sample, row, {counter.fingerprint: counter.count(sample.conversations, images) for counter in counters}


def _problem(shard: str, offset: int | None, key: str | None, error: BadSample) -> dict:
    return {"shard": shard, "offset": offset, "key": key, "reason": str(error)}


def index(options: argparse.Namespace, storage: Storage) -> None:
    """Makes a data set of shards. Raises ValueError for what the user can mend."""
    anyres = geometry(options)
    shards = shard_files(storage)
    for name, _ in shards:
        check_shard_name(name)  # no run would read it
    job = Indexing(storage, anyres, options.source, options.tokenizers, options.allow_text_image_token)
    text_lengths(options.tokenizers)  # errors come before the work
    parts, problems, seen, kinds = [], [], 0, set()
    with worker_pool(options.workers) as pool, Progress(len(shards), unit="shards") as progress:
        for number, found in enumerate(pool.map(partial(index_shard, job), shards), start=1):
            problems += found.problems
            seen += found.seen
            kinds.add(found.is_raw)
            if found.info is not None and found.info.samples:
                parts.append((found.info, found.rows))
            progress.show(number, len(problems))
    storage.put(REPORT_FILE, "".join(json.dumps(entry) + "\n" for entry in problems).encode())
    check_problems(problems, seen, options.max_rejected_share, storage)
    if {True, False} <= kinds:
        raise ValueError(f"{storage.label}: some shards hold raw images, others strips of tiles; keep them apart")
    allowed = {"allow_text_image_token": options.allow_text_image_token}
    build = {"tool": "index_shards", "rejected": len(problems), **allowed}
    info = write_dataset(storage, anyres, "raw" if True in kinds else "auto", parts, build)
    print(f"{storage.label}: {info.samples} samples, {info.images} images in {len(info.shards)} shards")
    print("sources: " + ", ".join(f"{name} {count}" for name, count in info.sources.items()))
    if problems:
        print(f"{len(problems)} samples left out, see {storage.address(REPORT_FILE)}")


def check_problems(problems: list[dict], seen: int, max_share: float, storage: Storage) -> None:
    """Raises ValueError when a shard is damaged, or too many samples cannot be used."""
    where = f"Nothing was indexed; see {storage.address(REPORT_FILE)}."
    damaged = [entry for entry in problems if entry["key"] is None]
    if damaged:
        first = damaged[0]
        raise ValueError(
            f"{len(damaged)} damaged shard(s), for example {storage.address(first['shard'])}: {first['reason']}. Copy "
            f"or make them again, or remove them. {where}"
        )
    if len(problems) == seen or len(problems) > max_share * seen:
        reason = problems[0]["reason"] if problems else "the shards are empty"
        raise ValueError(
            f"{len(problems)} of {seen} samples cannot be used, more than --max_rejected_share {max_share} allows; for "
            f"example: {reason}. {where}"
        )


def write(options: argparse.Namespace, storage: Storage) -> None:
    """What is missing there: the rest of a change that was cut short, the index, text lengths. Raises ValueError."""
    finish_replacing(storage)
    if not storage.exists(DATASET_FILE):
        index(options, storage)
    elif options.tokenizers:
        add_lengths(storage, options.tokenizers, options.workers)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("url", help="folder or URL of the shards; index and dataset.json are written there")
    add_geometry_arguments(parser)
    add("--tokenizer", action="append", default=[], help="NAME_OR_FOLDER:template, for exact text lengths; repeatable")
    add("--source", help="name for the source of all samples (default: what each names)")
    add("--allow_text_image_token", action="store_true", help="without a picture, <image> in a question is characters")
    add("--max_rejected_share", type=float, default=0.05, help="of the samples (default: %(default)s)")
    add("--take_over", action="store_true", help="end another process that indexes there")
    add("--workers", type=int, default=os.cpu_count(), help="processes; 0: none (default: the number of CPUs)")
    options = parser.parse_args(arguments)
    options.tokenizers = tuple(options.tokenizer)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    try:
        storage = Storage(options.url)
        if storage.exists(DATASET_FILE) and not storage.exists(NEXT_FILE) and not options.tokenizers:
            info = DatasetInfo.from_json(storage.read_all(DATASET_FILE))
            print(f"{storage.label} is a data set already ({info.samples} samples); nothing to do without --tokenizer")
            return
        shard_files(storage)  # an error when there are none, before anything is written
        with hold(storage, options.take_over):
            write(options, storage)
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: a worker process was killed
        sys.exit(f"index_shards: {error}")
    except KeyboardInterrupt:
        sys.exit("index_shards: interrupted; run the same command again")


if __name__ == "__main__":
    main()
