"""Uploaded pictures: checked, kept for a while, and drawn as the model sees them."""

import hashlib
import io
from base64 import b64encode
from dataclasses import dataclass, field
from threading import Lock

from PIL import Image

from doctor.report_samples import show_picture
from llava_next.anyres import AnyRes
from llava_next.data.format.pictures import IMAGE_FORMATS, MAX_PIXELS, open_rgb

MAX_BYTES = 50 << 20  # of one picture
KEPT_BYTES = 1 << 30  # of all; the oldest go first
PREVIEW_SIDE = 504  # px: three tiles of the drawing
ORIENTATION = 0x0112  # EXIF tag


@dataclass
class Pictures:
    """Pictures as they were uploaded, by the hash of their bytes; in memory, up to `KEPT_BYTES`."""

    files: dict[str, bytes] = field(default_factory=dict)
    _decoding: Lock = field(default_factory=Lock)  # a picture may take 270 MB: one after the other

    def add(self, data: bytes) -> str:
        """Takes a picture; returns its id.

        Raises:
            ValueError: too large, or not a picture that can be read.
        """
        if len(data) > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES >> 20} MB")
        id = hashlib.sha256(data).hexdigest()[:32]
        self._open(data)
        self.files.pop(id, None)
        self.files[id] = data
        while sum(map(len, list(self.files.values()))) > KEPT_BYTES:
            self.files.pop(next(iter(self.files)))
        return id

    def get(self, id: str) -> Image.Image:
        """The pixels that training would see. Raises ValueError: it was not uploaded, or is no longer kept."""
        if id not in self.files:
            raise ValueError("a picture of this chat is no longer here: start anew and add it again")
        return self._open(self.files[id])

    def _open(self, data: bytes) -> Image.Image:
        with self._decoding:
            try:
                return open_rgb(data)
            except ValueError as error:
                if "UnidentifiedImageError" in str(error):
                    kinds = ", ".join(IMAGE_FORMATS)
                    raise ValueError(f"not a picture of a format that is read here ({kinds})") from error
                if "DecompressionBomb" in str(error):
                    raise ValueError(f"more than {MAX_PIXELS // 10**6} million pixels") from error
                raise

    def show(self, id: str, anyres: AnyRes | None) -> dict:
        """A picture for the page: `id`, sides in px, `preview` as data URL, whether it `is_turned`, and what
        `show_picture` says of its tiles where `anyres` is known. Raises ValueError as `get`."""
        picture = self.get(id)
        is_turned = Image.open(io.BytesIO(self.files[id])).getexif().get(ORIENTATION, 1) != 1
        shown = {"id": id, "width": picture.width, "height": picture.height, "is_turned": is_turned}
        if anyres:
            shown |= show_picture(anyres.tiles(picture), picture.width, picture.height, anyres)
            shown["tile_size"] = anyres.tile_size
        return shown | {"preview": preview(picture)}


def preview(picture: Image.Image) -> str:
    """A small WebP as data URL: other formats are not shown by every browser."""
    small, buffer = picture.copy(), io.BytesIO()
    small.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE), Image.Resampling.LANCZOS)
    small.save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + b64encode(buffer.getvalue()).decode()
