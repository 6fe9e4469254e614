"""Ranged reads: the right bytes, retries, and errors that name URL and range and no secret."""

import http.server
import multiprocessing
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from llava_next.data.storage import MissingObjectError, Storage, StorageError, redact

DATA = bytes(range(256)) * 40


class Server(http.server.ThreadingHTTPServer):
    """Serves `DATA` under /set/data.tar with ranges. `faults` holds what to do to the next requests, first to last."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: list[str] = []
        self.requests: list[str] = []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/set"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests.append(self.headers.get("Range"))
        fault = self.server.faults.pop(0) if self.server.faults else None
        if fault in ("403", "429", "503"):
            return self.answer(int(fault), b"no")
        if self.path.split("?")[0] != "/set/data.tar":
            return self.answer(404, b"no")
        first, last = 0, len(DATA) - 1
        if self.headers.get("Range"):
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        body = DATA[first : last + 1]
        self.answer(206 if self.headers.get("Range") else 200, body, f"bytes {first}-{last}/{len(DATA)}", fault)

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, content_range: str | None = None, fault: str | None = None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if content_range and status == 206:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
        if fault == "cut":
            self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data.tar").write_bytes(DATA)
    return tmp_path


def test_local_and_http_ranges_are_the_files_bytes(folder, server):
    for url in (folder, str(folder) + "/", f"file://{folder}", server.url, server.url + "/"):
        storage = Storage(url)
        assert storage.read_all("data.tar") == DATA
        assert storage.read_range("data.tar", 512, 1000) == DATA[512:1512]
        assert storage.read_range("data.tar", len(DATA) - 1, 1) == DATA[-1:]
        assert storage.read_range("data.tar", 7, 0) == b""
        assert storage.exists("data.tar") and not storage.exists("other.tar")
    assert "bytes=512-1511" in server.requests  # and not the whole file


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


@pytest.mark.parametrize("fault", ["503", "429", "cut"])
def test_passing_faults_are_retried_and_give_the_same_bytes(server, fault):
    storage = Storage(server.url, retry_seconds=20)
    server.faults = [fault, fault]
    assert storage.read_range("data.tar", 100, 5000) == DATA[100:5100]
    assert len(server.requests) >= 3


def test_lasting_faults_end_within_the_time_budget_naming_url_and_range(server):
    server.faults = ["503"] * 1000
    start = time.monotonic()
    with pytest.raises(StorageError, match=rf"{server.url}/data.tar, bytes 100 to 5100: .*503"):
        Storage(server.url, retry_seconds=1).read_range("data.tar", 100, 5000)
    assert time.monotonic() - start < 5


def test_missing_objects_and_missing_permission_are_told_apart(folder, server):
    for url in (folder, folder / "nowhere", server.url):
        with pytest.raises(MissingObjectError, match=r"other\.tar: not found"):
            Storage(url).read_all("other.tar")
    server.faults = ["403"]
    with pytest.raises(StorageError, match=r"data\.tar: no permission"):
        Storage(server.url).read_all("data.tar")


def test_a_file_shorter_than_its_index_is_an_error(folder):
    for start in (len(DATA) - 5, len(DATA) + 5):
        with pytest.raises(StorageError, match=rf"data\.tar, bytes {start} to {start + 10}: "):
            Storage(folder).read_range("data.tar", start, 10)
    with pytest.raises(ValueError, match="cannot start at -1"):
        Storage(folder).read_range("data.tar", -1, 10)


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
    with pytest.raises(ValueError, match="is not a kind of URL that is read here"):
        Storage(url)


def test_hub_urls_say_what_to_do():
    with pytest.raises(ValueError, match="hf download"):
        Storage("hf://datasets/org/name")


def test_missing_settings_fail_at_once(monkeypatch):
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    start = time.monotonic()
    with pytest.raises(StorageError, match=r"az://box/set/data\.tar: .*[Aa]ccount"):
        Storage("az://box/set").read_all("data.tar")
    assert time.monotonic() - start < 2


def test_secrets_never_stand_in_messages(server):
    with pytest.raises(ValueError, match="without a user name") as error:
        Storage("https://me:geheim@host/x")
    assert "geheim" not in str(error.value)
    storage = Storage(server.url + "?sig=geheim", retry_seconds=0.1)
    for fault in ("503", "403"):
        server.faults = [fault] * 100
        with pytest.raises(StorageError) as error:
            storage.read_range("data.tar", 0, 10)
        assert "geheim" not in str(error.value) and error.value.__suppress_context__
    assert "geheim" not in repr(storage) + storage.label
    assert redact("https://u:p@h:1/a?b=c#d") == "https://h:1/a"


def test_names_cannot_leave_the_folder(folder):
    (folder / "inner").mkdir()
    with pytest.raises(StorageError):
        Storage(folder / "inner").read_all("../data.tar")


def test_threads_share_one_storage(server):
    storage = Storage(server.url)
    with ThreadPoolExecutor(16) as pool:
        parts = list(pool.map(lambda start: storage.read_range("data.tar", start, 64), range(0, len(DATA), 64)))
    assert b"".join(parts) == DATA


def read_in_worker(storage: Storage) -> tuple[int, bytes]:
    return os.getpid(), storage.read_range("data.tar", 1, 9)


def test_worker_processes_open_their_own_connection(folder):
    storage = Storage(folder)
    assert storage.read_all("data.tar") == DATA  # the parent's is open before
    assert pickle.loads(pickle.dumps(storage)).url == storage.url
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        process, data = pool.apply(read_in_worker, (storage,))
    assert process != os.getpid() and data == DATA[1:10]
