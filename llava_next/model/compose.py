"""A vision tower and a language model become one LLaVA-NeXT model folder.

Tensors go from the sources to the new folder one by one; a 7B model never exists in memory. What is new (projector,
newline, vocabulary rows) is seeded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaNextConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from llava_next.anyres import ORIGINAL_336, ORIGINAL_384, AnyRes
from llava_next.model.companions import write_companions
from llava_next.model.export import MAX_FILE_BYTES, file_key, write_config, write_weights
from llava_next.model.modeling import NORMALISATION, LlavaNextForConditionalGeneration
from llava_next.model.sources import CheckpointWeights, RandomWeights, resolve_folder, seeded
from llava_next.templates import IMAGE_TOKEN, get_template

LLM_KINDS = ("llama", "qwen2", "mistral")
VOCABULARY_MULTIPLE = 64  # rows of embedding and head are padded to this, as in the published checkpoints


@dataclass
class Part:
    """A vision tower or a language model to compose from: its config and where its tensors come from."""

    config: PretrainedConfig
    weights: CheckpointWeights | RandomWeights


def vision_part(name: str) -> Part:
    """The vision tower of a checkpoint (a CLIP or SigLIP model, with or without its text half).

    Raises:
        ValueError: a tower of another kind.
    """
    folder = resolve_folder(name)
    config = AutoConfig.from_pretrained(folder)
    config = getattr(config, "vision_config", config)
    if config.model_type not in NORMALISATION:
        raise ValueError(f"{name}: vision towers are {sorted(NORMALISATION)}, not {config.model_type!r}")
    return Part(config, CheckpointWeights(folder))


def llm_part(name: str) -> Part:
    """The language model of a checkpoint.

    Raises:
        ValueError: a model of another kind.
    """
    folder = resolve_folder(name)
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in LLM_KINDS:
        raise ValueError(f"{name}: language models are {list(LLM_KINDS)}, not {config.model_type!r}")
    return Part(config, CheckpointWeights(folder))


def random_part(config: PretrainedConfig, seed: int) -> Part:
    """A part with the architecture of `config` and seeded random weights."""
    auto_class = AutoModel if config.model_type in NORMALISATION else AutoModelForCausalLM
    return Part(config, RandomWeights.of(config, auto_class, seed))


def compose(
    vision: Part,
    llm: Part,
    tokenizer: PreTrainedTokenizerBase,
    template_name: str,
    out: str | Path,
    pinpoints: tuple[tuple[int, int], ...] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Writes a LLaVA-NeXT model folder: weights, config, tokenizer, processor, chat template, generation config.

    Args:
        tokenizer: of the language model; gets the image and pad tokens it lacks.
        template_name: chat template saved with the tokenizer and processor.
        pinpoints: (height, width) canvases; default: the published recipe's for the tower's size.
        seed: of projector, newline and nothing else.

    Returns:
        The folder.

    Raises:
        ValueError: parts that do not go together, a checkpoint that lacks weights, a tokenizer that lacks the
            template's special tokens, a folder that is not empty. Nothing has been written by then.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give a new folder or remove it")
    template = get_template(template_name)
    template.prepare_tokenizer(tokenizer)
    config = compose_config(vision.config, llm.config, tokenizer, pinpoints)
    sources = source_of_keys(config, vision, llm)
    out.mkdir(parents=True, exist_ok=True)
    write_weights(((key, t.to(dtype)) for key, t in composed_tensors(config, sources, seed)), out, max_file_bytes)
    write_config(config, out, dtype)
    write_companions(config, tokenizer, template, out)
    return out


def compose_config(
    vision: PretrainedConfig,
    llm: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    pinpoints: tuple[tuple[int, int], ...] | None = None,
) -> LlavaNextConfig:
    """The config of the composed model (recipe: features of layer -2; CLS dropped for CLIP, all patches for SigLIP).

    Raises:
        ValueError: pinpoints that do not fit the tower's tile size, or none known for it.
    """
    if pinpoints is None:
        known = {336: ORIGINAL_336, 384: ORIGINAL_384}
        if vision.image_size not in known:
            raise ValueError(f"no published pinpoints for {vision.image_size} px tiles; give them")
        pinpoints = known[vision.image_size]
    anyres = AnyRes(vision.image_size, vision.patch_size, pinpoints)
    rows = max(llm.vocab_size, len(tokenizer))
    llm = type(llm).from_dict({**llm.to_dict(), "pad_token_id": tokenizer.pad_token_id})
    llm.vocab_size = math.ceil(rows / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    llm.bos_token_id, llm.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    has_cls = vision.model_type == "clip_vision_model"
    return LlavaNextConfig(
        vision_config=vision.to_dict(),
        text_config=llm.to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_grid_pinpoints=[list(p) for p in pinpoints],
        image_seq_length=anyres.patches_per_side**2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if has_cls else "full",
        tie_word_embeddings=bool(llm.tie_word_embeddings),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def source_of_keys(config: LlavaNextConfig, vision: Part, llm: Part) -> dict[str, tuple[Part | None, str, torch.Size]]:
    """For every key of the new folder: the part that has it (None: new), its name there, its shape in the new model.

    Raises:
        ValueError: a part lacks weights of the architecture that its config describes.
    """
    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(config)
    shapes = {file_key(name): p.shape for name, p in model.named_parameters()}
    available: dict[str, tuple[Part, str]] = {}
    for part in (vision, llm):
        for name in part.weights.names():
            available[_composed_key(part is vision, name)] = (part, name)
    new = {key for key in shapes if key.startswith(("multi_modal_projector.", "image_newline"))}
    missing = sorted(set(shapes) - set(available) - new)
    if missing:
        raise ValueError(
            f"the checkpoints lack {len(missing)} of {len(shapes)} weights, e.g. {missing[:4]}; is one of them "
            "incomplete, or not the kind of model its config.json says?"
        )
    # sources first and in their files' order, so that every file is opened once
    order = [key for key in available if key in shapes] + [key for key in shapes if key in new]
    return {key: (*available.get(key, (None, key)), shapes[key]) for key in order}


def _composed_key(is_vision: bool, name: str) -> str:
    if is_vision:
        # CLIPModel, CLIPVisionModel and their transformers-5 forms differ in these prefixes only
        return f"vision_tower.vision_model.{name.rpartition('vision_model.')[2]}"
    return f"language_model.{name}"


def composed_tensors(
    config: LlavaNextConfig, sources: dict[str, tuple[Part | None, str, torch.Size]], seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """(key, tensor) of the whole model, one at a time.

    Raises:
        ValueError: a tensor's shape is not the architecture's.
    """
    for key, (part, name, shape) in sources.items():
        if part is None:
            yield key, new_tensor(key, shape, config, seed)
            continue
        tensor = part.weights.get(name)
        if key.endswith(("embed_tokens.weight", "lm_head.weight")):
            tensor = pad_rows(tensor, shape[0])
        if tensor.shape != shape:
            raise ValueError(f"{name}: the checkpoint has {tuple(tensor.shape)}, its config asks for {tuple(shape)}")
        yield key, tensor


def new_tensor(key: str, shape: torch.Size, config: LlavaNextConfig, seed: int) -> torch.Tensor:
    """Seeded projector weights (`nn.Linear`'s own distribution, as in the original) and newline (normal, 1/sqrt(d))."""
    generator = seeded(seed, key)
    hidden_size = config.text_config.hidden_size
    if key == "image_newline":
        return torch.empty(shape).normal_(0.0, 1 / math.sqrt(hidden_size), generator=generator)
    fan_in = config.vision_config.hidden_size if "linear_1" in key else hidden_size
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def pad_rows(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """Appends rows that start at the mean of the old ones, up to `rows`."""
    missing = rows - weight.shape[0]
    if missing <= 0:
        return weight
    mean = weight.float().mean(dim=0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(missing, -1)])


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a language model's folder or repository."""
    return AutoTokenizer.from_pretrained(resolve_folder(name), use_fast=True)
