"""AnyRes: how LLaVA-NeXT cuts a picture into tiles, and in which order the language model sees their features.

A picture is resized to fit one of a few canvases (the pinpoints), centred on black, and cut into square tiles of the
vision tower's size. In front of them goes the base tile: the whole picture squeezed into one square. Every tile gives
`patches_per_side ** 2` features. Those of the canvas are laid out as one map, the padding is cut off, every row gets a
newline embedding, and the sequence is: base tile, then the rows of the map.

Only integers and pixels live here: the same numbers are needed by the tools that build shards, by the planner that
sizes a million samples before it reads one, and by the model's gather. Counts and order are those of
`LlavaNextModel.pack_image_features` in transformers >= 4.51 (the original unpads with int(x), which loses rows or
columns of patches where a float falls just below a whole number); pixels are those of the original LLaVA-NeXT code.

Pinpoints are `(height, width)` as in transformers' `image_grid_pinpoints`. The original code read the same list as
(width, height), which decides between the two 2-tile canvases when a picture is small: use `ORIGINAL_336` to get the
grids of the published training runs, `HF_336` for a checkpoint that was published with that list.
"""

import math
import operator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from einops import rearrange
from PIL import Image

# transformers' default, in the configs of the llava-hf checkpoints.
HF_336 = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
# The same canvases with each pair swapped: transformers then picks what the original code picked.
ORIGINAL_336 = ((672, 336), (336, 672), (672, 672), (336, 1008), (1008, 336))


