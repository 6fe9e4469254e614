"""The on-disk contract: how one sample lies in a webdataset tar, and the strict reader of its bytes.

A sample's members are adjacent and share a key without dots: `KEY.0.jpg` or `KEY.0.webp` per picture, then `KEY.json`
with `id`, `source`, `conversations` and `images: [{width, height, rows, cols}]`. A picture is stored as one strip: its
tiles stacked top to bottom, base tile first, S wide and (1 + rows * cols) * S high, so that one decode and a reshape
give the tiles.

The reader takes the bytes of one sample (a range read that the index gives) and trusts none of them: every header is
checked, only pictures and JSON are decoded, and anything else is an error or ignored, never run.
"""

import io
import json
import re
from dataclasses import dataclass

import numpy as np
from einops import rearrange
from PIL import Image

from llava_next.anyres import MAX_SIDE
from llava_next.data.format.dataset import MAX_TILES
from llava_next.data.format.pictures import (
    RAW_FORMATS,
    RAW_KINDS,
    check_scans,
    decoding_error,
    open_picture,
    parse_foreign,
)
from llava_next.data.format.tar import BadSample, tar_members

CODECS = ("auto", "jpeg", "webp")
MAX_JSON_BYTES = 8 << 20
MAX_SAMPLE_TILES = 1024  # of all pictures; a thousand flat tiles of 336 px are 350 MB that 2 KB can hold
ALLOWED_KINDS = (*RAW_KINDS, "json", "txt")  # members that are looked at; all others are skipped unread

_STRIP_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
_MAX_WEBP_SIDE, _MAX_JPEG_SIDE = 16_383, 65_535
_SURROGATE = re.compile("[\ud800-\udfff]")  # what JSON can escape and no tokenizer takes
_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MEMBER_NAME = re.compile(r"((?:[^/]+/)*[^./]+)\.([^/]+)")


@dataclass(frozen=True)
class StripInfo:
    """One picture of a sample.

    Args:
        width, height: of the original picture, in pixels.
        rows, cols: its grid of tiles, without the base tile.
        ext: jpg, png or webp.
        data: the encoded strip.
        is_raw: `data` is the picture itself, as others put it into their shards, and rows and cols are 0: it is cut
            when it is read.
    """

    width: int
    height: int
    rows: int
    cols: int
    ext: str
    data: bytes
    is_raw: bool = False


@dataclass(frozen=True)
class RawSample:
    """A sample as stored: its texts as they are in the source data, its pictures as encoded strips.

    Args:
        key: name of its members in the tar.
        id: name in the source data; need not be unique.
        source: part of the mixture it belongs to.
        conversations: `[{"from": ..., "value": ...}, ...]`.
        images: in the order of their placeholders.
    """

    key: str
    id: str
    source: str
    conversations: list[dict[str, str]]
    images: list[StripInfo]


def encode_strip(tiles: np.ndarray, codec: str = "auto", quality: int = 95) -> tuple[str, bytes]:
    """Encode the tiles of one picture as a strip.

    Args:
        tiles: uint8 [n, S, S, 3].
        codec: `jpeg` (without chroma subsampling), `webp` (lossless), or `auto`: the smaller of the two, so that drawn
            pages and charts stay exact and photos stay small.
        quality: of the JPEG, 1 to 100.

    Returns:
        file extension (`jpg` or `webp`) and the encoded bytes.

    Raises:
        ValueError: not such an array, an unknown codec, or more tiles than the codec can stack.
    """
    if tiles.ndim != 4 or tiles.dtype != np.uint8 or tiles.shape[1] != tiles.shape[2] or tiles.shape[3] != 3:
        raise ValueError(f"tiles must be uint8 [n, S, S, 3], not {tiles.dtype} {list(tiles.shape)}.")
    if codec not in CODECS:
        raise ValueError(f"codec {codec!r} is not one of {', '.join(CODECS)}.")
    height = tiles.shape[0] * tiles.shape[1]
    if len(tiles) > MAX_TILES or height > (_MAX_WEBP_SIDE if codec == "webp" else _MAX_JPEG_SIDE):
        raise ValueError(f"a strip of {len(tiles)} tiles, {height} px high, is too large for codec {codec}.")
    strip = Image.fromarray(rearrange(tiles, "n y x rgb -> (n y) x rgb"))
    if codec == "webp":
        return "webp", _encoded(strip, format="WEBP", lossless=True)
    jpeg = _encoded(strip, format="JPEG", quality=quality, subsampling=0)
    if codec == "auto" and height <= _MAX_WEBP_SIDE and _may_compress(Image.fromarray(tiles[0]), quality):
        webp = _encoded(strip, format="WEBP", lossless=True)
        if len(webp) <= len(jpeg):
            return "webp", webp
    return "jpg", jpeg


