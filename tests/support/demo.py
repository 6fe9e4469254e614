"""The quickstart's data and model, small: scanned digits, their shards, and a tiny model composed for them."""

import json
import sys
from pathlib import Path

import pytest
import torch

import build_shards
import compose as compose_command
import make_digits
from llava_next.model.folders.compose import compose, random_part
from llava_next.model.folders.dry import DEMO_PINPOINTS, corpus_texts, demo_configs, train_tokenizer


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
