"""Paths as people write them: `~`, `file://` and plain ones; used for every flag, file and key of a configuration.

What may also be a URL goes through `data.storage.client.Storage`, which reads local paths by the same function.
"""

import argparse
import os
import re
from collections.abc import Callable
from functools import lru_cache, partial, update_wrapper
from pathlib import Path
from urllib.parse import unquote, urlsplit

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_FILE = re.compile(r"file:", re.IGNORECASE)


class PathError(argparse.ArgumentTypeError, ValueError):
    """What was given is no local path; the message says what it is and what to do. Command lines show it as it is."""


class _Shown:
    """A function that reads an argument, by the name under which --help shows it."""

    def __init__(self, name: str, read: Callable):
        update_wrapper(self, read)
        self._name, self._read = name, read

    def __call__(self, text):
        return self._read(text)

    def __repr__(self) -> str:
        return self._name


def shown_as(name: str) -> Callable[[Callable], _Shown]:
    """Names what a function reads, for --help: without it jsonargparse shows where the function lies in memory."""
    return partial(_Shown, name)


@shown_as("path")
def local_path(text: str | os.PathLike) -> Path:
    """A file or folder of this machine: a path, `~` and `~user` expanded, or a `file://` URL, percent-decoded.

    Raises:
        PathError: another kind of URL, a `file:` URL of another machine or without an absolute path, or nothing.
    """
    given = os.fspath(text)
    if not given:
        raise PathError("the path is empty")
    if _FILE.match(given):
        parts = urlsplit(given)
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise PathError(f"{given}: a file URL is written file:///absolute/path, or give the path alone")
        return Path(unquote(given[given.index("/", len("file://") if given[5:].startswith("//") else 5) :]))
    match = _URL.match(given)
    if match:
        where = f"{match[1]}://{urlsplit(given).netloc.rpartition('@')[2]}/..."
        raise PathError(f"{where} is a URL, and a local path is needed: nothing is fetched. Download it, give its path")
    return Path(os.path.expanduser(given))


@shown_as("path")
def output_file(text: str | os.PathLike) -> Path:
    """A local path to write a file to. Where it cannot be is found here, before any work.

    Raises:
        PathError: as `local_path`; a folder, or in a folder that is not there or cannot be written to.
    """
    path = local_path(text)
    if path.is_dir():
        raise PathError(f"{path} is a folder: give a file's name in it")
    if not path.parent.is_dir():
        raise PathError(f"{path}: there is no folder {path.parent}; make it, or give another place")
    check_writable(path.parent)
    return path


@shown_as("path")
def output_folder(text: str | os.PathLike) -> Path:
    """A local folder to write into, which need not be there. Raises PathError as `output_file`."""
    path = local_path(text)
    nearest = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    if not nearest.is_dir():
        given = "" if nearest == path else f"{path}: "
        raise PathError(f"{given}{nearest} is no folder; give another place")
    check_writable(nearest)
    return path


@shown_as("path")
def new_folder(text: str | os.PathLike) -> Path:
    """A local folder that is to be made: not there yet, or empty. Raises PathError as `output_folder`."""
    path = output_folder(text)
    if path.is_dir() and any(path.iterdir()):
        raise PathError(f"{path} is not empty; give a new folder or remove it")
    return path


def check_writable(folder: Path) -> None:
    """Raises PathError: nothing can be put into that folder."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PathError(f"{folder} cannot be written to; give another place, or the right to")


@shown_as("path")
def drawing_path(text: str | os.PathLike) -> Path:
    """A local path to draw a picture to, whose ending says in which format.

    Raises:
        PathError: as `output_file`; or another ending than .png and .webp.
    """
    path = output_file(text)
    if path.suffix not in (".png", ".webp"):
        raise PathError(f"{path}: give a name that ends in .png or .webp")
    return path


@shown_as("path or name")
def folder_or_name(text: str) -> str:
    """A model or data set that is a local path or a name on the hub: `~` and `file://` resolved, all else as given.

    Raises:
        PathError: as `local_path`.
    """
    path = local_path(text)
    return str(path) if text.startswith("~") or _FILE.match(text) else text


def below(path: str | os.PathLike, root: str | os.PathLike) -> str | None:
    """`path` relative to `root`, which a relative one is taken to be already; None when it does not lie under it.

    Decided by the texts: symbolic links inside of the root may lead anywhere, `..` may not. An absolute path may name
    the root as it was given or as it resolves.
    """
    text, given = os.path.normpath(path), os.path.abspath(root)
    if not os.path.isabs(text):
        if text.split(os.sep)[0] != os.pardir:
            return text
        text = os.path.normpath(os.path.join(given, text))  # out of the root, and perhaps into it again
    for base in (given, _resolved(given)):
        if text == base or text.startswith(base.rstrip(os.sep) + os.sep):
            return os.path.relpath(text, base)
    return None


@lru_cache
def _resolved(root: str) -> str:
    return os.path.realpath(root)  # a look at the disk for each folder of the path
