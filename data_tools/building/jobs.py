"""A build as a plan of shards, each of which stands alone: stop it anywhere, spread it over machines, and join it.

Which samples go into shard k, and in which order, follows from the input and the seed alone. Beside a finished shard
lies its record (`building/000000.parquet`: its rows of the index, and the samples left out); a build that is run again
keeps the shards that have one. When all have, index and `dataset.json` are written and the records removed.
"""

import io
import itertools
import json
import math
import re
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llava_next.anyres import AnyRes
from llava_next.data.format.dataset import DATASET_FILE, DatasetInfo, ShardInfo
from llava_next.data.format.index import INDEX_FILE, ROW_SCHEMA, Lengths
from llava_next.data.format.shards import RawSample
from llava_next.data.format.writer import ShardFile, shard_name, write_dataset
from llava_next.data.inputs.listing import Listing, Reader
from llava_next.data.inputs.samples import TURN_COUNTS, SampleMaker, common_reasons, make_samples, turn_counts
from llava_next.data.inputs.text_lengths import fingerprints
from llava_next.data.storage.client import Storage
from llava_next.data.storage.lease import LEASE_FILE, Lease
from llava_next.paths import output_folder
from llava_next.progress import PROCESSES, Progress, worker_pool
from llava_next.shuffling import permutation

REPORT_FILE = "rejected.jsonl"
STATE_FOLDER = "building"
PLAN_FILE = f"{STATE_FOLDER}/plan.json"
READ_THREADS = 16  # records of finished shards at once; each waits for the network


@dataclass(frozen=True)
class Job:
    """What a worker needs to know besides the addresses of a shard's samples."""

    reader: Reader
    cutter: SampleMaker
    output: Storage
    folder: Path | None  # of the output when that is local
    tokenizers: tuple[str, ...]


class Record(NamedTuple):
    """What is known of a finished shard: its description (None when no sample was left), rows, samples left out, and
    how many of those that are in have the properties of `TURN_COUNTS`."""

    info: ShardInfo | None
    rows: pa.Table
    rejected: list[dict]
    counts: dict[str, int]


