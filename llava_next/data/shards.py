"""The on-disk contract: how one sample lies in a webdataset tar, how it is written, and the strict reader of its bytes.

A sample's members are adjacent and share a key without dots: `KEY.0.jpg` or `KEY.0.webp` per picture, then `KEY.json`
with `id`, `source`, `conversations` and `images: [{width, height, rows, cols}]`. A picture is stored as one strip: its
tiles stacked top to bottom, base tile first, S wide and (1 + rows * cols) * S high, so that one decode and a reshape
give the tiles.

The reader takes the bytes of one sample (a range read that the index gives) and trusts none of them: every header is
checked, only pictures and JSON are decoded, and anything else is an error or ignored, never run.
"""

import contextlib
import hashlib
import io
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from einops import rearrange
from PIL import Image

from llava_next.anyres import MAX_SIDE, AnyRes
from llava_next.data.index import DATASET_FILE, SCHEMA, DatasetInfo, ShardInfo, write_dataset, written_aside
from llava_next.data.tar import BadSample, tar_members

CODECS = ("auto", "jpeg", "webp")
MAX_JSON_BYTES = 8 << 20
MAX_TILES = 144  # of one picture, enough for a canvas of 11 x 13; a larger strip is a decompression bomb
ALLOWED_KINDS = ("jpg", "png", "webp", "json", "txt")  # members that are looked at; all others are skipped unread

_STRIP_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
_MAX_WEBP_SIDE, _MAX_JPEG_SIDE = 16_383, 65_535
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
    """

    width: int
    height: int
    rows: int
    cols: int
    ext: str
    data: bytes


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
        BadSample: not a JPEG, PNG or WebP, truncated, another size than S x (n * S), or more than `MAX_TILES` tiles.
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
            pixels = np.asarray(image)
    except BadSample:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, its own bomb error, ...
        raise BadSample(f"strip does not decode ({type(error).__name__}: {error})") from error
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
    for number, image in enumerate(sample.images):
        if image.ext not in _STRIP_FORMATS:
            raise BadSample(f"image {number} has extension {image.ext!r}, not one of {', '.join(_STRIP_FORMATS)}")
        members[f"{number}.{image.ext}"] = image.data
    return members | {"json": text}


class ShardFile:
    """Writes one shard. A context manager: the tar takes its name when the block ends well, and never before.

    The same samples give the same bytes: times are 0, owners empty, members sorted.

    Args:
        path: of the tar.

    Attributes (when closed):
        info: the shard's `ShardInfo`; None when no sample was written, and then there is no file.
        rows: its part of the index, `SCHEMA` without the column `shard`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.info: ShardInfo | None = None
        self.rows: pa.Table | None = None
        self._columns: dict[str, list] = {name: [] for name in SCHEMA.names if name != "shard"}
        self._keys: set[str] = set()
        self._tar = None

    def __len__(self) -> int:
        return len(self._keys)

    def __enter__(self) -> "ShardFile":
        return self

    def write(self, sample: RawSample) -> None:
        """Append a sample. Raises BadSample, and leaves the tar as it was, when the sample cannot be stored."""
        members = sample_members(sample)
        if sample.key in self._keys:
            raise BadSample(f"key {sample.key} is already in {self.path.name}; the members of two samples would mix")
        if self._tar is None:
            self._open()
        start = self._tar.tarstream.offset
        self._tar.write({"__key__": sample.key, **members})
        self._keys.add(sample.key)
        row = {
            "offset": start,
            "nbytes": self._tar.tarstream.offset - start,
            "crc32": 0,  # taken from the file when it is complete
            "key": sample.key,
            "source": sample.source,
            **{f"{name}s": [getattr(image, name) for image in sample.images] for name in ("width", "height")},
            **{name: [getattr(image, name) for image in sample.images] for name in ("rows", "cols")},
            "text_bytes": sum(len(turn["value"].encode()) for turn in sample.conversations),
            "turns": len(sample.conversations),
        }
        for name, values in self._columns.items():
            values.append(row[name])

    def _open(self):
        from webdataset import TarWriter  # here: it imports torch, which readers of shards may do without

        stack = self._stack = contextlib.ExitStack()
        self._temporary = stack.enter_context(written_aside(self.path))
        file = stack.enter_context(open(self._temporary, "wb"))  # noqa: SIM115 (the stack closes it)
        # Whole seconds: a fractional mtime costs each member 1 KiB of extended header.
        self._tar = stack.enter_context(TarWriter(file, user="", group="", encoder=False, mtime=0))
        stack.push(self._finish)

    def __exit__(self, *error) -> None:
        if self._tar is not None:
            self._stack.__exit__(*error)

    def _finish(self, error_type, *_):
        """Completes the tar and takes its checksums, before the stack closes it and gives it its name."""
        if error_type is not None:
            return
        self._tar.close()
        self._tar.stream.flush()
        digest, size = hashlib.sha256(), 0
        with open(self._temporary, "rb") as file:
            for row, nbytes in enumerate(self._columns["nbytes"]):  # samples follow each other without gaps
                data = file.read(nbytes)
                self._columns["crc32"][row] = zlib.crc32(data)
                digest.update(data)
                size += nbytes
            end = file.read()
        digest.update(end)
        schema = SCHEMA.remove(SCHEMA.get_field_index("shard"))
        self.rows = pa.table(self._columns, schema=schema)
        self.info = ShardInfo(self.path.name, size + len(end), len(self), digest.hexdigest())


