"""Tiny models and random samples shared by the tests, and the stock transformers result to compare with."""

from __future__ import annotations

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig
from transformers import LlavaNextForConditionalGeneration as StockLlavaNext

from llava_next.anyres import AnyRes
from llava_next.data.loading.batch import Example, PackedBatch, pack
from llava_next.model.folders.dry import architecture, scaled
from llava_next.model.forward.kinds import tower_kind
from llava_next.model.forward.lora import Lora, add_adapters, is_adapter, quantise_under
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration, normalise
from llava_next.training.recipe.optim import Rates, freeze

TILE, PATCH = 28, 7
PINPOINTS = ((56, 28), (28, 56), (56, 56), (28, 84), (84, 28))
ANYRES = AnyRes(TILE, PATCH, PINPOINTS)
IMAGE_TOKEN_ID = 120
VOCABULARY = 128
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # whose matrices are whole blocks of 4-bit values


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


def pairing_config(vision: str, llm: str, tied: bool = False, **text_changes) -> LlavaNextConfig:
    """A pairing at scale `tiny`, with 128 tokens, 512 positions and tiles of 4 x 4 patches.

    SigLIP's tiles are 30 px of 7 px patches: the last 2 px belong to no patch, as with 384 and 14.
    """
    tower, text = scaled(architecture(vision), "tiny"), scaled(architecture(llm), "tiny")
    has_cls = tower.model_type == "clip_vision_model"
    tile = TILE if has_cls else TILE + 2
    tower.image_size, tower.patch_size = tile, PATCH
    text.vocab_size, text.initializer_range, text.tie_word_embeddings = VOCABULARY, 0.1, tied
    text.max_position_embeddings = 512
    text.bos_token_id, text.eos_token_id, text.pad_token_id = 1, 2, 0
    return LlavaNextConfig(
        vision_config=tower.to_dict(),
        text_config=text.to_dict() | text_changes,
        image_token_index=IMAGE_TOKEN_ID,
        # a canvas of a single tile besides
        image_grid_pinpoints=[[h // TILE * tile, w // TILE * tile] for h, w in (*PINPOINTS, (TILE, TILE))],
        image_seq_length=ANYRES.patches_per_tile,
        vision_feature_select_strategy="default" if has_cls else "full",
        tie_word_embeddings=tied,
    )


def geometry(config: LlavaNextConfig) -> AnyRes:
    """AnyRes of a model."""
    vision = config.vision_config
    return AnyRes(vision.image_size, vision.patch_size, [tuple(p) for p in config.image_grid_pinpoints])


def tiny_pair(
    folder, seed: int = 0, config: LlavaNextConfig | None = None
) -> tuple[LlavaNextForConditionalGeneration, StockLlavaNext]:
    """Our model and the stock one with the same float32 weights, through a folder in the llava-hf layout.

    With a `config`, biases and norms are random too: at 0 and 1 a forward that forgets them would be right.
    """
    from llava_next.model.folders.export import save_model

    torch.manual_seed(seed)
    model = LlavaNextForConditionalGeneration(config or tiny_config())
    if config is not None:
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    save_model(model, folder, dtype=torch.float32)
    stock, info = StockLlavaNext.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return LlavaNextForConditionalGeneration.from_pretrained(folder), stock


def with_adapters(
    model: LlavaNextForConditionalGeneration, lora: Lora, quantize: str | None = None
) -> LlavaNextForConditionalGeneration:
    """The same model with adapters that are not what they began as; else only projector and newline train."""
    if quantize:
        quantise_under(model, lora, torch.float32)
    add_adapters(model, lora, seed=3)
    freeze(model, Rates(vision=None))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name) and not parameter.is_meta:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def random_samples(
    seed: int, count: int, images=(0, 1, 2), max_text: int = 40, anyres: AnyRes = ANYRES, sizes_of=None
) -> list[tuple[Example, list]]:
    """Encoded samples with random ids, pixels and masks, and the (width, height) of their images.

    Args:
        sizes_of: called with the random generator, returns the (width, height) of an image; default: 1 to 119 px.
    """
    rng = np.random.default_rng(seed)
    samples, tile = [], anyres.tile_size
    size_of = sizes_of or (lambda rng: tuple(int(x) for x in rng.integers(1, 120, 2)))
    for slot in range(count):
        sizes = [size_of(rng) for _ in range(int(rng.choice(images)))]
        text = [rng.integers(1, IMAGE_TOKEN_ID, int(rng.integers(1, max_text))) for _ in range(len(sizes) + 1)]
        ids, index, tiles, tile_start = [text[0]], [], [], 0
        for size, words in zip(sizes, text[1:], strict=True):
            features = anyres.feature_index(*size)
            index.append(np.where(features > 0, features + tile_start * anyres.patches_per_tile, 0))
            tiles.append(rng.integers(0, 256, (anyres.num_tiles(*size), tile, tile, 3), dtype=np.uint8))
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
            tiles=np.concatenate(tiles) if tiles else np.zeros((0, tile, tile, 3), np.uint8),
            feature_index=np.concatenate(index) if index else np.zeros(0, np.int64),
            image_positions=np.flatnonzero(ids == IMAGE_TOKEN_ID),
        )
        samples.append((example, sizes))
    return samples


