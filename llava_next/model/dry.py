"""Architectures that need no download: the demo's tiny CLIP + Llama and a tokenizer trained on the text at hand."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPVisionConfig, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from llava_next.templates import get_template

# 32 px tiles of 2 x 2 patches, the five canvases of the published recipe
DEMO_PINPOINTS = ((64, 32), (32, 64), (64, 64), (32, 96), (96, 32))


def demo_configs() -> tuple[PretrainedConfig, PretrainedConfig]:
    """A CLIP tower and a Llama small enough to learn reading on a laptop's CPU in minutes (2 M parameters)."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=32,
        patch_size=16,
        projection_dim=128,
        initializer_range=0.5,
    )
    llm = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.5,
    )
    return vision, llm


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Llama's special tokens, trained on `texts`; digits stay single tokens.

    Args:
        texts: any strings; unseen ones still encode, byte by byte.
        vocab_size: at most this many tokens.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=1024
    )


def corpus_texts(samples: list[dict], template_name: str) -> list[str]:
    """The strings of a LLaVA JSON file's conversations plus the template's own words, to train a tokenizer on."""
    template = get_template(template_name)
    frame = " ".join((template.system, *template.user, template.header, *template.answer))
    texts = [turn["value"] for sample in samples for turn in sample["conversations"]]
    return texts + [frame] * len(samples)  # the template's words are in every sample