def shard_name(number: int) -> str:
    """File name of a shard: shard-000000.tar, ..."""
    return f"shard-{number:06d}.tar"


class ShardWriter:
    """Writes samples, one after the other, as a data set. A context manager.

        with ShardWriter(folder, AnyRes(336, 14, ORIGINAL_336)) as writer:
            writer.write(sample)

    Shards appear under their names when complete; index and `dataset.json` come last, when the block ends well.

    Args:
        folder: local folder, made when missing; it must not hold a data set yet.
        anyres: geometry of the tiles.
        codec: of the strips, as told to `encode_strip`; kept in `dataset.json`.
        shard_samples: samples a shard.
        build: kept in `dataset.json`.

    When closed, its attribute `info` is the `DatasetInfo` written.
    Raises ValueError when the folder holds a data set.
    """

    def __init__(
        self,
        folder: str | Path,
        anyres: AnyRes,
        codec: str = "auto",
        shard_samples: int = 1000,
        build: dict | None = None,
    ):
        self.folder, self.anyres, self.codec = Path(folder), anyres, codec
        self.shard_samples, self.build = shard_samples, build
        if (self.folder / DATASET_FILE).exists():
            raise ValueError(f"{self.folder} already holds a data set; choose another folder, or delete it first.")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.info: DatasetInfo | None = None
        self._parts: list[tuple[ShardInfo, pa.Table]] = []
        self._shard: ShardFile | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def write(self, sample: RawSample) -> None:
        """Append a sample. Raises BadSample, and leaves it out, when it cannot be stored."""
        if self._shard is None:
            self._shard = ShardFile(self.folder / shard_name(len(self._parts)))
        self._shard.write(sample)
        if len(self._shard) == self.shard_samples:
            self._close_shard()

    def _close_shard(self, *error):
        shard, self._shard = self._shard, None
        shard.__exit__(*(error or (None, None, None)))
        if shard.info is not None:
            self._parts.append((shard.info, shard.rows))

    def __exit__(self, *error) -> None:
        if self._shard is not None:
            self._close_shard(*error)
        if error[0] is None:
            self.info = write_dataset(self.folder, self.anyres, self.codec, self._parts, self.build)


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
        match = _MEMBER_NAME.fullmatch(name)
        if match is None or name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise BadSample(f"member name {name!r} is not KEY.EXTENSION")
        if key is None:
            key = match[1]
        if match[1] != key:
            raise BadSample(f"member {name!r} does not belong to sample {key!r}")
        extension = match[2].lower()
        if extension in members:
            raise BadSample(f"member {name!r} comes twice")
        if extension.rpartition(".")[2] in ALLOWED_KINDS:
            members[extension] = content
    if "json" not in members:
        raise BadSample(f"sample {key!r} has no .json member")
    values = _parse_description(members.pop("json"))
    images = [_strip(number, image, members) for number, image in enumerate(values["images"])]
    unlisted = [name for name in members if name.rpartition(".")[2] in _STRIP_FORMATS]
    if unlisted:
        raise BadSample(f"picture member {unlisted[0]!r} is not listed in the .json member")
    return RawSample(key, values["id"], values["source"], values["conversations"], images)


def _parse_description(text: bytes) -> dict:
    if len(text) > MAX_JSON_BYTES:
        raise BadSample(f".json member of {len(text)} bytes is over the limit of {MAX_JSON_BYTES}")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSample(f".json member does not parse ({error})") from None
    _check_description(values)
    return values


def _check_description(values) -> None:
    if not isinstance(values, dict):
        raise BadSample("description is not an object")
    for name, kind in (("id", str), ("source", str), ("conversations", list), ("images", list)):
        if not isinstance(values.get(name), kind):
            raise BadSample(f"{name!r} of the description is missing or not a {kind.__name__}")
    for number, turn in enumerate(values["conversations"]):
        if not (isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)):
            raise BadSample(f'turn {number} is not {{"from": text, "value": text}}')


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
