"""The stream of data against its goals, against plain webdataset, and under faults.

Shards are made in a scratch folder (see `datasets`) and served by the tests' servers in a process of their own, on the
same cores: what is measured over the network here is a lower bound for a machine with a server elsewhere.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from unittest import mock

from benchmarking import datasets
from benchmarking.cards import add_out, table, write_card
from benchmarking.serving import Serving
from benchmarking.streaming import WEBDATASETS, Pass, Taken, take
from llava_next.data.format.writer import shard_name
from llava_next.data.loading import encode, loader
from llava_next.data.loading.loader import LoaderOptions, MicroBatches
from llava_next.data.plan.mixture import Mixture
from llava_next.templates import Template

LATENCY = 0.1  # seconds before the first byte of every answer
FAULTS = ("reset", "503", "429", "stall", "truncated", "wrong_length", "etag", "flip", "missing", "403")
FAULT_SAMPLES, FAULT_SHARDS = 96, 8
_FOLDERS = re.compile(r"(?<![\w/:])/(?:[\w.+-]+/)+")  # of this machine, in tracebacks


def add_arguments(parser) -> None:
    """Options of `benchmark.py loader`."""
    parser.add_argument("--parts", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--photos", type=int, default=1000, help="in the shard whose names make the large data set")
    parser.add_argument("--copies", type=int, default=1000, help="names of that shard")
    parser.add_argument("--stream_samples", type=int, default=2000, help="read for a throughput, in photographs")
    parser.add_argument("--memory_steps", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--passes", type=int, default=5, help="over the photographs, for the CPU time")
    parser.add_argument("--fault_timeout", type=float, default=90.0, help="seconds until a run counts as hung")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    add_out(parser)


def run(args) -> None:
    """Measures the parts asked for and writes a card for each."""
    with tempfile.TemporaryDirectory(prefix="benchmark-loader-") as scratch:
        data = Data(Path(scratch), args)
        for part in args.parts:
            started = time.monotonic()
            figures, rows = MEASURES[part](args, data)
            print(
                f"{part}: {time.monotonic() - started:.0f} s\n{table(('what', 'goal', 'measured'), rows)}", flush=True
            )
            about = {"latency_s": LATENCY, "workers": args.workers, "data": dict(data.made)}
            write_card(f"loader-{part}", {**about, part: figures, "goals": rows}, args.out)


class Data:
    """The data sets, each made when it is first asked for.

    Attributes:
        made: what each holds.
    """

    def __init__(self, scratch: Path, args):
        self.scratch, self.made = scratch, {}
        self.how = {  # geometry, samples, samples a shard, names of each shard
            "photos": (datasets.CLIP, args.photos, args.photos, args.copies),  # a million samples by default
            "strips": (datasets.SMALL, args.photos, args.photos, args.copies),
            "middle": (datasets.CLIP, 96, 96, -(-args.stream_samples // 96)),  # enough for one throughput
            "few": (datasets.CLIP, FAULT_SAMPLES, FAULT_SAMPLES // FAULT_SHARDS, 1),  # every sample is looked at
        }

    def folder(self, name: str) -> Path:
        """Of a data set."""
        folder = self.scratch / name
        if name not in self.made:
            datasets.write_shards(folder, *self.how[name])
            self.made[name] = datasets.describe(folder)
        return folder


def cpu(args, data: Data) -> tuple[dict, list]:
    """CPU time of a sample on one core, whole and by part: the loader's own code in this process."""
    encoder, tokenizer = datasets.build_encoder(datasets.CLIP)
    mixture = Mixture([(data.folder("middle"), "photos", 1.0)], datasets.CLIP, 128)
    requests = list(mixture.requests(0, 1, 8192, 48))
    requests = requests[: max(1, len(requests) // 2)]
    whole, parts = [], []
    for _ in range(args.passes):
        micros = MicroBatches(mixture.storages, encoder, LoaderOptions(num_workers=0))
        with timed_parts() as spent:
            begin = time.process_time()
            count = sum(len(micros[request, None].slots) for request in requests)
            whole.append((time.process_time() - begin) / count)
        seconds = {name: sum(times) / count for name, times in spent.items()}
        seconds["place"] -= seconds["decode"] + seconds["tokenize"]  # encoding a sample does all three
        parts.append(seconds)
    by_part = {f"{name}_ms": 1000 * median(p[name] for p in parts) for name in parts[0]}
    rate = 1 / median(whole)
    figures = {"samples_per_s_per_core": rate, "best": 1 / min(whole), "tokenizer": tokenizer, **by_part}
    shares = ", ".join(f"{name.removesuffix('_ms')} {value:.2f}" for name, value in by_part.items())
    return figures, [("decode + encode + pack, samples/s/core, 5 tiles", ">= 150", f"{rate:.0f} (ms: {shares})")]


@contextlib.contextmanager
def timed_parts() -> Iterator[dict[str, list[float]]]:
    """CPU seconds of every call of each part of the loader's work inside, in whichever threads."""
    parts = {
        "read": (MicroBatches, "_read"),
        "parse": (loader, "read_sample"),
        "decode": (encode, "picture_tiles"),
        "tokenize": (Template, "encode"),
        "place": (encode.Encoder, "encode"),
        "pack": (loader, "pack"),
    }
    spent = {name: [] for name in parts}

    def timed(name: str, work: Callable) -> Callable:
        def call(*arguments, **options):
            begin = time.thread_time()
            result = work(*arguments, **options)
            spent[name].append(time.thread_time() - begin)
            return result

        return call

    with contextlib.ExitStack() as stack:
        for name, (owner, method) in parts.items():
            stack.enter_context(mock.patch.object(owner, method, timed(name, getattr(owner, method))))
        yield spent


def first(args, data: Data) -> tuple[dict, list]:
    """Time from the opening of the large data set to the first 16 samples, and what the index takes."""
    folder = data.folder("photos")
    # a rank's share of a step of 128 on 8 ranks
    what = Pass("ours", str(folder), 32, batch_size=16, max_steps=1, num_workers=args.workers)
    local = brief(take(what))
    with Serving(folder) as server:
        server.set(latency=LATENCY)
        http = brief(take(replace(what, url=server.url)))
        cold = brief(take(replace(what, url=server.url, server_early=False)))
    samples, delay = f"{data.made['photos']['samples']:,}", f"{1000 * LATENCY:.0f} ms"
    early = f"{http['first_s']:.1f} s ({cold['first_s']:.1f} s when worker processes import torch meanwhile)"
    held = f"{local['index_mb']:.0f} MB ({local['grown_mb']:.0f} MB more resident, pyarrow and its buffers included)"
    return {"local": local, "http": http, "http_cold": cold}, [
        (f"first 16 samples, local, index of {samples}", "<= 3 s", f"{local['first_s']:.1f} s"),
        (f"first 16 samples, HTTP with {delay}, index of {samples}", "<= 10 s", early),
        (f"plan of {samples} samples ready, local", "<= 2 s", f"{local['open_s']:.1f} s"),
        (f"index of {samples} samples in memory", "<= 100 MB", held),
    ]


def throughput(args, data: Data) -> tuple[dict, list]:
    """Samples a second behind the latency: photographs, and strips so small that decoding is not the limit."""
    figures, rows = {}, []
    for key, name, more in (("photos", "photographs in 5 tiles", 1), ("strips", "strips of a kilobyte", 5)):
        samples, small = args.stream_samples * more, key == "strips"
        with Serving(data.folder(key)) as server:
            server.set(latency=LATENCY)
            what = Pass("ours", server.url, samples, small=small, num_workers=args.workers)
            figures[key] = brief(take(replace(what, max_steps=samples // what.batch_size)))
        rate, spent = (figures[key][k] for k in ("samples_per_s", "cpu_ms_per_sample"))
        label = f"samples/s a rank at {1000 * LATENCY:.0f} ms, {args.workers} workers, {name}"
        rows.append((label, ">= 250", f"{rate:.0f} ({spent:.1f} ms of CPU each, server not counted)"))
    return figures, rows


def memory(args, data: Data) -> tuple[dict, list]:
    """Memory of a rank over a long run on strips: the main process and its workers."""
    steps, batch, url = args.memory_steps, 16, str(data.folder("strips"))
    what = Pass("ours", url, batch * steps, small=True, batch_size=batch, max_steps=steps, num_workers=args.workers)
    taken = take(replace(what, memory_every=max(1, steps // 100)), timeout=3600)
    looks = taken.memory[len(taken.memory) // 10 :] or [[0.0] * 4]  # queues have filled by then
    totals, quarter = [main + workers for _, main, workers, _ in looks], max(1, len(looks) // 4)
    early, late = median(totals[:quarter]), median(totals[-quarter:])
    _, main, workers, resident = (max(column) for column in zip(*looks, strict=True))
    figures = {
        **brief(taken),
        **{"steps": steps, "peak_mb": max(totals), "growth": late / max(early, 1e-9) - 1},
        **{"main_mb": main, "workers_mb": workers, "resident_mb": resident},
        "looks": [[int(step), *sizes] for step, *sizes in taken.memory],
    }
    parts = (
        f"main {main:.0f}, {args.workers} workers and what they are forked from {workers:.0f}; shared pages count "
        f"once, else {resident:,.0f}"
    )
    growth = f"{1 + figures['growth']:.3f}"
    return figures, [
        (f"memory of a rank over {steps:,} steps, last quarter / first", "<= 1.05", growth),
        ("memory of a rank, peak", "< 1,500 MB", f"{max(totals):,.0f} MB ({parts})"),
    ]


def against_webdataset(args, data: Data) -> tuple[dict, list]:
    """Both readers on the same shards, behind the latency and without it."""
    figures, rows = {}, []
    with Serving(data.folder("middle")) as server:
        made = data.made["middle"]
        names = [shard_name(k) for k in range(made["shards"])]
        for latency in (LATENCY, 0.0):
            server.set(latency=latency)
            what = Pass("ours", server.url, made["samples"], names, num_workers=args.workers)
            found = {reader: brief(take(replace(what, reader=reader))) for reader in ("ours", "webdataset")}
            figures[f"{1000 * latency:.0f}_ms"] = found
            label = f"webdataset + curl at {1000 * latency:.0f} ms, samples/s and CPU ms a sample (ours)"
            ours, theirs = (f"{f['samples_per_s']:.0f} and {f['cpu_ms_per_sample']:.1f}" for f in found.values())
            rows.append((label, "", f"{theirs} ({ours}, tokenised and packed)"))
    return figures, rows


def faults(args, data: Data) -> tuple[dict, list]:
    """Each fault once, in the middle of a pass: what is lost, what is altered, how the run ends."""
    folder, readers = data.folder("few"), {}
    names = [shard_name(k) for k in range(FAULT_SHARDS)]
    with Serving(folder) as server:
        for reader in ("ours", *WEBDATASETS):
            before = FAULT_SAMPLES // 2 if reader == "ours" else FAULT_SHARDS // 2  # requests: of samples, of shards
            what = Pass(reader, server.url, FAULT_SAMPLES, names, batch_size=16, num_workers=args.workers)
            what.checksums, what.server_early = True, False
            server.set(script=[], lasting=None, stall_seconds=1e5)
            clean = take(what, timeout=args.fault_timeout).checksums
            readers[reader] = {"clean": {"samples": len(clean)}}
            for fault in args.faults:
                readers[reader][fault] = one_fault(server, folder, what, fault, before, clean, args.fault_timeout)
                print(f"{reader}, {fault}: {readers[reader][fault]}", flush=True)
    rows = []
    for fault in args.faults:
        outcomes = "; ".join(f"{reader}: {tell(found[fault])}" for reader, found in readers.items())
        rows.append((f"fault: {fault}", "0 lost, 0 altered, or an error", outcomes))
    return readers, rows


def one_fault(server: Serving, folder: Path, what: Pass, fault: str, before: int, clean: dict, timeout: float) -> dict:
    """A pass that meets `fault` after `before` answers; compared with the pictures of the `clean` one."""
    victim, aside = folder / shard_name(FAULT_SHARDS // 2), folder / "aside"
    server.set(script=[None] * before + [None if fault == "missing" else fault], lasting=None)
    if fault == "missing":  # one shard is gone, not the whole server
        victim.rename(aside)
    begin = time.monotonic()
    try:
        taken = take(what, timeout=timeout)
    finally:
        if aside.exists():
            aside.rename(victim)
    return {
        "lost": len(clean.keys() - taken.checksums.keys()),
        "altered": sum(taken.checksums[key] != clean[key] for key in taken.checksums.keys() & clean.keys()),
        "end": "hung" if taken.error == "hung" else "error" if taken.error else "regular",
        "error": taken.error and _FOLDERS.sub("", " ".join(taken.error.split())[-300:]),
        "retries": taken.io.get("retries", 0),
        "seconds": time.monotonic() - begin,
    }


def tell(found: dict) -> str:
    """One outcome of `one_fault` in words: what is missing at a regular end is lost, a run that stopped can go on."""
    missing, altered = found["lost"], f", {found['altered']} altered" if found["altered"] else ""
    if found["end"] == "regular":
        return f"{missing} lost{altered}, went on"
    return f"{'hung' if found['end'] == 'hung' else 'stopped with an error'}{altered}, {missing} not delivered"


def brief(taken: Taken) -> dict:
    """What a card keeps of a pass."""
    return {name: value for name, value in asdict(taken).items() if name not in ("checksums", "memory")}


MEASURES = {
    "cpu": cpu,
    "first": first,
    "throughput": throughput,
    "memory": memory,
    "webdataset": against_webdataset,
    "faults": faults,
}
