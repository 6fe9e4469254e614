"""One pass over a data set in a fresh process, by this project's loader or by plain webdataset, and what it took.

Run as a script with a JSON object, the fields of `Pass`; it prints a JSON object, `Taken`. Both readers get the same
shards, server and number of worker processes. webdataset reads whole shards in order through curl and decodes pictures
(`decode("pil")`); this project also tokenises and packs. CPU time counts all processes of the reader, curl's too, and
starts with the first samples: importing torch is neither's merit.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import psutil

from benchmarking import datasets
from benchmarking.serving import python_path
from llava_next.anyres import AnyRes
from llava_next.data.format.index import Index

# readers by webdataset, and the handler of errors that they set: its own default raises
WEBDATASETS = {"webdataset": None, "webdataset, warn_and_continue": "warn_and_continue"}
WARM = 0.2  # share of the samples that only fills queues


@dataclass
class Pass:
    """What to read and how.

    Args:
        reader: `ours`, or one of `WEBDATASETS`.
        url: of the data set.
        shards: names, for webdataset, which has no index.
        small: tiles of 32 px instead of 336.
        batch_size, max_steps, num_workers, reads_in_flight: of our loader; webdataset takes the workers only.
        samples: in the pass, as far as it is read.
        checksums: of every picture, in the main process; for runs that are not timed.
        memory_every: steps between looks at the processes' memory; 0: none.
        server_early: start the server of worker processes before the clock, as the training scripts do.
    """

    reader: str
    url: str
    samples: int
    shards: list[str] = field(default_factory=list)
    small: bool = False
    batch_size: int = 32
    max_steps: int | None = None
    num_workers: int = 4
    reads_in_flight: int = 64
    checksums: bool = False
    memory_every: int = 0
    server_early: bool = True


@dataclass
class Taken:
    """What a pass took.

    Args:
        seen: samples; error: what ended the pass, None at its regular end.
        open_s: until the plan was ready; first_s: until the first samples; both from the opening of the data set.
        samples_per_s, cpu_ms_per_sample: after the first `WARM` of the samples, when queues were filled once.
        checksums: of pictures by key.
        memory: [step, MB of the main process, MB of all below it, MB of their resident sets added up]; see `memory_mb`.
        io: counters of our loader.
        index_mb: what the index holds; grown_mb: resident memory that the main process gained by opening the data set.
    """

    seen: int = 0
    error: str | None = None
    open_s: float = 0.0
    first_s: float = 0.0
    samples_per_s: float = 0.0
    cpu_ms_per_sample: float = 0.0
    checksums: dict[str, int] = field(default_factory=dict)
    memory: list[list[float]] = field(default_factory=list)
    io: dict[str, float] = field(default_factory=dict)
    index_mb: float = 0.0
    grown_mb: float = 0.0


def take(what: Pass, environment: dict[str, str] | None = None, timeout: float = 600) -> Taken:
    """The pass in a process of its own; after `timeout` seconds it and its children are killed (error `hung`)."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarking.streaming", json.dumps(asdict(what))],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), **(environment or {})},
            stdout=out,
            stderr=log,
            start_new_session=True,
        )
        try:
            process.wait(timeout)
            error = f"exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            error = "hung"
        _end(process)
        out.seek(0)
        lines = out.read().splitlines()
        if lines:
            found = Taken(**json.loads(lines[-1]))
            found.error = found.error if error == "exit status 0" else error
            return found
        log.seek(0)
        return Taken(error=error if error == "hung" else log.read()[-2000:])


