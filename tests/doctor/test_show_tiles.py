"""The sheet of tiles: what it draws and says is what `anyres` computes."""

import numpy as np
import pytest
from PIL import Image

import show_tiles
from llava_next.anyres import ORIGINAL_336, AnyRes

CLIP = AnyRes(336, 14, ORIGINAL_336)


def test_padding_is_dimmed_and_the_picture_keeps_its_pixels():
    """600 x 400 on 672 x 672: 32 of 48 rows of patches stay, 8 go above and 8 below."""
    picture = Image.new("RGB", (600, 400), (200, 40, 20))
    shown, words = show_tiles.draw_canvas(picture, CLIP, 336)
    pixels = np.asarray(shown)
    assert pixels.shape == (672, 672, 3)
    assert words == "2 x 2 tiles, unpadded\n32 rows x (48 + newline) = 1,568 tokens"
    assert pixels[150, 100].tolist() == pixels[500, 600].tolist() == [200, 40, 20]
    assert {tuple(pixels[y, 100].tolist()) for y in (5, 60, 620, 667)} == {(112, 112, 112)}


def test_a_sheet_is_written_whole_with_a_row_a_picture(tmp_path, capsys):
    for name, size in (("wide", (640, 480)), ("tall", (50, 5000))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    out = tmp_path / "tiles.webp"
    show_tiles.main([str(tmp_path / "wide.png"), str(tmp_path / "tall.png"), "--tower", "clip-336", "--out", str(out)])
    assert "wide.png: 5 tiles, 2,340 tokens" in capsys.readouterr().out
    with Image.open(out) as sheet:
        assert sheet.format == "WEBP" and sheet.height > 4 * 168
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tall.png", "tiles.webp", "wide.png"]


def test_a_square_picture_has_a_base_tile_and_no_canvas():
    square = show_tiles.draw_picture(Image.new("RGB", (640, 480)), AnyRes(336, 14, (), square=True), 168)
    assert square.width < show_tiles.draw_picture(Image.new("RGB", (640, 480)), CLIP, 168).width


def test_what_cannot_be_drawn_is_named(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(SystemExit, match=r"a.png: .*not a picture"):
        show_tiles.main([str(tmp_path / "a.png"), "--tower", "clip-336", "--out", str(tmp_path / "o.png")])
    assert not (tmp_path / "o.png").exists()
