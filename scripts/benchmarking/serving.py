"""The tests' misbehaving server in a process of its own, so that its work is not counted as the client's.

    with Serving(folder) as server:
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

ROOT = Path(__file__).parents[2]
# with which the benchmarks' processes find each other and the tests' server and tokenizers
PATHS = {"PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("scripts", "tests", "."))}


class Serving:
    """A server process over the files of `folder`, see tests/support/faults.py's FaultServer; a context manager.

    Attributes:
        url: where.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> Serving:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarking.serving", str(self.folder)],
            env={**os.environ, **PATHS},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.url = json.loads(self._process.stdout.readline())
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


def serve(folder: str) -> None:
    """Serves until the standard input ends."""
    from support.faults import FaultServer

    with FaultServer(folder) as server:
        print(json.dumps(server.url), flush=True)
        for line in sys.stdin:
            for name, value in json.loads(line).items():
                setattr(server, name, value)
            print(len(server.requests), flush=True)
    os._exit(0)  # threads that hang in a stalled answer are not waited for


if __name__ == "__main__":
    serve(sys.argv[1])
