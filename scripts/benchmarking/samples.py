"""Encoded samples as long and as large as a data set's, with random words and pixels, and the models they are for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LlavaNextConfig

from llava_next.anyres import ORIGINAL_336, ORIGINAL_384
from llava_next.data.loading.batch import IGNORE, Example, PackedBatch, pack
from llava_next.data.plan.dealing import deal
from llava_next.model.folders.dry import architecture, scaled
from llava_next.training.forecast.flops import cost_model
from llava_next.training.recipe.optim import Rates
from support.published import CLIP, LLAMA3, MISTRAL, PROFILE, QWEN2, SIGLIP, STAGE_1, VICUNA
from support.tiny import geometry

LLMS = {"vicuna-7b": VICUNA, "llama3-8b": LLAMA3, "qwen2-7b": QWEN2, "mistral-7b": MISTRAL}
TOWERS = {"clip-336": (CLIP, ORIGINAL_336), "siglip-384": (SIGLIP, ORIGINAL_384)}
SUPERVISED_SHARE = 0.4  # of the text tokens; an assumption, answers against questions and system prompt
PADDED_BATCH = 4  # samples of a batch of the stock way
CAPTION_TOKENS, CAPTION_SIGMA = 20, 0.4  # of stage 1's captions; an assumption
Samples = Sequence[tuple[Example, list[tuple[int, int]]]]  # encoded samples, and the (width, height) of their pictures


@dataclass(frozen=True)
class Stage:
    """A stage of the recipe: rates, samples of a step and of its published data set."""

    rates: Rates
    batch_size: int
    samples: int


STAGES = {1: Stage(STAGE_1, 256, 558_128), 2: Stage(Rates(), 128, 665_298)}


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
        vision_feature_select_strategy="default" if name == CLIP else "full",
        tie_word_embeddings=False,
    )


def profile_sizes(count: int, seed: int, stage: int = 2, shortened: int = 1) -> list[tuple[int, list[tuple[int, int]]]]:
    """(text tokens, sizes of its pictures: one or none) of samples drawn from mix665K's profile.

    Args:
        stage: in stage 1 every sample has a picture and a caption for text.
        shortened: texts are divided by this, for machines where whole ones take too long.
    """
    rng, found = np.random.default_rng(seed), []
    sources = [source for source in PROFILE["sources"] if source["sizes"] or stage == 2]
    shares = np.array([source["samples"] for source in sources], float)
    for _ in range(count):
        source, pictures = sources[rng.choice(len(sources), p=shares / shares.sum())], []
        if source["sizes"]:
            sizes, weights = zip(*source["sizes"], strict=True)
            pictures = [tuple(sizes[rng.choice(len(sizes), p=np.array(weights) / sum(weights))])]
        mean, sigma = source["text_tokens"]["mean"], source["text_tokens"]["sigma"]
        if stage == 1:
            mean, sigma = CAPTION_TOKENS, CAPTION_SIGMA
        tokens = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma) / shortened
        found.append((int(np.clip(tokens, 16, 3800)), pictures))
    return found


def profile_samples(count: int, config: LlavaNextConfig, seed: int, stage: int = 2, shortened: int = 1) -> Samples:
    """Encoded samples with random words and pixels, see `profile_sizes`: the last words supervised."""
    rng, anyres, found = np.random.default_rng((seed, 1)), geometry(config), []
    for slot, (text, pictures) in enumerate(profile_sizes(count, seed, stage, shortened)):
        index = anyres.feature_index(*pictures[0]) if pictures else np.zeros(0, np.int64)
        words = rng.integers(0, config.text_config.vocab_size - 1, text)
        ids = np.concatenate([words[:8], np.full(len(index), config.image_token_id), words[8:]])
        labels = np.where(np.arange(len(ids)) >= len(ids) - int(SUPERVISED_SHARE * text), ids, IGNORE)
        shape = (sum(anyres.num_tiles(*size) for size in pictures), *(anyres.tile_size,) * 2, 3)
        positions = np.flatnonzero(ids == config.image_token_id)
        tiles = rng.integers(0, 256, shape, np.uint8)
        found.append((Example(slot, slot, 0, ids, labels, tiles, index, positions), pictures))
    return found


def packed_step(
    samples: Samples,
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
    where = (anyres.tile_size, anyres.patches_per_tile)
    return [
        pack([examples[i] for i in members], *where, step=step, micro=micro, num_micro=len(bins))
        for micro, (members,) in enumerate(bins)
    ]


def supervised(samples: Samples) -> torch.Tensor:
    """Supervised tokens by slot, float64, as `slot_weights` takes them."""
    return torch.tensor([(e.labels[1:] != IGNORE).sum() for e, _ in samples], dtype=torch.float64)
