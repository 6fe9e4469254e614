"""The quickstart's data and model, small: scanned digits, their shards, and a tiny model composed for them."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import build_shards
import compose as compose_command
import make_digits
from llava_next.model.folders.adapters import save_adapter
from llava_next.model.folders.compose import compose, random_part
from llava_next.model.folders.dry import DEMO_PINPOINTS, corpus_texts, demo_configs, train_tokenizer
from llava_next.model.forward.lora import Lora, add_adapters
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration


def build_demo(folder: Path, samples: int) -> None:
    """folder/digits, folder/base (the composed model) and folder/shards."""
    make_digits.build(folder / "digits", train=samples, held_out=4, seed=0)
    arguments = [
        "--json",
        folder / "digits/train.json",
        "--images",
        folder / "digits/images",
        "--out",
        folder / "shards",
    ]
    compose_demo(folder / "base", folder / "digits/train.json")
    build_shards.main(
        [
            str(a)
            for a in [*arguments, "--model", folder / "base", "--workers", 0, "--shard_samples", 20, "--codec", "webp"]
        ]
    )


def build_demo_by_command(folder: Path, template: str) -> None:
    """folder/digits, and folder/model as scripts/compose.py makes it."""
    make_digits.build(folder / "digits", train=60, held_out=4, seed=0)
    arguments = ["--demo", folder / "digits/train.json", "--template", template, "--out", folder / "model"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["compose.py", *map(str, arguments)])
        compose_command.main()


def compose_demo(out: Path, samples: Path, template: str = "mistral") -> Path:
    vision, llm = demo_configs()
    vision.num_hidden_layers = llm.num_hidden_layers = 2  # each is a round of messages between ranks
    tokenizer = train_tokenizer(corpus_texts(json.loads(samples.read_text()), template), vocab_size=400)
    return compose(
        random_part(vision, 0), random_part(llm, 0), tokenizer, template, out, DEMO_PINPOINTS, dtype=torch.float32
    )


def build_run(run: Path) -> Path:
    """What training leaves in a run folder, with random weights: `model`, two steps, an adapter for `model`."""
    make_digits.build(run / "digits", train=20, held_out=1, seed=0)
    compose_demo(run / "model", run / "digits/train.json")
    (run / "config.yaml").write_text("seed: 1\n")
    for name in ("model-step-20", "model-step-100"):
        shutil.copytree(run / "model", run / name)
    model = LlavaNextForConditionalGeneration.from_pretrained(run / "model")
    lora = Lora(r=4, alpha=8, targets=["llm"], dropout=0.0)
    add_adapters(model, lora, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
            parameter += 0.2 * torch.randn_like(parameter) * ("lora_" in name)
    save_adapter(model, run / "adapter", lora, run / "model", run / "model")
    return run
