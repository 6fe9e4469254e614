"""What can go wrong with a read: the errors a caller sees, and what one failed request tells the retry loop."""

import re
from urllib.parse import unquote, urlsplit

_URL_IN_TEXT = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>]+")


class StorageError(OSError):
    """A read or write that failed for good; the message names the URL and, for a range, its bytes."""


class MissingObjectError(StorageError, FileNotFoundError):
    """There is no object of that name (or no such folder)."""


class RequestError(Exception):
    """One request failed.

    Args:
        text: why, and what to do about it; no secrets.
        may_pass: whether repeating it may help.
        missing: whether the object is not there.
    """

    def __init__(self, text: str, *, may_pass: bool = False, missing: bool = False):
        super().__init__(text)
        self.may_pass, self.missing = may_pass, missing


def redact(url: str) -> str:
    """A URL without its user name, password, query and fragment, as messages and logs show it."""
    parts = urlsplit(url)
    if parts.scheme == "file":
        return unquote(parts.path)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def first_line(error: Exception) -> str:
    """The first line of an error's text, URLs redacted."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return _URL_IN_TEXT.sub(lambda match: redact(match[0]), text)
