"""Encoded samples as long and as large as a data set's, with random words and pixels, and the models they are for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LlavaNextConfig

from benchmarking.cards import ROOT
from llava_next.anyres import ORIGINAL_336, ORIGINAL_384, AnyRes
from llava_next.data.loading.batch import IGNORE, Example, PackedBatch, pack
from llava_next.data.plan.dealing import deal
from llava_next.model.folders.dry import architecture, scaled
from llava_next.training.forecast.flops import cost_model
from llava_next.training.recipe.optim import Rates

PROFILE = ROOT / "tests" / "data" / "mix665k_profile.json"
LLMS = {
    "vicuna-7b": "lmsys/vicuna-7b-v1.5",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "qwen2-7b": "Qwen/Qwen2-7B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.2",
}
TOWERS = {
    "clip-336": ("openai/clip-vit-large-patch14-336", ORIGINAL_336),
    "siglip-384": ("google/siglip-so400m-patch14-384", ORIGINAL_384),
}
SUPERVISED_SHARE = 0.4  # of the text tokens; an assumption, answers against questions and system prompt
CAPTION_TOKENS, CAPTION_SIGMA = 20, 0.4  # of stage 1's captions; an assumption


@dataclass(frozen=True)
class Stage:
    """A stage of the recipe: rates, and samples of a step."""

    rates: Rates
    batch_size: int
    samples: int  # of its published data set


STAGES = {
    1: Stage(Rates(llm=None, projector=1e-3, vision=None, newline=1e-3), 256, 558_128),
    2: Stage(Rates(), 128, 665_298),
}


def model_config(model: str, tower: str, scale: str = "full", depth: int | None = None) -> LlavaNextConfig:
    """A pairing's config at a scale; `depth` cuts the language model to so many layers."""
    name, pinpoints = TOWERS[tower]
    vision, text = scaled(architecture(name), scale), scaled(architecture(LLMS[model]), scale)
    values = text.to_dict()
    if depth is not None:
        values["num_hidden_layers"] = depth
        values.pop("layer_types", None)  # derived from the number of layers
    return LlavaNextConfig(
        vision_config=vision.to_dict(),
        text_config=values,
        image_token_index=text.vocab_size - 1,
        image_grid_pinpoints=[list(p) for p in pinpoints],
        vision_feature_select_strategy="default" if vision.model_type == "clip_vision_model" else "full",
        tie_word_embeddings=False,
    )


def geometry(config: LlavaNextConfig) -> AnyRes:
    """AnyRes of a model."""
    vision = config.vision_config
    return AnyRes(vision.image_size, vision.patch_size, [tuple(p) for p in config.image_grid_pinpoints])


def profile_sizes(
    count: int, seed: int, stage: int = 2, shortened: int = 1
) -> list[tuple[int, tuple[int, int] | None]]:
    """(text tokens, (width, height) of the picture or None) of samples drawn from mix665K's profile.

    Args:
        stage: in stage 1 every sample has a picture and a caption for text.
        shortened: texts are divided by this, for machines where whole ones take too long.
    """
    rng = np.random.default_rng(seed)
    sources = json.loads(PROFILE.read_text())["sources"]
    sources = [source for source in sources if source["sizes"] or stage == 2]
    shares = np.array([source["samples"] for source in sources], float)
    found = []
    for _ in range(count):
        source = sources[rng.choice(len(sources), p=shares / shares.sum())]
        size = None
        if source["sizes"]:
            sizes, weights = zip(*source["sizes"], strict=True)
            size = tuple(sizes[rng.choice(len(sizes), p=np.array(weights) / sum(weights))])
        mean, sigma = source["text_tokens"]["mean"], source["text_tokens"]["sigma"]
        if stage == 1:
            mean, sigma = CAPTION_TOKENS, CAPTION_SIGMA
        found.append((int(np.clip(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma) / shortened, 16, 3800)), size))
    return found


def profile_samples(
    count: int, config: LlavaNextConfig, seed: int, stage: int = 2, shortened: int = 1
) -> list[tuple[Example, tuple[int, int] | None]]:
    """(encoded sample, its picture's size or None) with random words and pixels; see `profile_sizes`."""
    rng, anyres = np.random.default_rng((seed, 1)), geometry(config)
    sizes = profile_sizes(count, seed, stage, shortened)
    return [(example(rng, slot, text, size, config, anyres), size) for slot, (text, size) in enumerate(sizes)]


def example(rng: np.random.Generator, slot: int, text: int, size: tuple | None, config, anyres: AnyRes) -> Example:
    """`text` random words, the last of them supervised, around a picture of `size` in random pixels."""
    index = anyres.feature_index(*size) if size else np.zeros(0, np.int64)
    words = rng.integers(0, config.text_config.vocab_size - 1, text)
    ids = np.concatenate([words[:8], np.full(len(index), config.image_token_id), words[8:]])
    labels = np.where(np.arange(len(ids)) >= len(ids) - int(SUPERVISED_SHARE * text), ids, IGNORE)
    tiles = rng.integers(0, 256, (anyres.num_tiles(*size) if size else 0, *(anyres.tile_size,) * 2, 3), np.uint8)
    return Example(slot, slot, 0, ids, labels, tiles, index, np.flatnonzero(ids == config.image_token_id))


def packed_step(
    samples: Sequence[tuple[Example, tuple | None]],
    config: LlavaNextConfig,
    token_budget: int,
    tile_budget: int,
    rates: Rates | None = None,
    step: int = 0,
) -> list[PackedBatch]:
    """The samples as this project packs them for one rank: dealt by cost, collated."""
    examples, anyres = [example for example, _ in samples], geometry(config)
    lengths, tiles = [len(e.input_ids) for e in examples], [len(e.tiles) for e in examples]
    cost = cost_model(config, rates or Rates())
    bins = deal(lengths, tiles, world=1, token_budget=token_budget, tile_budget=tile_budget, cost=cost)
    return [
        pack(
            [examples[i] for i in members],
            *(anyres.tile_size, anyres.patches_per_tile),
            step=step,
            micro=micro,
            num_micro=len(bins),
        )
        for micro, (members,) in enumerate(bins)
    ]


def supervised(samples: Sequence[tuple[Example, tuple | None]]) -> torch.Tensor:
    """Supervised tokens by slot, float64, as `slot_weights` takes them."""
    return torch.tensor([(e.labels[1:] != IGNORE).sum() for e, _ in samples], dtype=torch.float64)
