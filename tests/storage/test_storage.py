"""Ranged reads: the right bytes through every fault, retries that are counted, errors that name URL and range and no
secret; writing and listing; the hub."""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest

from llava_next.data.storage.client import IOStats, MissingObjectError, Storage, StorageError, redact, written_aside
from support.faults import FaultServer, S3Server

DATA = bytes(range(256)) * 40
RANGES = [(start, 100 + start % 50) for start in range(0, 10_000, 25)]  # 400 of them


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "data.tar").write_bytes(DATA)
    return folder


@pytest.fixture
def server(folder):
    with FaultServer(folder) as server:
        yield server


@pytest.fixture
def s3(folder, monkeypatch):
    with S3Server(folder) as server:
        server.use(monkeypatch)
        yield server


def test_local_and_network_ranges_are_the_files_bytes(folder, server, s3):
    for url in (folder, str(folder) + "/", f"file://{folder}", server.url, server.url + "/", s3.url):
        storage = Storage(url)
        assert storage.read_all("data.tar") == DATA
        assert storage.read_range("data.tar", 512, 1000, size=len(DATA)) == DATA[512:1512]
        assert storage.read_range("data.tar", len(DATA) - 1, 1) == DATA[-1:]
        assert storage.read_range("data.tar", 7, 0) == b""
        assert storage.exists("data.tar") and not storage.exists("other.tar")
    assert "bytes=512-1511" in server.ranges()  # and not the whole file


def test_odd_folder_names_are_found(tmp_path, monkeypatch):
    odd = tmp_path / "a b%20c?d#é"
    odd.mkdir()
    (odd / "data.tar").write_bytes(DATA)
    assert Storage(odd).read_all("data.tar") == DATA
    monkeypatch.chdir(tmp_path)
    relative = Storage(odd.name)
    monkeypatch.chdir("/")
    assert relative.read_all("data.tar") == DATA
    assert relative.label == str(odd)


@pytest.mark.parametrize("fault", ["503", "429", "reset", "truncated", "stall", "wrong_length", "too_long"])
def test_passing_faults_are_retried_counted_and_give_the_same_bytes(server, fault):
    storage = Storage(server.url, stall_seconds=0.3)
    server.script = [fault, fault]
    assert storage.read_range("data.tar", 100, 5000, size=len(DATA)) == DATA[100:5100]
    assert len(server.requests) == 3
    stats = storage.stats()
    assert (stats.requests, stats.retries, stats.bytes, stats.cache_hits) == (3, 2, 5000, 0)
    assert 0 < stats.read_s < 20


def test_five_in_a_hundred_failing_requests_lose_nothing(server):
    server.share = 0.05
    storage = Storage(server.url)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda part: storage.read_range("data.tar", *part, size=len(DATA)), RANGES))
    assert parts == [DATA[start : start + length] for start, length in RANGES]
    failed = sum(request.fault is not None for request in server.requests)
    assert failed >= 8 and storage.stats().retries == failed
    assert storage.stats().requests == len(server.requests) == len(RANGES) + failed


@pytest.mark.parametrize(
    "fault, reason",
    [
        ("503", "503 Service Unavailable"),
        ("reset", "connection reset"),
        ("truncated", "the answer broke off"),
        ("stall", "no byte came for 0.3 s"),
        ("wrong_length", "Requested 100..5100, got 100..2600"),
    ],
)
def test_lasting_faults_end_within_the_time_budget_naming_url_and_range(server, fault, reason):
    server.script = [fault] * 1000
    start = time.monotonic()
    with pytest.raises(StorageError) as error:
        Storage(server.url, retry_seconds=1, stall_seconds=0.3).read_range("data.tar", 100, 5000)
    assert time.monotonic() - start < 6
    text = str(error.value)
    assert text.startswith(f"{server.url}/data.tar, bytes 100 to 5100: ") and reason in text
    assert f"given up after {len(server.requests)} attempts in " in text and len(server.requests) >= 2


def test_a_server_that_is_gone_is_tried_again_until_the_time_is_up(folder):
    with FaultServer(folder) as server:
        storage = Storage(server.url, retry_seconds=0.5)
        storage.read_range("data.tar", 0, 10)
    with pytest.raises(
        StorageError, match=r"data\.tar, bytes 0 to 10: connection refused \(given up after \d+ attempts"
    ):
        storage.read_range("data.tar", 0, 10)
    assert storage.stats().retries >= 2


