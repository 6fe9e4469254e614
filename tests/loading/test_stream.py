"""The stream as a run meets it: over networks that fail, killed and resumed, at any world size, one and the same."""

import hashlib
import json
import os
import pickle
import random
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from llava_next.data.loading.feed import Feed
from llava_next.data.loading.loader import STOP_SIGNALS, LoaderOptions, build_loader
from llava_next.data.plan.mixture import Mixture
from llava_next.data.storage.cache import Cache
from llava_next.data.storage.client import Storage, StorageError
from llava_next.training.setup import load_parts
from support.demo import build_demo
from support.faults import LASTING, FaultServer, S3Server
from support.launching import forked, wait_for_all
from support.workers.stream import read_rank

SAMPLES, BATCH, STEPS = 60, 8, 16  # two epochs of 60 samples: 8 steps each, the last of an epoch smaller


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A data set of digits and the encoder of the demo model."""
    folder = tmp_path_factory.mktemp("stream")
    build_demo(folder, samples=SAMPLES)
    data = SimpleNamespace(template="mistral", images="anyres", max_length=300)
    return folder / "shards", load_parts(
        SimpleNamespace(lora=None, quantize=None, model=str(folder / "base"), data=data)
    ).encoder


@pytest.fixture(scope="module")
def clean(demo, tmp_path_factory):
    """What one rank reads from the local folder: {step: [(slot, id, hash), ...]}."""
    out = tmp_path_factory.mktemp("clean") / "rank0"
    read_rank(str(demo[0]), demo[1], out)
    return merged([out])


def lines(out) -> list[dict]:
    """Whole lines of a rank's file; the last may be cut by a kill."""
    text = out.read_text() if out.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def merged(outs) -> dict[int, list]:
    """Samples of each step over all ranks, in slot order."""
    steps = {}
    for out in outs:
        for line in lines(out):
            steps.setdefault(line["step"], []).extend(tuple(row) for row in line["samples"])
    return {step: sorted(rows) for step, rows in sorted(steps.items())}


def digest(steps: dict[int, list]) -> str:
    return hashlib.sha256(json.dumps(list(steps.items())).encode()).hexdigest()


def total(outs, key: str) -> float:
    return sum(line["io"][key] for out in outs for line in lines(out))


def start_ranks(demo, url, outs, start_step=0, variables=None, **options) -> list:
    """Processes that read from a step on, each writing to its file."""
    ranks = []
    for rank, out in enumerate(outs):
        named = {"rank": rank, "world": len(outs), "start_step": start_step, **options}
        out.with_suffix(".job").write_bytes(pickle.dumps(((url, demo[1], out), named)))
        job = out.with_suffix(".job")
        ranks.append(forked("tests/support/workers/stream.py", job, said=out.with_suffix(".txt"), **(variables or {})))
    return ranks


def step_of(out: Path) -> int:
    """The last step that a rank has read."""
    return lines(out)[-1]["step"] if lines(out) else -1


def until_step(ranks, outs, goal: int) -> None:
    """Waits until all ranks have read a step."""
    deadline = time.monotonic() + 90
    while min(map(step_of, outs)) < goal:
        assert time.monotonic() < deadline and all(rank.poll() in (None, 0) for rank in ranks)
        time.sleep(0.02)


def take_back(outs, rng: random.Random, start: int) -> int:
    """The checkpoint that a killed run resumes from: what it logged after that is taken back."""
    start = rng.randint(start, min(map(step_of, outs)))
    for out in outs:
        kept = [line for line in lines(out) if line["step"] < start]
        out.write_text("".join(json.dumps(line) + "\n" for line in kept))
    return start


def read_with_kills(demo, url, tmp_path, world, seed, variables=None) -> list[Path]:
    """Ranks as processes, all killed twice at random steps and resumed at an earlier one, then run to the end."""
    rng, outs, start = random.Random(seed), [tmp_path / f"rank{rank}" for rank in range(world)], 0
    options = {"variables": variables, "pause": 0.03}
    for _ in range(2):
        ranks = start_ranks(demo, url, outs, start, **options)
        until_step(ranks, outs, start + rng.randint(1, 5))
        for rank in ranks:
            rank.kill()
            rank.wait()
        start = take_back(outs, rng, start)
    assert wait_for_all(start_ranks(demo, url, outs, start, **options), 90) == 0
    return outs


def assert_equal_to(clean, outs) -> None:
    found = merged(outs)
    assert len(found) == STEPS and sum(map(len, found.values())) == 2 * SAMPLES
    assert digest(found) == digest(clean)


@pytest.mark.parametrize(("transport", "world"), [("file", 4), ("s3", 2)])
def test_killed_and_resumed_streams_are_bit_equal_over_every_transport(demo, clean, tmp_path, transport, world):
    """5 % of the requests fail in passing, over s3, and over http in the test of signals."""
    if transport == "file":
        outs = read_with_kills(demo, str(demo[0]), tmp_path, world, seed=world)
    else:
        with S3Server(demo[0], share=0.05) as server:
            outs = read_with_kills(demo, server.url, tmp_path, world, seed=7, variables=server.environment)
    assert_equal_to(clean, outs)


def test_requests_that_fail_in_passing_lose_and_repeat_nothing_and_are_counted(demo, clean, tmp_path):
    out = tmp_path / "rank0"
    with FaultServer(demo[0]) as server:
        server.share = 0.05
        read_rank(server.url, demo[1], out)
        failed = sum(request.fault is not None for request in server.requests)
    assert digest(merged([out])) == digest(clean)
    # The index is read by the main process and counted there; its few requests may have failed as well.
    assert failed >= total([out], "retries") > 0
    assert total([out], "requests") >= 2 * SAMPLES + total([out], "retries")


