"""Data sets on the Hugging Face hub: whole files through huggingface_hub's cache, ranges from the local copy.

The hub limits the number of requests, and a range each would be one a sample; a shard is fetched once a machine
instead, under the lock of huggingface_hub's cache (`HF_HOME`). Token and endpoint are its usual `HF_TOKEN` and
`HF_ENDPOINT`. It also repeats some failed requests by itself (5 times, within half a minute) before `Storage` does.
"""

import os
import re
import threading
from urllib.parse import quote, unquote

from llava_next.data.storage.errors import RequestError, first_line, redact
from llava_next.data.storage.objects import SHORTER_THAN_INDEX, Version
from llava_next.versions import install

_URL = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/@]+))?(/(?P<folder>[^?#]*))?")
_COMMIT = re.compile(r"/snapshots/([0-9a-f]{40})/")


class Hub:
    """The files of a data set's folder on the hub. Every method raises RequestError.

    The first file that is fetched fixes the commit; all later ones are of it.

    Args:
        url: `hf://datasets/ORG/NAME[@REVISION][/FOLDER]`; a slash in a revision is written %2F.
        stall_seconds: time limit of a look-up (that of a download is huggingface_hub's `HF_HUB_DOWNLOAD_TIMEOUT`).

    Raises:
        ValueError: another form of URL.
    """

    def __init__(self, url: str, stall_seconds: float):
        parts = _URL.fullmatch(url)
        if parts is None:
            raise ValueError(
                f"{redact(url)}: a folder on the hub is written hf://datasets/ORG/NAME[@REVISION][/FOLDER]."
            )
        self.repo, self.revision = parts["repo"], unquote(parts["revision"] or "main")
        self.folder, self.stall_seconds = (parts["folder"] or "").strip("/"), stall_seconds
        self._paths: dict[str, str] = {}
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """The URL with the revision as it is known now: the commit, once a file was fetched."""
        return f"hf://datasets/{self.repo}@{quote(self.revision, safe='')}/{self.folder}".rstrip("/")

    def get(self, name: str, span: tuple[int, int] | None = None) -> tuple[bytes, Version]:
        """The bytes of a file, or those of [start, end); and what it is. Fetches the file when it is not here yet."""
        path = self._fetched(name)
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start, end = span or (0, size)
            if span and start >= size:
                raise RequestError(SHORTER_THAN_INDEX)
            file.seek(start)
            data = file.read(end - start)
        # In huggingface_hub's cache the blob that the name leads to is named by its ETag.
        return data, Version(size, os.path.basename(os.path.realpath(path)), None)

    def head(self, name: str) -> Version:
        """What a file is."""
        hub = _huggingface_hub()
        try:
            url = hub.hf_hub_url(self.repo, self._filename(name), repo_type="dataset", revision=self.revision)
            found = hub.get_hf_file_metadata(url, timeout=self.stall_seconds)
        except Exception as error:
            raise _explained(hub, error) from None
        return Version(found.size or 0, found.etag, None)

    def _fetched(self, name: str) -> str:
        path = self._paths.get(name)
        if path is None:
            if _COMMIT.fullmatch(f"/snapshots/{self.revision}/"):
                path = self._download(name)
            else:
                with self._lock:  # one thread finds the commit, the others use it
                    path = self._download(name)
                    found = _COMMIT.search(path)
                    self.revision = found[1] if found else self.revision
            self._paths[name] = path
        return path

    def _download(self, name: str) -> str:
        hub = _huggingface_hub()
        try:
            return hub.hf_hub_download(
                self.repo,
                self._filename(name),
                repo_type="dataset",
                revision=self.revision,
                etag_timeout=self.stall_seconds,
            )
        except Exception as error:  # its HTTP library, and so the class of its errors, differs between releases
            raise _explained(hub, error) from None

    def _filename(self, name: str) -> str:
        return f"{self.folder}/{name}" if self.folder else name


def _huggingface_hub():
    try:
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError:
        raise RequestError(f"reading from the hub needs huggingface_hub: {install('cloud')}.") from None
    huggingface_hub.utils.disable_progress_bars()  # a bar for each shard and process
    return huggingface_hub


def _explained(hub, error: Exception) -> RequestError:
    """`error` of huggingface_hub as one line."""
    errors, cause = hub.errors, error.__cause__ or error
    if hub.constants.HF_HUB_OFFLINE and isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return RequestError("not in the local cache, and HF_HUB_OFFLINE is set. Unset it, or fetch the data set first.")
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, errors.GatedRepoError) or status in (401, 403):
        return RequestError(
            "no permission, or no such data set. Check its name; a gated or private one needs its terms accepted and "
            f"HF_TOKEN set ({first_line(cause)})."
        )
    if status == 404:
        return RequestError("not found on the hub. Check data set, revision and folder.", missing=True)
    if status is not None:
        return RequestError(f"the hub answered {status}", may_pass=status in (408, 429) or status >= 500)
    if isinstance(cause, OSError) and cause.errno is not None and isinstance(error, OSError):
        return RequestError(f"huggingface_hub's cache cannot be written: {cause.strerror}. Check its disk (HF_HOME).")
    return RequestError(first_line(cause), may_pass=not isinstance(cause, ValueError))