@pytest.mark.parametrize(
    "fault, message", [("403", "no permission"), ("missing", "not found"), ("whole", "gives whole files only")]
)
def test_faults_that_cannot_pass_are_not_repeated(server, fault, message):
    server.script = [fault]
    with pytest.raises(StorageError, match=rf"{server.url}/data\.tar, bytes 0 to 10: {message}|: the server {message}"):
        Storage(server.url).read_range("data.tar", 0, 10)
    assert len(server.requests) == 1


def test_missing_objects_and_missing_permission_are_told_apart(folder, server):
    for url in (folder, folder / "nowhere", server.url):
        with pytest.raises(MissingObjectError, match=r"other\.tar: not found"):
            Storage(url).read_all("other.tar")
    server.script = ["403"]
    with pytest.raises(StorageError, match=r"data\.tar: no permission") as error:
        Storage(server.url).read_all("data.tar")
    assert not isinstance(error.value, MissingObjectError)


def test_a_file_shorter_than_its_index_is_an_error(folder, server):
    for url in (folder, server.url):
        for start in (len(DATA) - 5, len(DATA) + 5):
            with pytest.raises(
                StorageError, match=rf"data\.tar, bytes {start} to {start + 10}: .*shorter than its index"
            ):
                Storage(url).read_range("data.tar", start, 10)
        with pytest.raises(ValueError, match="cannot start at -1"):
            Storage(url).read_range("data.tar", -1, 10)
    assert len(server.requests) == 2  # at once


def test_an_object_of_another_size_than_the_index_says_is_an_error(folder, server):
    for url in (folder, server.url):
        with pytest.raises(StorageError, match=r"bytes 0 to 10: the object has 10240 bytes, its index says 10241"):
            Storage(url).read_range("data.tar", 0, 10, size=len(DATA) + 1)
    assert len(server.requests) == 1


def test_an_object_replaced_while_the_run_reads_it_is_an_error(folder, server):
    storage = Storage(server.url)
    storage.read_range("data.tar", 0, 10)
    server.script = ["etag"]
    with pytest.raises(StorageError, match=r"bytes 10 to 20: .*The shard was changed while the run reads it"):
        storage.read_range("data.tar", 10, 10)
    assert len(server.requests) == 2
    assert Storage(server.url).read_range("data.tar", 10, 10) == DATA[10:20]  # a new run starts from what is there now

    server.etags, local = False, Storage(folder)
    without_tag = Storage(server.url)
    for storage in (local, without_tag):
        assert storage.read_range("data.tar", 0, 10) == storage.read_range("data.tar", 0, 10)
    (folder / "data.tar").write_bytes(DATA[::-1])
    os.utime(folder / "data.tar", (1e9, 1e9))
    for storage in (local, without_tag):
        with pytest.raises(StorageError, match="The shard was changed"):
            storage.read_range("data.tar", 0, 10)


@pytest.mark.parametrize(
    "url",
    [
        "pipe:curl http://x",
        "pipe://x",
        "ftp://host/x",
        "memory:///",
        "data:x",
        "file:relative",
        "s3:bucket",
        "javascript:x",
    ],
)
def test_other_schemes_are_refused(url):
    with pytest.raises(ValueError, match=r"is not a kind of URL that is read here|a file URL is written"):
        Storage(url)