def test_bit_that_flips_on_the_way_is_read_again_and_never_cached(demo, clean, tmp_path):
    with FaultServer(demo[0]) as server:
        server.script = [None] * 30 + ["flip"]
        read_rank(server.url, demo[1], tmp_path / "rank0", cache=Cache(tmp_path / "cache", 100_000_000))
    assert digest(merged([tmp_path / "rank0"])) == digest(clean)
    assert total([tmp_path / "rank0"], "retries") == 1 and total([tmp_path / "rank0"], "cache_hits") > SAMPLES / 2


def test_cache_serves_the_second_epoch(demo, clean, tmp_path):
    with FaultServer(demo[0]) as server:
        read_rank(server.url, demo[1], tmp_path / "rank0", cache=Cache(tmp_path / "cache", 100_000_000))
    assert digest(merged([tmp_path / "rank0"])) == digest(clean)
    # A sample at the end of the first epoch and the start of the second may be read ahead before it is stored.
    assert SAMPLES / 2 <= total([tmp_path / "rank0"], "cache_hits") <= SAMPLES


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("flip", "checksum differs from the index"),
        ("etag", "changed"),
        ("missing", "not found"),
        ("403", "permission"),
    ],
)
def test_lasting_faults_end_the_stream_naming_url_and_range(demo, tmp_path, fault, message):
    with FaultServer(demo[0]) as server:
        # 2 files of the data set, then samples: the fault comes with the twentieth
        server.script = [None] * 22 + [fault] * (1 if fault in LASTING else 500)
        begin = time.monotonic()
        with pytest.raises(StorageError, match=message) as error:
            read_rank(server.url, demo[1], tmp_path / "rank0", retry_seconds=1.0)
        assert time.monotonic() - begin < 30
    assert server.url in str(error.value) and ", bytes " in str(error.value)
    assert len(lines(tmp_path / "rank0")) < STEPS


def test_stall_is_written_down_while_it_lasts(demo, tmp_path):
    """A server that stops in the middle of an answer: which sample, which bytes, and the stacks, before any limit."""
    encoder = demo[1]
    with FaultServer(demo[0]) as server:
        storage = Storage(server.url, stall_seconds=60, retry_seconds=0.5)
        mixture = Mixture([(storage, "data", 1.0)], encoder.anyres, BATCH, max_length=encoder.max_length)
        server.script = ["stall"] * 50
        options = LoaderOptions(num_workers=0, patience=0.3, dump_folder=tmp_path)
        feed = Feed(build_loader(mixture, encoder, 0, 1, 1500, 60, options=options), 0.3, options.dump_file("rank0"))
        waiter = ThreadPoolExecutor(1).submit(next, feed)
        deadline = time.monotonic() + 20
        while len(dumps := sorted(tmp_path.glob("stall-*.txt"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)  # until it is written to the end
        text = "".join(path.read_text() for path in dumps)
    assert isinstance(waiter.exception(timeout=30), StorageError)  # the server is gone
    feed.close()
    assert "reads in flight:" in text and f"{server.url}/shard-000" in text and ", bytes " in text
    assert "loading step 0, micro-batch 0" in text and "no micro-batch from the loader; last: nothing yet" in text
    assert "Thread 0x" in text and "read_range" in text


def shared_memory(processes: list[psutil.Process]) -> set[Path]:
    """Files of semaphores and other shared memory that these processes have mapped; known by inode, for glibc names a
    semaphore after it has mapped it."""
    maps = [line for process in processes for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines()]
    inodes = {int(line.split()[4]) for line in maps if "/dev/shm/" in line}
    return {Path(entry) for entry in os.scandir("/dev/shm") if entry.inode() in inodes}


def test_signals_do_not_reach_workers_and_a_killed_rank_leaves_nothing_and_goes_on_bit_equal(
    demo, clean, tmp_path, request
):
    """Ctrl-C, SIGTERM and SIGHUP for the whole job leave the loading to the rank; after SIGKILL of the rank no process,
    file, socket or shared memory of it is left. Over http, where 5 % of the requests fail in passing."""
    temporary = Path(tempfile.mkdtemp())  # a socket's path has about 100 characters at most
    request.addfinalizer(lambda: shutil.rmtree(temporary))
    outs, options = [tmp_path / "rank0"], {"num_workers": 3, "variables": {"TMPDIR": str(temporary)}}
    with FaultServer(demo[0]) as server:
        server.share = 0.05
        # in epochs without end, of which two are looked at
        [rank] = ranks = start_ranks(demo, server.url, outs, **options, pause=0.1, epochs=20)
        until_step(ranks, outs, 1)
        family = psutil.Process(rank.pid).children(recursive=True)
        assert len(family) >= 4  # the server of workers and three workers, at least
        shared = shared_memory([psutil.Process(rank.pid), *family])
        assert any("sem." in path.name for path in shared) and list(temporary.iterdir())
        for process in family:
            if "resource_tracker" not in " ".join(process.cmdline()):
                mask = Path(f"/proc/{process.pid}/status").read_text().split("SigBlk:")[1].split()[0]
                for number in STOP_SIGNALS:  # blocked from birth: there is no moment in which they would end a worker
                    assert int(mask, 16) >> (number - 1) & 1
                    process.send_signal(number)
        until_step(ranks, outs, 14)  # beyond all that was loaded ahead
        rank.kill()
        rank.wait()
        assert not psutil.wait_procs(family, timeout=30)[1]
        deadline = time.monotonic() + 30
        while any(path.exists() for path in shared) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not [path for path in shared if path.exists()] and not list(temporary.iterdir())
        start = take_back(outs, random.Random(11), 4)
        assert wait_for_all(start_ranks(demo, server.url, outs, start, **options), 90) == 0
    assert_equal_to(clean, outs)
