"""Servers that misbehave on purpose: a web server with injected faults, and an S3 server in this process.

    with FaultServer(folder) as server:
        server.script = [None, "reset", "503"]      # faults of the next GETs, in order
        server.share = 0.05                         # after that: this share of all requests, seeded
        server.latency = 0.1                        # seconds before the first byte
        Storage(server.url)

    with S3Server(folder, share=0.05) as server:    # moto, bucket filled from the folder
        server.use(monkeypatch)                     # or give `server.environment` to a subprocess
        Storage(server.url)

Faults, by name:
    reset         half of the body, then a TCP reset
    truncated     half of the body, then the connection is closed in order
    stall         half of the body, then nothing for `stall_seconds`, then the connection is closed
    503, 429      that status, once
    wrong_length  a body half as long, with headers that agree with it
    too_long      a body one byte too long, with headers that agree with it
    whole         the whole object with status 200, as from a server that knows no ranges
    flip          one bit of the body flipped
    etag          another ETag from now on
    missing, 403  404 or 403 from now on, for every object
"""

import contextlib
import hashlib
import http.server
import os
import random
import socket
import struct
import threading
import time
import urllib.request
from email.utils import formatdate
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

TRANSIENT = ("503", "429", "reset", "truncated")
LASTING = ("etag", "missing", "403")


class Request(NamedTuple):
    """A request as the server saw it: object name, Range header or None, and the fault it met or None."""

    method: str
    name: str
    range: str | None
    fault: str | None


class FaultServer:
    """Serves the files of `folder` at `url` with ranges, ETags and keep-alive; use it as a context manager.

    Attributes:
        script: faults of the next GETs, first to last; None serves one well. Each entry is used once.
        share: of all requests that come when the script is empty, the share that meets one of `kinds` (seeded).
        kinds: what `share` draws from.
        latency: seconds before the first byte of each answer.
        stall_seconds: how long a stalled answer hangs.
        etags: whether answers carry an ETag; without one, they still carry Last-Modified.
        headers: further headers of every answer.
        lasting: the lasting fault in force (`missing` or `403`), or None.
        requests: every request so far.
    """

    def __init__(self, folder, *, seed: int = 0):
        self.folder = Path(folder).resolve()
        self.script: list[str | None] = []
        self.share, self.kinds = 0.0, TRANSIENT
        self.latency, self.stall_seconds = 0.0, 30.0
        self.etags, self.etag_version = True, 0
        self.headers: dict[str, str] = {}
        self.lasting: str | None = None
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.faults = self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/set"

    def __enter__(self) -> "FaultServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.hang_up()

    def record(self, method: str, name: str, byte_range: str | None) -> str | None:
        """Notes a request and says which fault it meets."""
        with self._lock:
            fault = None
            if self.script:
                fault = self.script.pop(0) if method == "GET" else None
            elif self._random.random() < self.share:
                fault = self._random.choice(self.kinds)
            if fault == "etag":
                self.etag_version += 1
            elif fault in LASTING:
                self.lasting = fault
            self.requests.append(Request(method, name, byte_range, self.lasting or fault))
            return self.lasting or fault

    def ranges(self, name: str | None = None) -> list[str | None]:
        """Range headers of the GETs so far, of one object or of all."""
        return [r.range for r in self.requests if r.method == "GET" and name in (None, r.name)]


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    faults: FaultServer

    def __init__(self, *arguments):
        self.connections: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request, client_address):
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Ends the connections that are kept alive: the next request finds no server."""
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address):
        """Clients hang up on stalled answers; that is no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        faults = self.server.faults
        name = unquote(urlsplit(self.path).path).removeprefix("/set/")
        fault = faults.record(self.command, name, self.headers.get("Range"))
        faults.closing.wait(faults.latency)
        path = (faults.folder / name).resolve()
        if fault in ("403", "429", "503"):
            self.answer(int(fault), b"no")
        elif fault == "missing" or faults.folder not in path.parents or not path.is_file():
            self.answer(404, b"no")
        else:
            self.serve(path, fault)

    do_HEAD = do_GET

    def serve(self, path: Path, fault: str | None) -> None:
        size, asked = path.stat().st_size, self.headers.get("Range")
        first, last, status = 0, size - 1, 200
        if asked and fault != "whole":
            begin, _, end = asked.removeprefix("bytes=").partition("-")
            first, last, status = (
                (int(begin), min(int(end or last), last), 206) if begin else (size - int(end), last, 206)
            )
            if first > last:
                return self.answer(416, b"no", {"Content-Range": f"bytes */{size}"})
        if fault == "wrong_length":
            last = first + (last - first) // 2
        elif fault == "too_long":
            last += 1
        with open(path, "rb") as file:
            file.seek(first)
            body = bytearray(file.read(last + 1 - first).ljust(last + 1 - first, b"\0"))
        if fault == "flip":
            body[len(body) // 2] ^= 4
        headers = {"Last-Modified": formatdate(path.stat().st_mtime, usegmt=True), "Accept-Ranges": "bytes"}
        if self.server.faults.etags:
            stamp = f"{size}-{path.stat().st_mtime_ns}-{self.server.faults.etag_version}"
            headers["ETag"] = f'"{hashlib.md5(stamp.encode()).hexdigest()}"'
        if status == 206:
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self.answer(status, bytes(body), headers, fault)

    def answer(self, status: int, body: bytes, headers: dict | None = None, fault: str | None = None) -> None:
        breaks = fault in ("reset", "truncated", "stall")
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **self.server.faults.headers, **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if breaks else body)
        if breaks:
            self.close_connection = True
            if fault == "stall":
                self.server.faults.closing.wait(self.server.faults.stall_seconds)
            elif fault == "reset":  # lingering for zero seconds: close() sends RST instead of FIN
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.rfile.close()
                self.connection.close()

    def log_message(self, *_):
        pass


