"""Measures and writes what it measured, with hardware, versions and commit, to a card in scripts/benchmarks/.

    python scripts/benchmark.py step --model vicuna-7b --tower clip-336 --scale tiny

`step`: forward and backward of the same samples, packed by this project and one padded batch after the other by stock
transformers, in turns in one process and one precision. Sizes and text lengths follow mix665K's profile; weights and
pixels are random.
"""

from __future__ import annotations

import json
import platform
import subprocess
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch
from jsonargparse import ArgumentParser
from transformers import LlavaNextConfig
from transformers import LlavaNextForConditionalGeneration as StockLlavaNext

from llava_next.anyres import ORIGINAL_336, ORIGINAL_384, AnyRes
from llava_next.data.batch import IGNORE, Example, pack
from llava_next.data.plan import deal
from llava_next.model.attention import attention_names, choose_attention
from llava_next.model.dry import architecture, scaled
from llava_next.model.modeling import NORMALISATION, LlavaNextForConditionalGeneration, normalise
from llava_next.training.loop import slot_weights

ROOT = Path(__file__).parent.parent
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


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["step"])
    parser.add_argument("--model", default="vicuna-7b", choices=list(LLMS))
    parser.add_argument("--tower", default="clip-336", choices=list(TOWERS))
    parser.add_argument("--scale", default="tiny", help="width and depth, see llava_next/model/dry.py")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=16, help="of a step")
    parser.add_argument("--padded_batch", type=int, default=4, help="samples of a batch of the stock way")
    parser.add_argument("--token_budget", type=int, default=8192, help="of a packed micro-batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    config, anyres = model_config(args.model, args.tower, args.scale)
    ours, stock = both_models(config, args.device)
    samples = profile_samples(args.samples, anyres, config, seed=0)
    micros = packed_step(samples, anyres, args.token_budget)
    batches = [samples[i : i + args.padded_batch] for i in range(0, len(samples), args.padded_batch)]

    packed, padded, losses = [], [], []
    for repeat in range(args.repeats + 1):  # the first of each warms up
        first, seconds = timed(lambda: run_packed(ours, micros, args.device))
        second, stock_seconds = timed(lambda: run_padded(stock, batches, len(samples), anyres, args.device))
        losses.append((first, second))
        print(f"packed {seconds:.2f} s, padded {stock_seconds:.2f} s, loss {first:.5f} and {second:.5f}", flush=True)
        if repeat:
            packed.append(seconds)
            padded.append(stock_seconds)

    tokens = sum(len(example.input_ids) for example, _ in samples)
    longest = [max(len(example.input_ids) for example, _ in batch) * len(batch) for batch in batches]
    write_card(
        args,
        {
            "tokens": tokens,
            "padded_tokens": sum(longest),
            "packed_s": median(packed),
            "padded_s": median(padded),
            "ratio": median(b / a for a, b in zip(packed, padded, strict=True)),
            "loss": losses[-1],
        },
    )


def model_config(model: str, tower: str, scale: str) -> tuple[LlavaNextConfig, AnyRes]:
    """The pairing's config at a scale, and its tiles."""
    name, pinpoints = TOWERS[tower]
    vision, text = scaled(architecture(name), scale), scaled(architecture(LLMS[model]), scale)
    config = LlavaNextConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=text.vocab_size - 1,
        image_grid_pinpoints=[list(p) for p in pinpoints],
        vision_feature_select_strategy="default" if vision.model_type == "clip_vision_model" else "full",
        tie_word_embeddings=False,
    )
    return config, AnyRes(vision.image_size, vision.patch_size, pinpoints)


