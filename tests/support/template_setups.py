"""Every template with a real tokenizer and the stock processor, and conversations in the forms that clients send."""

import re
from functools import cache, partial
from typing import NamedTuple

import numpy as np
from PIL import Image
from transformers import LlavaNextProcessor, PreTrainedTokenizerFast
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from llava_next.model.folders.dry import corpus_texts, train_tokenizer
from llava_next.own_template import template_for
from llava_next.templates import OWN, Template
from llava_next.tokenise import IGNORE_INDEX, IMAGE_TOKEN
from support import own_templates, real_tokenizers

IMAGE = Image.new("RGB", (50, 40), (200, 30, 90))

# name -> (chat template, tokenizer as published)
SETUPS = {
    "vicuna": ("vicuna_v1", real_tokenizers.vicuna),
    "vicuna_legacy": ("vicuna_v1", lambda: real_tokenizers.vicuna(legacy=True)),
    "llama3": ("llama_3", real_tokenizers.llama3),
    "mistral": ("mistral", real_tokenizers.mistral),
    "mistral_prepending": ("mistral", real_tokenizers.mistral_prepending),
    "mistral_not_legacy": ("mistral", lambda: real_tokenizers.mistral(legacy=False)),
    "qwen2": ("qwen", real_tokenizers.qwen2),
}
SENTENCEPIECE = tuple(name for name in SETUPS if name not in ("llama3", "qwen2"))
# Tokenizers that read a text after <image> otherwise than at the start
POSITION_MATTERS = ("vicuna", "mistral_not_legacy")


def small(family: str, **tokens: str) -> PreTrainedTokenizerFast:
    """A small tokenizer with the special tokens of a template's family; `tokens` are named otherwise."""
    tokenizer = train_tokenizer(corpus_texts([], family), 512, family)
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    return tokenizer


# the same for templates of today's families; Phi-4's tokenizers name a beginning token that they do not add
FAMILIES = {
    name: (name, partial(small, name))
    for name in ("llama_3_1", "qwen3", "chatml", "smollm", "olmo_2", "gemma_3", "mistral_v3", "mistral_nemo")
} | {name: (name, partial(small, name, bos_token="<|endoftext|>")) for name in ("phi_4", "phi_4_mini")}


def with_template(name: str) -> PreTrainedTokenizerFast:
    """A small tokenizer that brings a chat template of `own_templates`."""
    family, text = own_templates.TRAINED[name]
    tokenizer = small(family)
    tokenizer.chat_template = text
    return tokenizer


# language models' own templates
OWNS = {f"own_{name}": (OWN, partial(with_template, name)) for name in own_templates.TRAINED}


class Setup(NamedTuple):
    template: Template
    tokenizer: PreTrainedTokenizerFast
    image_id: int
    processor: LlavaNextProcessor
    image_length: int  # tokens of IMAGE


@cache
def setup(name: str) -> Setup:
    template_name, build = (SETUPS | FAMILIES | OWNS)[name]
    tokenizer = build()
    template = template_for(template_name, tokenizer)
    image_id = template.prepare_tokenizer(tokenizer)
    processor = stock_processor(tokenizer, template)
    image_length = processor(text=IMAGE_TOKEN, images=[IMAGE])["input_ids"][0].count(image_id)
    assert image_length > 8
    return Setup(template, tokenizer, image_id, processor, image_length)


def stock_processor(tokenizer: PreTrainedTokenizerFast, template: Template) -> LlavaNextProcessor:
    """With tiles of 28 px and patches of 14."""
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": 28},
            crop_size={"height": 28, "width": 28},
            image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template.jinja,
    )


def encode(s: Setup, conversations: list[dict], n_images: int = 0, template: Template | None = None):
    return (template or s.template).encode(conversations, s.tokenizer, s.image_id, [s.image_length] * n_images)


def turns(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def chat(conversations: list[dict], as_list: bool = False) -> list[dict]:
    """The same turns as a client sends them: strings, or lists of parts with every image in its place."""
    messages = []
    for turn in conversations:
        content = turn["value"]
        if as_list:
            texts = re.split(f"{IMAGE_TOKEN}\n?", content)
            content = [{"type": "text", "text": texts[0]}] if texts[0] else []
            for text in texts[1:]:
                content += [{"type": "image", "image": IMAGE}, {"type": "text", "text": text}]
        messages.append({"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": content})
    return messages


def supervised_runs(input_ids: np.ndarray, labels: np.ndarray) -> list[tuple[int, int]]:
    """[start, end) of every run of supervised positions; labels must repeat the ids there."""
    mask = labels != IGNORE_INDEX
    assert (labels[mask] == input_ids[mask]).all()
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def learned_texts(s: Setup, input_ids: np.ndarray, labels: np.ndarray) -> list[str]:
    return [
        s.tokenizer.decode(input_ids[a:b], skip_special_tokens=False) for a, b in supervised_runs(input_ids, labels)
    ]
