"""AnyRes against the original LLaVA-NeXT code (golden data) and against stock transformers."""

import ast
import hashlib
import json
import pickle
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, SiglipVisionConfig
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from llava_next.anyres import HF_336, MAX_SIDE, ORIGINAL_336, ORIGINAL_384, AnyRes, resize_bicubic, to_rgb

GOLDENS = json.loads((Path(__file__).parent / "data" / "anyres.json").read_text())
BLOCKS = {"clip336": AnyRes(336, 14, ORIGINAL_336), "siglip384": AnyRes(384, 14, ORIGINAL_384)}
CASES = [
    pytest.param(case, block, id=f"{block}-{case['width']}x{case['height']}")
    for case in GOLDENS["cases"]
    for block in BLOCKS
]
GEOMETRIES = {**BLOCKS, "clip336_hf": AnyRes(336, 14, HF_336)}

# Log-uniform sides reach strips such as 3 x 40000; the plain range is where the canvases compete.
SIDES = st.one_of(st.integers(1, 1500), st.floats(0, 17).map(lambda exponent: int(2**exponent)))
EDGE_SIZES = [(1, 1), (5000, 50), (50, 5000), (131072, 1), (1, 131072), (535, 1071), (1071, 535), (49, 49), (88, 99)]


def sizes_strategy(max_examples):
    """Decorates a test of (width, height): the edge sizes, then `max_examples` reproducible ones."""

    def decorate(test):
        test = given(width=SIDES, height=SIDES)(test)
        for width, height in EDGE_SIZES:
            test = example(width=width, height=height)(test)
        return settings(max_examples=max_examples, derandomize=True, deadline=None, database=None)(test)

    return decorate


# ---------------------------------------------------------------- golden data of the original code


