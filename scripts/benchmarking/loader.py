"""The stream of data against its goals, against plain webdataset, and under faults.

Shards are made in a scratch folder (see `datasets`) and served by the tests' servers in a process of their own, on the
same cores: what is measured over the network here is a lower bound for a machine with a server elsewhere.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median

from benchmarking import datasets
from benchmarking.cards import CARDS, table, write_card
from benchmarking.serving import Serving
from benchmarking.streaming import WEBDATASETS, Pass, Taken, take
from llava_next.data.format.shards import read_sample
from llava_next.data.format.writer import shard_name
from llava_next.data.loading.batch import pack
from llava_next.data.loading.encode import picture_tiles
from llava_next.data.loading.loader import LoaderOptions, MicroBatches
from llava_next.data.plan.mixture import Mixture
from llava_next.paths import local_path

LATENCY = 0.1  # seconds before the first byte of every answer
PARTS = ("cpu", "first", "throughput", "memory", "webdataset", "faults", "s3")
FAULTS = ("reset", "503", "429", "stall", "truncated", "wrong_length", "etag", "flip", "missing", "403")
FAULT_SAMPLES, FAULT_SHARDS = 96, 8
_FOLDERS = re.compile(r"(?<![\w/:])/(?:[\w.+-]+/)+")  # of this machine, in tracebacks


def add_arguments(parser) -> None:
    """Options of `benchmark.py loader`."""
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--photos", type=int, default=1000, help="in the shard whose names make the large data set")
    parser.add_argument("--copies", type=int, default=1000, help="names of that shard")
    parser.add_argument("--stream_samples", type=int, default=2000, help="read for a throughput, in photographs")
    parser.add_argument("--memory_steps", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--passes", type=int, default=5, help="over the photographs, for the CPU time")
    parser.add_argument("--fault_timeout", type=float, default=90.0, help="seconds until a run counts as hung")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--out", type=local_path, default=CARDS)


def run(args) -> None:
    """Measures the parts asked for and writes a card for each."""
    scratch, goals = Path(tempfile.mkdtemp(prefix="benchmark-loader-")), []
    try:
        data = Data(scratch, args)
        for part in args.parts:
            started = time.monotonic()
            figures, rows = MEASURES[part](args, data)
            goals += rows
            print(f"{part}: {time.monotonic() - started:.0f} s", flush=True)
            print(table(("what", "goal", "measured"), rows), flush=True)
            about = {"latency_s": LATENCY, "workers": args.workers, "data": dict(data.made)}
            write_card(f"loader-{part}", {**about, part: figures, "goals": rows}, args.out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if len(args.parts) > 1:
        print("\n" + table(("what", "goal", "measured"), goals), flush=True)


class Data:
    """The data sets, each made when it is first asked for.

    Attributes:
        made: what each holds.
    """

    def __init__(self, scratch: Path, args):
        self.scratch, self.args, self.made = scratch, args, {}

    def large(self, anyres=datasets.CLIP) -> Path:
        """A million samples by default."""
        name = "photos" if anyres == datasets.CLIP else "strips"
        return self._make(name, anyres, self.args.photos, self.args.photos, self.args.copies)

    def middle(self) -> Path:
        """Shards of 96 photographs, enough for one throughput."""
        return self._make("middle", datasets.CLIP, 96, 96, -(-self.args.stream_samples // 96))

    def few(self) -> Path:
        """Some shards whose every sample is looked at."""
        return self._make("few", datasets.CLIP, FAULT_SAMPLES, FAULT_SAMPLES // FAULT_SHARDS, 1)

    def _make(self, name: str, *how) -> Path:
        folder = self.scratch / name
        if not folder.exists():
            datasets.write_shards(folder, *how)
            self.made[name] = datasets.describe(folder)
        return folder


def cpu(args, data: Data) -> tuple[dict, list]:
    """CPU time of a sample on one core, whole and by part: the loader's own code in this process."""
    encoder, tokenizer = datasets.build_encoder(datasets.CLIP)
    mixture = Mixture([(data.middle(), "photos", 1.0)], datasets.CLIP, 128)
    requests = list(mixture.requests(0, 1, 8192, 48))
    requests = requests[: max(1, len(requests) // 2)]
    whole, parts = [], []
    for _ in range(args.passes):
        loader = MicroBatches(mixture.storages, encoder, LoaderOptions(num_workers=0))
        begin, count = time.process_time(), 0
        for request in requests:
            count += len(loader[request, None].slots)
        whole.append((time.process_time() - begin) / count)
        parts.append(split_cpu(loader, requests))
    by_part = {f"{name}_ms": 1000 * median(p[name] for p in parts) for name in parts[0]}
    rate = 1 / median(whole)
    figures = {"samples_per_s_per_core": rate, "best": 1 / min(whole), "tokenizer": tokenizer, **by_part}
    shares = ", ".join(f"{name.removesuffix('_ms')} {value:.2f}" for name, value in by_part.items())
    return figures, [("decode + encode + pack, samples/s/core, 5 tiles", ">= 150", f"{rate:.0f} (ms: {shares})")]


def split_cpu(loader: MicroBatches, requests: list) -> dict[str, float]:
    """CPU seconds a sample of each part, one after the other in one thread."""
    spent, encoder = dict.fromkeys(("read", "parse", "decode", "tokenize", "place", "pack"), 0.0), loader.encoder

    def timed(name: str, work: Callable, *arguments):
        begin = time.process_time()
        result = work(*arguments)
        spent[name] += time.process_time() - begin
        return result

    count = 0
    for request in requests:
        examples = []
        for ref in request.samples:
            raw = timed("parse", read_sample, timed("read", loader._read, ref), ref.location.key)
            before = spent["decode"] + spent["tokenize"]
            for number, image in enumerate(raw.images):
                timed("decode", picture_tiles, image, number, encoder.anyres)
            lengths = [encoder.anyres.num_tokens(image.width, image.height) for image in raw.images]
            timed(
                "tokenize",
                encoder.template.encode,
                raw.conversations,
                encoder.tokenizer,
                encoder.image_token_id,
                lengths,
            )
            inside = spent["decode"] + spent["tokenize"] - before
            examples.append(timed("place", encoder.encode, raw, ref.sample_id, ref.slot, ref.source))
            spent["place"] -= inside  # encode does all three
            count += 1
        timed("pack", pack, examples, encoder.anyres.tile_size, encoder.anyres.patches_per_tile)
    return {name: max(0.0, seconds) / count for name, seconds in spent.items()}


def first(args, data: Data) -> tuple[dict, list]:
    """Time from the opening of the large data set to the first 16 samples, and what the index takes."""
    folder, figures = data.large(), {}
    # a rank's share of a step of 128 on 8 ranks
    what = Pass("ours", str(folder), 32, batch_size=16, max_steps=1, num_workers=args.workers)
    figures["local"] = brief(take(what))
    with Serving("http", folder) as server:
        server.set(latency=LATENCY)
        what.url = server.url
        figures["http"] = brief(take(what))
        what.server_early = False
        figures["http_cold"] = brief(take(what))
    local, http, cold = (figures[name] for name in ("local", "http", "http_cold"))
    samples = f"{data.made['photos']['samples']:,}"
    return figures, [
        (f"first 16 samples, local, index of {samples}", "<= 3 s", f"{local['first_s']:.1f} s"),
        (
            f"first 16 samples, HTTP with {1000 * LATENCY:.0f} ms, index of {samples}",
            "<= 10 s",
            f"{http['first_s']:.1f} s ({cold['first_s']:.1f} s when worker processes import torch meanwhile)",
        ),
        (f"plan of {samples} samples ready, local", "<= 2 s", f"{local['open_s']:.1f} s"),
        (
            f"index of {samples} samples in memory",
            "<= 100 MB",
            f"{local['index_mb']:.0f} MB ({local['grown_mb']:.0f} MB more resident, pyarrow and its buffers included)",
        ),
    ]


def throughput(args, data: Data) -> tuple[dict, list]:
    """Samples a second behind the latency: photographs, and strips so small that decoding is not the limit."""
    figures, rows = {}, []
    for anyres, name in ((datasets.CLIP, "photographs in 5 tiles"), (datasets.SMALL, "strips of a kilobyte")):
        folder, small = data.large(anyres), anyres == datasets.SMALL
        samples = args.stream_samples * (5 if small else 1)
        with Serving("http", folder) as server:
            server.set(latency=LATENCY)
            what = Pass("ours", server.url, samples, small=small, batch_size=32, num_workers=args.workers)
            what.max_steps = samples // 32
            key = "strips" if small else "photos"
            figures[key] = brief(take(what))
        rate, spent = (figures[key][k] for k in ("samples_per_s", "cpu_ms_per_sample"))
        label = f"samples/s a rank at {1000 * LATENCY:.0f} ms, {args.workers} workers, {name}"
        rows.append((label, ">= 250", f"{rate:.0f} ({spent:.1f} ms of CPU each, server not counted)"))
    return figures, rows


def memory(args, data: Data) -> tuple[dict, list]:
    """Memory of a rank over a long run on strips: the main process and its workers."""
    folder, batch = data.large(datasets.SMALL), 16
    every = max(1, args.memory_steps // 100)
    what = Pass(
        *("ours", str(folder), batch * args.memory_steps),
        small=True,
        batch_size=batch,
        max_steps=args.memory_steps,
        num_workers=args.workers,
        memory_every=every,
    )
    taken = take(what, timeout=3600)
    looks = taken.memory[len(taken.memory) // 10 :]  # queues have filled by then
    totals = [main + workers for _, main, workers, _ in looks] or [0.0]
    early, late = (median(part) for part in (totals[: max(1, len(totals) // 4)], totals[-max(1, len(totals) // 4) :]))
    figures = {
        **brief(taken),
        "steps": args.memory_steps,
        "peak_mb": max(totals),
        "main_mb": max((main for _, main, *_ in looks), default=0.0),
        "workers_mb": max((workers for *_, workers, _ in looks), default=0.0),
        "resident_mb": max((resident for *_, resident in looks), default=0.0),
        "growth": late / max(early, 1e-9) - 1,
        "looks": [[int(step), *sizes] for step, *sizes in taken.memory],
    }
    steps, peak = f"{args.memory_steps:,}", figures["peak_mb"]
    parts = (
        f"main {figures['main_mb']:.0f}, {args.workers} workers and what they are forked from "
        f"{figures['workers_mb']:.0f}; shared pages count once, else {figures['resident_mb']:,.0f}"
    )
    return figures, [
        (f"memory of a rank over {steps} steps, last quarter / first", "<= 1.05", f"{1 + figures['growth']:.3f}"),
        ("memory of a rank, peak", "< 1,500 MB", f"{peak:,.0f} MB ({parts})"),
    ]


def against_webdataset(args, data: Data) -> tuple[dict, list]:
    """Both readers on the same shards, behind the latency and without it."""
    folder, figures, rows = data.middle(), {}, []
    made = data.made["middle"]
    names = [shard_name(k) for k in range(made["shards"])]
    with Serving("http", folder) as server:
        for latency in (LATENCY, 0.0):
            server.set(latency=latency)
            found = {}
            for reader in ("ours", "webdataset"):
                what = Pass(reader, server.url, made["samples"], names, batch_size=32, num_workers=args.workers)
                found[reader] = brief(take(what))
            figures[f"{1000 * latency:.0f}_ms"] = found
            label = f"webdataset + curl at {1000 * latency:.0f} ms, samples/s and CPU ms a sample (ours)"
            told = (f"{found[r]['samples_per_s']:.0f} and {found[r]['cpu_ms_per_sample']:.1f}" for r in found)
            ours, theirs = told
            rows.append((label, "", f"{theirs} ({ours}, tokenised and packed)"))
    return figures, rows


def s3(args, data: Data) -> tuple[dict, list]:
    """Our loader over S3. moto is a mock of S3 in Python; this says that the path works, not how fast S3 is."""
    folder = data.middle()
    samples = data.made["middle"]["samples"]
    with Serving("s3", folder) as server:
        taken = take(Pass("ours", server.url, samples, num_workers=args.workers), server.environment)
    figures = brief(taken)
    return figures, [("samples/s over S3 (moto, itself the limit)", "", f"{figures['samples_per_s']:.0f}")]


def faults(args, data: Data) -> tuple[dict, list]:
    """Each fault once, in the middle of a pass: what is lost, what is altered, how the run ends."""
    folder = data.few()
    names = [shard_name(k) for k in range(FAULT_SHARDS)]
    readers = {}
    with Serving("http", folder) as server:
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
    kept = asdict(taken)
    for name in ("checksums", "memory"):
        kept.pop(name)
    return kept


MEASURES = {
    "cpu": cpu,
    "first": first,
    "throughput": throughput,
    "memory": memory,
    "webdataset": against_webdataset,
    "faults": faults,
    "s3": s3,
}
