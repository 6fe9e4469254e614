"""One writer at a time: who gets a lease, on one machine and on several, and what a crash leaves behind."""

import json
import subprocess
import sys
import threading
import time

import pytest

from llava_next.data.storage import lease as leases
from llava_next.data.storage.client import Storage
from llava_next.data.storage.lease import LEASE_FILE, Lease, LeaseHeld
from support.faults import S3Server


@pytest.fixture(params=["file", "s3"])
def storage(request, tmp_path, monkeypatch):
    if request.param == "file":
        yield Storage(tmp_path)
    else:
        with S3Server(tmp_path) as server:
            server.use(monkeypatch)
            yield Storage(f"{server.url}/run")


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Beats of 50 ms; a holder elsewhere is dead after half a second."""
    for name, seconds in (("BEAT", 0.05), ("STALE", 0.5), ("SETTLE", 0.05)):
        monkeypatch.setattr(leases, name, seconds)


def lease(storage: Storage, **options) -> Lease:
    return Lease(storage, "run", "Wait for it.", **options)


def content(storage: Storage) -> dict:
    return json.loads(storage.read_all(LEASE_FILE))


def write(storage: Storage, beat: int, **changes) -> None:
    """A lease as another machine's run would write it."""
    about = {"token": "theirs", "host": "node-7", "machine": "another", "process": 12, "start": "5", "since": 1.0}
    storage.put(LEASE_FILE, json.dumps({**about, **changes, "beat": beat}).encode())


def test_second_holder_on_one_machine_is_refused_at_once_and_gets_it_when_it_is_free(storage):
    first = lease(storage).take()
    with pytest.raises(LeaseHeld, match=r"is in use by another run: process \d+ on .*, since 20.*\. Wait for it\."):
        lease(storage).take()
    first.release()
    assert not storage.exists(LEASE_FILE)
    with lease(storage).take() as second:
        assert content(storage)["token"] == second._me["token"]


def test_renewals_change_the_lease(storage):
    with lease(storage).take():
        deadline = time.monotonic() + 20
        while content(storage)["beat"] < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_ended_process_on_this_machine_leaves_a_lease_that_is_free(storage):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write(storage, 3, machine=leases._machine(), process=gone.pid, start="1")
    with lease(storage).take() as mine:
        assert content(storage)["token"] == mine._me["token"]


def test_process_with_the_number_of_an_ended_holder_does_not_keep_its_lease(storage):
    write(storage, 3, machine=leases._machine(), process=1, start="not when process 1 began")
    lease(storage).take().release()


def test_holder_elsewhere_that_renews_is_refused_and_one_that_does_not_is_taken_for_dead(storage):
    stop, beats = threading.Event(), iter(range(1000))

    def renew():
        while not stop.wait(0.05):
            write(storage, next(beats))

    write(storage, 0)
    other, said = threading.Thread(target=renew), []
    other.start()
    try:
        with pytest.raises(LeaseHeld, match="process 12 on node-7"):
            lease(storage).take(say=said.append)
    finally:
        stop.set()
        other.join()
    assert len(said) == 1 and "waiting up to" in said[0]
    with lease(storage).take(say=said.append) as mine:
        assert content(storage)["token"] == mine._me["token"]


def test_lease_of_unreadable_content_goes_stale_as_any(storage):
    storage.put(LEASE_FILE, b"{")
    lease(storage).take(say=lambda text: None).release()


def test_taken_over_holder_is_told_and_gives_nothing_back(storage):
    told = threading.Event()
    first = lease(storage, on_lost=lambda text: told.set()).take()
    write(storage, 0)
    assert told.wait(20)
    first.release()
    assert content(storage)["token"] == "theirs"


def test_of_many_that_start_at_once_one_gets_the_lease(storage):
    """Each waits for the others before it tries: on an empty place, and on one whose holder has ended."""
    for before in (None, {"machine": leases._machine(), "process": 0, "start": "1"}):
        if before:
            write(storage, 0, **before)
        barrier, got, refused = threading.Barrier(8), [], []

        def start(barrier=barrier, got=got, refused=refused):
            mine = lease(storage, on_lost=refused.append)
            barrier.wait()
            try:
                got.append(mine.take(say=lambda text: None))
            except LeaseHeld:
                refused.append(mine)

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(got), len(refused)) == (1, 7)
        got[0].release()


def test_two_kinds_of_lease_in_one_place_do_not_meet(storage):
    with lease(storage, name="part-1.json").take(), lease(storage, name="part-2.json").take():
        assert storage.exists("part-1.json") and storage.exists("part-2.json")
