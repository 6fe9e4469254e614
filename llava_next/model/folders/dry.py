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
    CLIPVisionConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    SmolLM3Config,
)

from llava_next.model.folders.sources import read_config
from llava_next.model.forward.kinds import check_language_model, check_tower
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

# beside the published pairings
_BASE = _values(_TOWER, 768, 3072, 12, 12, 224, 16, "gelu_pytorch_tanh", 1e-6)
_HUGE = _values(_TOWER, 1280, 5120, 32, 16, 378, 14, "quick_gelu", 1e-5, projection_dim=1024)
OTHER_TOWERS = {
    "google/siglip2-base-patch16-224": (SiglipVisionConfig, _BASE),
    "google/siglip2-so400m-patch14-384": (SiglipVisionConfig, _SIGLIP),
    "google/siglip2-so400m-patch16-256": (SiglipVisionConfig, _SIGLIP | {"image_size": 256, "patch_size": 16}),
    "google/siglip2-so400m-patch16-512": (SiglipVisionConfig, _SIGLIP | {"image_size": 512, "patch_size": 16}),
    "apple/DFN5B-CLIP-ViT-H-14-378": (CLIPVisionConfig, _HUGE),
    "facebook/metaclip-h14-fullcc2.5b": (CLIPVisionConfig, _HUGE | {"image_size": 224}),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": (CLIPVisionConfig, _HUGE | {"image_size": 224, "hidden_act": "gelu"}),
}
_LLAMA_3_ROPE = _values("rope_type low_freq_factor high_freq_factor", "llama3", 1.0, 4.0)
_LLAMA_3_ROPE |= {"factor": 8.0, "original_max_position_embeddings": 8192}
_LLAMA_3_1 = _LLAMA_3 | {"max_position_embeddings": 131072, "rope": _LLAMA_3_ROPE}
_LLAMA_3_2 = _values(_LLM, 128256, 2048, 8192, 16, 32, 8, 131072, 1e-5, 500000.0, 128000, 128009, head_dim=64)
_LLAMA_3_2 |= {"rope": _LLAMA_3_ROPE | {"factor": 32.0}, "tie_word_embeddings": True}
_NEMO = _values(_LLM, 131072, 5120, 14336, 40, 32, 8, 1024000, 1e-5, 1000000.0, 1, 2, head_dim=128, sliding_window=None)
_QWEN_3 = _values(_LLM, 151936, 4096, 12288, 36, 32, 8, 40960, 1e-6, 1000000.0, 151643, 151645, head_dim=128)
_SMOLLM_2 = _values(_LLM, 49152, 2048, 8192, 24, 32, 32, 8192, 1e-5, 130000.0, 1, 2, tie_word_embeddings=True)
_SMOLLM_3 = _values(_LLM, 128256, 2048, 11008, 36, 16, 4, 65536, 1e-6, 5000000.0, 128000, 128012, pad_token_id=128004)
_OLMO_2 = _values(_LLM, 100352, 4096, 11008, 32, 32, 32, 4096, 1e-6, 500000.0, 100257, 100257, pad_token_id=100277)
_YARN = _values("rope_type factor attention_factor", "yarn", 8.0, 1.2079441541679836)
_YARN |= {"beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 8192}
_OLMO_3 = _OLMO_2 | {"vocab_size": 100278, "max_position_embeddings": 65536, "sliding_window": 4096}
_OLMO_3 |= {"rope": _YARN, "local_rope_theta": 500000.0}
_PHI_4_LONG = [1.118320672**i for i in range(31)] + [
    *(32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77)
]  # as published, to nine digits
_PHI_4 = _values(_LLM, 200064, 3072, 8192, 32, 24, 8, 131072, 1e-5, 10000.0, 199999, 199999, pad_token_id=199999)
_PHI_4 |= {"original_max_position_embeddings": 4096, "sliding_window": 262144, "tie_word_embeddings": True}
_PHI_4["rope"] = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": _PHI_4_LONG}
_PHI_4["rope"] |= {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 4096}
_GEMMA_3 = _values(_LLM, 262144, 1152, 6912, 26, 4, 1, 32768, 1e-6, 1000000.0, 2, 1, head_dim=256, sliding_window=512)
_GEMMA_3 |= {"tie_word_embeddings": True, "local_rope_theta": 10000.0}
OTHER_LLMS = {
    "meta-llama/Llama-3.1-8B-Instruct": (LlamaConfig, _LLAMA_3_1),
    "meta-llama/Llama-3.2-1B-Instruct": (LlamaConfig, _LLAMA_3_2),
    "mistralai/Mistral-7B-Instruct-v0.3": (MistralConfig, _MISTRAL | {"vocab_size": 32768}),
    "mistralai/Mistral-Nemo-Instruct-2407": (MistralConfig, _NEMO),
    "Qwen/Qwen2.5-7B-Instruct": (Qwen2Config, _QWEN_2),
    "Qwen/Qwen3-8B": (Qwen3Config, _QWEN_3),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": (LlamaConfig, _SMOLLM_2),
    "HuggingFaceTB/SmolLM3-3B": (SmolLM3Config, _SMOLLM_3 | {"tie_word_embeddings": True}),
    "allenai/OLMo-2-1124-7B-Instruct": (Olmo2Config, _OLMO_2),
    "allenai/Olmo-3-7B-Instruct": (Olmo3Config, _OLMO_3),
    "microsoft/Phi-4-mini-instruct": (Phi3Config, _PHI_4),
    "google/gemma-3-1b-it": (Gemma3TextConfig, _GEMMA_3),
}
ARCHITECTURES = TOWERS | OTHER_TOWERS | LLMS | OTHER_LLMS


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


def architecture(name: str, *, of_llm: bool = False) -> PretrainedConfig:
    """The config of a published tower or language model, without network, or that of a local folder.

    Args:
        of_llm: a language model is wanted; a multimodal folder is then refused, not taken for its tower.

    Raises:
        ValueError: neither a known name nor a folder with a config.json, or one of another kind.
    """
    if name in ARCHITECTURES:
        return _config(*ARCHITECTURES[name])
    if not (Path(name) / "config.json").exists():
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{name}: known architectures are {known}; or give a folder with a config.json")
    config = read_config(Path(name))
    config = config if of_llm else getattr(config, "vision_config", config)
    (check_tower if hasattr(config, "patch_size") and not of_llm else check_language_model)(config, name)
    return config


def _config(kind: type, values: dict) -> PretrainedConfig:
    values = dict(values)
    if "rope_theta" in values:
        rope = {"rope_type": "default", "rope_theta": values.pop("rope_theta")} | values.pop("rope", {})
        if "local_rope_theta" in values:
            local = {"rope_type": "default", "rope_theta": values.pop("local_rope_theta")}
            rope = {"full_attention": rope, "sliding_attention": local}
        values = {"tie_word_embeddings": False} | values | {"rope_parameters": rope}
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
    own_head_dim = values.pop("head_dim", None)
    head_dim = own_head_dim or config.hidden_size // config.num_attention_heads
    is_llm = "num_key_value_heads" in values
    if is_llm:
        ratio = config.num_attention_heads // config.num_key_value_heads
        # two key heads at least: with one, a wrong order of repeated heads would not show
        values["num_key_value_heads"] = max(2, size.key_heads // ratio)
        values["num_attention_heads"] = values["num_key_value_heads"] * ratio
    else:
        values["num_attention_heads"] = size.vision_heads
    wide = config.hidden_size / (config.num_attention_heads * head_dim)  # not 1 where heads have a size of their own
    head_dim //= size.text_shrink if is_llm else size.vision_shrink
    values["hidden_size"] = round(head_dim * wide) * values["num_attention_heads"]
    if own_head_dim:
        values["head_dim"] = head_dim
    if "query_pre_attn_scalar" in values:
        values["query_pre_attn_scalar"] = head_dim
    if "projection_dim" in values:
        values["projection_dim"] = size.vision_heads * head_dim
    values["intermediate_size"] = round(values["hidden_size"] * config.intermediate_size / config.hidden_size / 8) * 8
    layers = values["num_hidden_layers"] = size.text_layers if is_llm else size.vision_layers
    for key, value in values.items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:  # what differs by layer: each kind of it
            kinds = list(dict.fromkeys(value))
            values[key] = [kinds[layer % len(kinds)] for layer in range(layers)]
    for rope in (values.get("rope_parameters"), values.get("rope_scaling")):
        for key in ("short_factor", "long_factor"):
            if key in (rope or {}):
                rope[key] = rope[key][:: len(rope[key]) // int(head_dim * rope["partial_rotary_factor"] / 2)]
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