@dataclass(frozen=True)
class Plan:
    """All that decides a data set's bytes besides the images; kept in `building/plan.json` and in `dataset.json`."""

    input_sha256: str
    samples: int
    anyres: AnyRes
    codec: str
    quality: int
    shard_samples: int
    seed: int
    source: str | None
    tokenizers: tuple[str, ...]  # fingerprints
    system: str = "keep"
    template: str | None = None
    allow_text_image_token: bool = False

    @property
    def num_shards(self) -> int:
        """Shards, those included of which no sample may be left."""
        return math.ceil(self.samples / self.shard_samples)

    def to_dict(self) -> dict:
        """For JSON files."""
        return {"tool": "build_shards", **asdict(self), "tokenizers": list(self.tokenizers)}

    @classmethod
    def from_json(cls, text: bytes) -> "Plan":
        """The plan of `building/plan.json`. Raises ValueError."""
        try:
            values = json.loads(text)
            del values["tool"]
            values["anyres"] = AnyRes(**values["anyres"])
            return cls(**values | {"tokenizers": tuple(values["tokenizers"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{PLAN_FILE} is not this tool's ({type(error).__name__}: {error})") from None


class Output:
    """The data set being built, at a folder or a URL."""

    def __init__(self, url: str):
        self.storage = Storage(url)
        self.folder = Path(self.storage.label) if self.storage.url.startswith("file:") else None

    def files(self) -> dict[str, int]:
        """Size in bytes of every file, by name."""
        if self.folder is not None and not self.folder.exists():
            return {}
        return dict(self.storage.list())

    def is_complete(self, plan: Plan) -> bool:
        """Whether the data set is there already, as planned. Raises ValueError as `check`, or it is damaged."""
        info, label = self.check(plan), self.storage.label
        if info is None:
            return False
        files = self.files()
        for name, size in [(shard.name, shard.bytes) for shard in info.shards] + [(INDEX_FILE, info.index_bytes)]:
            if files.get(name) != size:
                raise ValueError(f"{label}/{name} is missing or was changed. Delete {label} and build it again.")
        self.remove_state(files)
        return True

    def check(self, plan: Plan) -> DatasetInfo | None:
        """The data set that is there already.

        Args:
            plan: its `input_sha256` is empty before the input is listed, which may take hours, and not compared then.

        Raises:
            ValueError: no place to write to, another data set, another build, or somebody else's shards.
        """
        if self.folder is not None:
            output_folder(self.folder)
        files, label = self.files(), self.storage.label
        asked = json.loads(json.dumps(plan.to_dict()))
        if not plan.input_sha256:
            del asked["input_sha256"], asked["samples"]
        if DATASET_FILE in files:
            info = DatasetInfo.from_json(self.storage.read_all(DATASET_FILE))
            if not asked.items() <= info.build.items():
                raise ValueError(
                    f"{label} holds a data set from other input or arguments. Give another --out or delete it."
                )
            return info
        if PLAN_FILE in files:
            there = Plan.from_json(self.storage.read_all(PLAN_FILE))
            if not asked.items() <= json.loads(json.dumps(there.to_dict())).items():
                raise ValueError(
                    f"{label} holds a build from other input or arguments that was not finished. Give another --out, "
                    "or delete it."
                )
        elif any(name.endswith(".tar") and "/" not in name for name in files):
            raise ValueError(f"{label} holds tar files that this tool did not write. Give another --out.")
        return None

    def plan(self) -> Plan:
        """Of the build that lies here. Raises ValueError when there is none."""
        if PLAN_FILE not in self.files():
            raise ValueError(f"{self.storage.label} holds no parts of a build, or one that was merged already")
        return Plan.from_json(self.storage.read_all(PLAN_FILE))

    def hold(self, part: int = 1, parts: int = 1, take_over: bool = False) -> Lease:
        """The right to build here, for as long as the block lasts. Parts of one build may be made at once.

        Raises:
            LeaseHeld: another process builds the same part here.
        """
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        name = LEASE_FILE if parts == 1 else f"lease-{part}-of-{parts}.json"
        return hold(self.storage, take_over, name)

    def begin(self, plan: Plan) -> None:
        """Marks the place as being built."""
        if self.folder is not None:
            (self.folder / STATE_FOLDER).mkdir(parents=True, exist_ok=True)
        self.storage.put(PLAN_FILE, (json.dumps(plan.to_dict()) + "\n").encode())

    def save(self, number: int, record: Record) -> None:
        """Writes a shard's record; its tar must be in place."""
        about = {"info": record.info and asdict(record.info), "rejected": record.rejected, "counts": record.counts}
        buffer = io.BytesIO()
        pq.write_table(record.rows.replace_schema_metadata({"shard": json.dumps(about, default=str)}), buffer)
        self.storage.put(f"{STATE_FOLDER}/{number:06d}.parquet", buffer.getvalue())

    def load(self, number: int) -> Record:
        """A shard's record."""
        table = pq.read_table(pa.BufferReader(self.storage.read_all(f"{STATE_FOLDER}/{number:06d}.parquet")))
        about = json.loads(table.schema.metadata[b"shard"])
        info = about["info"] and ShardInfo(**about["info"])
        return Record(info, table.replace_schema_metadata(None), about["rejected"], about["counts"])

    def finished(self, numbers: Iterable[int]) -> Iterator[tuple[int, Record]]:
        """Those of the shards `numbers` that are done, in order, with their records; a few are held at a time."""
        files = self.files()
        there = [number for number in numbers if f"{STATE_FOLDER}/{number:06d}.parquet" in files]
        with ThreadPoolExecutor(READ_THREADS) as pool:
            for start in range(0, len(there), 4 * READ_THREADS):
                chunk = there[start : start + 4 * READ_THREADS]
                for number, record in zip(chunk, pool.map(self.load, chunk), strict=True):
                    if record.info is None or files.get(record.info.name) == record.info.bytes:
                        yield number, record

    def remove_state(self, files: Iterable[str]) -> None:
        """Removes the records, once the data set is complete."""
        for name in files:
            if name.startswith(f"{STATE_FOLDER}/"):
                self.storage.delete(name)
        if self.folder is not None and (self.folder / STATE_FOLDER).exists():
            (self.folder / STATE_FOLDER).rmdir()


def hold(storage: Storage, take_over: bool, name: str = LEASE_FILE) -> Lease:
    """A lease on a folder or URL that a data tool writes to. Raises LeaseHeld."""
    cure = (
        "Two at once would remove each other's files: wait for it or end it (it continues when started again), or give "
        "another place. --take_over takes the place from one that does not answer, which then ends"
    )
    return Lease(storage, "build", cure, name=name).take(take_over, lambda text: print(text, file=sys.stderr))


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


def build_shard(number: int, rows: np.ndarray, addresses: np.ndarray) -> int:
    """Builds one shard of the samples in `rows` of the input, and its record; runs in a worker.

    Returns:
        how many samples were left out.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = (_job.folder or Path(scratch)) / shard_name(number)
        record = write_shard(path, rows.tolist(), addresses)
        if _job.folder is None and record.info is not None:
            _job.output.put(path.name, path)
    Output(_job.output.url).save(number, record)
    return len(record.rejected)


def write_shard(path: Path, rows: list[int], addresses: np.ndarray) -> Record:
    """The tar of a shard."""
    rejected, counts = [], Counter(dict.fromkeys(TURN_COUNTS, 0))
    with ShardFile(path, fingerprints(_job.tokenizers)) as shard:

        def keep(sample: RawSample, lengths: dict[str, Lengths]) -> None:
            shard.write(sample, lengths)
            counts.update(turn_counts(sample))

        for left_out in make_samples(_job.reader, _job.cutter, _job.tokenizers, rows, addresses, keep):
            if left_out:
                rejected.append(left_out)
                count(REJECTED)
            count(DONE)
            if _counters[STOP]:
                raise InterruptedError("stopped")
    empty = pa.schema(ROW_SCHEMA).empty_table()
    return Record(shard.info, empty if shard.rows is None else shard.rows, rejected, counts)


def build_missing(
    output: Output, plan: Plan, listing: Listing, job: Job, numbers: list[int], workers: int, check: Callable
) -> None:
    """Builds those of the shards `numbers` that are not finished; 0 workers: in this process.

    Args:
        check: is called with the number of samples left out so far, and raises when they are too many.

    A worker's error ends the build.
    """
    done = {number: len(record.rejected) for number, record in output.finished(numbers)}
    order = permutation(plan.samples, plan.seed)

    def rows_of(number: int) -> np.ndarray:
        return order[number * plan.shard_samples : (number + 1) * plan.shard_samples]

    counters, rejected = PROCESSES.Array("q", 3), sum(done.values())
    missing = (number for number in numbers if number not in done)
    total, before = (sum(len(rows_of(number)) for number in which) for which in (numbers, done))
    with worker_pool(workers, start_worker, (job, counters, not workers)) as pool, Progress(total, before) as progress:
        try:
            waiting: set[Future] = set()
            while True:
                for number in itertools.islice(missing, 2 * max(workers, 1) - len(waiting)):
                    rows = rows_of(number)
                    waiting.add(pool.submit(build_shard, number, rows, listing.addresses[rows]))
                if not waiting:
                    break
                finished, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                progress.show(counters[DONE], sum(done.values()) + counters[REJECTED])
                for future in finished:
                    rejected += future.result()  # raises what the worker raised
                check(rejected)
        except BaseException:
            counters[STOP] = 1
            raise


def finish(output: Output, plan: Plan, max_rejected_share: float, keep: bool) -> tuple[DatasetInfo, list[dict]]:
    """Makes the data set of the finished shards; gives it and the samples left out. Arguments as for `check_share`.

    Each shard's record is read once. What they say of missing shards and samples is known after the last one, when the
    index is a temporary file yet: an error leaves no data set.

    Raises:
        ValueError: shards are missing, or too many samples were left out.
    """
    numbers, rejected, counts = range(plan.num_shards), [], Counter()
    build = json.loads(json.dumps(plan.to_dict()))

    def parts() -> Iterator[tuple[ShardInfo, pa.Table]]:
        missing = dict.fromkeys(numbers)
        for number, record in output.finished(numbers):
            del missing[number]
            rejected.extend(record.rejected)
            counts.update(record.counts)
            if record.info is not None:
                yield record.info, record.rows
        if missing:
            raise ValueError(
                f"{output.storage.label}: {len(missing)} of {plan.num_shards} shards are not built yet, for example "
                f"{shard_name(next(iter(missing)))}. Run the missing parts (--part i/n), then --merge again."
            )
        report(output, rejected)
        check_share(len(rejected), plan.samples, max_rejected_share, output, numbers, keep)
        build.update({"rejected": len(rejected), **counts})  # dataset.json is written when the last part is

    info = write_dataset(output.storage, plan.anyres, plan.codec, parts(), build)
    files, kept = output.files(), {shard.name for shard in info.shards}
    for name in files:
        if re.fullmatch(r"shard-\d+\.tar", name) and name not in kept:  # an earlier attempt at it had a sample
            output.storage.delete(name)
    output.remove_state(files)
    return info, rejected


def report(output: Output, rejected: Iterable[dict]) -> None:
    """Writes the list of samples left out: one JSON object a line."""
    output.storage.put(REPORT_FILE, "".join(json.dumps(entry) + "\n" for entry in rejected).encode())


def check_share(
    rejected: int, samples: int, max_share: float, output: Output, numbers: Iterable[int], keep: bool = False
) -> None:
    """Fails when too many samples were left out, or all.

    Args:
        keep: what was built stays as it is. Else the records of the shards that lack samples are removed: when the
            images are mended, the same command builds those shards again.

    Raises:
        ValueError: with the most common reasons.
    """
    if rejected != samples and rejected <= max_share * samples:
        return
    lacking = {number: record.rejected for number, record in output.finished(numbers) if record.rejected}
    entries = [entry for found in lacking.values() for entry in found]
    report(output, entries)
    for number in () if keep else lacking:
        output.storage.delete(f"{STATE_FOLDER}/{number:06d}.parquet")
    why, cure = f", more than --max_rejected_share {max_share} allows", "mend them, or allow more"
    if rejected == samples:
        why, cure = ": none is left", "mend them"
    elif keep:
        cure = "allow more, or mend them and build the parts in another --out"
    raise ValueError(
        f"{rejected} of {samples} samples rejected{why}; no data set written: {cure}. "
        f"See {output.storage.address(REPORT_FILE)}; most often: " + "; ".join(common_reasons(entries))
    )
