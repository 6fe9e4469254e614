"""Byte ranges that were read from the network, kept in a local folder for the next epoch and the next run.

All processes of a node may share the folder. An entry is a file of its own, written aside and renamed, that carries a
checksum: what a killed writer or a bad disk leaves is never taken for data. Entries are named by URL, version of the
object and range, so a changed object never meets its old bytes. When the folder is full, the entries that were not
used for longest go.
"""

import contextlib
import fcntl
import hashlib
import os
import sys
import threading
import time
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llava_next.paths import local_path

_BLOCK = 4096  # bytes; what a file occupies on the disk is a multiple of it
_CRC_BYTES = 4
_KEEP = 7 / 8  # of max_bytes stays after an eviction, so that evictions are rare
_ABANDONED = 3600.0  # seconds after which a temporary file has no writer any more


class Cache:
    """A folder of byte ranges. Cheap to make, picklable, safe to share between threads and processes.

    A folder that cannot be written and a full disk end no run: one warning, and reads go on without storing.

    Args:
        folder: made when the first range is stored.
        max_bytes: what the entries may occupy, in bytes of disk; processes that write while one evicts may exceed it
            by an entry each.
    """

    def __init__(self, folder: str | os.PathLike, max_bytes: int):
        self.folder, self.max_bytes = local_path(folder).absolute(), int(max_bytes)
        if self.max_bytes <= 0:
            raise ValueError(f"a cache of {max_bytes} bytes holds nothing; give max_bytes, or no cache.")
        self._broken = False

    def get(self, url: str, tag: str, start: int, length: int) -> bytes | None:
        """Bytes [start, start + length) of the object `url` in version `tag`, or None. Removes a damaged entry."""
        path = self._path(url, tag, start, length)
        try:
            entry = path.read_bytes()
            data = entry[_CRC_BYTES:]
            if len(data) == length and zlib.crc32(data) == int.from_bytes(entry[:_CRC_BYTES], "little"):
                with contextlib.suppress(OSError):  # another user's, or just evicted
                    os.utime(path)  # the time of its last use
                return data
            path.unlink(missing_ok=True)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._give_up(error)
        return None

    def put(self, url: str, tag: str, start: int, data: bytes) -> None:
        """Stores the bytes of `url` in version `tag` from `start` on, unless there is no room for them."""
        occupied = _blocks(_CRC_BYTES + len(data))
        if self._broken or occupied * _BLOCK > _KEEP * self.max_bytes:
            return
        path = self._path(url, tag, start, len(data))
        aside = self.folder / "writing" / f"{os.getpid()}-{threading.get_ident()}-{path.name}"
        try:
            if not self._reserve(occupied):
                return
            aside.parent.mkdir(parents=True, exist_ok=True)
            path.parent.mkdir(exist_ok=True)
            with open(aside, "wb") as file:
                file.write(zlib.crc32(data).to_bytes(_CRC_BYTES, "little"))
                file.write(data)
            os.replace(aside, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            self._give_up(error)

    def _path(self, url: str, tag: str, start: int, length: int) -> Path:
        # The URL whole, query included, but only its hash is written: a query may hold a secret.
        name = hashlib.sha256("\0".join((url, tag, str(start), str(length))).encode()).hexdigest()
        return self.folder / name[:2] / name

    def _reserve(self, occupied: int) -> bool:
        """Counts `occupied` more blocks; evicts when that is too much. Returns whether there is room.

        What all processes together hold is the length of the file `blocks`, one byte a block: appending is atomic, so
        no count is lost and nobody waits for a lock. Each eviction sets it right again.
        """
        counter = self.folder / "blocks"
        try:
            held = counter.stat().st_size
        except FileNotFoundError:
            self.folder.mkdir(parents=True, exist_ok=True)
            held = self.max_bytes  # not known
        if (held + occupied) * _BLOCK > self.max_bytes and not self._evict(occupied):
            return False
        with open(counter, "ab", buffering=0) as file:
            file.write(bytes(occupied))
        return True

    def _evict(self, occupied: int) -> bool:
        """Removes the entries not used for longest. Returns False when another process is doing so at this moment."""
        with open(self.folder / "lock", "wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            times, blocks = array("d"), array("q")  # 16 bytes an entry: there may be millions
            for entry in self._entries():
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    times.append(status.st_mtime)
                    blocks.append(_blocks(status.st_size))
            order = np.argsort(np.asarray(times), kind="stable")[::-1]
            held = np.cumsum(np.asarray(blocks)[order])
            keep = int(np.searchsorted(held, self.max_bytes * _KEEP / _BLOCK - occupied, side="right"))
            if keep < len(order):
                self._remove_until(times[order[keep]])
            with open(self.folder / "blocks", "ab") as counter:
                counter.truncate(int(held[keep - 1]) if keep else 0)
        return True

    def _remove_until(self, last_use: float) -> None:
        """Removes entries last used then or before, and what killed writers left."""
        for entry in self._entries():
            with contextlib.suppress(FileNotFoundError):
                if entry.stat().st_mtime <= last_use:
                    os.unlink(entry.path)
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder / "writing") as left:
            for entry in left:
                with contextlib.suppress(FileNotFoundError):
                    if entry.stat().st_mtime < time.time() - _ABANDONED:
                        os.unlink(entry.path)

    def _entries(self) -> Iterator[os.DirEntry]:
        for number in range(256):
            with contextlib.suppress(FileNotFoundError), os.scandir(self.folder / f"{number:02x}") as entries:
                yield from entries

    def _give_up(self, error: OSError) -> None:
        if not self._broken:
            self._broken = True
            print(
                f"The cache {self.folder} cannot be used ({error.strerror or error}): this process stores nothing more "
                "in it and reads from the network. Free some space, or give a folder that can be written.",
                file=sys.stderr,
                flush=True,
            )


def _blocks(nbytes: int) -> int:
    return -(-nbytes // _BLOCK)