def _may_compress(base: Image.Image, quality: int) -> bool:
    """Whether lossless compression is worth trying: on a photo it takes 0.3 s and loses to JPEG by a factor of 2.

    The fastest lossless setting on the base tile takes 4 ms and tells: photos give 2.1 to 2.8 times the JPEG's size,
    drawn pages and charts, where lossless compression wins by up to 16 times, 0.6 to 1.6 times.
    """
    sketch = _encoded(base, format="WEBP", lossless=True, quality=0, method=0)
    return len(sketch) < 2 * len(_encoded(base, format="JPEG", quality=quality, subsampling=0))


def _encoded(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def decode_strip(data: bytes, tile_size: int) -> np.ndarray:
    """Decode a strip into its tiles: uint8 [n, S, S, 3] with S = `tile_size`.

    Raises:
        BadSample: not a JPEG, PNG or WebP, truncated, animated, another size than S x (n * S), more than `MAX_TILES`
            tiles, or a JPEG of more than `MAX_JPEG_SCANS` scans.
    """
    try:
        with Image.open(io.BytesIO(data), formats=tuple(_STRIP_FORMATS.values())) as image:
            width, height = image.size  # from the header; nothing is decompressed before it is checked
            if width != tile_size or height % tile_size or not 0 < height // tile_size <= MAX_TILES:
                raise BadSample(
                    f"strip of {width} x {height} px does not hold 1 to {MAX_TILES} tiles of {tile_size} px"
                )
            if image.mode != "RGB":
                raise BadSample(f"strip has colour mode {image.mode}, not RGB")
            if getattr(image, "is_animated", False):
                raise BadSample(f"strip has {image.n_frames} frames; it must be one picture")
            check_scans(image, data)
            image.load()  # numpy would swallow some of its errors
            pixels = np.asarray(image)
    except BadSample:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, its own bomb error, ...
        raise BadSample(f"strip does not decode ({decoding_error(error)})") from error
    return rearrange(pixels, "(n y) x rgb -> n y x rgb", y=tile_size)


def sample_members(sample: RawSample) -> dict[str, bytes]:
    """The sample's tar members, extension to bytes.

    Raises:
        BadSample: a key or extension that cannot be a member's name, text that is not valid Unicode, too long a text.
    """
    if not _KEY.fullmatch(sample.key):
        raise BadSample(f"key {sample.key!r} must be 1 to 64 of A-Z a-z 0-9 _ and -")
    description = {
        "id": sample.id,
        "source": sample.source,
        "conversations": sample.conversations,
        "images": [
            {name: getattr(image, name) for name in ("width", "height", "rows", "cols")} for image in sample.images
        ],
    }
    _check_description(description)
    try:
        text = json.dumps(description, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadSample(f"text is not valid Unicode ({error.reason} at {error.start})") from None
    if len(text) > MAX_JSON_BYTES:
        raise BadSample(f"text of {len(text)} bytes is over the limit of {MAX_JSON_BYTES}")
    members = {}
    _check_tiles(sample.images)
    for number, image in enumerate(sample.images):
        if image.ext not in _STRIP_FORMATS:
            raise BadSample(f"image {number} has extension {image.ext!r}, not one of {', '.join(_STRIP_FORMATS)}")
        members[f"{number}.{image.ext}"] = image.data
    return members | {"json": text}


def read_sample(data: bytes, key: str | None = None) -> RawSample:
    """Parse the bytes of one sample.

    Args:
        data: exactly the sample's range in its tar.
        key: what the index calls it; None accepts any.

    Raises:
        BadSample: not whole, well-formed members of one sample with a valid description, and its reason.
    """
    members: dict[str, bytes] = {}
    for name, content in tar_members(data):
        found, extension = split_member_name(name)
        key = key or found
        if found != key:
            raise BadSample(f"member {name!r} does not belong to sample {key!r}")
        if extension in members:
            raise BadSample(f"member {name!r} comes twice")
        if extension.rpartition(".")[2] in ALLOWED_KINDS:
            members[extension] = content
    values = _parse_json(members.pop("json")) if "json" in members else {}
    if _is_foreign(values.get("images")):
        return _foreign_sample(key, values, members)
    _check_description(values)
    images = [_strip(number, image, members) for number, image in enumerate(values["images"])]
    _check_tiles(images)
    unlisted = [name for name in members if name.rpartition(".")[2] in RAW_KINDS]
    if unlisted:
        raise BadSample(f"picture member {unlisted[0]!r} is not listed in the .json member")
    return RawSample(key, values["id"], values["source"], values["conversations"], images)


def split_member_name(name: str) -> tuple[str, str]:
    """Key and lower-case extension of a tar member: `a/b.0.jpg` -> `a/b`, `0.jpg`. Raises BadSample."""
    match = _MEMBER_NAME.fullmatch(name)
    if match is None or name.startswith("/") or "\\" in name or ".." in name.split("/"):
        raise BadSample(f"member name {name!r} is not KEY.EXTENSION")
    return match[1], match[2].lower()


def _is_foreign(images) -> bool:
    """Whether an `images` entry is none that this project writes: absent, or it names or holds pictures itself."""
    entries = images if isinstance(images, list) else [images]
    return images is None or any(
        (isinstance(entry, str) and entry) or (isinstance(entry, dict) and {"path", "bytes"} & set(entry))
        for entry in entries
    )


def _foreign_sample(key: str, values: dict, members: dict[str, bytes]) -> RawSample:
    """A sample that others wrote, see `pictures`."""
    description, pictures = parse_foreign(key, values, members)
    _check_description({**description, "images": []})
    images = []
    for extension, data in pictures:
        width, height = open_picture(data, load=False, formats=RAW_FORMATS).size
        images.append(StripInfo(width, height, 0, 0, extension, data, is_raw=True))
    return RawSample(key, **description, images=images)


def _parse_json(text: bytes) -> dict:
    if len(text) > MAX_JSON_BYTES:
        raise BadSample(f".json member of {len(text)} bytes is over the limit of {MAX_JSON_BYTES}")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSample(f".json member does not parse ({error})") from None
    if not isinstance(values, dict):
        raise BadSample("description is not an object")
    return values


def parse_description(text: bytes) -> dict:
    """The `.json` member of a sample that this project wrote. Raises BadSample as `read_sample`."""
    values = _parse_json(text)
    _check_description(values)
    return values


def _check_description(values: dict) -> None:
    for name, kind in (("id", str), ("source", str), ("conversations", list), ("images", list)):
        if not isinstance(values.get(name), kind):
            raise BadSample(f"{name!r} of the description is missing or not a {kind.__name__}")
    for number, turn in enumerate(values["conversations"]):
        if not (isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)):
            raise BadSample(f'turn {number} is not {{"from": text, "value": text}}')
        if _SURROGATE.search(turn["from"] + turn["value"]):
            raise BadSample(f"turn {number} is not valid Unicode (half of a surrogate pair)")
    if _SURROGATE.search(values["id"] + values["source"]):
        raise BadSample("'id' or 'source' is not valid Unicode (half of a surrogate pair)")


def _check_tiles(images: list[StripInfo]) -> None:
    tiles = sum(1 + image.rows * image.cols for image in images)
    if tiles > MAX_SAMPLE_TILES:
        raise BadSample(
            f"{len(images)} images of {tiles} tiles are over the limit of {MAX_SAMPLE_TILES} tiles a sample"
        )


def _strip(number: int, image, members: dict[str, bytes]) -> StripInfo:
    """Takes picture `number` out of `members`."""
    names = ("width", "height", "rows", "cols")
    if not isinstance(image, dict) or not all(type(image.get(name)) is int for name in names):
        raise BadSample(f"image {number} must have whole numbers {', '.join(names)}")
    width, height, rows, cols = (image[name] for name in names)
    sizes_fit = 0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE
    if not sizes_fit or min(rows, cols) < 0 or max(rows, cols) > MAX_TILES or 1 + rows * cols > MAX_TILES:
        raise BadSample(f"image {number} of {width} x {height} px in {rows} x {cols} tiles is not possible")
    found = [ext for ext in _STRIP_FORMATS if f"{number}.{ext}" in members]
    if len(found) != 1:
        raise BadSample(f"image {number} has {len(found)} members, expected one of {number}.jpg, .png, .webp")
    return StripInfo(width, height, rows, cols, found[0], members.pop(f"{number}.{found[0]}"))