def test_missing_settings_fail_at_once_with_the_cure(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("AZURE_", "AWS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")  # no machine of the cloud's
    start = time.monotonic()
    with pytest.raises(StorageError, match=r"az://box/set/data\.tar: .*Set AZURE_STORAGE_ACCOUNT_NAME"):
        Storage("az://box/set").read_all("data.tar")
    with pytest.raises(
        StorageError, match=r"s3://box/set/data\.tar, bytes 0 to 9: no credentials found: set AWS_ACCESS"
    ):
        Storage("s3://box/set").read_range("data.tar", 0, 9)
    assert time.monotonic() - start < 5


def test_secrets_never_stand_in_messages(server):
    with pytest.raises(ValueError, match="without a user name") as error:
        Storage("https://me:geheim@host/x")
    assert "geheim" not in str(error.value)
    storage = Storage(server.url + "?sig=geheim", retry_seconds=0.1)
    for fault in ("503", "403"):
        server.script = [fault] * 100
        with pytest.raises(StorageError) as error:
            storage.read_range("data.tar", 0, 10)
        assert "geheim" not in str(error.value) and error.value.__suppress_context__
    assert "geheim" not in repr(storage) + storage.label
    assert redact("https://u:p@h:1/a?b=c#d") == "https://h:1/a"


def test_names_cannot_leave_the_folder(folder):
    (folder / "inner").mkdir()
    storage = Storage(folder / "inner")
    for use in (storage.read_all, storage.delete, storage.list, lambda name: storage.put(name, b"")):
        with pytest.raises(StorageError):
            use("../data.tar")
    assert (folder / "data.tar").read_bytes() == DATA


def test_threads_share_one_storage(server):
    storage = Storage(server.url)
    with ThreadPoolExecutor(16) as pool:
        parts = list(pool.map(lambda start: storage.read_range("data.tar", start, 64), range(0, len(DATA), 64)))
    assert b"".join(parts) == DATA
    assert storage.stats().requests == len(DATA) // 64 and storage.stats().bytes == len(DATA)


def read_in_worker(storage: Storage) -> tuple[int, bytes, IOStats]:
    return os.getpid(), storage.read_range("data.tar", 1, 9), storage.stats()


def test_worker_processes_open_their_own_connection_and_count_from_zero(folder):
    storage = Storage(folder)
    assert storage.read_all("data.tar") == DATA  # the parent's is open before
    assert pickle.loads(pickle.dumps(storage)).url == storage.url
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        process, data, stats = pool.submit(read_in_worker, storage).result()
    assert process != os.getpid() and data == DATA[1:10]
    assert (stats.requests, stats.bytes) == (1, 9)
    assert (storage.stats() - IOStats(requests=1)).as_dict() == {**storage.stats().as_dict(), "requests": 0}


def test_reads_under_way_are_listed_until_they_end(server):
    storage = Storage(server.url, stall_seconds=5)
    server.latency = 0.5
    reader = threading.Thread(target=storage.read_range, args=("data.tar", 100, 50))
    reader.start()
    while not server.requests:
        time.sleep(0.01)
    [(where, start, length, seconds)] = storage.in_flight()
    assert (where, start, length) == (f"{server.url}/data.tar", 100, 50) and 0 < seconds < 5
    reader.join()
    assert storage.in_flight() == []


def test_s3_with_five_in_a_hundred_503_loses_nothing(folder, monkeypatch):
    with S3Server(folder, share=0.05) as server:
        server.use(monkeypatch)
        storage = Storage(server.url)
        with ThreadPoolExecutor(4) as pool:
            parts = list(pool.map(lambda part: storage.read_range("data.tar", *part, size=len(DATA)), RANGES))
    assert parts == [DATA[start : start + length] for start, length in RANGES]
    assert storage.stats().retries == sum(status == 503 for *_, status in server.requests) >= 8


@pytest.mark.parametrize("refusal", ["ExpiredToken", "InvalidAccessKeyId"])
def test_credentials_that_s3_refuses_end_the_run_at_once(s3, monkeypatch, refusal):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "geheim")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "geheim")
    s3.refusal = refusal
    with pytest.raises(StorageError, match=rf"s3://shards/data\.tar, bytes 0 to 10: no permission.*{refusal}") as error:
        Storage(s3.url).read_range("data.tar", 0, 10)
    assert "geheim" not in str(error.value) and len(s3.requests) == 1


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_objects_are_written_listed_and_deleted(kind, tmp_path, s3):
    storage = Storage(tmp_path / "new" / "out" if kind == "local" else f"{s3.url}/out")
    assert storage.list() == []
    big = tmp_path / "big"
    big.write_bytes(os.urandom(17 * 2**20))  # above one part
    storage.put("step-1/a b%#é.bin", b"abc")
    storage.put("step-1/big.bin", big)
    storage.put("step-10/empty", b"")
    assert storage.list() == [("step-1/a b%#é.bin", 3), ("step-1/big.bin", 17 * 2**20), ("step-10/empty", 0)]
    assert storage.list("step-1/a") == [("step-1/a b%#é.bin", 3)]
    assert [name for name, _ in storage.list("step-1")] == ["step-1/a b%#é.bin", "step-1/big.bin", "step-10/empty"]
    assert storage.read_all("step-1/big.bin") == big.read_bytes() and storage.read_all("step-10/empty") == b""
    assert storage.read_range("step-1/a b%#é.bin", 1, 2) == b"bc"
    storage.put("step-1/a b%#é.bin", b"other")  # what this Storage replaced itself was not changed behind its back
    assert storage.read_range("step-1/a b%#é.bin", 0, 5) == b"other"
    storage.delete("step-10/empty")
    storage.delete("step-10/empty")
    assert [name for name, _ in storage.list()] == ["step-1/a b%#é.bin", "step-1/big.bin"]


