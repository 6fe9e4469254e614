"""What answers prompts: the model folder in stock transformers, or in vLLM. Greedy, in the saved generation config."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LogitsProcessor, LogitsProcessorList
from transformers.utils import logging

from llava_next.model.folders.adapters import CONFIG, adapter_base
from llava_next.model.folders.merging import with_adapter

BACKENDS = ("transformers", "vllm")


class Engine(Protocol):
    """Answers prompts of one model folder."""

    processor: object

    def answer(self, prompts: Sequence[str], pictures: Sequence[Sequence[Image.Image]], most: int) -> list[str]:
        """Greedy answers, at most `most` tokens each, of rendered prompts with the pictures of each."""


class Numbers(LogitsProcessor):
    """Stops at logits that are no numbers, of which greedy choice would make an answer all the same."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if torch.isnan(scores).any():
            raise ValueError("the model's logits are no numbers (NaN)")
        return scores


def load_processor(folder: str | Path):
    """The processor with the pixels of training, which torchvision's would miss by up to two grey levels.

    Raises:
        ValueError: it has no chat template.
    """
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(f"{folder} has no processor with a chat template: give a folder that training has written")
    processor.tokenizer.padding_side = "left"
    return processor


@torch.inference_mode()
def generate(
    model, processor, prompts: Sequence[str], pictures: Sequence[Sequence[Image.Image]], most: int
) -> list[str]:
    """Greedy answers of one padded batch; the saved generation config says which tokens end them.

    Raises:
        ValueError: a prompt that is longer than the model takes, or logits that are no numbers.
    """
    images = [picture for of_prompt in pictures for picture in of_prompt]
    inputs = processor(images=images or None, text=list(prompts), padding=True, return_tensors="pt")
    length, limit = inputs["input_ids"].shape[1], model.config.get_text_config().max_position_embeddings
    if length >= limit:
        raise ValueError(f"the prompt is {length:,} tokens long, the model takes {limit:,}")
    inputs = inputs.to(model.device, model.dtype)
    checks = LogitsProcessorList([Numbers()])
    output = model.generate(**inputs, max_new_tokens=most, do_sample=False, logits_processor=checks)
    return [text.strip() for text in processor.batch_decode(output[:, length:], skip_special_tokens=True)]


class Transformers:
    """A model or adapter folder in stock transformers, loaded when it is first asked.

    Args:
        folder: an adapter's is merged into its base in memory.
        device: `cpu`, `cuda`, `cuda:N`.
    """

    def __init__(self, folder: Path, device: str | torch.device):
        self.folder, self.device = folder, torch.device(device)
        self.processor = load_processor(folder)

    @cached_property
    def model(self):
        logging.disable_progress_bar()
        base = adapter_base(self.folder)
        model = AutoModelForImageTextToText.from_pretrained(base or self.folder, dtype="auto")
        if base:
            model = with_adapter(model, self.folder)
        return model.to(self.device).eval()

    def answer(self, prompts: Sequence[str], pictures: Sequence[Sequence[Image.Image]], most: int) -> list[str]:
        return generate(self.model, self.processor, prompts, pictures, most)


class Vllm:
    """A model folder in vLLM, loaded when it is first asked.

    Raises:
        ValueError: vLLM is not installed, or an adapter folder.
    """

    def __init__(self, folder: Path, device: str | torch.device):
        if importlib.util.find_spec("vllm") is None:
            raise ValueError("--backend vllm: vllm is not installed here: pip install vllm, or leave the option out")
        if (folder / CONFIG).exists():
            raise ValueError(f"--backend vllm: {folder} is an adapter: put it into its base first (scripts/merge.py)")
        self.folder = folder
        self.processor = load_processor(folder)

    @cached_property
    def model(self):
        from vllm import LLM

        return LLM(str(self.folder), limit_mm_per_prompt={"image": 16})

    def answer(self, prompts: Sequence[str], pictures: Sequence[Sequence[Image.Image]], most: int) -> list[str]:
        from vllm import SamplingParams

        asked = [
            {"prompt": prompt, "multi_modal_data": {"image": list(images)}} if images else {"prompt": prompt}
            for prompt, images in zip(prompts, pictures, strict=True)
        ]
        # the end tokens of the saved generation config are vLLM's own default
        answers = self.model.generate(asked, SamplingParams(temperature=0.0, max_tokens=most), use_tqdm=False)
        return [answer.outputs[0].text.strip() for answer in answers]


def start_engine(backend: str, folder: Path, device: str | torch.device) -> Engine:
    """An engine by its name in `BACKENDS`. Raises ValueError: it cannot take the folder, or is not installed."""
    return {"transformers": Transformers, "vllm": Vllm}[backend](folder, device)
