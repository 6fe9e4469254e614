"""Strict reading of tar members from bytes in memory.

A damaged header must be an error that names it. (Python's tarfile, and webdataset with it, takes it for the end of the
archive: the rest of a shard is then lost without a word.)
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

_BLOCK = 512
_MAX_NAME_BYTES = 4096  # what file systems take; a longer one is there to fill memory and messages
_MAX_EXTENDED_BYTES = 1 << 20
_MAX_MESSAGE = 500  # characters
_PAX_RECORD = re.compile(rb"(\d{1,6}) ([^=\n]+)=")


def one_line(text: str) -> str:
    """A message that may quote hostile bytes as a terminal and a log may show it: printable, one line, not endless."""
    if len(text) > _MAX_MESSAGE:
        text = text[: _MAX_MESSAGE - 4] + " ..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class BadSample(ValueError):
    """One sample that cannot be used; the message says why, in one printable line. The others are not affected."""

    def __init__(self, reason: str):
        super().__init__(one_line(reason))


class Span(NamedTuple):
    """A member of a tar: headers start at byte `start`, content at `begin`; with its padding it ends at `end`."""

    name: str
    start: int
    begin: int
    size: int
    end: int


def tar_members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """The regular files of a piece of a tar, name and content, strictly.

    Reads ustar headers with the pax and GNU records for long names, which is what webdataset, tar and Python write.

    Raises:
        BadSample: a wrong checksum, a member cut off, a link, device or folder, an end marker inside.
    """
    view = memoryview(data)
    for span, _ in _walk(lambda start, size: bytes(view[start : start + size]), len(data)):
        yield span.name, bytes(view[span.begin : span.begin + span.size])


def walk_tar(read: Callable[[int, int], bytes], size: int) -> Iterator[Span]:
    """The regular files of a whole tar, strictly; folders are passed over. Contents are not read.

    Args:
        read: gives the bytes [start, start + length).
        size: of the tar, in bytes.

    Raises:
        BadSample: as `tar_members`, or the tar does not end with its end marker and zeros.
    """
    end = 0
    for span, is_file in _walk(read, size, is_whole=True):
        end = span.end
        if is_file:
            yield span
    while end < size:
        length = min(1 << 20, size - end)
        if read(end, length).count(0) != length:
            raise BadSample(f"something follows the end-of-archive marker, after byte {end}")
        end += length


def _walk(read: Callable[[int, int], bytes], size: int, is_whole: bool = False) -> Iterator[tuple[Span, bool]]:
    """Members and whether they are files (else folders, in a whole tar), up to byte `size` or to the end marker."""
    position = start = 0
    long_name, long_size = None, None
    while position < size:
        header = read(position, min(_BLOCK, size - position))
        if is_whole and len(header) == _BLOCK and not any(header) and position == start:
            return
        name, length, kind = _parse_header(header, position)
        length = length if long_size is None else long_size
        position += _BLOCK
        if position + length > size:
            raise BadSample(f"member {name!r} is cut off: {size - position} of {length} bytes")
        begin, position = position, position + -(-length // _BLOCK) * _BLOCK
        if kind in b"xL" and length > _MAX_EXTENDED_BYTES:
            raise BadSample(f"an extended tar header of {length} bytes is over the limit of {_MAX_EXTENDED_BYTES}")
        if kind == b"x":
            long_name, long_size = _parse_pax(read(begin, length), long_name)
        elif kind == b"L":
            long_name = _decoded(read(begin, length).rstrip(b"\0"))
        elif kind in b"0\0" or (is_whole and kind == b"5" and not length):
            yield Span(long_name or name, start, begin, length, position), kind != b"5"
            long_name, long_size, start = None, None, position
        else:
            raise BadSample(f"member {name!r} is a link, folder or device (type {kind!r}), not a file")
    if position != size or start != position:
        raise BadSample("the last member is not complete")
    if is_whole:
        raise BadSample(f"it ends at byte {size} without an end-of-archive marker: it was cut off")


def _parse_header(header: bytes, position: int) -> tuple[str, int, bytes]:
    """Name, size and type of a member."""
    if len(header) < _BLOCK:
        raise BadSample(f"header at byte {position} is cut off")
    if not any(header):
        raise BadSample(f"end-of-archive marker at byte {position}, inside the sample")
    checksum = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if _octal(header[148:156]) != checksum or header[257:262] != b"ustar":
        raise BadSample(f"no tar header at byte {position} (wrong checksum or magic): the bytes are damaged")
    size = _octal(header[124:136])
    if size is None:
        raise BadSample(f"header at byte {position} has no readable size")
    name = header[:100].split(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0")[0] + b"/" + name
    return _decoded(name), size, header[156:157]


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0")
    return int(digits, 8) if re.fullmatch(rb"[0-7]{1,12}", digits) else None


def _parse_pax(content: bytes, name: str | None) -> tuple[str | None, int | None]:
    """`path` and `size` of a pax record list `b"LENGTH KEY=VALUE\\n..."`; other keys (times, owners) do not matter."""
    position, size = 0, None
    while position < len(content):
        match = _PAX_RECORD.match(content, position)
        end = position + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(content) or content[end - 1 : end] != b"\n":
            raise BadSample("an extended tar header does not parse")
        value, record, position = content[match.end() : end - 1], match[2], end
        if record.startswith(b"GNU.sparse."):
            raise BadSample("a member is stored as a sparse file: make the tar without --sparse")
        if record == b"path":
            name = _decoded(value)
        elif record == b"size":
            if not re.fullmatch(rb"\d{1,12}", value):
                raise BadSample("an extended tar header has no readable size")
            size = int(value)
    return name, size


def _decoded(name: bytes) -> str:
    if len(name) > _MAX_NAME_BYTES:
        raise BadSample(f"member name of {len(name)} bytes is over the limit of {_MAX_NAME_BYTES}")
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        raise BadSample(f"member name {name!r} is not UTF-8") from None
