"""The packed forward against stock transformers, one sample at a time."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import torch

from llava_next.training.devices.agreement import slot_weights
from support.tiny import (
    IMAGE_TOKEN_ID,
    geometry,
    gradients,
    pack_tiny,
    packed_logits,
    random_samples,
    stock_logits,
    stock_loss,
)

TOLERANCE = 1e-5
close = partial(torch.testing.assert_close, rtol=TOLERANCE, atol=TOLERANCE)


def any_size(rng) -> tuple[int, int]:
    """(width, height): a few pixels, very long or very tall, or anything odd."""
    low, high = [((1, 1), (4, 4)), ((1, 500), (9, 4000)), ((500, 1), (4000, 9)), ((11, 11), (200, 200))][
        rng.integers(0, 4)
    ]
    width, height = rng.integers(low, high)
    return int(width), int(height)


def mixed_samples(config, seed: int, count: int = 6, longest: int | None = None) -> list:
    """`count` samples of 0 to 3 images of any size, and texts of 1 and 2 tokens and of `longest`, by default all
    positions that there are."""
    samples = random_samples(seed, count, images=(0, 1, 2, 3), anyres=geometry(config), sizes_of=any_size)
    rng = np.random.default_rng(seed)
    for length in (1, 2, longest or config.text_config.max_position_embeddings):
        example = copy.copy(random_samples(seed, 1, images=(0,))[0][0])
        example.input_ids = rng.integers(3, IMAGE_TOKEN_ID, length)
        example.labels = np.where(rng.random(length) < 0.5, example.input_ids, -100)
        samples.insert(int(rng.integers(0, len(samples))), (example, []))
    return in_slots(samples)


def in_slots(samples: list) -> list:
    for slot, (example, _) in enumerate(samples):
        example.slot, example.source = slot, slot % 2
    return samples


def packed_step(model, samples) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Packed loss and all gradients."""
    batch = pack_tiny([e for e, _ in samples], geometry(model.config))
    weights = slot_weights(torch.tensor(batch.supervised, dtype=torch.float64), "token")
    model.zero_grad()
    loss = model(**batch.weighted(weights).model_inputs(torch.device("cpu")), num_sources=2).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_equal_to_stock(model, stock, samples) -> None:
    loss, ours = packed_step(model, samples)
    supervised = torch.tensor([(e.labels[1:] != -100).sum() for e, _ in samples], dtype=torch.float64)
    stock.zero_grad()
    expected = stock_loss(stock, samples, slot_weights(supervised, "token"))
    expected.backward()
    theirs = {name: g for name, g in gradients(stock).items() if g.abs().max() > 0}
    close(loss, expected.detach())
    assert {name for name, g in ours.items() if g.abs().max() > 0} == set(theirs)
    assert len(theirs) > 40
    for name, gradient in theirs.items():
        close(ours[name], gradient, msg=lambda m, n=name: f"{n}: {m}")
    batch = pack_tiny([e for e, _ in samples], geometry(model.config))
    with torch.no_grad():
        logits = packed_logits(model, batch).split([len(e.input_ids) for e, _ in samples])
        for packed, (example, sizes) in zip(logits, samples, strict=True):
            close(packed, stock_logits(stock, example, sizes))
