"""Reads whole objects and byte ranges from local folders, S3, Google Cloud, Azure and web servers, through obstore.

obstore (Rust's object_store) needs no process fork, resumes and retries by itself, and releases the GIL while it
waits, so many threads can read at once. Credentials come from the usual environment of each cloud (`AWS_*`, `GOOGLE_*`,
`AZURE_*`); they never stand in a message, nor does the user name or the query of a URL.
"""

import os
import re
import threading
import time
from datetime import timedelta
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError, GenericError, PermissionDeniedError, UnauthenticatedError
from obstore.store import HTTPStore, LocalStore, from_url

CLOUD_SCHEMES = ("s3", "gs", "az")
WEB_SCHEMES = ("http", "https")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_URL_IN_TEXT = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>]+")
_opening = threading.Lock()


class StorageError(OSError):
    """A read that failed for good; the message names the URL and, for a range, its bytes."""


class MissingObjectError(StorageError, FileNotFoundError):
    """There is no object of that name (or no such folder)."""


class Storage:
    """A folder of objects: a local path, or a URL of `file`, `s3`, `gs`, `az`, `http` or `https`.

    Cheap to make, picklable and safe to share between threads: the connection is opened on first use in each process.

    Args:
        url: the folder. A relative path is resolved now, so that workers find it wherever they run.
        retry_seconds: how long a request is repeated when it fails in a way that may pass (refused or dropped
            connections, timeouts, 5xx and 429 answers) before the read fails.

    Raises:
        ValueError: a scheme that is not read, or a URL with a user name or password in it.
    """

    def __init__(self, url: str | os.PathLike, *, retry_seconds: float = 60.0):
        self.url = _normalised(os.fspath(url))
        self.retry_seconds = retry_seconds
        self._opened: tuple[int, object] | None = None  # (process id, store): a store does not survive a fork

    def __getstate__(self):
        return {"url": self.url, "retry_seconds": self.retry_seconds, "_opened": None}

    def __repr__(self) -> str:
        return f"Storage({self.label!r})"

    @property
    def label(self) -> str:
        """The URL as messages may show it, without user name and query."""
        return redact(self.url)

    def address(self, name: str) -> str:
        """URL of an object in this folder, for messages."""
        return f"{self.label.rstrip('/')}/{name}"

    def read_all(self, name: str) -> bytes:
        """All bytes of the object `name`.

        Raises:
            MissingObjectError: there is no such object.
            StorageError: the read failed, also after retries.
        """
        return self._read(self.address(name), lambda store: obstore.get(store, name).bytes())

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Bytes [start, start + length) of the object `name`. Raises as `read_all`, and when the object ends before."""
        if start < 0 or length < 0:
            raise ValueError(f"a range cannot start at {start} and be {length} bytes long.")
        if length == 0:
            return b""
        where = f"{self.address(name)}, bytes {start} to {start + length}"
        data = self._read(where, lambda store: obstore.get_range(store, name, start=start, length=length))
        if len(data) != length:
            raise StorageError(
                f"{where}: got {len(data)} of {length} bytes. The file is shorter than its index says: it was cut off "
                "or replaced. Copy it again, or build the index again."
            )
        return data

    def exists(self, name: str) -> bool:
        """Whether there is an object `name`. Raises StorageError when that cannot be found out."""
        try:
            self._read(self.address(name), lambda store: obstore.head(store, name) and b"")
        except MissingObjectError:
            return False
        return True

    def _read(self, where: str, request) -> bytes:
        try:
            store = self._store()
        except (BaseError, OSError, ValueError) as error:
            raise _explained(where, error) from None
        give_up, pause = time.monotonic() + self.retry_seconds, 0.1
        while True:
            try:
                return bytes(request(store))
            except (BaseError, OSError, ValueError) as error:
                if time.monotonic() + pause > give_up or not self._may_pass(error):
                    # `from None`: obstore's own text may hold the URL as it was given, secrets included.
                    raise _explained(where, error) from None
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def _may_pass(self, error: Exception) -> bool:
        """Whether to repeat what obstore gave up.

        It repeats requests itself; a body that breaks off it resumes only if the server sent an ETag, else it fails.
        """
        is_answer = "status code: 4" in str(error)
        return isinstance(error, GenericError) and not is_answer and not self.url.startswith("file:")

    def _store(self):
        opened = self._opened
        if opened is None or opened[0] != os.getpid():
            with _opening:
                opened = self._opened
                if opened is None or opened[0] != os.getpid():
                    opened = self._opened = (os.getpid(), self._open())
        return opened[1]

    def _open(self):
        scheme = urlsplit(self.url).scheme
        if scheme == "file":
            return LocalStore(unquote(urlsplit(self.url).path))
        retries = {
            "max_retries": 1000,  # the time decides
            "retry_timeout": timedelta(seconds=self.retry_seconds),
            "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
        }
        # The URL (or AWS_ENDPOINT_URL) says whether a connection is encrypted. A stall is noticed by the read timeout;
        # the total one only has to let the largest index through.
        client = {"allow_http": True, "connect_timeout": "5s", "read_timeout": "15s", "timeout": "10m"}
        make = HTTPStore if scheme in WEB_SCHEMES else from_url
        return make(self.url, client_options=client, retry_config=retries)


def redact(url: str) -> str:
    """A URL without its user name, password, query and fragment, as messages and logs show it."""
    parts = urlsplit(url)
    if parts.scheme == "file":
        return unquote(parts.path)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _normalised(url: str) -> str:
    """`url` with a scheme. Local paths become absolute `file` URLs, percent-encoding what a URL cannot hold."""
    match = _SCHEME.match(url)
    if match is None:
        return "file://" + os.path.abspath(url).replace("%", "%25").replace("?", "%3F").replace("#", "%23")
    scheme = match[1].lower()
    if scheme == "file" and url[5:].startswith("///"):
        return "file://" + url[7:].rstrip("/")
    if scheme == "hf":
        raise ValueError(
            f"{redact(url)}: data sets on the Hugging Face hub are not read in place. Download it first "
            "(`hf download --repo-type dataset NAME --local-dir DIR`) and give the folder."
        )
    if scheme not in CLOUD_SCHEMES + WEB_SCHEMES or not url.startswith("://", len(scheme)):
        raise ValueError(
            f"{redact(url)}: {scheme}: is not a kind of URL that is read here. Give a local folder or one of "
            f"file:///, {', '.join(f'{name}://' for name in CLOUD_SCHEMES + WEB_SCHEMES)} "
            "(a local path with a colon in it: write ./ in front)."
        )
    if "@" in urlsplit(url).netloc:
        raise ValueError(f"{redact(url)}: give the URL without a user name; credentials come from the environment.")
    return url if "?" in url else url.rstrip("/")


def _explained(where: str, error: Exception) -> StorageError:
    """`error` of obstore as one of ours: one line, no secrets, and what to do."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    text = _URL_IN_TEXT.sub(lambda match: redact(match[0]), text)
    if isinstance(error, FileNotFoundError) or "Unable to canonicalize filesystem root" in text:
        return MissingObjectError(f"{where}: not found. Check the URL, and that the data set is complete.")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return StorageError(f"{where}: no permission. Check that the credentials are set and still valid ({text}).")
    return StorageError(f"{where}: {text}")
