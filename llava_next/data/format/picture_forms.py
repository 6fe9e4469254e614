"""Pictures as records hold them: a path, embedded bytes or a data URL, under one of several keys.

What is there is found without being opened or decoded (`pictures_of`), then opened (`opened`), or looked up below the
image root (`picture_file`).
"""

import base64
import binascii
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from llava_next.data.format.tar import BadSample
from llava_next.paths import PathError, below, local_path

# Of each group, those with a value must agree; a later group counts when the ones before hold nothing.
PICTURE_KEYS = (
    ("image", "images"),
    ("image_path", "image_paths", "image_file", "image_files", "image_name", "img", "imgs", "img_path"),
    ("picture", "pictures", "photo", "photos"),
    ("image_url", "image_urls", "image_bytes", "image_base64"),
)
VIDEO_KEYS = ("video", "videos")
_MEDIA_FILE = re.compile(r"\S.*\.(jpe?g|png|webp|gif|bmp|tiff?|heic|avif|mp4|avi|mov|mkv|webm)", re.IGNORECASE)
_DATA_URL = re.compile(r"data:[^,]{0,200}?(;base64)?,", re.IGNORECASE)
_BARE_BASE64 = re.compile(r"(/9j/|iVBORw0KGgo|R0lGOD|UklGR)[A-Za-z0-9+/\s]{60,}={0,2}\s*")  # JPEG, PNG, GIF, WebP
_NAME_LENGTH = 200  # characters of a picture's name in reports
_KEYS_SHOWN = 12


class Picture(NamedTuple):
    """A picture that lies in the data set itself: what to call it in reports, and its bytes."""

    name: str
    data: bytes


def key_names(record: dict) -> str:
    """A record's keys, for messages."""
    names = [str(key) for key in record]
    more = f" and {len(names) - _KEYS_SHOWN} more" if len(names) > _KEYS_SHOWN else ""
    return (", ".join(names[:_KEYS_SHOWN]) + more) if names else "none"


def pictures_of(record: dict) -> list[str | bytes | Picture]:
    """The record's pictures as they are written: paths and data URLs, embedded bytes. Not those in its messages.

    Raises:
        BadSample: a value that is no picture, or keys that name different ones.
    """
    for group in PICTURE_KEYS:
        lists = {key: values for key in group if key in record and (values := listed(record[key]))}
        if lists:
            first, *others = lists.values()
            if any(values != first for values in others):
                raise BadSample(f"{' and '.join(lists)} name different pictures: leave one of them out")
            return first
    return []


def media_key(record: dict, texts: Iterable[str]) -> str | None:
    """Of a record without pictures under the known keys: another key that names one, or a video; None: no such key.

    Args:
        texts: keys that hold texts, whatever these say.
    """
    known = {"id", "source", "data_source", *texts, *(key for group in PICTURE_KEYS for key in group)}
    for key, value in record.items():
        if key in known or str(key).lower().endswith("_id"):
            continue
        values = value if isinstance(value, list) else [value]
        if all(isinstance(entry, str) and _MEDIA_FILE.fullmatch(entry) for entry in values) and values:
            return key
    return None


def listed(value) -> list[str | bytes | Picture]:
    """The pictures that one value holds: none, one or a list. Raises BadSample."""
    if isinstance(value, str):
        return [value] if value else []
    values = [_unwrapped(entry) for entry in (value if isinstance(value, list) else [value]) if entry not in (None, "")]
    return [entry for entry in values if entry is not None]


def _unwrapped(value) -> str | bytes | Picture | None:
    """A picture, taken out of the object that holds its bytes or its path. None: an empty cell. Raises BadSample."""
    if isinstance(value, (str, bytes, Picture)):
        return value
    if not isinstance(value, dict):
        raise BadSample("image is neither a path nor a list of paths, nor embedded bytes or data URLs")
    data = next((value[key] for key in ("bytes", "data") if value.get(key) is not None), None)
    path = next((value[key] for key in ("path", "url", "image_url") if value.get(key) is not None), None)
    if data is None and path is None and not any(entry is not None for entry in value.values()):
        return None
    if data is None:
        if not isinstance(path, str):
            raise BadSample(f"image is an object without bytes or path: its keys are {key_names(value)}")
        return path or None
    name = path if isinstance(path, str) and path else "embedded"
    if isinstance(data, list) and all(isinstance(byte, int) and 0 <= byte < 256 for byte in data):
        data = bytes(data)
    if isinstance(data, str):
        data = _decoded(data, name)
    if not isinstance(data, bytes):
        raise BadSample(f"image {name} has bytes that are neither bytes nor base64")
    return Picture(name, data)


def is_path(value: str | bytes | Picture) -> bool:
    """Whether a picture is named, not embedded."""
    return isinstance(value, str) and not _DATA_URL.match(value) and not _BARE_BASE64.fullmatch(value)


def opened(value: str | bytes | Picture) -> str | Picture:
    """Embedded pictures as bytes, paths as they are. Raises BadSample."""
    if isinstance(value, Picture) or is_path(value):
        return value
    return Picture("embedded", value if isinstance(value, bytes) else _decoded(value, "image"))


def _decoded(text: str, name: str) -> bytes:
    """The bytes of a data URL or of base64. Raises BadSample."""
    match = _DATA_URL.match(text)
    if match and not match[1]:
        raise BadSample(f"{name} is a data URL without base64")
    try:
        return base64.b64decode("".join(text[match.end() if match else 0 :].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSample(f"{name} holds base64 that does not decode ({error})") from None


def picture_names(record: dict) -> list | str | int | float | None:
    """What a report calls a record's pictures, whatever they are: one name, or a list."""

    def name(value):
        if isinstance(value, Picture):
            return value.name
        if isinstance(value, dict):
            return name(value["path"]) if isinstance(value.get("path"), str) else "embedded"
        if isinstance(value, str) and len(value) > _NAME_LENGTH:
            return f"{value[:30]}... ({len(value)} characters)"
        return "embedded" if isinstance(value, bytes) else value

    given = next((record[key] for group in PICTURE_KEYS for key in group if record.get(key)), None)
    return [name(value) for value in given] if isinstance(given, list) else name(given)


def picture_file(name: str, root: Path | None) -> Path:
    """The file of a picture that a record names: relative to `root`, or absolute, `~` or `file://` and under it.

    Raises:
        BadSample: a URL, a path that leads out of `root`, or no such file.
    """
    if root is None:
        raise BadSample(f"image is a path, and there is no image root (--images): {name}")
    try:
        inside = below(local_path(name), root)
    except PathError:
        raise BadSample(
            f"image is a URL, and URLs are not fetched: {name}. Download the pictures below the image root and write "
            "their paths, or embed their bytes"
        ) from None
    if inside is None:
        raise BadSample(f"path leaves the image root: {name} does not lie under {root}")
    try:
        if "\0" not in inside and (root / inside).is_file():
            return root / inside
    except (OSError, ValueError):  # a name that is too long, or not one
        pass
    raise BadSample(f"no such image file: {root / inside}")
