"""Reads and writes a folder of objects: local, S3, Google Cloud, Azure, a web server or the Hugging Face hub.

What a run of a week on rented machines meets is dealt with here: a request that fails in a way that may pass is
repeated within a time budget, and counted; what cannot pass (no permission, no such object, no credentials) fails at
once with its cure; an object that was replaced while the run reads it is noticed. Ranges from the network can be kept
in a local `Cache`. Credentials never stand in a message, nor does the user name or the query of a URL.
"""

import contextlib
import itertools
import os
import random
import re
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from llava_next.data.storage.cache import Cache
from llava_next.data.storage.errors import MissingObjectError, RequestError, StorageError, redact
from llava_next.data.storage.hub import Hub
from llava_next.data.storage.objects import CLOUD_SCHEMES, SHORTER_THAN_INDEX, WEB_SCHEMES, Objects, Version
from llava_next.paths import local_path

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds between attempts
_WRITING = (".", ".writing")  # around the name of a local file that is being written
_opening = threading.Lock()
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class IOStats:
    """What a Storage has done so far.

    Args:
        requests: sent, repeated ones included.
        retries: of them, those that repeated a failed one.
        bytes: read, from the network, the disk or the cache.
        cache_hits: reads that the cache answered.
        read_s: seconds spent in reads, summed over threads.
    """

    requests: int = 0
    retries: int = 0
    bytes: int = 0
    cache_hits: int = 0
    read_s: float = 0.0

    def __add__(self, other: "IOStats") -> "IOStats":
        return IOStats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: "IOStats") -> "IOStats":
        return IOStats(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def as_dict(self) -> dict[str, float]:
        """The counters by name."""
        return asdict(self)


class Storage:
    """A folder of objects: a local path, or a URL of `file`, `s3`, `gs`, `az`, `http`, `https` or `hf`.

    Cheap to make, picklable and safe to share between threads: the connection is opened on first use in each process,
    and a pickled copy counts from zero.

    Args:
        url: the folder. A relative path is resolved now, so that workers find it wherever they run. On the hub:
            `hf://datasets/ORG/NAME[@REVISION][/FOLDER]`.
        cache: for ranges that come from the network; not used for local files and the hub, which are on the disk.
        retry_seconds: how long a request is repeated when it fails in a way that may pass (refused, dropped or
            stalled connections, answers that break off, 5xx and 429) before it fails.
        stall_seconds: without a byte for so long, a request has failed.

    Raises:
        ValueError: a scheme that is not read, or a URL with a user name or password in it.
    """

    def __init__(
        self,
        url: str | os.PathLike,
        *,
        cache: Cache | None = None,
        retry_seconds: float = 45.0,
        stall_seconds: float = 15.0,
    ):
        self.url = _normalised(os.fspath(url))
        self.retry_seconds, self.stall_seconds = retry_seconds, stall_seconds
        self.cache = cache if urlsplit(self.url).scheme in CLOUD_SCHEMES + WEB_SCHEMES else None
        self._reset()

    def _reset(self) -> None:
        self._opened: tuple[int, Objects | Hub] | None = None  # (process id, ...): a connection survives no fork
        self._stats = IOStats()
        self._versions: dict[str, Version] = {}  # of each object as it was seen first
        self._in_flight: dict[int, tuple[str, int, int, float]] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        private = ("_opened", "_stats", "_versions", "_in_flight", "_numbers", "_lock")
        state = {name: value for name, value in self.__dict__.items() if name not in private}
        if self._opened is not None and isinstance(self._opened[1], Hub):
            state["url"] = self._opened[1].url  # all processes read the same commit
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._reset()

    def __repr__(self) -> str:
        return f"Storage({self.label!r})"

    @property
    def label(self) -> str:
        """The URL as messages may show it, without user name and query."""
        return redact(self.url)

    def address(self, name: str) -> str:
        """URL of an object in this folder, for messages."""
        return f"{self.label.rstrip('/')}/{name}"

    def stats(self) -> IOStats:
        """The counters as they are now."""
        return self._stats

    def in_flight(self) -> list[tuple[str, int, int, float]]:
        """Reads under way, oldest first: URL, first byte, number of bytes (0: all of it), seconds since the start."""
        now = time.monotonic()
        with self._lock:
            return [(where, start, length, now - begin) for where, start, length, begin in self._in_flight.values()]

    def read_all(self, name: str) -> bytes:
        """All bytes of the object `name`.

        Raises:
            MissingObjectError: there is no such object.
            StorageError: the read failed, also after retries.
        """
        with self._reading(name, 0, 0):
            data, _ = self._answer(self.address(name), lambda opened: opened.get(name))
        self._count(bytes=len(data))
        return data

    def read_range(
        self, name: str, start: int, length: int, size: int | None = None, crc32: int | None = None
    ) -> bytes:
        """Bytes [start, start + length) of the object `name`.

        Args:
            name: of the object.
            start, length: in bytes.
            size: of the whole object in bytes, as the index knows it.
            crc32: of the range, as the index knows it.

        Raises:
            MissingObjectError: there is no such object.
            StorageError: the read failed, also after retries; the object is not `size` long, ends before the range, or
                is not the one that this Storage read from before; the bytes have another checksum, read twice.
        """
        if start < 0 or length < 0:
            raise ValueError(f"a range cannot start at {start} and be {length} bytes long.")
        if length == 0:
            return b""
        where = f"{self.address(name)}, bytes {start} to {start + length}"
        with self._reading(name, start, length):
            data = self._cached(where, name, start, length, size)
            if data is None:
                data = self._answer(where, lambda opened: self._range(opened, name, start, length, size))
                if crc32 not in (None, zlib.crc32(data)):
                    # Once more: a bit that flipped on the way is not one that flipped in the shard.
                    self._count(retries=1)
                    data = self._answer(where, lambda opened: self._range(opened, name, start, length, size))
                    if zlib.crc32(data) != crc32:
                        raise StorageError(
                            f"{where}: checksum differs from the index, read twice. The shard was changed or damaged; "
                            "copy it again, or rebuild the data set."
                        )
                if self.cache is not None:
                    self.cache.put(self._key(name), self._versions[name].tag, start, data)
        self._count(bytes=length)
        return data

    def exists(self, name: str) -> bool:
        """Whether there is an object `name`. Raises StorageError when that cannot be found out."""
        try:
            self._answer(self.address(name), lambda opened: opened.head(name))
        except MissingObjectError:
            return False
        return True

    def put(self, name: str, data: bytes | Path) -> None:
        """Writes the object `name`, whole or not at all; a Path is a local file to copy. Replaces what was there.

        Raises:
            StorageError: the write failed, also after retries, or nothing can be written to such a URL.
        """
        self._check_writable(name)
        if urlsplit(self.url).scheme == "file":
            path = Path(unquote(urlsplit(self.url).path)) / name
            with self._local_errors(name), written_aside(path) as temporary:
                temporary.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(data, temporary) if isinstance(data, Path) else temporary.write_bytes(data)
        else:
            self._answer(self.address(name), lambda opened: opened.put(name, data))
        self._versions.pop(name, None)

    def swap(self, name: str, data: bytes, before: bytes | None) -> bool:
        """Writes the object `name` if it still is `before` (None: not there), see `Objects.swap`. Raises as `put`."""
        self._check_writable(name)
        done = self._answer(self.address(name), lambda opened: opened.swap(name, data, before))
        self._versions.pop(name, None)
        return done

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        """Name and size in bytes of every object whose name begins with `prefix`, subfolders included, sorted.

        A folder that does not exist is empty, as a bucket knows no folders.

        Raises:
            StorageError: it failed, also after retries, or such a URL cannot be listed.
        """
        self._check_writable(prefix)
        folder = prefix.rpartition("/")[0]
        try:
            found = self._answer(self.address(prefix), lambda opened: opened.list(folder))
        except MissingObjectError:
            return []
        unfinished = re.compile(r"(.*/)?{}[^/]*{}".format(*map(re.escape, _WRITING)))
        return sorted(pair for pair in found if pair[0].startswith(prefix) and not unfinished.fullmatch(pair[0]))

    def delete(self, name: str) -> None:
        """Removes the object `name`; none of that name is no error. Raises StorageError as `put` does."""
        self._check_writable(name)
        with contextlib.suppress(MissingObjectError):
            self._answer(self.address(name), lambda opened: opened.delete(name))
        self._versions.pop(name, None)

    def _answer(self, where: str, request: Callable[[Objects | Hub], Answer]) -> Answer:
        """What `request` gives, repeated until it succeeds, cannot pass, or the time is up."""
        begin, attempts, pause = time.monotonic(), 0, _FIRST_PAUSE
        while True:
            attempts += 1
            try:
                opened = self._open()
                self._count(requests=1, retries=int(attempts > 1))
                return request(opened)
            except RequestError as error:
                spent = time.monotonic() - begin
                # Jitter: the ranks of a large run must not all come back at the same moment.
                wait = pause * random.uniform(0.5, 1.0)
                if not error.may_pass or spent + wait > self.retry_seconds:
                    times = "1 attempt" if attempts == 1 else f"{attempts} attempts"
                    tries = f" (given up after {times} in {spent:.1f} s)" if error.may_pass else ""
                    kind = MissingObjectError if error.missing else StorageError
                    raise kind(f"{where}: {error}{tries}") from None
            time.sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _range(self, opened: Objects | Hub, name: str, start: int, length: int, size: int | None) -> bytes:
        data, version = opened.get(name, (start, start + length))
        self._check(name, version, size)
        if start + length > version.size:
            raise RequestError(f"got {len(data)} of {length} bytes. {SHORTER_THAN_INDEX}")
        if len(data) != length:
            raise RequestError(f"got {len(data)} of {length} bytes", may_pass=True)
        return data

    def _check(self, name: str, version: Version, size: int | None) -> None:
        """Raises RequestError when the object is not the one that the index, or this Storage before, has seen."""
        cure = "The shard was changed while the run reads it. Restore it, or build the index again and start from it."
        if size is not None and version.size != size:
            raise RequestError(f"the object has {version.size} bytes, its index says {size}. {cure}")
        first = self._versions.setdefault(name, version)
        if version.size != first.size or version.tag != first.tag:
            raise RequestError(
                f"the object has {version.size} bytes and ETag {version.e_tag}, it had {first.size} and {first.e_tag} "
                f"when this process read it first. {cure}"
            )

    def _cached(self, where: str, name: str, start: int, length: int, size: int | None) -> bytes | None:
        """The range from the cache, if it is there for the present version of the object."""
        if self.cache is None:
            return None
        version = self._versions.get(name)
        if version is None:  # once for each object and process
            version = self._answer(where, lambda opened: opened.head(name))
        try:
            self._check(name, version, size)
        except RequestError as error:
            raise StorageError(f"{where}: {error}") from None
        data = self.cache.get(self._key(name), version.tag, start, length)
        self._count(cache_hits=int(data is not None))
        return data

    def _key(self, name: str) -> str:
        return f"{self.url}\n{name}"

    @contextlib.contextmanager
    def _reading(self, name: str, start: int, length: int) -> Iterator[None]:
        begin, number = time.monotonic(), next(self._numbers)
        with self._lock:
            self._in_flight[number] = (self.address(name), start, length, begin)
        try:
            yield
        finally:
            with self._lock:
                del self._in_flight[number]
            self._count(read_s=time.monotonic() - begin)

    def _count(self, **counts: float) -> None:
        more = IOStats(**counts)
        with self._lock:
            self._stats += more

    def _open(self) -> Objects | Hub:
        opened = self._opened
        if opened is None or opened[0] != os.getpid():
            with _opening:
                opened = self._opened
                if opened is None or opened[0] != os.getpid():
                    kind = Hub if self.url.startswith("hf:") else Objects
                    opened = self._opened = (os.getpid(), kind(self.url, self.stall_seconds))
        return opened[1]

    @contextlib.contextmanager
    def _local_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(
                f"{self.address(name)}: cannot be written ({error.strerror or error}). Check the disk's free space and "
                "the folder's permissions."
            ) from error

    def _check_writable(self, name: str) -> None:
        scheme = urlsplit(self.url).scheme
        if scheme in (*WEB_SCHEMES, "hf"):
            writable = ", ".join(f"{name}://" for name in CLOUD_SCHEMES)
            raise StorageError(
                f"{self.label}: {scheme}: is read only, and its folders cannot be listed. Give a local folder or "
                f"one of {writable}."
            )
        if name.startswith("/") or ".." in name.split("/"):
            raise StorageError(f"{self.address(name)}: the name leaves the folder.")


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside `path`; renames it to `path` when the block ends well, else removes it.

    The data are on the disk before the name is, so that a crash leaves the old file, the new one, or none.
    """
    temporary = path.with_name(path.name.join(_WRITING))
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _normalised(url: str) -> str:
    """`url` with a scheme. Local paths (`paths.local_path`) become absolute `file` URLs, percent-encoded as needed."""
    match = _SCHEME.match(url)
    scheme = match[1].lower() if match else "file"
    if scheme == "file":
        path = os.path.abspath(local_path(url))
        return "file://" + path.replace("%", "%25").replace("?", "%3F").replace("#", "%23")
    if scheme == "hf":
        return Hub(url, 0.0) and url.rstrip("/")
    if scheme not in CLOUD_SCHEMES + WEB_SCHEMES or not url.startswith("://", len(scheme)):
        raise ValueError(
            f"{redact(url)}: {scheme}: is not a kind of URL that is read here. Give a local folder or one of "
            f"file:///, {', '.join(f'{name}://' for name in (*CLOUD_SCHEMES, *WEB_SCHEMES, 'hf'))} "
            "(a local path with a colon in it: write ./ in front)."
        )
    if "@" in urlsplit(url).netloc:
        raise ValueError(f"{redact(url)}: give the URL without a user name; credentials come from the environment.")
    return url if "?" in url else url.rstrip("/")
