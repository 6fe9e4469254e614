"""One request at a time to a local folder, S3, Google Cloud, Azure or a web server, through obstore.

obstore (Rust's object_store) needs no process fork and releases the GIL while it waits. Its own retries are switched
off: `Storage` repeats requests, so that every retry is counted and what cannot pass fails at once. Credentials and
endpoints come from the usual environment of each cloud (`AWS_*`, `GOOGLE_*`, `AZURE_*`).
"""

import contextlib
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    GenericError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import HTTPStore, LocalStore, from_url

from llava_next.data.storage.errors import RequestError, first_line

CLOUD_SCHEMES = ("s3", "gs", "az")
WEB_SCHEMES = ("http", "https")
UPLOAD_PART = 16 * 2**20  # bytes; S3 takes 10,000 parts an object: up to 160 GB

# obstore tells failures apart in the text only.
_STATUS = re.compile(r"status code: (\d{3})( [A-Za-z][A-Za-z ]*)?")
_CODE = re.compile(r"<Code>(\w+)</Code>")  # in the body of S3's answers
_PASSING_CODES = ("RequestTimeout", "SlowDown", "InternalError", "OperationAborted")
_CREDENTIAL_CODES = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired", "ExpiredTokenException")
_RANGE_BEYOND_END = re.compile(r"status code: 416|Requested range was invalid|StartTooLarge")
# Without credentials obstore asks the metadata service of the cloud's own machines; elsewhere there is none.
_METADATA_SERVICE = re.compile(
    r"//(169\.254\.|metadata\.google\.internal|[^\s/]+/(latest/(api|meta-data)|computeMetadata|metadata/identity))"
)
_NEVER_PASSES = re.compile(r"redirect without LOCATION|certificate|builder error|relative URL without a base")
_REASONS = {
    "ConnectionRefused": "connection refused",
    "ConnectionReset": "connection reset",
    "dns error": "host name not found",
    "Account must be specified": "no storage account given. Set AZURE_STORAGE_ACCOUNT_NAME",
    "IncompleteBody": "the answer broke off",
    "UnexpectedEof": "the answer broke off",
}
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (profiles under ~/.aws are not read: "
    '`eval "$(aws configure export-credentials --format env)"` exports one), or AWS_SKIP_SIGNATURE=true for a public '
    "bucket",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to a key file, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "az": "set AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or AZURE_SKIP_SIGNATURE=true for a public "
    "container",
}


class Version(NamedTuple):
    """Which object answered: its whole size in bytes, its ETag if it has one, and when it was changed."""

    size: int
    e_tag: str | None
    modified: datetime | None

    @property
    def tag(self) -> str:
        """What tells two versions apart: the ETag, else size and time of change."""
        if self.e_tag:
            return self.e_tag.removeprefix("W/")
        return f"{self.size} {self.modified and self.modified.timestamp()}"


