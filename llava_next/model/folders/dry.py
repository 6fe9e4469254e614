"""Architectures that need no download: the published ones at three sizes, and the quickstart's demo model.

Configs are the published config.json files, written out. Shrunk ones keep what makes an architecture behave as it
does (tile and patch size, ratio of query to key heads, biases, activations, norm epsilon, rotary base, vocabulary,
tied or not) and have few, thin layers. Their tokenizer is trained on the text at hand.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from llava_next.templates import get_template


def _values(keys: str, *values, **more) -> dict:
    return dict(zip(keys.split(), values, strict=True)) | more


_TOWER = "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size hidden_act "
_TOWER += "layer_norm_eps"
_CLIP = _values(_TOWER, 1024, 4096, 24, 16, 336, 14, "quick_gelu", 1e-5, projection_dim=768)
_SIGLIP = _values(_TOWER, 1152, 4304, 27, 16, 384, 14, "gelu_pytorch_tanh", 1e-6)
TOWERS = {
    "openai/clip-vit-large-patch14-336": (CLIPVisionConfig, _CLIP),
    "google/siglip-so400m-patch14-384": (SiglipVisionConfig, _SIGLIP),
}

_LLM = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
_LLM += "max_position_embeddings rms_norm_eps rope_theta bos_token_id eos_token_id"
_VICUNA = _values(_LLM, 32000, 4096, 11008, 32, 32, 32, 4096, 1e-5, 10000.0, 1, 2)
_LLAMA_3 = _values(_LLM, 128256, 4096, 14336, 32, 32, 8, 8192, 1e-5, 500000.0, 128000, 128009)
_QWEN_2 = _values(_LLM, 152064, 3584, 18944, 28, 28, 4, 32768, 1e-6, 1000000.0, 151643, 151645)
_QWEN_2 |= {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28}
_MISTRAL = _values(_LLM, 32000, 4096, 14336, 32, 32, 8, 32768, 1e-5, 1000000.0, 1, 2, sliding_window=None)
LLMS = {
    "lmsys/vicuna-7b-v1.5": (LlamaConfig, _VICUNA),
    "meta-llama/Meta-Llama-3-8B-Instruct": (LlamaConfig, _LLAMA_3),
    "Qwen/Qwen2-7B-Instruct": (Qwen2Config, _QWEN_2),  # whose q, k and v have biases by definition
    "mistralai/Mistral-7B-Instruct-v0.2": (MistralConfig, _MISTRAL),
}


@dataclass(frozen=True)
class Scale:
    """How far an architecture is shrunk.

    Args:
        vision_layers, text_layers: number of layers; the tower's last one is never used.
        vision_heads: heads of the tower; the language model has `key_heads` or, with grouped queries, two.
        key_heads: key heads of a language model whose every query head has its own.
        vision_shrink, text_shrink: head dimensions are divided by these.
    """

    vision_layers: int
    text_layers: int
    vision_heads: int
    key_heads: int
    vision_shrink: int
    text_shrink: int


SCALES: dict[str, Scale | None] = {
    "tiny": Scale(vision_layers=3, text_layers=2, vision_heads=2, key_heads=8, vision_shrink=8, text_shrink=16),
    "small": Scale(vision_layers=5, text_layers=4, vision_heads=8, key_heads=8, vision_shrink=2, text_shrink=2),
    "full": None,
}


def architecture(name: str) -> PretrainedConfig:
    """The config of a published tower or language model, without network, or that of a local folder.

    Raises:
        ValueError: neither a known name nor a folder with a config.json, or one of another kind.
    """
    known = TOWERS | LLMS
    if name in known:
        return _config(*known[name])
    if not (Path(name) / "config.json").exists():
        raise ValueError(f"{name}: known architectures are {', '.join(known)}; or give a folder with a config.json")
    config = AutoConfig.from_pretrained(name)
    config = getattr(config, "vision_config", config)
    if config.model_type not in {config_class.model_type for config_class, _ in known.values()}:
        raise ValueError(f"{name}: {config.model_type!r} is no architecture that this project composes")
    return config


def _config(kind: type, values: dict) -> PretrainedConfig:
    if "rope_theta" in values:
        rope = {"rope_type": "default", "rope_theta": values["rope_theta"]}
        values = {name: value for name, value in values.items() if name != "rope_theta"}
        values |= {"rope_parameters": rope, "tie_word_embeddings": False}
    return kind(**values)


def scaled(config: PretrainedConfig, scale: str) -> PretrainedConfig:
    """The same architecture with few, thin layers.

    Args:
        config: of a tower or a language model.
        scale: `tiny` (2 text layers of width 64 to 112), `small` (4 of 512 to 896) or `full` (unchanged).

    Returns:
        A new config.

    Raises:
        ValueError: no such scale.
    """
    if scale not in SCALES:
        raise ValueError(f"no scale {scale!r}: choose one of {', '.join(SCALES)}")
    values = config.to_dict()
    size = SCALES[scale]
    if size is None:
        return type(config).from_dict(values)
    values.pop("layer_types", None)  # derived from the number of layers
    head_dim = values.pop("head_dim", None) or config.hidden_size // config.num_attention_heads
    if "num_key_value_heads" in values:
        ratio = config.num_attention_heads // config.num_key_value_heads
        head_dim //= size.text_shrink
        # two key heads at least: with one, a wrong order of repeated heads would not show
        values["num_key_value_heads"] = max(2, size.key_heads // ratio)
        values["num_attention_heads"] = values["num_key_value_heads"] * ratio
        values["num_hidden_layers"] = size.text_layers
    else:
        head_dim //= size.vision_shrink
        values["num_attention_heads"] = size.vision_heads
        values["num_hidden_layers"] = size.vision_layers
        if "projection_dim" in values:
            values["projection_dim"] = size.vision_heads * head_dim
    values["hidden_size"] = values["num_attention_heads"] * head_dim
    values["intermediate_size"] = round(values["hidden_size"] * config.intermediate_size / config.hidden_size / 8) * 8
    return type(config).from_dict(values)


# (height, width) canvases for 32 px tiles: one for every layout of up to six digits, so that each digit gets a tile
DEMO_PINPOINTS = tuple(
    (32 * rows, 32 * cols)
    for rows, cols in (
        *((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (1, 4), (4, 1)),
        *((1, 5), (5, 1), (1, 6), (6, 1), (2, 3), (3, 2)),
    )
)


def demo_configs() -> tuple[PretrainedConfig, PretrainedConfig]:
    """A CLIP tower and a Llama small enough to learn reading on a laptop's CPU in minutes (2 M parameters)."""
    tower = _values(_TOWER, 128, 384, 4, 4, 32, 16, "quick_gelu", 1e-5, projection_dim=128)
    llm = _values(_LLM, 512, 128, 320, 3, 4, 4, 1024, 1e-6, 10000.0, 1, 2)
    drawn = {"initializer_range": 0.5}
    return _config(CLIPVisionConfig, tower | drawn), _config(LlamaConfig, llm | drawn)


