"""The stock way beside ours: the same samples in padded batches through transformers' own forward and loss.

In turns, in one process and one precision, so that whatever else the machine does meets both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from transformers import LlavaNextConfig
from transformers import LlavaNextForConditionalGeneration as StockLlavaNext

from benchmarking.samples import geometry, packed_step, supervised
from llava_next.data.loading.batch import IGNORE, Example
from llava_next.model.forward.attention import attention_names, choose_attention
from llava_next.model.forward.modeling import NORMALISATION, LlavaNextForConditionalGeneration, normalise
from llava_next.training.devices.agreement import slot_weights

Samples = Sequence[tuple[Example, tuple[int, int] | None]]


def against_stock(
    config: LlavaNextConfig, samples: Samples, padded_batch: int, token_budget: int, tile_budget: int, repeats: int
) -> dict:
    """Seconds of forward and backward of a step, ours and stock, float32 on the CPU; and both losses.

    Args:
        padded_batch: samples of a batch of the stock way.
    """
    ours, stock = both_models(config)
    weights = slot_weights(supervised(samples), "sample")
    micros = [batch.weighted(weights) for batch in packed_step(samples, config, token_budget, tile_budget)]
    batches = [samples[i : i + padded_batch] for i in range(0, len(samples), padded_batch)]
    packed, padded, losses = [], [], ()
    for repeat in range(repeats + 1):  # the first of each warms up
        first, seconds = timed(lambda: run_packed(ours, micros))
        second, stock_seconds = timed(lambda: run_padded(stock, batches, len(samples)))
        losses = (first, second)
        if repeat:
            packed.append(seconds)
            padded.append(stock_seconds)
    longest = [max(len(example.input_ids) for example, _ in batch) * len(batch) for batch in batches]
    return {
        "tokens": sum(len(example.input_ids) for example, _ in samples),
        "padded_tokens": sum(longest),
        "packed_s": median(packed),
        "padded_s": median(padded),
        "ratio": median(b / a for a, b in zip(packed, padded, strict=True)),
        "loss": {"packed": losses[0], "padded": losses[1]},
    }


def both_models(config: LlavaNextConfig) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and the stock model with the same random weights, float32."""
    torch.manual_seed(0)
    stock = StockLlavaNext(config).train()
    ours = LlavaNextForConditionalGeneration(config).train()
    ours.load_state_dict(stock.state_dict())
    kernel, _ = choose_attention("auto", "cpu", torch.float32)
    ours.set_attn_implementation(attention_names(kernel))
    return ours, stock


def run_packed(model: torch.nn.Module, micros: list) -> float:
    """Forward and backward of the packed step; its loss."""
    model.zero_grad()
    total = 0.0
    for batch in micros:
        loss = model(**batch.model_inputs(torch.device("cpu"))).loss
        loss.backward()
        total += loss.item()
    return total


def run_padded(model: torch.nn.Module, batches: list[Samples], num_samples: int) -> float:
    """Forward and backward of padded batches through stock transformers; the same loss (each sample counts alike)."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        logits = model(**padded_inputs(batch, model.config)).logits
        loss = 0.0
        for row, (example, _) in zip(logits, batch, strict=True):
            labels = torch.from_numpy(example.labels[1:])
            nll = torch.nn.functional.cross_entropy(row[: len(labels)].float(), labels, ignore_index=IGNORE)
            loss = loss + nll / num_samples
        loss.backward()
        total += loss.item()
    return total


def padded_inputs(batch: Samples, config: LlavaNextConfig) -> dict:
    """A batch padded on the right to its longest sample, as transformers' forward takes it."""
    longest, anyres = max(len(example.input_ids) for example, _ in batch), geometry(config)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (example, _) in enumerate(batch):
        ids[row, : len(example.input_ids)] = torch.from_numpy(example.input_ids)
        mask[row, : len(example.input_ids)] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    pictured = [(example, size) for example, size in batch if size]
    if pictured:
        most, side = max(len(e.tiles) for e, _ in pictured), anyres.tile_size
        pixels = torch.zeros(len(pictured), most, 3, side, side)
        mean, std = NORMALISATION[config.vision_config.model_type]
        for row, (example, _) in enumerate(pictured):
            pixels[row, : len(example.tiles)] = normalise(torch.from_numpy(example.tiles), mean, std)
        sizes = torch.tensor([(height, width) for _, (width, height) in pictured])
        inputs |= {"pixel_values": pixels, "image_sizes": sizes}
    return inputs


def timed(function: Callable[[], float]) -> tuple[float, float]:
    """A function's result and its seconds."""
    started = time.perf_counter()
    return function(), time.perf_counter() - started
