"""Strict reading of whole shards: every byte once, in order, sample by sample, hashed on the way."""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

from llava_next.data.format.shards import split_member_name
from llava_next.data.format.tar import BadSample, walk_tar
from llava_next.data.storage.client import Storage

READ_BYTES = 8 << 20


class Found(NamedTuple):
    """Adjacent members of one key: the bytes [start, start + len(data)) of a shard.

    `problem`: why they cannot be used, else empty.
    """

    key: str
    start: int
    data: bytes
    problem: str


class Stream:
    """A shard from front to back, in few large reads. Memory holds one sample, or `READ_BYTES`."""

    def __init__(self, storage: Storage, name: str, size: int):
        self.storage, self.name, self.size = storage, name, size
        self._held, self._start, self._digest = bytearray(), 0, hashlib.sha256()

    def read(self, start: int, length: int) -> bytes:
        """The bytes [start, start + length); what was released before is gone."""
        end = start + length
        while self._start + len(self._held) < end:
            position = self._start + len(self._held)
            data = self.storage.read_range(self.name, position, min(READ_BYTES, self.size - position))
            self._digest.update(data)
            self._held += data
        return bytes(self._held[start - self._start : end - self._start])

    def release(self, position: int) -> None:
        """Forgets what lies before `position`."""
        if position - self._start > READ_BYTES:
            del self._held[: position - self._start]
            self._start = position

    def sha256(self) -> str:
        """Of the whole shard, when all of it was read."""
        return self._digest.hexdigest()


def samples_in(stream: Stream) -> Iterator[Found]:
    """The samples of a shard.

    Raises:
        BadSample: the shard is damaged or cut off, holds a link or a device, or lacks its end; the rest is not read.
        StorageError: a read failed.
    """
    seen: set[str] = set()
    key, start, end, problem = None, 0, 0, ""
    for span in walk_tar(stream.read, stream.size):
        try:
            found, wrong = split_member_name(span.name)[0], ""
        except BadSample as error:
            found, wrong = span.name, str(error)
        if found == key and span.start == end:
            end, problem = span.end, problem or wrong
            continue
        if key is not None:
            yield Found(key, start, stream.read(start, end - start), problem)
            stream.release(end)
        if found in seen:
            wrong = wrong or f"key {found!r} comes again, apart from its other members"
        seen.add(found)
        key, start, end, problem = found, span.start, span.end, wrong
    if key is not None:
        yield Found(key, start, stream.read(start, end - start), problem)


def shard_files(storage: Storage) -> list[tuple[str, int]]:
    """Name and size of every tar at a URL, in order. Raises ValueError when there is none."""
    shards = sorted((name, size) for name, size in storage.list() if name.endswith(".tar") and "/" not in name)
    if not shards:
        raise ValueError(f"{storage.label} holds no .tar files")
    return shards
