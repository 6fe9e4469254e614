"""From a record of an input to a sample as it is stored: text checked by training's rules, pictures as strips."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from llava_next.anyres import HF_336, ORIGINAL_336, ORIGINAL_384, AnyRes
from llava_next.data.format.picture_forms import Picture, picture_file
from llava_next.data.format.pictures import open_picture
from llava_next.data.format.records import (
    has_text_image_token,
    prepend_system,
    read_record,
    source_name,
    without_system,
)
from llava_next.data.format.shards import RawSample, StripInfo, encode_strip
from llava_next.data.format.tar import BadSample
from llava_next.paths import local_path
from llava_next.templates import TEMPLATES, get_template
from llava_next.turns import place_images, read_system, read_turns

TOWERS = {"clip-336": AnyRes(336, 14, ORIGINAL_336), "siglip-384": AnyRes(384, 14, ORIGINAL_384)}
PINPOINTS = {"original": None, "hf": HF_336}  # None: the tower's own
SYSTEM_CHOICES = {"keep": lambda turns: turns, "drop": without_system, "prepend": prepend_system}


@dataclass(frozen=True)
class Cutter:
    """How records become samples.

    Args:
        root: folder that image paths are relative to; None: all pictures are embedded.
        anyres: geometry of the tiles; codec, quality: of the strips.
        source: name for the part of the mixture; None: each record's own, see `records.source_name`.
        system: what becomes of a sample's own system prompt, one of `SYSTEM_CHOICES`.
        template: chat template of the training, where it is known; None: any.
        allow_text_image_token: take `<image>` in a sample without pictures as characters.
    """

    root: Path | None
    anyres: AnyRes
    codec: str = "auto"
    quality: int = 95
    source: str | None = None
    system: str = "keep"
    template: str | None = None
    allow_text_image_token: bool = False

    def make_sample(self, row: int, record: dict) -> RawSample:
        """The record in row `row` of the input. Raises BadSample."""
        found = read_record(record, allow_text_image_token=self.allow_text_image_token)
        turns = SYSTEM_CHOICES[self.system](found.conversations)
        check_text(turns, len(found.pictures))
        check_system(turns, self.template)
        images = [self.cut_picture(picture) for picture in found.pictures]
        name = str(row) if found.id is None else found.id
        return RawSample(f"{row:09d}", name, self.source or source_name(record, self.root), turns, images)

    def cut_picture(self, name: str | Picture) -> StripInfo:
        """One picture as a strip of tiles. Raises BadSample."""
        image = open_picture(name.data if isinstance(name, Picture) else picture_file(name, self.root))
        try:
            rows, cols = self.anyres.grid(*image.size)
            ext, data = encode_strip(self.anyres.tiles(image), self.codec, self.quality)
        except ValueError as error:
            raise BadSample(str(error)) from error
        return StripInfo(*image.size, rows, cols, ext, data)


def check_text(conversations: list, n_images: int) -> None:
    """Applies the rules of training; what they make of the text is not stored. Raises BadSample."""
    try:
        place_images(read_turns(conversations), n_images)
    except ValueError as error:
        raise BadSample(str(error)) from error


def check_system(conversations: list, template: str | None) -> None:
    """Refuses a sample's own system prompt where the chat template has no place for one. Raises BadSample."""
    if template is not None:
        try:
            get_template(template).check_system(read_system(conversations))
        except ValueError as error:
            raise BadSample(str(error)) from error


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


def model_template(folder: Path) -> str | None:
    """The chat template of this project that is saved in a model folder; None: another, or none."""
    try:
        saved = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except OSError:
        return None
    return next((name for name, template in TEMPLATES.items() if template.jinja == saved), None)