class Objects:
    """The objects under `url`. Every method is one request and raises RequestError.

    Args:
        url: normalised, of `file` or one of `CLOUD_SCHEMES` and `WEB_SCHEMES`.
        stall_seconds: a request that gets no byte for so long has failed.
    """

    def __init__(self, url: str, stall_seconds: float):
        self.scheme, self.stall_seconds = urlsplit(url).scheme, stall_seconds
        self._answered = False
        try:
            self._store = self._open(url)
        except (BaseError, OSError, ValueError) as error:
            reason = self._explained(error)
            raise RequestError(str(reason), missing=reason.missing) from None  # a setting; no answer will change it

    def get(self, name: str, span: tuple[int, int] | None = None) -> tuple[bytes, Version]:
        """The bytes of an object, or those of [start, end); and what it was."""
        with self._translated():
            answer = obstore.get(self._store, name, options={"range": span} if span else {})
            return bytes(answer.bytes()), _version(answer.meta)

    def head(self, name: str) -> Version:
        """What the object is."""
        with self._translated():
            return _version(obstore.head(self._store, name))

    def put(self, name: str, data: bytes | Path) -> None:
        """Writes an object; large ones in parts."""
        with self._translated():
            obstore.put(self._store, name, data, chunk_size=UPLOAD_PART, max_concurrency=4)

    def swap(self, name: str, data: bytes, before: bytes | None) -> bool:
        """Writes an object that still is `before` (None: that is not there); False when it is something else.

        A local file is compared and then replaced; a server that knows no conditional writes is written to as `put`
        does. Two that swap at once can then both succeed, and must look later which of them did.
        """
        with self._translated():
            try:
                mode = "create"
                if before is not None:
                    answer = obstore.get(self._store, name)
                    if bytes(answer.bytes()) != before:
                        return False
                    version = {key: answer.meta[key] for key in ("e_tag", "version") if answer.meta.get(key)}
                    mode = "overwrite" if self.scheme == "file" else version
                obstore.put(self._store, name, data, mode=mode, use_multipart=False)
            except (AlreadyExistsError, PreconditionError, FileNotFoundError):
                return False
            except (NotImplementedError, NotSupportedError):
                obstore.put(self._store, name, data)
            return True

    def list(self, folder: str) -> list[tuple[str, int]]:
        """Name and size in bytes of every object under `folder`, subfolders included."""
        with self._translated():
            pages = obstore.list(self._store, folder or None)
            return [(meta["path"], meta["size"]) for page in pages for meta in page]

    def delete(self, name: str) -> None:
        """Removes an object."""
        with self._translated():
            obstore.delete(self._store, name)

    def _open(self, url: str):
        if self.scheme == "file":
            return LocalStore(unquote(urlsplit(url).path))
        # The URL (or AWS_ENDPOINT_URL) says whether a connection is encrypted. A stall is noticed by the read timeout;
        # the total one only has to let the largest index through.
        client = {
            "allow_http": True,
            "connect_timeout": "5s",
            "read_timeout": f"{max(1, round(1000 * self.stall_seconds))}ms",
            "timeout": "10m",
        }
        make = HTTPStore if self.scheme in WEB_SCHEMES else from_url
        return make(url, client_options=client, retry_config={"max_retries": 0})

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError, ValueError) as error:
            # `from None`: obstore's own text may hold the URL as it was given, secrets included.
            raise self._explained(error) from None
        self._answered = True

    def _explained(self, error: Exception) -> RequestError:
        """`error` as one line without secrets. An answer's body is never shown: it may repeat keys and signatures."""
        text = str(error)
        status, code = _STATUS.search(text), _CODE.search(text)
        if isinstance(error, FileNotFoundError) or "Unable to canonicalize filesystem root" in text:
            return RequestError("not found. Check the URL, and that the data set is complete.", missing=True)
        if _METADATA_SERVICE.search(text.splitlines()[0]):
            # Once they were found, the service exists and its failures pass.
            return RequestError(f"no credentials found: {_CREDENTIALS.get(self.scheme)}.", may_pass=self._answered)
        answer = status and f"the server answered {status[1]}{status[2] or ''}{f', {code[1]}' if code else ''}"
        if isinstance(error, PermissionDeniedError | UnauthenticatedError) or (code and code[1] in _CREDENTIAL_CODES):
            reason = answer or first_line(error)
            return RequestError(f"no permission. Check that the credentials are set and still valid ({reason}).")
        if _RANGE_BEYOND_END.search(text):
            return RequestError(SHORTER_THAN_INDEX)
        if isinstance(error, NotSupportedError) and "Range" in text:
            return RequestError(
                "the server gives whole files only. Use one that answers range requests, or copy the data."
            )
        if "redirect without LOCATION" in text:
            return RequestError("it lies in another region. Set AWS_REGION to the bucket's.")
        if status:
            may_pass = status[1] in ("408", "429") or status[1] >= "500" or (code and code[1] in _PASSING_CODES)
            return RequestError(answer, may_pass=bool(may_pass))
        may_pass = isinstance(error, GenericError) and self.scheme != "file" and not _NEVER_PASSES.search(text)
        return RequestError(self._reason(text) or first_line(error), may_pass=may_pass)

    def _reason(self, text: str) -> str | None:
        if "TimedOut" in text or "kind: Timeout" in text:
            return f"no byte came for {self.stall_seconds:g} s"
        return next((reason for mark, reason in _REASONS.items() if mark in text), None)


SHORTER_THAN_INDEX = (
    "The file is shorter than its index says: it was cut off or replaced. Copy it again, or build the index again."
)


def _version(meta) -> Version:
    return Version(meta["size"], meta.get("e_tag"), meta.get("last_modified"))
