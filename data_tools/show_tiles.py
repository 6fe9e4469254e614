"""Draws pictures as the model sees them: as given, the base tile, and the canvas of tiles, with tokens counted.

    python data_tools/show_tiles.py photo.jpg --tower clip-336 --out tiles.webp

The canvas is put together again from the tiles; what unpadding takes away is dimmed, and no token stands for it.
"""

import argparse
import sys

from einops import rearrange
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from building.cutting import add_geometry_arguments, geometry
from doctor.report_samples import kept_pixels
from llava_next.anyres import AnyRes
from llava_next.data.format.pictures import open_picture
from llava_next.data.format.tar import BadSample
from llava_next.data.storage.client import written_aside
from llava_next.paths import drawing_path, local_path

GAP, LINE_HEIGHT, FONT_SIZE = 14, 19, 14
TILE_BORDER, KEPT_BORDER = "#ffffff", "#e69f00"
DIMMED = 0.25  # brightness of padding, which is black: shown as grey, so that it is told from a dark picture
PADDING_GREY = (150, 150, 150)


def dim_padding(canvas: Image.Image, kept: tuple[int, int, int, int]) -> Image.Image:
    """A copy with everything outside `kept` (left, top, right, bottom in pixels) dimmed towards grey."""
    grey = Image.new("RGB", canvas.size, PADDING_GREY)
    shown = Image.blend(ImageEnhance.Brightness(canvas).enhance(DIMMED), grey, 0.75)
    shown.paste(canvas.crop(kept), kept[:2])
    return shown


def draw_canvas(picture: Image.Image, anyres: AnyRes, side: int) -> tuple[Image.Image, str]:
    """The canvas of tiles, each `side` pixels wide, and what it is in words.

    Args:
        picture: one whose geometry has a canvas (rows and cols are not 0).
    """
    rows, cols, map_rows, map_cols = (int(v[0]) for v in anyres.layout_many([picture.width], [picture.height]))
    canvas = rearrange(anyres.tiles(picture)[1:], "(r c) y x rgb -> (r y) (c x) rgb", r=rows, c=cols)
    (left, right), (top, bottom) = kept_pixels(cols, map_cols, anyres), kept_pixels(rows, map_rows, anyres)
    shown = dim_padding(Image.fromarray(canvas), (left, top, right, bottom)).resize((cols * side, rows * side))
    scale, draw = side / anyres.tile_size, ImageDraw.Draw(shown)
    for col in range(1, cols):
        draw.line((col * side, 0, col * side, rows * side), TILE_BORDER, 2)
    for row in range(1, rows):
        draw.line((0, row * side, cols * side, row * side), TILE_BORDER, 2)
    if map_rows and map_cols:
        draw.rectangle([round(v * scale) for v in (left, top, right, bottom)], outline=KEPT_BORDER, width=2)
    tokens = map_rows * (map_cols + 1)
    return shown, f"{rows} x {cols} tiles, unpadded\n{map_rows} rows x ({map_cols} + newline) = {tokens:,} tokens"


def draw_picture(picture: Image.Image, anyres: AnyRes, side: int) -> Image.Image:
    """A row of the sheet: the picture as given, its base tile, its canvas; a heading of two lines above each.

    Args:
        side: pixels of a tile on the sheet.
    """
    given = picture.convert("RGB")
    given.thumbnail((2 * side, 2 * side), Image.Resampling.LANCZOS)
    total = anyres.num_tokens(*picture.size)
    panels = [(given, f"as given\n{picture.width} x {picture.height} px, {total:,} tokens in all")]
    base = Image.fromarray(anyres.tiles(picture)[0]).resize((side, side), Image.Resampling.LANCZOS)
    panels.append((base, f"base tile\n{anyres.patches_per_tile} tokens"))
    if anyres.grid(*picture.size) != (0, 0):
        panels.append(draw_canvas(picture, anyres, side))
    font = ImageFont.load_default(FONT_SIZE)
    widths = [max(image.width, *(int(font.getlength(line)) + 1 for line in text.split("\n"))) for image, text in panels]
    height = max(image.height for image, _ in panels) + 2 * LINE_HEIGHT + GAP
    row = Image.new("RGB", (sum(widths) + GAP * (len(panels) + 1), height + GAP), "white")
    draw, x = ImageDraw.Draw(row), GAP
    for (image, text), width in zip(panels, widths, strict=True):
        draw.multiline_text((x, GAP // 2), text, "black", font, spacing=LINE_HEIGHT - FONT_SIZE)
        row.paste(image, (x, GAP + 2 * LINE_HEIGHT))
        x += width + GAP
    return row


def draw_tiles(pictures: list[Image.Image], anyres: AnyRes, side: int = 168) -> Image.Image:
    """The sheet: a row a picture."""
    rows = [draw_picture(picture, anyres, side) for picture in pictures]
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    y = 0
    for row in rows:
        sheet.paste(row, (0, y))
        y += row.height
    return sheet


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pictures", nargs="+", type=local_path)
    parser.add_argument("--out", type=drawing_path, required=True, help="PNG or WebP file")
    add_geometry_arguments(parser)
    options = parser.parse_args(arguments)
    pictures = []
    try:
        anyres = geometry(options)
        for path in options.pictures:
            try:
                pictures.append(open_picture(path))
            except BadSample as error:
                raise ValueError(f"{path}: {error}") from None
        sheet = draw_tiles(pictures, anyres)
    except (ValueError, OSError) as error:
        sys.exit(f"show_tiles: {error}")
    with written_aside(options.out) as temporary:
        sheet.save(temporary, options.out.suffix[1:].upper(), quality=85)
    for path, picture in zip(options.pictures, pictures, strict=True):
        print(f"{path}: {anyres.num_tiles(*picture.size)} tiles, {anyres.num_tokens(*picture.size):,} tokens")
    print(f"{options.out}, {options.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