def both_models(config: LlavaNextConfig, device: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and the stock model with the same random weights, float32."""
    torch.manual_seed(0)
    stock = StockLlavaNext(config).to(device).train()
    ours = LlavaNextForConditionalGeneration(config).to(device).train()
    ours.load_state_dict(stock.state_dict())
    kernel, _ = choose_attention("auto", device, torch.float32)
    ours.set_attn_implementation(attention_names(kernel))
    return ours, stock


def profile_samples(count: int, anyres: AnyRes, config: LlavaNextConfig, seed: int) -> list[tuple[Example, tuple]]:
    """(encoded sample, its image's (width, height) or None): sizes and text lengths drawn from the profile."""
    rng = np.random.default_rng(seed)
    sources = json.loads(PROFILE.read_text())["sources"]
    shares = np.array([source["samples"] for source in sources], float)
    samples = []
    for slot in range(count):
        source = sources[rng.choice(len(sources), p=shares / shares.sum())]
        size = None
        if source["sizes"]:
            sizes, weights = zip(*source["sizes"], strict=True)
            size = tuple(sizes[rng.choice(len(sizes), p=np.array(weights) / sum(weights))])
        mean, sigma = source["text_tokens"]["mean"], source["text_tokens"]["sigma"]
        text = int(np.clip(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma), 16, 3800))
        index = anyres.feature_index(*size) if size else np.zeros(0, np.int64)
        words = rng.integers(0, config.text_config.vocab_size - 1, text)
        ids = np.concatenate([words[:8], np.full(len(index), config.image_token_id), words[8:]])
        labels = np.where(np.arange(len(ids)) >= len(ids) - int(SUPERVISED_SHARE * text), ids, IGNORE)
        tiles = rng.integers(0, 256, (anyres.num_tiles(*size) if size else 0, *(anyres.tile_size,) * 2, 3), np.uint8)
        positions = np.flatnonzero(ids == config.image_token_id)
        samples.append((Example(slot, slot, 0, ids, labels, tiles, index, positions), size))
    return samples


def packed_step(samples: list[tuple[Example, tuple]], anyres: AnyRes, token_budget: int) -> list:
    """The step as this project packs it for one rank, weights set."""
    examples = [example for example, _ in samples]
    lengths, tiles = [len(e.input_ids) for e in examples], [len(e.tiles) for e in examples]
    bins = deal(lengths, tiles, world=1, token_budget=token_budget, tile_budget=10**6)
    batches = [pack([examples[i] for i in b], anyres.tile_size, anyres.patches_per_tile) for (b,) in bins]
    supervised = torch.tensor([(e.labels[1:] != IGNORE).sum() for e in examples], dtype=torch.float64)
    return [batch.weighted(slot_weights(supervised, "sample")) for batch in batches]


def run_packed(model: torch.nn.Module, micros: list, device: str) -> float:
    """Forward and backward of the packed step; its loss."""
    model.zero_grad()
    total = 0.0
    for batch in micros:
        loss = model(**batch.model_inputs(torch.device(device))).loss
        loss.backward()
        total += loss.item()
    return total


def run_padded(model: torch.nn.Module, batches: list, num_samples: int, anyres: AnyRes, device: str) -> float:
    """Forward and backward of padded batches through stock transformers; the same loss (each sample counts alike)."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        logits = model(**padded_inputs(batch, model.config, anyres, device)).logits
        for row, (example, _) in zip(logits, batch, strict=True):
            labels = torch.from_numpy(example.labels[1:]).to(device)
            nll = torch.nn.functional.cross_entropy(row[: len(labels)].float(), labels, ignore_index=IGNORE)
            total = total + nll / num_samples
        total.backward()
        total = total.detach()
    return float(total)


def padded_inputs(batch: list[tuple[Example, tuple]], config: LlavaNextConfig, anyres: AnyRes, device: str) -> dict:
    """A batch padded on the right to its longest sample, as transformers' forward takes it."""
    longest = max(len(example.input_ids) for example, _ in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (example, _) in enumerate(batch):
        ids[row, : len(example.input_ids)] = torch.from_numpy(example.input_ids)
        mask[row, : len(example.input_ids)] = 1
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    pictured = [(example, size) for example, size in batch if size]
    if pictured:
        most, side = max(len(e.tiles) for e, _ in pictured), anyres.tile_size
        pixels = torch.zeros(len(pictured), most, 3, side, side)
        mean, std = NORMALISATION[config.vision_config.model_type]
        for row, (example, _) in enumerate(pictured):
            pixels[row, : len(example.tiles)] = normalise(torch.from_numpy(example.tiles), mean, std)
        sizes = torch.tensor([(height, width) for _, (width, height) in pictured])
        inputs |= {"pixel_values": pixels.to(device), "image_sizes": sizes}
    return inputs


def timed(function) -> tuple[float, float]:
    """A function's result and its seconds; both models end with reading the loss, which waits for the device."""
    started = time.perf_counter()
    return function(), time.perf_counter() - started


def write_card(args, figures: dict) -> None:
    """Prints the figures and writes them with all that is needed to repeat them."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    card = {
        "command": {k: v for k, v in vars(args).items() if k not in ("config",)},
        "hardware": torch.cuda.get_device_name()
        if args.device == "cuda"
        else platform.processor() or platform.machine(),
        "threads": args.threads,
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
        "commit": commit.stdout.strip() or None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **figures,
    }
    path = ROOT / "scripts" / "benchmarks" / f"{args.what}-{args.model}-{args.tower}-{args.scale}-{args.device}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(card, indent=1) + "\n")
    print(json.dumps(card, indent=1))
    print(f"packed is {figures['ratio']:.2f} x as fast as padded; card: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