def formula_image(width, height):
    x, y, channel = np.arange(width)[None, :, None], np.arange(height)[:, None, None], np.arange(3)
    return Image.fromarray(((3 * x + 5 * y + 41 * channel + (x * y) // 7) % 256).astype(np.uint8))


def unpad_differs(case, block):
    return "unpad_hf_differs" in case[block]["float_sensitive"]


@pytest.mark.parametrize(("case", "block"), CASES)
def test_tiles_have_the_originals_bytes(case, block):
    image = formula_image(case["width"], case["height"])
    assert hashlib.sha256(image.tobytes()).hexdigest() == case["image_sha256"]
    tiles = BLOCKS[block].tiles(image)
    side = BLOCKS[block].tile_size
    assert tiles.shape == (case[block]["n_tiles"], side, side, 3) and tiles.dtype == np.uint8
    np.testing.assert_allclose(tiles.mean(axis=(1, 2, 3)), case[block]["tile_means"], atol=0.01)
    channels_first = np.ascontiguousarray(tiles.transpose(0, 3, 1, 2))
    assert hashlib.sha256(channels_first.tobytes()).hexdigest() == case[block]["tiles_sha256"]


@pytest.mark.parametrize(("case", "block"), CASES)
def test_grid_is_the_originals_best_resolution(case, block):
    anyres = BLOCKS[block]
    rows, cols = anyres.grid(case["width"], case["height"])
    assert [cols * anyres.tile_size, rows * anyres.tile_size] == case[block]["best_resolution"]
    assert anyres.num_tiles(case["width"], case["height"]) == case[block]["n_tiles"]


@pytest.mark.parametrize(("case", "block"), [p for p in CASES if not unpad_differs(*p.values)])
def test_feature_order_is_the_originals(case, block):
    anyres, expected = BLOCKS[block], case[block]
    index = anyres.feature_index(case["width"], case["height"])
    assert anyres.num_tokens(case["width"], case["height"]) == len(index) == expected["n_image_tokens"]
    assert (index == 0).sum() == expected["n_newline"]
    order = (index - 1).astype("<i4")  # the golden order counts features from 0 and writes a newline as -1
    assert hashlib.sha256(order.tobytes()).hexdigest() == expected["merge_order_sha256"]
    if "merge_order_rle" in expected:
        runs = [np.arange(start, start + n) if start >= 0 else [-1] * n for start, n in expected["merge_order_rle"]]
        np.testing.assert_array_equal(order, np.concatenate(runs))


def test_unpad_rounds_as_transformers_where_the_original_does_not():
    differing = [p.values for p in CASES if unpad_differs(*p.values)]
    assert len(differing) >= 2
    for case, block in differing:
        width, height = case["width"], case["height"]
        index = BLOCKS[block].feature_index(width, height)
        np.testing.assert_array_equal(index, packed_by_transformers(block, width, height))
        assert BLOCKS[block].num_tokens(width, height) == len(index) != case[block]["n_image_tokens"]


def test_published_token_counts():
    clip, siglip = BLOCKS["clip336"], BLOCKS["siglip384"]
    assert clip.num_tokens(640, 480) == 2340
    assert clip.num_tokens(672, 672) == 2928
    assert siglip.num_tokens(768, 768) == 3699
    assert siglip.patches_per_side == 27  # 384 / 14 leaves 6 pixels unused


def test_transposed_list_decides_between_the_two_tile_grids():
    assert AnyRes(336, 14, ORIGINAL_336).grid(300, 200) == (2, 1)
    assert AnyRes(336, 14, HF_336).grid(300, 200) == (1, 2)
    assert sorted(ORIGINAL_336) == sorted(HF_336) == sorted((width, height) for height, width in HF_336)


# ---------------------------------------------------------------- stock transformers


@cache
def stock_model(name):
    """A LlavaNextModel with one-dimensional everything; only its config matters to pack_image_features."""
    anyres = GEOMETRIES[name]
    vision_class = SiglipVisionConfig if name.startswith("siglip") else CLIPVisionConfig
    tiny = {"hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1, "num_hidden_layers": 1}
    config = LlavaNextConfig(
        vision_config=vision_class(image_size=anyres.tile_size, patch_size=anyres.patch_size, **tiny),
        text_config=LlamaConfig(vocab_size=8, num_key_value_heads=1, **tiny),
        image_grid_pinpoints=[list(pinpoint) for pinpoint in anyres.pinpoints],
    )
    return LlavaNextModel(config)


def packed_by_transformers(name, width, height):
    """pack_image_features on features that are their own index: 1 + tile * patches + patch, newline 0."""
    anyres, model = GEOMETRIES[name], stock_model(name)
    n, patches = anyres.num_tiles(width, height), anyres.patches_per_tile
    features = torch.arange(1, 1 + n * patches, dtype=torch.float64).reshape(n, patches, 1)
    strategy = "full" if name.startswith("siglip") else "default"
    newline = torch.zeros(1, dtype=torch.float64)
    packed, lengths = model.pack_image_features([features], torch.tensor([[height, width]]), strategy, newline)
    assert lengths.tolist() == [len(packed[0])]
    return packed[0][:, 0].to(torch.int64).numpy()


class PlaceholderCounter(LlavaNextProcessor):
    """The stock processor's arithmetic without its tokenizer."""

    def __init__(self, anyres):
        self.patch_size, self.num_additional_image_tokens = anyres.patch_size, 0
        self.image_processor = SimpleNamespace(image_grid_pinpoints=[list(pair) for pair in anyres.pinpoints])


@pytest.mark.parametrize("name", GEOMETRIES)
@sizes_strategy(max_examples=400)
def test_grid_and_token_count_are_the_stock_processors(name, width, height):
    anyres = GEOMETRIES[name]
    rows, cols = anyres.grid(width, height)
    side, pinpoints = anyres.tile_size, [list(pair) for pair in anyres.pinpoints]
    assert (rows * side, cols * side) == tuple(select_best_resolution([height, width], pinpoints))
    placeholders = PlaceholderCounter(anyres)._get_number_of_features(height, width, side, side)
    assert anyres.num_tokens(width, height) == placeholders


@pytest.mark.parametrize("name", GEOMETRIES)
@sizes_strategy(max_examples=300)
def test_feature_index_is_the_stock_models_packing(name, width, height):
    index = GEOMETRIES[name].feature_index(width, height)
    assert index.dtype == np.int64 and len(index) == GEOMETRIES[name].num_tokens(width, height)
    np.testing.assert_array_equal(index, packed_by_transformers(name, width, height))


def one_call_resize_has_our_order(image, anyres):
    """Whether this Pillow's own resize gives the two-pass bytes, for the base tile and for the canvas.

    Resizing is the only step in which the stock processor and `AnyRes.tiles` make different Pillow calls.
    """
    rows, cols = anyres.grid(*image.size)
    canvas = (rows * anyres.tile_size, cols * anyres.tile_size)
    height, width = get_patch_output_size(np.asarray(image), canvas, ChannelDimension.LAST)
    sizes = [(anyres.tile_size, anyres.tile_size), (width, height)]
    return all(image.resize(size, Image.Resampling.BICUBIC) == resize_bicubic(image, *size) for size in sizes)


def test_tiles_are_the_stock_pil_processors_where_pillow_resizes_in_the_same_order():
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (3, 400), (400, 3), (336, 336), (640, 480), (480, 640), (2000, 100), (100, 1200)]
    sizes += [tuple(int(side) for side in 2 ** rng.uniform(0, 10, 2)) for _ in range(40)]
    anyres, compared = AnyRes(336, 14, HF_336), 0
    square = {"height": 336, "width": 336}
    processor = LlavaNextImageProcessorPil(
        size=square,
        crop_size=square,
        image_grid_pinpoints=[list(pinpoint) for pinpoint in HF_336],
        do_rescale=False,
        do_normalize=False,
        do_pad=False,
    )
    for width, height in sizes:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        if not one_call_resize_has_our_order(image, anyres):
            continue
        stock = np.asarray(processor(images=image)["pixel_values"][0])
        np.testing.assert_array_equal(anyres.tiles(image), stock.transpose(0, 2, 3, 1))
        compared += 1
    assert compared >= len(sizes) // 2  # Pillow 13 differs for many tall pictures, older ones for none


# ---------------------------------------------------------------- contract


def test_many_pictures_give_what_one_by_one_gives():
    rng = np.random.default_rng(0)
    widths, heights = rng.integers(1, 3000, (2, 300))
    for anyres in GEOMETRIES.values():
        rows, cols = anyres.grid_many(widths, heights)
        pairs = list(zip(widths.tolist(), heights.tolist(), strict=True))
        assert list(zip(rows.tolist(), cols.tolist(), strict=True)) == [anyres.grid(*pair) for pair in pairs]
        assert anyres.num_tokens_many(widths, heights).tolist() == [anyres.num_tokens(*pair) for pair in pairs]
    assert BLOCKS["clip336"].num_tokens_many([], []).shape == (0,)


def test_sequence_is_the_base_tile_then_rows_that_end_in_a_newline():
    anyres = AnyRes(32, 8, ((32, 64), (64, 32), (64, 64), (32, 96), (96, 32)))
    index = anyres.feature_index(96, 32)
    assert index[:16].tolist() == list(range(1, 17))
    rows = index[16:].reshape(4, 13)
    assert (rows[:, -1] == 0).all()
    assert rows[1, :12].tolist() == [21, 22, 23, 24, 37, 38, 39, 40, 53, 54, 55, 56]  # second patch row of three tiles
    rows = rows[:, :-1] - 1
    assert len(set(rows.ravel())) == 48 and rows.min() == 16 and rows.max() == 63


def test_without_pinpoints_a_picture_is_its_base_tile_and_one_newline():
    anyres = AnyRes(32, 8, [])
    assert anyres.grid(50, 20) == (0, 0)
    assert anyres.num_tiles(50, 20) == 1
    assert anyres.num_tokens(50, 20) == 17
    assert anyres.num_tokens_many([50, 1], [20, 999]).tolist() == [17, 17]
    assert anyres.feature_index(50, 20).tolist() == [*range(1, 17), 0]
    image = formula_image(50, 20)
    np.testing.assert_array_equal(anyres.tiles(image), np.asarray(resize_bicubic(image, 32, 32))[None])


def test_thin_pictures_lose_their_rows_or_their_columns():
    clip, siglip = BLOCKS["clip336"], BLOCKS["siglip384"]
    assert (clip.feature_index(5000, 50) == 0).sum() == 0 and clip.num_tokens(5000, 50) == 576
    assert clip.feature_index(50, 5000)[576:].tolist() == [0] * 72
    assert (siglip.feature_index(5000, 50) == 0).sum() == 1  # 27 is odd: padding in equal halves leaves one row


def test_padding_is_black_and_centred():
    tiles = AnyRes(32, 8, ((32, 64),)).tiles(Image.new("RGB", (64, 16), (255, 255, 255)))
    assert tiles.shape == (3, 32, 32, 3)
    assert (tiles[0] == 255).all()  # the base tile is never padded
    assert (tiles[1:, :8] == 0).all() and (tiles[1:, 8:24] == 255).all() and (tiles[1:, 24:] == 0).all()


def test_tiles_are_writable_and_own_their_memory():
    for anyres in (AnyRes(32, 8, ()), AnyRes(32, 8, ((32, 64),))):
        tiles = anyres.tiles(formula_image(40, 30))
        assert tiles.flags.writeable and tiles.flags.c_contiguous and tiles.base is None


def test_is_hashable_comparable_and_picklable():
    one, same = AnyRes(336, 14, HF_336), AnyRes(336, 14, [list(pinpoint) for pinpoint in HF_336])
    assert one == same and hash(one) == hash(same) and one != AnyRes(336, 14, ORIGINAL_336)
    assert pickle.loads(pickle.dumps(one)) == one
    with pytest.raises(AttributeError):
        one.tile_size = 384


def test_returns_python_ints():
    values = [
        *BLOCKS["clip336"].grid(640, 480),
        BLOCKS["clip336"].num_tokens(640, 480),
        AnyRes(32, 8, ()).num_tokens(9, 9),
    ]
    assert [type(value) for value in values] == [int] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 14, ()), "tile_size is 0; it must be positive"),
        ((336, -14, ()), "patch_size is -14; it must be positive"),
        ((336.0, 14, ()), "tile_size is 336.0; it must be a whole number"),
        ((8, 14, ()), "patch_size 14 is larger than tile_size 8"),
        ((336, 14, ((336, 700),)), r"\(336, 700\) is not a multiple of tile_size 336"),
        ((384, 14, HF_336), r"\(336, 672\) is not a multiple of tile_size 384"),
        ((336, 14, ((336, 0),)), "width of pinpoint .* is 0; it must be positive"),
        ((336, 14, ((-336, 336),)), "height of pinpoint .* is -336; it must be positive"),
        ((336, 14, ((336, 336, 336),)), "is not a \\(height, width\\) pair"),
        ((336, 14, (336, 672)), "pinpoint 336 is not a \\(height, width\\) pair"),
        ((336, 14, ((336, "672"),)), "must be a whole number"),
    ],
)
def test_bad_geometry_is_refused_with_its_reason(arguments, message):
    with pytest.raises(ValueError, match=message):
        AnyRes(*arguments)


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (0, 480, "image width is 0; it must be 1 to"),
        (640, -1, "image height is -1"),
        (640, MAX_SIDE + 1, f"image height is {MAX_SIDE + 1}"),
        (640.5, 480, "image width must be a whole number"),
    ],
)
def test_bad_image_sizes_are_refused_with_their_value(width, height, message):
    anyres = BLOCKS["clip336"]
    for function in (anyres.grid, anyres.num_tiles, anyres.num_tokens, anyres.feature_index):
        with pytest.raises(ValueError, match=message):
            function(width, height)


