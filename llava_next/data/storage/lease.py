"""One writer at a time in a folder or at a URL: a lease that its holder renews and that no crash can keep.

The lease is a small JSON object beside what is written. It is taken and renewed by writes that succeed only if it
still is what was read (on disks a file is made exclusively, on S3, Google Cloud and Azure by conditional requests), so
it works on network file systems and compares no two machines' clocks: a holder elsewhere lives as long as its lease
changes, one on this machine as long as its process does.
"""

import atexit
import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from llava_next.data.storage.client import Storage
from llava_next.data.storage.errors import MissingObjectError, StorageError

BEAT = 10.0  # seconds between renewals
STALE = 60.0  # seconds without one after which a holder on another machine is taken for dead
SETTLE = 1.0  # seconds until two that replaced a lease at once see which of them has it
LEASE_FILE = "lease.json"

_held: set["Lease"] = set()


class LeaseHeld(ValueError):
    """Another process writes there; the message says which, since when, and what can be done."""


class Lease:
    """The right to write below a URL. Taken by `take`, kept by a thread, given back by `release` or at exit.

    Args:
        storage: the folder, which must exist, or the URL.
        kind: of what holds it, for messages: `run`, `build`.
        cure: what a person can do when another one holds it, a sentence.
        on_lost: called from the thread, with a message, when another process took the lease over. Nothing may be
            written afterwards; the default ends the process at once.
        name: of the lease's object.
    """

    def __init__(
        self,
        storage: Storage,
        kind: str,
        cure: str,
        on_lost: Callable[[str], None] | None = None,
        name: str = LEASE_FILE,
    ):
        self.storage, self.kind, self.cure, self.name = storage, kind, cure, name
        self.on_lost = on_lost or _end
        self._me = {**_process(), "token": secrets.token_hex(8), "since": time.time(), "beat": 0}
        self._content: bytes | None = None
        self._closing, self._thread = threading.Event(), None

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def take(self, take_over: bool = False, say: Callable[[str], None] = print) -> "Lease":
        """Returns when the lease is held; waits when only time can tell whether its holder lives.

        Args:
            take_over: from a holder that lives. It ends at its next renewal, which is waited for.
            say: called with a line before a wait.

        Raises:
            LeaseHeld: another process holds it.
            StorageError: the lease cannot be written.
        """
        seen, deadline = None, 0.0
        while True:
            found = self._read()
            holder = _holder(found)
            if found is not None and holder["token"] == self._me["token"]:
                break  # the answer to our own write was lost
            if found is None or take_over or _is_gone(holder):
                pass
            elif _is_here(holder) or (seen is not None and found != seen):
                raise LeaseHeld(self._describe(holder))
            elif seen is None:
                say(f"{self._describe(holder, short=True)}; waiting up to {STALE:.0f} s to see whether it still lives")
                seen, deadline = found, time.monotonic() + STALE
                continue
            elif time.monotonic() < deadline:
                time.sleep(min(1.0, STALE / 10))
                continue
            self._content = self._text()
            if not self.storage.swap(self.name, self._content, found):
                continue
            if found is not None:
                self._settle(holder, take_over, say)
            break
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()
        _held.add(self)
        return self

    def release(self) -> None:
        """Gives the lease back. Can be called again."""
        _held.discard(self)
        self._closing.set()
        if self._thread is None:
            return
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=BEAT)
        self._thread = None
        with contextlib.suppress(StorageError):  # then it goes stale
            if _holder(self._read())["token"] == self._me["token"]:
                self.storage.delete(self.name)

    def _settle(self, holder: dict, take_over: bool, say: Callable[[str], None]) -> None:
        if take_over and not _is_gone(holder):
            say(f"taken over: {self._describe(holder, short=True)}; waiting for it to end")
            deadline = time.monotonic() + 2 * BEAT
            while time.monotonic() < deadline and not _is_gone(holder):
                time.sleep(0.2)
            if _is_here(holder):
                raise LeaseHeld(
                    f"{self._describe(holder, short=True)} does not end. It may hang: `kill -9 {holder['process']}`, "
                    "then start again"
                )
        time.sleep(SETTLE)
        found = _holder(self._read())
        if found["token"] != self._me["token"]:
            raise LeaseHeld(self._describe(found))

    def _renew(self) -> None:
        while not self._closing.wait(BEAT):
            self._me["beat"] += 1
            content = self._text()
            try:
                if self.storage.swap(self.name, content, self._content):
                    self._content = content
                    continue
                found = self._read()
            except StorageError:  # a full or unreachable disk: what the lease guards will say so
                continue
            if found is None or _holder(found)["token"] == self._me["token"]:
                self._content = found  # removed with the folder's other files, or the answer to our own write was lost
            elif not self._closing.is_set():
                self._thread = None  # nothing to give back
                return self.on_lost(
                    f"{self.storage.label} was taken over by {_name(_holder(found))}; this {self.kind} ends and "
                    "writes nothing more"
                )

    def _read(self) -> bytes | None:
        try:
            return self.storage.read_all(self.name)
        except MissingObjectError:
            return None

    def _text(self) -> bytes:
        return json.dumps(self._me | {"renewed": time.time()}).encode()

    def _describe(self, holder: dict, short: bool = False) -> str:
        text = f"{self.storage.label} is in use by another {self.kind}: {_name(holder)}"
        return text if short else f"{text}. {self.cure}"


def release_all() -> None:
    """Gives back what this process holds: before an end that skips Python's exit handlers."""
    for lease in list(_held):
        lease.release()


atexit.register(release_all)


def _end(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)
    os._exit(1)


def _process() -> dict:
    """Who this is: host, machine (a name that no two running kernels or containers share), process and its start."""
    return {"host": socket.gethostname(), "machine": _machine(), "process": os.getpid(), "start": _start(os.getpid())}


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()


def _start(process: int) -> str | None:
    """When a process began, in ticks since boot; None when there is none of that number (or it waits to be reaped).

    Without /proc an empty string.
    """
    if not os.path.exists("/proc/self/stat"):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return None
        except OSError:
            pass
        return ""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _holder(content: bytes | None) -> dict:
    """What a lease says; of one that says nothing (another program's, or half-written) only that it is there."""
    unknown = {"token": "", "host": "an unknown host", "machine": "", "process": 0, "start": "", "since": 0.0}
    try:
        found = json.loads(content or b"{}")
        return unknown | {name: type(unknown[name])(found[name]) for name in unknown}
    except (ValueError, KeyError, TypeError):
        return unknown


def _is_here(holder: dict) -> bool:
    """Whether the holder's process runs on this machine."""
    return holder["machine"] == _machine() and _start(holder["process"]) == holder["start"]


def _is_gone(holder: dict) -> bool:
    """Whether the holder's process ran on this machine and has ended."""
    return holder["machine"] == _machine() and _start(holder["process"]) != holder["start"]


def _name(holder: dict) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
    return f"process {holder['process']} on {holder['host']}, since {since}"