def pack_tiny(examples: list[Example], anyres: AnyRes = ANYRES, **kwargs) -> PackedBatch:
    """`pack` with the tiny geometry."""
    return pack(examples, anyres.tile_size, anyres.patches_per_tile, **kwargs)


def pixel_batch(
    examples: list[Example], sizes: list[list[tuple[int, int]]], anyres: AnyRes, config: LlavaNextConfig
) -> dict[str, torch.Tensor]:
    """A batch padded on the right, with labels, as transformers' own forward takes it.

    Args:
        sizes: (width, height) of each example's images.
    """
    longest = max(len(example.input_ids) for example in examples)
    ids, mask = torch.zeros(2, len(examples), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        ids[row, :length], mask[row, :length] = torch.from_numpy(example.input_ids), 1
        labels[row, 1:length] = torch.from_numpy(example.labels[1:])
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    kind = tower_kind(config.vision_config)
    pixels = []
    for example, of_images in zip(examples, sizes, strict=True):
        tiles = normalise(torch.from_numpy(example.tiles), kind.mean, kind.std)
        pixels += tiles.split([anyres.num_tiles(*size) for size in of_images]) if of_images else []
    if pixels:
        most = max(len(p) for p in pixels)
        inputs["pixel_values"] = torch.stack([torch.cat([p, p.new_zeros(most - len(p), *p.shape[1:])]) for p in pixels])
        inputs["image_sizes"] = torch.tensor([(h, w) for of_images in sizes for w, h in of_images])
    return inputs


def stock_logits(model: StockLlavaNext, example: Example, sizes: list[tuple[int, int]]) -> torch.Tensor:
    """Logits `[t, vocabulary]` of one sample through transformers' own forward."""
    inputs = pixel_batch([example], [sizes], geometry(model.config), model.config)
    del inputs["labels"]
    return model(**{name: value.to(model.device) for name, value in inputs.items()}).logits[0]


def packed_logits(model: LlavaNextForConditionalGeneration, batch: PackedBatch) -> torch.Tensor:
    """Logits `[T, vocabulary]` of every position, by the pieces that the packed forward is made of."""
    embeds = model.model.language_model.embed_tokens(batch.input_ids)
    features = model.image_features(batch.tiles)[batch.feature_index]
    embeds = embeds.index_copy(0, batch.image_positions, features)
    return model.lm_head(model.decode_segments(embeds, batch.position_ids, batch.cu_seqlens, batch.max_seqlen))


def stock_loss(model: StockLlavaNext, samples: list[tuple[Example, list]], weights: torch.Tensor) -> torch.Tensor:
    """Weighted loss sum over samples, one stock forward each. `weights` float32 `[slots]`."""
    total = torch.zeros((), device=model.device)
    for example, sizes in samples:
        logits = stock_logits(model, example, sizes).float()
        labels = torch.from_numpy(example.labels).to(model.device)
        nll = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100)
        total = total + nll * weights[example.slot]
    return total


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradient of every parameter that has one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
