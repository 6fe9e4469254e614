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
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import psutil

from benchmarking.serving import PATHS

# readers by webdataset, and the handler of errors that they set: its own default raises
WEBDATASETS = {"webdataset": None, "webdataset, warn_and_continue": "warn_and_continue"}
WARM = 0.2  # share of the samples that only fills queues


@dataclass
class Pass:
    """What to read and how.

    Args:
        reader: `ours`, or one of `WEBDATASETS`.
        url: of the data set.
        samples: in the pass, as far as it is read.
        shards: names, for webdataset, which has no index.
        small: tiles of 32 px instead of 336.
        batch_size, max_steps, num_workers: of our loader; webdataset takes the workers only.
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


def take(what: Pass, timeout: float = 600) -> Taken:
    """The pass in a process of its own; after `timeout` seconds it and its children are killed (error `hung`)."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarking.streaming", json.dumps(asdict(what))],
            env={**os.environ, "OMP_NUM_THREADS": "1", **PATHS},
            stdout=out,
            stderr=log,
            start_new_session=True,
        )
        try:
            error = f"exit status {process.wait(timeout)}"
        except subprocess.TimeoutExpired:
            error = "hung"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # workers that it leaves behind, too
        process.wait()
        for file in (out, log):
            file.seek(0)
        if lines := out.read().splitlines():
            found = Taken(**json.loads(lines[-1]))
            found.error = found.error if error == "exit status 0" else error
            return found
        return Taken(error=error if error == "hung" else log.read()[-2000:])


def main(what: Pass) -> Taken:
    """Reads and measures; keeps what it has on the standard output for a parent that loses patience."""
    taken, warm, mark = Taken(), int(WARM * what.samples), None
    try:
        for count, pictures in (_ours if what.reader == "ours" else _webdataset)(what, taken):
            taken.seen += count
            taken.checksums |= pictures
            if mark is None and taken.seen >= warm:
                mark = (time.monotonic(), cpu_seconds(), taken.seen)
            if what.checksums:
                print(json.dumps(asdict(taken)), flush=True)
        if mark and taken.seen > mark[2]:
            samples = taken.seen - mark[2]
            taken.samples_per_s = samples / (time.monotonic() - mark[0])
            taken.cpu_ms_per_sample = 1000 * (cpu_seconds() - mark[1]) / samples
    except Exception as error:
        taken.error = f"{type(error).__name__}: {error}"[-600:]
    return taken


def _ours(what: Pass, taken: Taken) -> Iterator[tuple[int, dict[str, int]]]:
    from benchmarking import datasets
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
    before, begin = psutil.Process().memory_info().rss, time.monotonic()
    mixture = Mixture([(what.url, "photos", 1.0)], anyres, what.batch_size)
    mixture.deal(0, 8, 8192, 48)
    taken.open_s, taken.grown_mb = time.monotonic() - begin, (psutil.Process().memory_info().rss - before) / 1e6
    columns = [value for index in mixture.indexes for value in vars(index).values()]
    columns = [x for value in columns for x in (value.values() if isinstance(value, dict) else [value])]
    taken.index_mb = sum(getattr(column, "nbytes", 0) for column in columns) / 1e6
    feed = Feed(build_loader(mixture, encoder, 0, 1, 8192, 48, options=LoaderOptions(what.num_workers)))
    io = Counter()
    try:
        for step, micros in feed:
            taken.first_s = taken.first_s or time.monotonic() - begin
            for batch in micros:
                io.update(batch.io)
            taken.io = dict(io)
            looked_at = micros if what.checksums else ()
            pictures = {key: crc for batch in looked_at for key, crc in _checksums(batch, anyres.patches_per_tile)}
            if what.memory_every and step % what.memory_every == 0:
                taken.memory.append([step, *memory_mb()])
            yield sum(len(batch.slots) for batch in micros), pictures
            if what.max_steps and step + 1 >= what.max_steps:
                break
    finally:
        feed.close()


def _checksums(batch, patches_per_tile: int) -> Iterator[tuple[str, int]]:
    """Sample id and crc32 of its tiles, one picture a sample."""
    bounds = batch.cu_seqlens.tolist()
    for sample_id, begin, end in zip(batch.sample_ids, bounds, bounds[1:], strict=False):
        features = batch.feature_index[(batch.image_positions >= begin) & (batch.image_positions < end)]
        tiles = ((features[features > 0] - 1) // patches_per_tile).unique()
        yield f"{sample_id:06d}", zlib.crc32(batch.tiles[tiles].numpy().tobytes())


def _webdataset(what: Pass, taken: Taken) -> Iterator[tuple[int, dict[str, int]]]:
    import webdataset as wds
    from torch.utils.data import DataLoader

    begin, handler = time.monotonic(), WEBDATASETS[what.reader]
    urls = [f"{what.url}/{name}" for name in what.shards]
    options = {"handler": getattr(wds, handler)} if handler else {}
    dataset = wds.WebDataset(urls, shardshuffle=False, empty_check=False, **options).decode("pil", **options)
    for sample in DataLoader(dataset, batch_size=None, num_workers=what.num_workers):
        taken.first_s = taken.first_s or time.monotonic() - begin
        yield 1, {sample["__key__"]: zlib.crc32(sample["0.jpg"].tobytes())} if what.checksums else {}


def cpu_seconds() -> float:
    """Of this process, the processes below it, and those that they have waited for."""
    total = 0.0
    for process in _family():
        with contextlib.suppress(psutil.Error):
            total += sum(process.cpu_times()[:4])  # user, system, and both of its children
    return total


def memory_mb() -> tuple[float, float, float]:
    """Proportional set size of this process, and of all below it, in MB: shared pages count once, and what programs
    outside share (the code of torch) counts in part. Third, all resident sets added up, which count shared pages for
    every process that has them."""
    shared, resident = [], 0.0
    for process in _family():
        with contextlib.suppress(psutil.Error):
            found = process.memory_full_info()
            shared.append(found.pss / 1e6)
            resident += found.rss / 1e6
    return shared[0], sum(shared[1:]), resident


def _family() -> list[psutil.Process]:
    this = psutil.Process()
    return [this, *this.children(recursive=True)]


if __name__ == "__main__":
    print(json.dumps(asdict(main(Pass(**json.loads(sys.argv[1]))))), flush=True)
    os._exit(0)