def test_bad_size_among_many_is_named_by_position():
    with pytest.raises(ValueError, match="image height is 0 at position 2"):
        BLOCKS["clip336"].num_tokens_many([1, 2, 3], [5, 5, 0])
    with pytest.raises(ValueError, match="must have the same shape"):
        BLOCKS["clip336"].grid_many([1, 2, 3], [5])


# ---------------------------------------------------------------- colour modes


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "F"])
def test_to_rgb_is_pillows_plain_conversion(mode):
    image = formula_image(23, 17).convert("P").convert(mode) if mode == "PA" else formula_image(23, 17).convert(mode)
    assert image.mode == mode
    converted = to_rgb(image)
    assert converted.mode == "RGB" and converted.tobytes() == image.convert("RGB").tobytes()


def test_to_rgb_drops_transparency_and_keeps_the_colour_under_it():
    image = Image.new("RGBA", (4, 4), (200, 100, 50, 0))
    assert (np.asarray(to_rgb(image)) == [200, 100, 50]).all()


@pytest.mark.parametrize(("mode", "dtype"), [("I;16", "<u2"), ("I;16B", ">u2"), ("I", "<i4")])
def test_to_rgb_keeps_the_upper_byte_of_16_bit_grey(mode, dtype):
    values = np.arange(0, 65536, 257).reshape(16, 16)  # 0x0000, 0x0101, ..., 0xffff
    image = Image.frombytes(mode, (16, 16), values.astype(dtype).tobytes())
    grey = np.asarray(to_rgb(image))
    assert (grey == np.arange(256).reshape(16, 16, 1)).all() and grey.shape == (16, 16, 3)


