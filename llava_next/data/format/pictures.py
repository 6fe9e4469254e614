"""Pictures as others made them, and samples of shards as others wrote them: read by content, within limits.

A sample that this project wrote lists its strips in its JSON member (`shards.read_sample`). One that others wrote, in
the plain webdataset way, is `KEY.jpg` (or .jpeg, .png, .webp) with `KEY.json` in LLaVA's fields, with `KEY.txt` that
holds a caption, or both; its picture is raw and is cut into tiles when it is read. Raw pictures in shards are JPEG,
PNG, WebP or, as published data sets hold them under such names, GIF; when a data set is built, BMP, TIFF and PPM too.
Whatever the format, pixels are those of the first frame by Pillow's `convert("RGB")` (see `anyres.to_rgb`).
"""

import io
import math
import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from llava_next.data.format.tar import BadSample

# Not all that Pillow knows: some of its formats start programs (EPS runs Ghostscript).
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
RAW_FORMATS = IMAGE_FORMATS[:4]  # of pictures in shards that others wrote; TIFF is many formats in one
MAX_PIXELS = 89_478_485  # Pillow's own limit, beyond which it warns of a decompression bomb
MAX_JPEG_SCANS = 100  # a progressive JPEG has about ten; each costs a pass over all pixels and as little as 30 bytes
RAW_KINDS = ("jpg", "jpeg", "png", "webp")  # their extensions
_TIFF_TILE = (322, 323)  # tags: width and length of a TIFF's own tiles


def open_picture(file: Path | bytes, *, load: bool = True, formats: tuple[str, ...] = IMAGE_FORMATS) -> Image.Image:
    """The picture in `file`, by its content and not its name; of an animation, the first frame.

    Args:
        load: decode it; otherwise only the header is read, which tells the size.
        formats: that are looked for.

    Raises:
        BadSample: not such a picture, damaged, or more than `MAX_PIXELS` pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=formats)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise BadSample(f"{image.width} x {image.height} px is more than {MAX_PIXELS} pixels")
            if image.format == "TIFF" and math.prod(int(image.tag_v2.get(tag, 1)) for tag in _TIFF_TILE) > MAX_PIXELS:
                raise BadSample(f"a TIFF with tiles of more than {MAX_PIXELS} pixels")  # each is decoded as a whole
            if load:
                if isinstance(file, bytes):
                    check_scans(image, file)
                image.load()
            return image
    except BadSample:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, bomb errors and others
        raise BadSample(f"image cannot be read: {decoding_error(error)}") from error


def decoding_error(error: Exception) -> str:
    """What a decoder said, without the memory address that Pillow puts into its message for unknown formats."""
    text = "not a picture of a known format" if isinstance(error, UnidentifiedImageError) else error
    return f"{type(error).__name__}: {text}"


def check_scans(image: Image.Image, data: bytes) -> None:
    """Raises BadSample for a JPEG of more than `MAX_JPEG_SCANS` scans.

    Compressed JPEG data never hold the marker that is counted; embedded thumbnails add one or two.
    """
    if image.format == "JPEG" and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise BadSample(f"JPEG has more than {MAX_JPEG_SCANS} scans")


def parse_foreign(key: str, values: dict | None, members: dict[str, bytes]) -> tuple[dict, list[tuple[str, bytes]]]:
    """A sample of a shard that others wrote.

    Args:
        values: the parsed `.json` member; None when there is none.
        members: extension to bytes of the others.

    Returns:
        the description (`id`, `source`, `conversations` as `shards.RawSample` has them, not checked further), and
        extension and bytes of each picture: one or none.

    Raises:
        BadSample: several pictures, a dotted extension, no text.
    """
    pictures = [extension for extension in members if extension.rpartition(".")[2] in RAW_KINDS]
    for extension in pictures:
        if "." in extension:
            raise BadSample(
                f"picture member {extension!r} is not listed in the .json member; in shards that others wrote it "
                "belongs to a key with a dot in it, which readers cut at the first dot: rename the members"
            )
    if len(pictures) > 1:
        raise BadSample(f"sample {key!r} has the pictures {', '.join(pictures)}; expected one")
    conversations = (values or {}).get("conversations")
    if conversations is None:
        caption = members["txt"].decode("utf-8", "replace") if "txt" in members else (values or {}).get("caption")
        if not isinstance(caption, str) or not pictures:
            raise BadSample(f"sample {key!r} has no .json member with conversations, nor a picture with a caption")
        conversations = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]
    values = values or {}
    if isinstance(conversations, list):
        conversations = [stored_turn(turn) for turn in conversations]
    source = values.get("source") or values.get("data_source") or ("image" if pictures else "text")
    description = {"id": str(values.get("id", key)), "source": str(source), "conversations": conversations}
    return description, [(extension, members[extension]) for extension in pictures]


def stored_turn(turn):
    """A message as it is stored: keys `role` and `content` become `from` and `value`. No object: as it is."""
    if not isinstance(turn, dict):
        return turn
    return {"from": turn.get("from", turn.get("role")), "value": turn.get("value", turn.get("content"))}