def original_pinpoints(tile_size: int) -> tuple[tuple[int, int], ...]:
    """The published recipe's canvases for tiles of another size."""
    return tuple((height // 336 * tile_size, width // 336 * tile_size) for height, width in ORIGINAL_336)


ORIGINAL_384 = original_pinpoints(384)

# transformers unpads with int(round(x, 7)) of a fraction whose denominator is a side of the picture. While sides are
# below 1e7 that is the exact integer quotient, which is what is computed here; beyond, rounding could lift it by one.
MAX_SIDE = 10_000_000
MAX_SQUARE_RATIO = 100  # a thinner picture, resized by its shorter side, would take gigabytes


@dataclass(frozen=True)
class AnyRes:
    """Geometry of one vision tower and one list of canvases. Immutable, hashable and cheap to pickle.

    Args:
        tile_size: side S of a tile in pixels, the vision tower's `image_size` (336, 384).
        patch_size: side of a patch in pixels (14). Pixels beyond the last whole patch are dropped, as the tower's
            convolution does: 384 / 14 gives 27 patches a side.
        pinpoints: canvases as (height, width) in pixels, multiples of `tile_size`; their order breaks ties. Lists are
            accepted and become tuples. Empty means that there are no tiles but the base one: a picture is then its
            features and one newline.
        square: not AnyRes at all, but what LLaVA-1.5 made of a picture: its shorter side is resized to S and one
            square cut from its middle; the sequence is that tile's features, without a newline. Takes no pinpoints.

    Raises:
        ValueError: a size is not a positive integer, or a pinpoint is not a pair of positive multiples of `tile_size`.
    """

    tile_size: int
    patch_size: int
    pinpoints: tuple[tuple[int, int], ...]
    square: bool = False

    def __post_init__(self):
        tile_size = _positive_int(self.tile_size, "tile_size")
        patch_size = _positive_int(self.patch_size, "patch_size")
        if patch_size > tile_size:
            raise ValueError(f"patch_size {patch_size} is larger than tile_size {tile_size}; a tile needs a patch.")
        pinpoints = tuple(_checked_pinpoint(pinpoint, tile_size) for pinpoint in self.pinpoints)
        if self.square and pinpoints:
            raise ValueError("square pictures have no tiles but one; leave pinpoints empty.")
        for name, value in (("tile_size", tile_size), ("patch_size", patch_size), ("pinpoints", pinpoints)):
            object.__setattr__(self, name, value)  # the dataclass is frozen

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a tile: 24 for CLIP-336, 27 for SigLIP-384."""
        return self.tile_size // self.patch_size

    @property
    def patches_per_tile(self) -> int:
        """Features that one tile gives: 576 for CLIP-336, 729 for SigLIP-384."""
        return self.patches_per_side**2

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Tiles of the chosen canvas as (rows, cols); (0, 0) when there are no pinpoints.

        Raises:
            ValueError: a side is not a positive integer or exceeds `MAX_SIDE`.
        """
        return _layout(self, width, height)[:2]

    def num_tiles(self, width: int, height: int) -> int:
        """Tiles of a picture, the base tile included. Raises as `grid`."""
        rows, cols = self.grid(width, height)
        return 1 + rows * cols

    def num_tokens(self, width: int, height: int) -> int:
        """Length of a picture's feature sequence, newlines included. Raises as `grid`.

        640 x 480 is 2,340 tokens with CLIP-336; the most are 2,928, and 3,699 with SigLIP-384. So thin a picture that
        unpadding leaves no row is its base tile alone, without a newline; one without a column keeps only newlines.
        """
        return _num_tokens(self, *_layout(self, width, height))

    def grid_many(self, widths, heights) -> tuple[np.ndarray, np.ndarray]:
        """`grid` for many pictures at once.

        Args:
            widths, heights: integers [N], in pixels.

        Returns:
            rows, cols: int64 [N].

        Raises:
            ValueError: as `grid`, or when the lengths differ.
        """
        widths, heights = _checked_sizes(widths, heights)
        area = widths * heights
        rows, cols, least_wasted = np.zeros_like(area), np.zeros_like(area), np.zeros_like(area)
        most_effective = np.full_like(area, -1)
        for canvas_height, canvas_width in self.pinpoints:
            # Float64 and truncation on purpose: 535 x 1071 hangs on the same rounding in the original.
            scale = np.minimum(canvas_width / widths, canvas_height / heights)
            downscaled = (widths * scale).astype(np.int64) * (heights * scale).astype(np.int64)
            effective = np.minimum(downscaled, area)
            wasted = canvas_height * canvas_width - effective
            better = (effective > most_effective) | ((effective == most_effective) & (wasted < least_wasted))
            most_effective = np.where(better, effective, most_effective)
            least_wasted = np.where(better, wasted, least_wasted)
            rows = np.where(better, canvas_height // self.tile_size, rows)
            cols = np.where(better, canvas_width // self.tile_size, cols)
        return rows, cols

    def num_tokens_many(self, widths, heights) -> np.ndarray:
        """`num_tokens` for many pictures at once: int64 [N]. Arguments and errors as `grid_many`."""
        return _num_tokens(self, *self.layout_many(widths, heights))

    def layout_many(self, widths, heights) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Canvas and unpadded feature map of many pictures.

        Returns:
            rows, cols: tiles of the canvas, int64 [N].
            map_rows, map_cols: patches of the canvas that unpadding keeps, int64 [N]; newlines are not counted.
            Padding is removed in equal parts on both sides, so an odd remainder stays: a 27-patch map of a picture
            with no whole row keeps one row, a 24-patch map none.

        Arguments and errors as `grid_many`.
        """
        rows, cols = self.grid_many(widths, heights)
        widths, heights = _checked_sizes(widths, heights)
        full_rows, full_cols = rows * self.patches_per_side, cols * self.patches_per_side
        picture_is_wider = widths * full_rows > heights * full_cols
        row_padding = np.where(picture_is_wider, full_rows - heights * full_cols // widths, 0) // 2
        col_padding = np.where(picture_is_wider, 0, full_cols - widths * full_rows // heights) // 2
        return rows, cols, full_rows - 2 * row_padding, full_cols - 2 * col_padding

    def feature_index(self, width: int, height: int) -> np.ndarray:
        """The picture's feature sequence as a gather: int64 [M] with M = `num_tokens(width, height)`.

        An entry is 0 for the newline embedding, else `1 + tile * patches_per_tile + patch`, with tile 0 the base tile
        and patches counted row by row. Raises as `grid`.
        """
        rows, cols, map_rows, map_cols = _layout(self, width, height)
        side = self.patches_per_side
        features = 1 + np.arange((1 + rows * cols) * self.patches_per_tile, dtype=np.int64)
        base, tiles = np.split(features, [self.patches_per_tile])
        if rows * cols == 0:
            return base if self.square else np.append(base, 0)
        canvas = rearrange(tiles, "(r c i j) -> (r i) (c j)", r=rows, c=cols, i=side, j=side)
        top, left = (rows * side - map_rows) // 2, (cols * side - map_cols) // 2
        kept = np.zeros((map_rows, map_cols + 1), np.int64)  # the last column: a newline after every row
        kept[:, :-1] = canvas[top : top + map_rows, left : left + map_cols]
        return np.concatenate([base, kept.ravel()])

    def tiles(self, image: Image.Image) -> np.ndarray:
        """The picture's tiles: uint8 [n, S, S, 3], base tile first, then the canvas row by row; n = `num_tiles`.

        Pixels are the original code's under every Pillow version; nothing is rescaled or normalised. The base tile is
        distorted to a square, the canvas keeps the aspect ratio and is padded with black.

        Raises:
            ValueError: a size as in `grid`, a colour mode that Pillow cannot convert to RGB, or with `square` a picture
                more than `MAX_SQUARE_RATIO` times as long as wide.
        """
        image = to_rgb(image)
        rows, cols = self.grid(*image.size)
        side = self.tile_size
        tiles = np.empty((1 + rows * cols, side, side, 3), np.uint8)
        tiles[0] = np.asarray(_centre_square(image, side) if self.square else resize_bicubic(image, side, side))
        if rows * cols:
            canvas = np.asarray(_letterbox(image, cols * side, rows * side))
            tiles[1:] = rearrange(canvas, "(r y) (c x) rgb -> (r c) y x rgb", r=rows, c=cols)
        return tiles


@lru_cache(maxsize=1 << 16)
def _layout(anyres: AnyRes, width: int, height: int) -> tuple[int, int, int, int]:
    """`AnyRes.layout_many` for one picture, as python ints: (rows, cols, map_rows, map_cols)."""
    return tuple(int(values[0]) for values in anyres.layout_many([width], [height]))


def _num_tokens(anyres: AnyRes, rows, cols, map_rows, map_cols):
    """Tokens of a layout (ints or arrays): base tile, map with a newline a row; one newline when there is no map."""
    lone_newline = (rows * cols == 0) & (not anyres.square)
    return anyres.patches_per_tile + map_rows * (map_cols + 1) + lone_newline


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as 8-bit RGB, with the pixels that the original's `image.convert("RGB")` gives.

    - Transparency is dropped, not blended: the colour stored under it shows, often black. (transformers' image
      processors since version 5 blend with white instead.)
    - 16-bit grey (modes `I;16*`, and `I` as which Pillow opens 16-bit PGM and, before 11, PNG) keeps its upper 8 bits,
      as Pillow does with 16-bit colour. A plain convert would clip all but the darkest 0.4 % to white.
    - EXIF orientation is ignored, as in the original.

    Raises:
        ValueError: Pillow knows no conversion from the picture's mode.
    """
    if image.mode == "RGB":
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.clip(np.asarray(image), 0, 65535) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    return image.convert("RGB")


def resize_bicubic(image: Image.Image, width: int, height: int) -> Image.Image:
    """Bicubic resize whose bytes do not depend on the Pillow version.

    Resizing is two passes with 8-bit pixels between them, so their order shows: Pillow up to 12 runs the horizontal
    pass first, Pillow 13 the vertical one for many tall pictures. Measured between 13.0 and two calls, each kind 400
    resizes to 336 to 1344 px: up to 25 grey levels apart on noise, 31 on black and white noise, 2 on a smooth picture.
    (12.3: none.) Two calls fix the order.
    """
    horizontal = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return horizontal.resize((width, height), Image.Resampling.BICUBIC)


def _letterbox(image: Image.Image, canvas_width: int, canvas_height: int) -> Image.Image:
    """The picture scaled to fit the canvas, centred on black. The floats are rounded as in the original."""
    scale_width, scale_height = canvas_width / image.width, canvas_height / image.height
    if scale_width < scale_height:
        width, height = canvas_width, min(math.ceil(image.height * scale_width), canvas_height)
    else:
        width, height = min(math.ceil(image.width * scale_height), canvas_width), canvas_height
    canvas = Image.new("RGB", (canvas_width, canvas_height))
    canvas.paste(resize_bicubic(image, width, height), ((canvas_width - width) // 2, (canvas_height - height) // 2))
    return canvas


def _centre_square(image: Image.Image, side: int) -> Image.Image:
    """The middle of the picture with its shorter side resized to `side`, as CLIP's own processor cuts it."""
    short, long = sorted(image.size)
    if long > MAX_SQUARE_RATIO * short:
        raise ValueError(f"a picture of {image.width} x {image.height} px is too thin for a square from its middle.")
    width, height = (side if length == short else int(side * length / short) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    return resize_bicubic(image, width, height).crop((left, top, left + side, top + side))


def _positive_int(value, name: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of pixels.") from None
    if number <= 0:
        raise ValueError(f"{name} is {number}; it must be positive.")
    return number


def _checked_pinpoint(pinpoint, tile_size: int) -> tuple[int, int]:
    try:
        height, width = pinpoint
    except (TypeError, ValueError):
        raise ValueError(f"pinpoint {pinpoint!r} is not a (height, width) pair.") from None
    height = _positive_int(height, f"height of pinpoint {pinpoint!r}")
    width = _positive_int(width, f"width of pinpoint {pinpoint!r}")
    if height % tile_size or width % tile_size:
        raise ValueError(
            f"pinpoint (height, width) = ({height}, {width}) is not a multiple of tile_size {tile_size}; "
            "give pinpoints made for this vision tower."
        )
    return height, width


def _checked_sizes(widths, heights) -> tuple[np.ndarray, np.ndarray]:
    """Both as int64 [N]. Raises ValueError naming the first bad size."""
    widths, heights = np.asarray(widths), np.asarray(heights)
    if widths.shape != heights.shape:
        raise ValueError(f"widths {widths.shape} and heights {heights.shape} must have the same shape.")
    for name, sides in (("width", widths), ("height", heights)):
        if sides.size and sides.dtype.kind not in "iu":
            raise ValueError(f"image {name} must be a whole number of pixels, not {sides.ravel()[0]!r}.")
        bad = np.flatnonzero((sides < 1) | (sides > MAX_SIDE))
        if bad.size:
            where = f" at position {bad[0]}" if sides.size > 1 else ""
            raise ValueError(f"image {name} is {sides.ravel()[bad[0]]}{where}; it must be 1 to {MAX_SIDE} pixels.")
    return widths.astype(np.int64), heights.astype(np.int64)