def test_to_rgb_ignores_exif_orientation():
    image = formula_image(20, 10)
    image.getexif()[0x0112] = 6
    assert to_rgb(image).size == (20, 10)


def test_tiles_convert_other_modes():
    grey = formula_image(40, 30).convert("L")
    anyres = AnyRes(32, 8, ((32, 64),))
    np.testing.assert_array_equal(anyres.tiles(grey), anyres.tiles(grey.convert("RGB")))


def test_geometry_imports_neither_torch_nor_transformers():
    tree = ast.parse(Path(AnyRes.tiles.__code__.co_filename).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {"numpy", "einops", "PIL"} <= imported
    assert imported <= {"numpy", "einops", "PIL", "math", "operator", "dataclasses", "functools"}


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (336, 336), (50, 37), (1000, 101), (337, 500)])
def test_square_is_the_middle_as_clips_own_processor_cuts_it(size):
    """Resize of the shorter side, then the crop: within one grey level of stock transformers (the order of passes)."""
    from transformers import CLIPImageProcessorPil

    square = AnyRes(336, 14, (), square=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
    stock = CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, do_rescale=False, do_normalize=False
    )
    expected = np.asarray(stock(picture, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)
    tiles = square.tiles(picture)
    assert tiles.shape == (1, 336, 336, 3)
    assert np.abs(tiles[0].astype(int) - expected).max() <= 1
    assert square.num_tokens(*size) == 576 == len(square.feature_index(*size)) and square.num_tiles(*size) == 1
    assert square.feature_index(*size).tolist() == list(range(1, 577))  # no newline
    assert square.num_tokens_many([size[0]] * 2, [size[1]] * 2).tolist() == [576, 576]


def test_square_takes_no_pinpoints_and_no_hair_thin_picture():
    with pytest.raises(ValueError, match="leave pinpoints empty"):
        AnyRes(336, 14, ORIGINAL_336, square=True)
    with pytest.raises(ValueError, match="4000 x 20 px is too thin"):
        AnyRes(336, 14, (), square=True).tiles(Image.new("RGB", (4000, 20)))
