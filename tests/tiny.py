"""Tiny models and random samples shared by the tests, and the stock transformers result to compare with."""

from __future__ import annotations

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig
from transformers import LlavaNextForConditionalGeneration as StockLlavaNext

from llava_next.anyres import AnyRes
from llava_next.data.batch import Example, PackedBatch, pack
from llava_next.model.modeling import NORMALISATION, LlavaNextForConditionalGeneration, normalise

TILE, PATCH = 28, 7
PINPOINTS = ((56, 28), (28, 56), (56, 56), (28, 84), (84, 28))
ANYRES = AnyRes(TILE, PATCH, PINPOINTS)
IMAGE_TOKEN_ID = 120
VOCABULARY = 128


def tiny_config(**text_changes) -> LlavaNextConfig:
    """CLIP of 3 layers, Llama of 2 layers with grouped-query attention."""
    text = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "initializer_range": 0.1,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": TILE,
        "patch_size": PATCH,
        "projection_dim": 32,
    }
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**vision).to_dict(),
        text_config=LlamaConfig(**{**text, **text_changes}).to_dict(),
        image_token_index=IMAGE_TOKEN_ID,
        image_grid_pinpoints=[list(p) for p in PINPOINTS],
        image_seq_length=ANYRES.patches_per_tile,
        tie_word_embeddings=False,
    )


def tiny_pair(folder, seed: int = 0) -> tuple[LlavaNextForConditionalGeneration, StockLlavaNext]:
    """Our model and the stock one with the same float32 weights, through a folder in the llava-hf layout."""
    from llava_next.model.export import save_model

    torch.manual_seed(seed)
    save_model(LlavaNextForConditionalGeneration(tiny_config()), folder, dtype=torch.float32)
    return LlavaNextForConditionalGeneration.from_pretrained(folder), StockLlavaNext.from_pretrained(folder)


def random_samples(seed: int, count: int, images=(0, 1, 2), max_text: int = 40) -> list[tuple[Example, list]]:
    """Encoded samples with random ids, pixels and masks, and the (width, height) of their images."""
    rng = np.random.default_rng(seed)
    samples = []
    for slot in range(count):
        sizes = [tuple(int(x) for x in rng.integers(1, 120, 2)) for _ in range(int(rng.choice(images)))]
        text = [rng.integers(1, IMAGE_TOKEN_ID, int(rng.integers(1, max_text))) for _ in range(len(sizes) + 1)]
        ids, index, tiles, tile_start = [text[0]], [], [], 0
        for size, words in zip(sizes, text[1:], strict=True):
            features = ANYRES.feature_index(*size)
            index.append(np.where(features > 0, features + tile_start * ANYRES.patches_per_tile, 0))
            tiles.append(rng.integers(0, 256, (ANYRES.num_tiles(*size), TILE, TILE, 3), dtype=np.uint8))
            tile_start += len(tiles[-1])
            ids += [np.full(len(features), IMAGE_TOKEN_ID), words]
        ids = np.concatenate(ids)
        labels = np.where((ids != IMAGE_TOKEN_ID) & (rng.random(len(ids)) < 0.5), ids, -100)
        example = Example(
            sample_id=slot,
            slot=slot,
            source=slot % 2,
            input_ids=ids,
            labels=labels,
            tiles=np.concatenate(tiles) if tiles else np.zeros((0, TILE, TILE, 3), np.uint8),
            feature_index=np.concatenate(index) if index else np.zeros(0, np.int64),
            image_positions=np.flatnonzero(ids == IMAGE_TOKEN_ID),
        )
        samples.append((example, sizes))
    return samples


def pack_tiny(examples: list[Example], **kwargs) -> PackedBatch:
    """`pack` with the tiny geometry."""
    return pack(examples, TILE, ANYRES.patches_per_tile, **kwargs)


def stock_logits(model: StockLlavaNext, example: Example, sizes: list[tuple[int, int]]) -> torch.Tensor:
    """Logits `[t, vocabulary]` of one sample through transformers' own forward."""
    inputs = {}
    if sizes:
        mean, std = NORMALISATION["clip_vision_model"]
        pixels = normalise(torch.from_numpy(example.tiles), mean, std)
        per_image = pixels.split([ANYRES.num_tiles(*s) for s in sizes])
        most = max(len(p) for p in per_image)
        padded = [torch.cat([p, p.new_zeros(most - len(p), *p.shape[1:])]) for p in per_image]
        inputs = {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor([(h, w) for w, h in sizes])}
    ids = torch.from_numpy(example.input_ids)[None]
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits[0]


def stock_loss(model: StockLlavaNext, samples: list[tuple[Example, list]], weights: torch.Tensor) -> torch.Tensor:
    """Weighted loss sum over samples, one stock forward each. `weights` float32 `[slots]`."""
    total = torch.zeros(())
    for example, sizes in samples:
        logits = stock_logits(model, example, sizes)
        labels = torch.from_numpy(example.labels)
        nll = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100)
        total = total + nll * weights[example.slot]
    return total


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradient of every parameter that has one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
