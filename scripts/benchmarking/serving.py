"""The tests' misbehaving servers in a process of their own, so that their work is not counted as the client's.

    with Serving("http", folder) as server:
        server.set(latency=0.1, script=[None, "reset"])
        Storage(server.url)

Run as a script it is that process: it prints its address and takes settings as JSON lines.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarking.cards import ROOT


def python_path() -> str:
    """PYTHONPATH with which the benchmarks' processes find each other and the tests' servers and tokenizers."""
    return os.pathsep.join([str(ROOT / "scripts"), str(ROOT / "tests"), str(ROOT)])


class Serving:
    """A server process over the files of `folder`; a context manager.

    Args:
        kind: `http` (tests/support/faults.py's FaultServer) or `s3` (moto).
        folder: what is served.

    Attributes:
        url: where.
        environment: variables that lead a client there.
    """

    def __init__(self, kind: str, folder: Path):
        self.kind, self.folder = kind, folder

    def __enter__(self) -> Serving:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarking.serving", self.kind, str(self.folder)],
            env={**os.environ, "PYTHONPATH": python_path()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        ready = json.loads(self._process.stdout.readline())
        self.url, self.environment = ready["url"], ready["environment"]
        return self

    def set(self, **settings) -> int:
        """Changes attributes of the server; requests answered so far."""
        self._process.stdin.write(json.dumps(settings) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def __exit__(self, *_) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(kind: str, folder: str) -> None:
    """Serves until the standard input ends."""
    from support.faults import FaultServer, S3Server

    with (FaultServer if kind == "http" else S3Server)(folder) as server:
        print(json.dumps({"url": server.url, "environment": getattr(server, "environment", {})}), flush=True)
        for line in sys.stdin:
            for name, value in json.loads(line).items():
                setattr(server, name, value)
            print(len(server.requests), flush=True)
    os._exit(0)  # threads that hang in a stalled answer are not waited for


if __name__ == "__main__":
    serve(*sys.argv[1:])
