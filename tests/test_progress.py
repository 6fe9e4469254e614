"""Worker processes of the data tools and of plans."""

import subprocess
import sys
import time
from pathlib import Path

from support.launching import ROOT

KILLED = """
import os, time
from llava_next.progress import worker_pool
with worker_pool(2) as pool:
    pool.submit(time.sleep, 600)
    print(pool.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), 9)
"""


def test_workers_end_when_their_process_is_killed():
    """The one that works and the one that waits: else their reader of this pipe would wait too."""
    done = subprocess.run([sys.executable, "-c", KILLED], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=30)
    stat = Path("/proc", done.stdout.strip(), "stat")
    for _ in range(50):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("a worker that waits for work outlived its process")