# special tokens, beginning-of-sequence and end token of each template's family; unlisted: Llama-2's
LLAMA_TOKENS = (("<unk>", "<s>", "</s>"), "<s>", "</s>")
FAMILY_TOKENS = {
    "llama_3": (
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|end_of_text|>",
    ),
    "qwen": (("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None, "<|endoftext|>"),
    "smollm": (("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_start|>", "<|im_end|>"),
    "olmo_2": (("<|endoftext|>", "<|pad|>"), "<|endoftext|>", "<|endoftext|>"),
    "phi_4": (("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"), None, "<|im_end|>"),
    "phi_4_mini": (("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), None, "<|endoftext|>"),
    "gemma_3": (("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>"),
    "mistral_v3": (("<unk>", "<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>"),
}
_AS = {"llama_3_1": "llama_3", "qwen3": "qwen", "chatml": "qwen", "mistral_nemo": "mistral_v3"}
FAMILY_TOKENS |= {name: FAMILY_TOKENS[other] for name, other in _AS.items()}


def train_tokenizer(texts: Iterable[str], vocab_size: int, template_name: str = "vicuna_v1") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a family's special tokens, trained on `texts`; digits stay single tokens.

    Args:
        texts: any strings; unseen ones still encode, byte by byte.
        vocab_size: at most this many tokens.
        template_name: the chat template that it will be used with.
    """
    special, bos, eos = FAMILY_TOKENS.get(template_name, LLAMA_TOKENS)
    unknown = "<unk>" if "<unk>" in special else None
    tokenizer = Tokenizer(models.BPE(unk_token=unknown))
    # As in LLaMA3 and Qwen2, line breaks never join what follows: a header's are the same before an answer and at a
    # prompt's end.
    line_breaks = pre_tokenizers.Split(Regex(r"\s*[\r\n]+"), "isolated")
    digits, letters = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([line_breaks, digits, letters])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if bos:
        pair = (bos, special.index(bos))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[pair])
    names = {"unk_token": unknown, "bos_token": bos, "eos_token": eos}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{name: token for name, token in names.items() if token},
        model_max_length=1024,
    )


def corpus_texts(samples: list[dict], template_name: str) -> list[str]:
    """The strings of a LLaVA JSON file's conversations plus the template's own words, to train a tokenizer on.

    Without samples, the template's own words.
    """
    template = get_template(template_name)
    frame = " ".join((template.system or "", *template.user, template.header, *template.answer))
    texts = [turn["value"] for sample in samples for turn in sample["conversations"]]
    return texts + [frame] * max(1, len(samples))  # the template's words are in every sample
