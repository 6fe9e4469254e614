"""Every element of a JSON list or a JSONL file with its place in the file, in one pass and without holding the file.

The file is read as Latin-1, one character a byte: JSON's structure is ASCII, so values end where they do in UTF-8 and
positions are those of bytes. Texts that are not ASCII are garbled in the values given here, but for the name of the
sample's source.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from llava_next.data.format.picture_forms import PICTURE_KEYS, key_names
from llava_next.data.format.records import TEXT_KEYS, source_name

READ_BYTES = 4 << 20
MAX_RECORD_BYTES = 64 << 20  # of one sample in a JSON file; what is larger is not a list of samples

_SPACE = re.compile(r"[ \t\r\n]*")
_COMMA = re.compile(r"[ \t\r\n]*,[ \t\r\n]*")
_COLON = re.compile(r"[ \t\r\n]*:[ \t\r\n]*")
_LIST_START, _LIST_END = re.compile(r"[ \t\r\n]*\["), re.compile(r"[ \t\r\n]*\][ \t\r\n]*")
_OBJECT_START, _OBJECT_END = re.compile(r"[ \t\r\n]*\{"), re.compile(r"[ \t\r\n]*\}[ \t\r\n]*")
_RECORD_KEYS = {*TEXT_KEYS, *(key for group in PICTURE_KEYS for key in group)}


class BrokenFile(ValueError):
    """The text is no JSON from byte `position` on."""

    def __init__(self, reason: str, position: int):
        super().__init__(reason)
        self.position = position


class TooLong(BrokenFile):
    """A value of more than `MAX_RECORD_BYTES`."""


def json_records(path: Path, digest) -> Iterator[tuple[int, int, object]]:
    """First byte, bytes and value of every element of a JSON list, of the list in an object around a single one, or of
    every value of a JSONL file. `digest` hashes the file.

    Raises:
        BrokenFile: where the text is no JSON.
        ValueError: an object at the top that is neither a sample nor around a single list; its keys are named.
    """
    wraps = _is_wrapper(path)
    with open(path, "rb") as file:
        window = _Window(file, digest)
        window.skip_mark()
        if wraps:
            yield from _wrapped(window)
        elif window.take(_LIST_START):
            yield from _elements(window)
        else:
            window.take(_SPACE)
            while not window.at_end():
                yield window.record()
                window.take(_SPACE)
            return
        window.expect_end()


def _elements(window: "_Window") -> Iterator[tuple[int, int, object]]:
    """The elements of a list, after its bracket."""
    if window.take(_LIST_END):
        return
    window.take(_SPACE)
    while True:
        yield window.record()
        if not window.take(_COMMA):
            if not window.take(_LIST_END):
                raise BrokenFile("expected , or ]", window.position)
            return


def _is_wrapper(path: Path) -> bool:
    """Whether a file is a single object and no sample: one around a list of samples, if anything."""
    with open(path, "rb") as file:
        window = _Window(file, None)
        window.skip_mark()
        if not window.take(_OBJECT_START):
            return False
        file.seek(window.position - 1)
        window = _Window(file, None)
        try:
            value = window.decode()
            window.take(_SPACE)
            return not _RECORD_KEYS & set(value) and window.at_end()
        except TooLong:
            return True
        except BrokenFile:  # the pass over the samples says where
            file.seek(0)
            window = _Window(file, None)
            window.skip_mark()
            with contextlib.suppress(ValueError):
                return next(_wrapped(window), None) is not None
            return False


def _wrapped(window: "_Window") -> Iterator[tuple[int, int, object]]:
    """The elements of the only list in an object."""
    names, lists = [], []
    window.take(_OBJECT_START)
    while not window.take(_OBJECT_END):
        if names and not window.take(_COMMA):
            raise BrokenFile("expected , or }", window.position)
        window.take(_SPACE)
        name = window.decode()
        if not isinstance(name, str) or not window.take(_COLON):
            raise BrokenFile("expected a key and a colon", window.position)
        names.append(name)
        if name not in _RECORD_KEYS and window.take(_LIST_START):
            lists.append(name)
            if len(lists) == 1:
                yield from _elements(window)
            else:
                for _ in _elements(window):
                    pass
        else:
            window.decode()
    if len(lists) != 1:
        held = f"holds {len(lists)} lists, under {', '.join(lists)}" if lists else "holds no list of samples"
        raise ValueError(
            f"the file is one object with the keys {key_names(dict.fromkeys(names))}: it is no sample, and it {held}. "
            "Give a list of samples, one sample a line, or an object around a single list"
        )


class _Window:
    """A sliding window of a file as Latin-1 text; hashes what it reads, if it is given what to hash with."""

    def __init__(self, file, digest):
        self._file, self._digest, self._text, self._place, self._before, self._ended = file, digest, "", 0, 0, False
        self._decoder, self._is_ascii = json.JSONDecoder(), True
        self._fill()

    @property
    def position(self) -> int:
        """Next byte of the file."""
        return self._before + self._place

    def _fill(self, least: int = 0) -> bool:
        """Reads on; False at the file's end."""
        data = self._file.read(max(least, READ_BYTES))
        if self._digest is not None:
            self._digest.update(data)
        self._is_ascii = self._is_ascii and data.isascii()
        self._before += self._place
        self._text, self._place = self._text[self._place :] + data.decode("latin-1"), 0
        self._ended = not data
        return bool(data)

    def skip_mark(self) -> None:
        """Skips a byte-order mark. Raises ValueError for one of UTF-16."""
        if self._text.startswith("\xef\xbb\xbf"):
            self._place = 3
        elif self._text.startswith(("\xff\xfe", "\xfe\xff")):
            raise ValueError("it is UTF-16: save it as UTF-8")

    def take(self, pattern: re.Pattern) -> bool:
        """Goes past `pattern` if it comes next."""
        match = pattern.match(self._text, self._place)
        while (match is None or match.end() == len(self._text)) and not self._ended:
            if match is None and _SPACE.match(self._text, self._place).end() < len(self._text):
                return False
            self._fill()
            match = pattern.match(self._text, self._place)
        self._place = match.end() if match else self._place
        return match is not None

    def at_end(self) -> bool:
        """Whether nothing is left."""
        return self._place == len(self._text) and (self._ended or not self._fill())

    def expect_end(self) -> None:
        """Raises BrokenFile when something is left."""
        if not self.at_end():
            raise BrokenFile("something follows the end of the list or object", self.position)

    def record(self) -> tuple[int, int, object]:
        """First byte, bytes and value of what comes next; the name of its source is decoded rightly."""
        start = self.position
        value = self.decode()
        length = self.position - start
        if not self._is_ascii and isinstance(value, dict) and not source_name(value).isascii():
            value = json.loads(self._text[self._place - length : self._place].encode("latin-1"))
        return start, length, value

    def decode(self):
        """The value that comes next."""
        while True:
            try:
                value, self._place = self._decoder.raw_decode(self._text, self._place)
                return value
            except json.JSONDecodeError as error:
                left, broken_at = len(self._text) - self._place, self._before + error.pos
                if not self._ended and left > MAX_RECORD_BYTES:
                    raise TooLong(f"no sample ends within {MAX_RECORD_BYTES} bytes", self.position) from None
                if self._ended or not self._fill(left):
                    raise BrokenFile(error.msg, broken_at) from None
