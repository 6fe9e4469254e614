"""Strict reading of tar members from bytes in memory.

A damaged header must be an error that names it. (Python's tarfile, and webdataset with it, takes it for the end of the
archive: the rest of a shard is then lost without a word.)
"""

import re
from collections.abc import Iterator

_BLOCK = 512


class BadSample(ValueError):
    """One sample that cannot be used; the message says why. The others are not affected."""


def tar_members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """The regular files of a piece of a tar, name and content, strictly.

    Reads ustar headers with the pax and GNU records for long names, which is what webdataset, tar and Python write.

    Raises:
        BadSample: a wrong checksum, a member cut off, a link, device or folder, an end marker inside.
    """
    view, position, long_name, long_size = memoryview(data), 0, None, None
    while position < len(data):
        header = bytes(view[position : position + _BLOCK])
        name, size, kind = _parse_header(header, position)
        size = size if long_size is None else long_size
        position += _BLOCK
        if position + size > len(data):
            raise BadSample(f"member {name!r} is cut off: {len(data) - position} of {size} bytes")
        content = bytes(view[position : position + size])
        position += -(-size // _BLOCK) * _BLOCK
        if kind == b"x":
            long_name, long_size = _parse_pax(content, long_name)
        elif kind == b"L":
            long_name = _decoded(content.rstrip(b"\0"))
        elif kind in b"0\0":
            yield (long_name or name), content
            long_name = long_size = None
        else:
            raise BadSample(f"member {name!r} is a link, folder or device (type {kind!r}), not a file")
    if position != len(data) or long_name is not None or long_size is not None:
        raise BadSample("the last member is not complete")


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
    size = None
    while content:
        match = re.match(rb"(\d{1,6}) ([^=\n]+)=", content)
        length = int(match[1]) if match else 0
        if not match or not match.end() < length <= len(content) or content[length - 1 : length] != b"\n":
            raise BadSample("an extended tar header does not parse")
        value, record = content[match.end() : length - 1], match[2]
        content = content[length:]
        if record == b"path":
            name = _decoded(value)
        elif record == b"size":
            if not re.fullmatch(rb"\d{1,12}", value):
                raise BadSample("an extended tar header has no readable size")
            size = int(value)
    return name, size


def _decoded(name: bytes) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        raise BadSample(f"member name {name!r} is not UTF-8") from None
