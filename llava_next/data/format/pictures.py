"""Pictures as others made them, and samples of shards as others wrote them: read by content, within limits.

A sample that this project wrote lists its strips in its JSON member (`shards.read_sample`). One that others wrote, in
the plain webdataset way, is `KEY.jpg` (or .jpeg, .png, .webp) with `KEY.json` in any form of `records`, with `KEY.txt`
that holds a caption, or both; its picture is raw and is cut into tiles when it is read. Raw pictures in shards are
JPEG, PNG, WebP or, as published data sets hold them under such names, GIF; when a data set is built, BMP, TIFF and PPM
too. Whatever the format, pixels are those of the first frame by Pillow's `convert("RGB")` (see `anyres.to_rgb`).
"""

import io
import math
import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from llava_next.anyres import to_rgb
from llava_next.data.format.picture_forms import Picture
from llava_next.data.format.records import TEXT_KEYS, holds_pictures, read_record
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


def open_rgb(file: Path | bytes) -> Image.Image:
    """The picture as 8-bit RGB, opened as for training: evaluation and chat see the pixels that training saw.

    Whatever the file's name; EXIF orientation is not applied, transparency is dropped (`anyres.to_rgb`).

    Raises:
        BadSample: as `open_picture`, or a colour mode without a conversion.
    """
    image = open_picture(file)
    try:
        return to_rgb(image)
    except ValueError as error:
        raise BadSample(f"image cannot be read: {error}") from error


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
        values: the parsed `.json` member, a record in any form of `records`; None when there is none.
        members: extension to bytes of the others.

    Returns:
        the description (`id`, `source`, `conversations` as `shards.RawSample` has them, not checked further), and
        extension and bytes of each picture: the members that the record names, its one member, or embedded ones.

    Raises:
        BadSample: several pictures that the record does not name, a dotted extension, no text.
    """
    values, found = dict(values or {}), [name for name in members if name.rpartition(".")[2] in RAW_KINDS]
    if not any(values.get(name) is not None for name in TEXT_KEYS) and "txt" in members:
        values["caption"] = members["txt"].decode("utf-8", "replace")
    texts = {name for name in TEXT_KEYS if values.get(name) is not None}
    names_its_own = bool(texts) and holds_pictures(values)
    if found and not names_its_own:
        values["image"] = [Picture(extension, members[extension]) for extension in _only_one(key, found)]
    if not texts or (texts == {"caption"} and not found and not names_its_own):
        raise BadSample(f"sample {key!r} has no .json member with conversations, nor a picture with a caption")
    # without pictures `<image>` may be text: whether that is meant was decided when the shards were indexed
    record = read_record(values, allow_text_image_token=True)
    pictures = [_named_member(key, picture, found, len(record.pictures), members) for picture in record.pictures]
    _only_one(key, [extension for extension in found if extension not in {name for name, _ in pictures}], 0)
    source = values.get("source") or values.get("data_source") or ("image" if pictures else "text")
    return {"id": record.id or key, "source": str(source), "conversations": record.conversations}, pictures


def _only_one(key: str, found: list[str], most: int = 1) -> list[str]:
    """The picture members that the record does not name, which may be `most`. Raises BadSample."""
    for extension in found:
        if "." in extension:
            raise BadSample(
                f"picture member {extension!r} is not listed in the .json member; in shards that others wrote it "
                "belongs to a key with a dot in it, which readers cut at the first dot: rename the members"
            )
    if len(found) > most:
        wanted = "one, or their names in the record" if most else "those that the record names"
        raise BadSample(f"sample {key!r} has the pictures {', '.join(found)}; expected {wanted}")
    return found


def _named_member(
    key: str, picture: str | Picture, found: list[str], count: int, members: dict[str, bytes]
) -> tuple[str, bytes]:
    """Extension and bytes of a record's picture: embedded, or one of the members `found`. Raises BadSample."""
    if isinstance(picture, Picture):
        extension = picture.name.rpartition(".")[2].lower()
        return (picture.name if picture.name in found else extension if extension in RAW_KINDS else "jpg"), picture.data
    for extension in found:
        if picture in (extension, f"{key}.{extension}") or len(found) == count == 1:
            return extension, members[extension]
    raise BadSample(f"sample {key!r} names the picture {picture}, which is not among its members")
