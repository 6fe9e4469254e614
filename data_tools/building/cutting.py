"""Pictures of records as strips of tiles, for the geometry that the command line asks for."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from llava_next.anyres import HF_336, ORIGINAL_336, ORIGINAL_384, AnyRes
from llava_next.data.format.records import has_text_image_token
from llava_next.data.format.shards import encode_strip
from llava_next.data.format.tar import BadSample
from llava_next.data.inputs.samples import SampleMaker
from llava_next.paths import local_path

TOWERS = {"clip-336": AnyRes(336, 14, ORIGINAL_336), "siglip-384": AnyRes(384, 14, ORIGINAL_384)}
PINPOINTS = {"original": None, "hf": HF_336}  # None: the tower's own


@dataclass(frozen=True)
class Cutter(SampleMaker):
    """How records become samples, pictures as strips.

    Args:
        codec, quality: of the strips.
    """

    codec: str = "auto"
    quality: int = 95

    reads_pixels = True

    def strip_data(self, image: Image.Image) -> tuple[str, bytes]:
        """Extension and bytes of the picture's strip. Raises ValueError."""
        return encode_strip(self.anyres.tiles(image), self.codec, self.quality)


def check_images(conversations: list, n_images: int) -> None:
    """Refuses a sample without pictures whose question has `<image>`. Raises BadSample."""
    if not n_images and has_text_image_token(conversations):
        raise BadSample(
            "a question has <image>, and the sample has no picture; if the characters are meant, give "
            "--allow_text_image_token"
        )


def add_geometry_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `geometry` reads."""
    add = parser.add_argument
    add("--model", type=local_path, help="cut tiles for this LLaVA-NeXT model folder")
    add("--tower", choices=TOWERS, help="instead of --model: vision tower to cut tiles for")
    add("--tile_size", type=int, help="instead of --tower: side of a tile in pixels")
    add("--patch_size", type=int, help="instead of --tower: side of a patch in pixels")
    add("--pinpoints", help="original (default), hf, or canvases as HEIGHTxWIDTH,HEIGHTxWIDTH,... in pixels")
    add(
        "--square", action="store_true", help="one tile from a picture's middle, for a stage 1 with data.images: square"
    )


def geometry(options: argparse.Namespace) -> AnyRes:
    """The tiles' geometry from --model, --tower, or --tile_size, --patch_size and --pinpoints. Raises ValueError."""
    found = _tiled_geometry(options)
    return AnyRes(found.tile_size, found.patch_size, (), square=True) if options.square else found


def _tiled_geometry(options: argparse.Namespace) -> AnyRes:
    if options.model is not None:
        return model_geometry(options.model)
    named = TOWERS.get(options.tower)
    if named is None and None in (options.tile_size, options.patch_size, options.pinpoints):
        raise ValueError("give --model or --tower, or all of --tile_size, --patch_size and --pinpoints")
    pinpoints = PINPOINTS.get(options.pinpoints or "original", options.pinpoints)
    if isinstance(pinpoints, str):
        try:
            pinpoints = [(int(height), int(width)) for height, width in (p.split("x") for p in pinpoints.split(","))]
        except ValueError:
            raise ValueError(f"--pinpoints {pinpoints}: expected HEIGHTxWIDTH,HEIGHTxWIDTH,... in pixels") from None
    tile_size = options.tile_size or named.tile_size
    return AnyRes(tile_size, options.patch_size or named.patch_size, pinpoints or named.pinpoints)


def model_geometry(folder: Path) -> AnyRes:
    """The geometry that a LLaVA-NeXT model folder's config.json asks for. Raises ValueError when it holds none."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        vision = config["vision_config"]
        return AnyRes(vision["image_size"], vision["patch_size"], config["image_grid_pinpoints"])
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"--model {folder}: no LLaVA-NeXT config.json there ({type(error).__name__}: {error})"
        ) from None