def _end(process: subprocess.Popen) -> None:
    """Ends a pass and the workers that it leaves behind, by their process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(what: Pass) -> Taken:
    """Reads and measures; keeps what it has on the standard output for a parent that loses patience."""
    taken, clock = Taken(), time.monotonic
    reader = _ours if what.reader == "ours" else _webdataset
    warm = int(WARM * what.samples)
    mark = None
    try:
        for count, pictures in reader(what, taken):
            taken.seen += count
            taken.checksums |= pictures
            if mark is None and taken.seen >= warm:
                mark = (clock(), cpu_seconds(), taken.seen)
            if what.checksums:
                print(json.dumps(asdict(taken)), flush=True)
        now = clock()
        if mark and taken.seen > mark[2]:
            samples = taken.seen - mark[2]
            taken.samples_per_s = samples / (now - mark[0])
            taken.cpu_ms_per_sample = 1000 * (cpu_seconds() - mark[1]) / samples
    except Exception as error:
        taken.error = f"{type(error).__name__}: {error}"[-600:]
    return taken


def _ours(what: Pass, taken: Taken) -> Iterator[tuple[int, dict[str, int]]]:
    from llava_next.data.loading.feed import Feed
    from llava_next.data.loading.loader import LoaderOptions, build_loader, start_worker_server
    from llava_next.data.plan.mixture import Mixture

    anyres = datasets.SMALL if what.small else datasets.CLIP
    encoder, _ = datasets.build_encoder(anyres)
    if what.server_early and what.num_workers:
        start_worker_server(encoder)
        probe = multiprocessing.get_context("forkserver").Process(target=time.time)
        probe.start()
        probe.join()  # in a run, the model loads in the meantime
    before, begin = resident_mb(), time.monotonic()
    mixture = Mixture([(what.url, "photos", 1.0)], anyres, what.batch_size)
    mixture.deal(0, 8, 8192, 48)
    taken.open_s, taken.grown_mb = time.monotonic() - begin, resident_mb() - before
    taken.index_mb = sum(map(held_mb, mixture.indexes))
    options = LoaderOptions(what.num_workers, what.reads_in_flight)
    feed = Feed(build_loader(mixture, encoder, 0, 1, 8192, 48, options=options))
    try:
        for step, micros in feed:
            taken.first_s = taken.first_s or time.monotonic() - begin
            for batch in micros:
                for name, value in batch.io.items():
                    taken.io[name] = taken.io.get(name, 0) + value
            pictures = {}
            if what.checksums:
                pictures = {key: crc for batch in micros for key, crc in _checksums(batch, anyres)}
            if what.memory_every and step % what.memory_every == 0:
                taken.memory.append([step, *memory_mb()])
            yield sum(len(batch.slots) for batch in micros), pictures
            if what.max_steps and step + 1 >= what.max_steps:
                break
    finally:
        feed.close()


def _checksums(batch, anyres: AnyRes) -> Iterator[tuple[str, int]]:
    """Sample id and crc32 of its tiles, one picture a sample."""
    bounds = batch.cu_seqlens.tolist()
    for sample_id, begin, end in zip(batch.sample_ids, bounds, bounds[1:], strict=False):
        features = batch.feature_index[(batch.image_positions >= begin) & (batch.image_positions < end)]
        tiles = ((features[features > 0] - 1) // anyres.patches_per_tile).unique()
        yield f"{sample_id:06d}", zlib.crc32(batch.tiles[tiles].numpy().tobytes())


def _webdataset(what: Pass, taken: Taken) -> Iterator[tuple[int, dict[str, int]]]:
    import webdataset as wds
    from torch.utils.data import DataLoader

    begin = time.monotonic()
    urls = [f"{what.url}/{name}" for name in what.shards]
    handler = WEBDATASETS[what.reader] and getattr(wds, WEBDATASETS[what.reader])
    options = {"handler": handler} if handler else {}
    dataset = wds.WebDataset(urls, shardshuffle=False, empty_check=False, **options).decode("pil", **options)
    for sample in DataLoader(dataset, batch_size=None, num_workers=what.num_workers):
        taken.first_s = taken.first_s or time.monotonic() - begin
        key = sample["__key__"]
        yield 1, {key: zlib.crc32(sample["0.jpg"].tobytes())} if what.checksums else {}


def cpu_seconds() -> float:
    """Of this process, the processes below it, and those that they have waited for."""
    total = 0.0
    for process in _family():
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def memory_mb() -> tuple[float, float, float]:
    """Proportional set size of this process, and of all below it, in MB: shared pages count once, and what programs
    outside share (the code of torch) counts in part. Third, all resident sets added up, which count shared pages for
    every process that has them."""
    sizes, resident = [], 0.0
    for process in _family():
        found = {"Pss:": 0.0, "Rss:": 0.0}
        with contextlib.suppress(OSError), open(f"/proc/{process.pid}/smaps_rollup") as file:
            found |= {words[0]: int(words[1]) / 1e3 for words in map(str.split, file) if words[0] in found}
        sizes.append(found["Pss:"])
        resident += found["Rss:"]
    return sizes[0], sum(sizes[1:]), resident


def held_mb(index: Index) -> float:
    """Bytes of an index's columns, in MB."""
    columns = [value for value in vars(index).values() if hasattr(value, "nbytes")]
    return (
        sum(column.nbytes for column in (*columns, *index.exact_text_tokens.values(), *index.first_targets.values()))
        / 1e6
    )


def resident_mb() -> float:
    """Resident set of this process, in MB."""
    return psutil.Process().memory_info().rss / 1e6


def _family() -> list[psutil.Process]:
    this = psutil.Process()
    return [this, *this.children(recursive=True)]


if __name__ == "__main__":
    print(json.dumps(asdict(main(Pass(**json.loads(sys.argv[1]))))), flush=True)
    os._exit(0)