class S3Server:
    """An S3 server (moto) in this process whose bucket holds the files of `folder`; use it as a context manager.

    Args:
        folder: copied into the bucket, subfolders included; None leaves it empty.
        bucket: its name.
        share: of GETs that are answered 503 (seeded).
        seed: of those draws.

    Attributes:
        url: of the bucket, `s3://...`.
        environment: the AWS_* variables that lead a process here.
        latency: seconds before each answer.
        refusal: an S3 error code such as `ExpiredToken` that every request gets from now on, or None.
        requests: (method, path, status) of every request after the bucket was filled.
    """

    def __init__(self, folder=None, *, bucket: str = "shards", share: float = 0.0, seed: int = 0):
        self.folder, self.bucket, self.share = folder and Path(folder), bucket, share
        self.url, self.latency, self.refusal = f"s3://{bucket}", 0.0, None
        self.environment: dict[str, str] = {}
        self.requests: list[tuple[str, str, int]] = []
        self._random, self._ready = random.Random(seed), False

    def __enter__(self) -> "S3Server":
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            protocol_version = "HTTP/1.1"

            def log(self, *_):
                pass

        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Quiet)
        self._server.daemon_threads, self._server.block_on_close = True, False
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.environment = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self._put(f"{endpoint}/moto-api/reset", method="POST")  # moto's buckets outlive its servers
        self._put(f"{endpoint}/{self.bucket}")
        for path in sorted(self.folder.rglob("*")) if self.folder else ():
            if path.is_file():
                name = path.relative_to(self.folder).as_posix()
                self._put(f"{endpoint}/{self.bucket}/{urllib.request.quote(name)}", path.read_bytes())
        self._ready = True
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def use(self, monkeypatch) -> None:
        """Makes these AWS_* variables, and no others, those of this process for the time of a test."""
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)

    @staticmethod
    def _put(url: str, data: bytes = b"", method: str = "PUT") -> None:
        headers = {
            "Authorization": "AWS4-HMAC-SHA256 Credential=testing/20260101/us-east-1/s3/aws4_request",
            "Content-Type": "application/octet-stream",  # urllib's default makes moto read a form
        }
        urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=10).close()

    def _answer(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]

        def start(status, headers, *rest):
            if self._ready:
                self.requests.append((method, path, int(status.split()[0])))
            return start_response(status, headers, *rest)

        time.sleep(self.latency)
        code = self.refusal
        if code is None and self._ready and method == "GET" and self._random.random() < self.share:
            code = "SlowDown"
        if code is None:
            return self._app(environ, start)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        # As S3 does: expired tokens are a bad request, wrong keys are forbidden.
        status = {"SlowDown": "503 Slow Down", "ExpiredToken": "400 Bad Request"}.get(code, "403 Forbidden")
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>Refused on purpose.</Message></Error>".encode()
        start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [b"" if method == "HEAD" else body]
