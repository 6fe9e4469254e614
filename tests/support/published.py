"""The published pairings at their true sizes, and samples with the lengths of mix665K."""

import json

import numpy as np
from transformers import LlavaNextConfig

from llava_next.anyres import ORIGINAL_336, AnyRes
from llava_next.data.plan.profile import FOLDER
from llava_next.model.folders.dry import LLMS, architecture
from llava_next.training.recipe.optim import Rates

PROFILE = json.loads((FOLDER / "mix665k.json").read_text())
CLIP, SIGLIP = "openai/clip-vit-large-patch14-336", "google/siglip-so400m-patch14-384"
VICUNA, LLAMA3, QWEN2, MISTRAL = LLMS
STAGE_1 = Rates(llm=None, projector=1e-3, vision=None, newline=1e-3)


def profile_samples(count: int, seed: int, max_length: int = 4096) -> tuple[np.ndarray, np.ndarray]:
    """Lengths in tokens and tiles of `count` samples drawn from the profile of mix665K, for CLIP-336: int64 [count]."""
    rng, anyres = np.random.default_rng(seed), AnyRes(336, 14, ORIGINAL_336)
    sources = PROFILE["sources"]
    shares = np.array([source["samples"] for source in sources], float)
    which = rng.choice(len(sources), count, p=shares / shares.sum())
    lengths, tiles = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for number, source in enumerate(sources):
        rows = np.flatnonzero(which == number)
        sigma = source["text_tokens"]["sigma"]
        text = rng.lognormal(np.log(source["text_tokens"]["mean"]) - sigma**2 / 2, sigma, len(rows))
        lengths[rows] = np.clip(text, 16, 3800)
        if source["sizes"]:
            sizes = np.array([size for size, _ in source["sizes"]])
            weights = np.array([weight for _, weight in source["sizes"]])
            width, height = sizes[rng.choice(len(sizes), len(rows), p=weights / weights.sum())].T
            lengths[rows] += anyres.num_tokens_many(width, height)
            grid_rows, grid_cols = anyres.grid_many(width, height)
            tiles[rows] = 1 + grid_rows * grid_cols
    return np.minimum(lengths, max_length), tiles


def full_config(llm: str, tower: str = CLIP) -> LlavaNextConfig:
    """A published pairing at its true size."""
    return LlavaNextConfig(
        vision_config=architecture(tower).to_dict(),
        text_config=architecture(llm).to_dict(),
        vision_feature_select_strategy="default" if tower == CLIP else "full",
    )
