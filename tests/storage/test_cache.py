"""The cache of byte ranges: hits, repair, the cap, several processes at once, and never another object's bytes."""

import errno
import multiprocessing
import os
import pickle
import random
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from llava_next.data.storage.cache import Cache
from llava_next.data.storage.client import Storage, StorageError
from support.faults import FaultServer

DATA = random.Random(0).randbytes(400_000)
RANGES = [(start, 900 + start % 77) for start in range(0, 390_000, 1000)]
BLOCK = 4096


@pytest.fixture
def server(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "data.tar").write_bytes(DATA)
    with FaultServer(tmp_path / "set") as server:
        yield server


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", 2**30)


def entries(cache: Cache) -> list[Path]:
    return [path for path in cache.folder.glob("??/*") if path.is_file()]


def occupied(cache: Cache) -> int:
    """Bytes of disk blocks that the entries take."""
    return sum(-(-path.stat().st_size // BLOCK) * BLOCK for path in entries(cache))


def read(storage: Storage, ranges=RANGES) -> bool:
    """Whether all ranges come with the right bytes."""
    return all(storage.read_range("data.tar", *r, size=len(DATA)) == DATA[r[0] : r[0] + r[1]] for r in ranges)


@pytest.mark.parametrize("etags", [True, False])
def test_second_run_reads_from_the_cache_alone(server, cache, etags):
    server.etags, server.share = etags, 0.05
    first, second = Storage(server.url, cache=cache), Storage(server.url, cache=cache)
    assert read(first) and first.stats().cache_hits == 0 and first.stats().retries > 0
    server.share, gets = 0.0, len(server.ranges())
    assert read(second) and len(server.ranges()) == gets
    stats = second.stats()
    assert (stats.requests, stats.cache_hits, stats.bytes) == (1, len(RANGES), sum(length for _, length in RANGES))
    assert read(pickle.loads(pickle.dumps(second))) and len(server.ranges()) == gets


@pytest.mark.parametrize("damage", ["flipped bit", "cut off", "emptied"])
def test_damaged_entries_are_read_again_and_repaired(server, cache, damage):
    assert read(Storage(server.url, cache=cache), RANGES[:20])
    for path in entries(cache):
        data = bytearray(path.read_bytes())
        data[random.Random(path.name).randrange(len(data))] ^= 16
        path.write_bytes({"flipped bit": data, "cut off": data[:-1], "emptied": b""}[damage])
    storage = Storage(server.url, cache=cache)
    assert read(storage, RANGES[:20]) and storage.stats().cache_hits == 0
    assert read(storage, RANGES[:20]) and storage.stats().cache_hits == 20


def test_a_changed_object_never_meets_its_old_bytes(server, cache):
    before = Storage(server.url, cache=cache)
    assert read(before, RANGES[:5])
    changed = DATA[::-1]
    (server.folder / "data.tar").write_bytes(changed)
    os.utime(server.folder / "data.tar", (1e9, 1e9))
    after = Storage(server.url, cache=cache)
    for start, length in RANGES[:5]:
        assert after.read_range("data.tar", start, length) == changed[start : start + length]
    assert after.stats().cache_hits == 0
    with pytest.raises(StorageError, match="The shard was changed while the run reads it"):
        before.read_range("data.tar", *RANGES[7])
    with pytest.raises(StorageError, match=r"has 400000 bytes, its index says 7"):
        after.read_range("data.tar", *RANGES[0], size=7)  # also where a hit would have been


def test_entries_are_told_apart_by_url_query_version_and_range(cache):
    keys = [("u", "a", 0), ("u?x=1", "a", 0), ("u?x=2", "a", 0), ("u", "b", 0), ("u", "a", 1)]
    for number, key in enumerate(keys):
        cache.put(*key, bytes([number]) * 10)
    for number, (url, tag, start) in enumerate(keys):
        assert cache.get(url, tag, start, 10) == bytes([number]) * 10
        assert cache.get(url, tag, start, 9) is None
    assert all("x=1" not in path.name for path in entries(cache))  # a query may hold a secret


def test_cap_holds_at_every_moment_and_the_least_recently_used_go(tmp_path):
    cache = Cache(tmp_path / "cache", 64 * BLOCK)
    for number in range(400):
        cache.put("u", "tag", number, bytes(BLOCK if number % 2 else 100))
        assert occupied(cache) <= cache.max_bytes
        if number % 5 == 0:
            assert number == 0 or cache.get("u", "tag", 0, 100) == bytes(100)  # in use, so it stays
    assert occupied(cache) >= cache.max_bytes / 2
    held = [number for number in range(400) if cache.get("u", "tag", number, BLOCK if number % 2 else 100) is not None]
    assert held[0] == 0 and held[1:] == list(range(held[1], 400))  # the rest: the newest, without a gap
    cache.put("u", "tag", 9999, bytes(64 * BLOCK))  # larger than the cache
    assert cache.get("u", "tag", 9999, 64 * BLOCK) is None


def read_shuffled(url: str, cache: Cache, seed: int) -> tuple[bool, int]:
    ranges = RANGES * 2
    random.Random(seed).shuffle(ranges)
    storage = Storage(url, cache=cache)
    return read(storage, ranges), storage.stats().cache_hits


def test_processes_share_a_full_cache(server, tmp_path):
    cache = Cache(tmp_path / "cache", 100 * BLOCK)
    with ProcessPoolExecutor(2, multiprocessing.get_context("forkserver")) as pool:
        results = list(pool.map(partial(read_shuffled, server.url, cache), range(4)))
    assert all(right for right, _ in results) and sum(hits for _, hits in results) > 0
    # Two writers may each be one entry beyond what was counted while an eviction ran.
    assert BLOCK <= occupied(cache) <= cache.max_bytes + 2 * BLOCK
    assert list((cache.folder / "writing").iterdir()) == []


def write_for_ever(cache: Cache) -> None:
    for number in range(10**9):
        cache.put("u", "tag", number % 50, bytes([number % 50]) * 300_000)


def test_a_killed_writer_leaves_nothing_that_is_read_and_no_lock(tmp_path):
    cache = Cache(tmp_path / "cache", 40 * 300_000)  # fewer than it writes: it also evicts
    for seed in range(3):
        writer = multiprocessing.get_context("forkserver").Process(target=write_for_ever, args=(cache,))
        writer.start()
        while not entries(cache):
            time.sleep(0.01)
        time.sleep(random.Random(seed).uniform(0, 0.3))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        found = [(number, cache.get("u", "tag", number, 300_000)) for number in range(50)]
        assert all(data in (None, bytes([number]) * 300_000) for number, data in found)
        assert any(data is not None for _, data in found)
    left = cache.folder / "writing" / "left"
    left.write_bytes(b"x")
    os.utime(left, (1e9, 1e9))
    for number in range(100, 150):  # evicts
        cache.put("u", "tag", number, bytes(300_000))
    assert cache.get("u", "tag", 149, 300_000) == bytes(300_000) and not left.exists()


@pytest.mark.parametrize("failure", ["no folder", "full disk"])
def test_an_unusable_cache_warns_once_and_ends_no_run(server, tmp_path, monkeypatch, capsys, failure):
    cache = Cache(tmp_path / "cache", 2**30)
    if failure == "no folder":
        cache.folder.write_bytes(b"a file where the folder should be")
    else:

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
    storage = Storage(server.url, cache=cache)
    assert read(storage, RANGES[:20]) and read(storage, RANGES[:20])
    assert storage.stats().cache_hits == 0 and storage.stats().requests == 41
    assert capsys.readouterr().err.count(f"The cache {cache.folder} cannot be used") == 1


def test_local_files_are_never_cached(server, cache):
    storage = Storage(server.folder, cache=cache)
    assert read(storage) and storage.stats().cache_hits == 0 and not cache.folder.exists()
    with pytest.raises(ValueError, match="a cache of 0 bytes"):
        Cache(cache.folder, 0)