def test_a_local_write_that_fails_leaves_the_old_file(folder):
    storage = Storage(folder)
    with pytest.raises(StorageError, match=r"data\.tar: cannot be written \(No such file"):
        storage.put("data.tar", folder / "nothing here")
    assert storage.list() == [("data.tar", len(DATA))] and storage.read_all("data.tar") == DATA
    with written_aside(folder / "half") as temporary:
        temporary.write_bytes(b"1")
        assert storage.list() == [("data.tar", len(DATA))]


def test_web_servers_and_the_hub_are_read_only(server):
    for url in (server.url, "hf://datasets/org/name"):
        storage = Storage(url)
        for use in (storage.list, storage.delete, lambda name, storage=storage: storage.put(name, b"")):
            with pytest.raises(StorageError, match="is read only"):
                use("x")
    assert server.requests == []


COMMIT = "0123456789abcdef" * 2 + "01234567"
READ_FROM_HUB = """
import json, pickle
from llava_next.data.storage.client import MissingObjectError, Storage
storage = Storage("hf://datasets/org/name/train", retry_seconds=20)
ranges = [storage.read_range("data.tar", start, 64, size=10240).hex() for start in range(0, 10240, 64)]
stats = storage.stats()
copy = pickle.loads(pickle.dumps(storage))
try:
    copy.read_all("other.tar")
except MissingObjectError as error:
    missing = str(error)
print(json.dumps([ranges, stats.requests, stats.retries, copy.url, copy.read_all("small").decode(), missing,
                  storage.exists("data.tar"), storage.exists("no")]))
"""


def run_with_hub(code: str, environment: dict[str, str]) -> subprocess.Popen:
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", **environment}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=-1, stderr=-1, text=True)


@pytest.fixture
def hub(tmp_path):
    """A server that answers like the hub for the data set org/name: each file under its branch and its commit."""
    for revision in ("main", COMMIT):
        train = tmp_path / "hub" / "datasets" / "org" / "name" / "resolve" / revision / "train"
        train.mkdir(parents=True)
        (train / "data.tar").write_bytes(DATA)
        (train / "small").write_text(revision[:4])
    with FaultServer(tmp_path / "hub") as server:
        server.headers = {"X-Repo-Commit": COMMIT}
        yield server


def test_hub_files_are_fetched_once_and_all_from_one_commit(hub, tmp_path):
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    hub.share, hub.kinds = 1.0, ("reset",)  # huggingface_hub repeats 503 and stalls by itself
    process = run_with_hub(READ_FROM_HUB, environment)
    while not any(r.name.endswith("data.tar") for r in list(hub.requests) if r.method == "GET"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    hub.share = 0.0
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    ranges, requests, retries, url, small, missing, exists, exists_not = json.loads(out)
    assert bytes.fromhex("".join(ranges)) == DATA
    assert retries >= 1 and requests == len(ranges) + retries
    gets = [r.name for r in hub.requests if r.method == "GET" and r.fault is None and r.name.endswith("data.tar")]
    assert len(gets) == 1
    assert url == f"hf://datasets/org/name@{COMMIT}/train" and small == COMMIT[:4]
    assert missing.startswith(f"{url}/other.tar: not found on the hub")
    assert exists and not exists_not

    hub.requests.clear()
    offline = run_with_hub(
        READ_FROM_HUB.split("copy =")[0] + "print(stats.retries)", environment | {"HF_HUB_OFFLINE": "1"}
    )
    assert offline.wait(60) == 0 and hub.requests == []


def test_hub_urls_and_a_missing_package_say_what_to_do(monkeypatch):
    for url in ("hf://models/org/name", "hf://datasets/name", "hf://datasets/org/name@a@b", "hf:datasets/org/name"):
        with pytest.raises(ValueError, match="is written hf://datasets/ORG/NAME"):
            Storage(url)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(StorageError, match=r"hf://datasets/org/name/data\.tar: .*pip install .* -e '\.\[cloud\]'"):
        Storage("hf://datasets/org/name").read_all("data.tar")
