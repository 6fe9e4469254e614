"""A vision tower and a language model become one LLaVA-NeXT model folder.

Tensors go from the sources to the new folder one by one; a 7B model never exists in memory. What is new (projector,
newline, vocabulary rows) is seeded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaNextConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from llava_next.anyres import AnyRes, original_pinpoints
from llava_next.model.folders.card import Story, part_of, write_card
from llava_next.model.folders.check import check_folder
from llava_next.model.folders.companions import write_companions
from llava_next.model.folders.export import MAX_FILE_BYTES, file_key, made_aside, write_config, write_weights
from llava_next.model.folders.sources import CheckpointWeights, RandomWeights, read_config, seeded
from llava_next.model.forward.kinds import TOWER_KINDS, check_language_model, check_tower, tower_kind
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration, used_layers
from llava_next.own_template import template_for
from llava_next.paths import new_folder
from llava_next.repositories import cure, resolve_folder
from llava_next.tokenise import DATA_TOKENS, IMAGE_TOKEN

TOWER, LLM = "vision tower", "language model"  # roles
VOCABULARY_KEYS = ("embed_tokens.weight", "lm_head.weight")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"  # of a language model by itself
FEATURE_LAYER = -2  # of the tower, in the published recipe
VOCABULARY_MULTIPLE = 64  # rows of embedding and head are padded to this, as in the published checkpoints


@dataclass
class Part:
    """A vision tower or a language model to compose from: its config and where its tensors come from.

    Args:
        notes: what a person should know of it, one a line.
        origin: name and licence for the card, see `part_of`.
    """

    config: PretrainedConfig
    weights: CheckpointWeights | RandomWeights
    notes: tuple[str, ...] = ()
    origin: dict = field(default_factory=dict)


def vision_part(name: str) -> Part:
    """The vision tower of a checkpoint (a CLIP or SigLIP model, with or without its text half).

    Raises:
        ValueError: a tower of another kind, a folder without config or weights.
    """
    config = read_config(resolve_folder(name, "config"))  # refused before its weights are fetched
    config = getattr(config, "vision_config", config)
    check_tower(config, name)
    folder = resolve_folder(name)
    _check_normalisation(config, folder)
    return Part(config, CheckpointWeights(folder), origin=part_of(TOWER, name, folder))


def _check_normalisation(config: PretrainedConfig, folder: Path) -> None:
    """Refuses a tower whose own processor normalises otherwise than the composed model would."""
    file, kind = folder / "preprocessor_config.json", tower_kind(config)
    saved = json.loads(file.read_text()) if file.exists() else {}
    for key, ours in (("image_mean", kind.mean), ("image_std", kind.std)):
        theirs = saved.get(key, ours)
        if any(abs(a - b) > 1e-4 for a, b in zip(theirs, ours, strict=True)):
            raise ValueError(
                f"{file}: {key} is {theirs}, towers of the kind {config.model_type} are given pictures with "
                f"{list(ours)}; this one would see others than it was trained with"
            )


def llm_part(name: str) -> Part:
    """The language model of a checkpoint. One that its config calls tied, with a head of its own in the files that is
    not the embedding, is taken as untied: dropping the head would make it another model.

    Raises:
        ValueError: a model of another kind, a folder without config or weights.
    """
    config = read_config(resolve_folder(name, "config"))  # refused before its weights are fetched
    check_language_model(config, name)
    folder = resolve_folder(name)
    weights, origin = CheckpointWeights(folder), part_of(LLM, name, folder)
    if not (config.tie_word_embeddings and _has_own_head(weights)):
        return Part(config, weights, origin=origin)
    config.tie_word_embeddings = False
    note = (
        f"{name}: config.json says tie_word_embeddings: true, but {HEAD} in its files is not {EMBEDDING}: "
        "both are taken, untied"
    )
    return Part(config, weights, (note,), origin)


def _has_own_head(weights: CheckpointWeights) -> bool:
    """Whether there is an output head that holds other numbers than the embedding."""
    if not {HEAD, EMBEDDING} <= weights.shapes.keys():
        return False
    return not torch.equal(weights.get(HEAD), weights.get(EMBEDDING))


def random_part(config: PretrainedConfig, seed: int, name: str = "") -> Part:
    """A part with the architecture of `config` and seeded random weights.

    Args:
        name: of the architecture, for the card; without it its kind.
    """
    is_tower = config.model_type in TOWER_KINDS
    auto_class = AutoModel if is_tower else AutoModelForCausalLM
    origin = part_of(TOWER if is_tower else LLM, name or config.model_type, None)
    return Part(config, RandomWeights.of(config, auto_class, seed), origin=origin)


def compose(
    vision: Part,
    llm: Part,
    tokenizer: PreTrainedTokenizerBase,
    template_name: str,
    out: str | Path,
    pinpoints: tuple[tuple[int, int], ...] | None = None,
    seed: int = 0,
    data_tokens: Sequence[str] = (),
    feature_layer: int = FEATURE_LAYER,
    dtype: torch.dtype = torch.bfloat16,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Writes a LLaVA-NeXT model folder: weights, config, tokenizer, processor, chat template, generation config.

    Args:
        tokenizer: of the language model; gets the image and pad tokens it lacks.
        template_name: chat template saved with the tokenizer and processor; `own`: the one that `tokenizer` brings.
        pinpoints: (height, width) canvases; default: see `compose_config`.
        seed: of projector, newline and nothing else.
        data_tokens: special tokens of the tokenizer that data may contain, kept with it.
        feature_layer: of the tower, see `used_layers`.

    Returns:
        The folder, which passes every check of `check_folder`.

    Raises:
        ValueError: parts that do not go together, a checkpoint that lacks weights, a tokenizer that lacks the
            template's special tokens or whose own template cannot be trained, a folder that is not empty, a result that
            fails a check. Nothing is left of it.
        OSError: the folder cannot be written; nothing is left of it.
    """
    out = new_folder(out)
    check_tower(vision.config, vision.weights.label)
    check_language_model(llm.config, llm.weights.label)
    template = template_for(template_name, tokenizer)
    if data_tokens:
        tokenizer.init_kwargs[DATA_TOKENS] = list(data_tokens)
    template.prepare_tokenizer(tokenizer)
    config = compose_config(vision.config, llm.config, tokenizer, pinpoints, feature_layer)
    sources = source_of_keys(config, vision, llm)
    with made_aside(out) as aside:
        write_weights(composed_tensors(config, sources, seed), aside, max_file_bytes, dtype)
        write_config(config, aside, dtype)
        write_companions(config, tokenizer, template.jinja, aside)
        write_card(aside, Story([part.origin for part in (llm, vision) if part.origin]))
        if failed := [finding for finding in check_folder(aside) if not finding.ok]:
            raise ValueError("the composed model fails: " + "; ".join(f"{f.check}: {f.text}" for f in failed))
    return out


def compose_config(
    vision: PretrainedConfig,
    llm: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    pinpoints: tuple[tuple[int, int], ...] | None = None,
    feature_layer: int = FEATURE_LAYER,
) -> LlavaNextConfig:
    """The config of the composed model: CLS dropped for CLIP, all patches for SigLIP.

    Args:
        pinpoints: default: the published recipe's, for tiles of the tower's size.
        feature_layer: of the tower, see `used_layers`.

    Raises:
        ValueError: pinpoints that do not fit the tower's tile size, or no such layer.
    """
    used_layers(vision.num_hidden_layers, feature_layer)
    if pinpoints is None:
        pinpoints = original_pinpoints(vision.image_size)
    anyres = AnyRes(vision.image_size, vision.patch_size, pinpoints)
    rows = max(llm.vocab_size, len(tokenizer))
    rows = math.ceil(rows / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    llm = type(llm).from_dict({**llm.to_dict(), "vocab_size": rows, **ids})
    for part in (vision, llm):
        part.__dict__.pop("auto_map", None)  # code that came with a checkpoint is not needed, and never run
    return LlavaNextConfig(
        vision_config=vision.to_dict(),
        text_config=llm.to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_grid_pinpoints=[list(p) for p in pinpoints],
        image_seq_length=anyres.patches_per_side**2,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default" if tower_kind(vision).has_cls else "full",
        tie_word_embeddings=bool(llm.tie_word_embeddings),
        **ids,
    )


def source_of_keys(config: LlavaNextConfig, vision: Part, llm: Part) -> dict[str, tuple[Part | None, str, torch.Size]]:
    """For every key of the new folder: the part that has it (None: new), its name there, its shape in the new model.

    Raises:
        ValueError: a part lacks weights of the architecture that its config describes, or has them in another shape.
    """
    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(config)
    shapes = {file_key(name): p.shape for name, p in model.named_parameters()}
    available: dict[str, tuple[Part, str]] = {}
    for part, prefix in ((vision, "vision_tower."), (llm, "language_model.")):
        for name in part.weights.names():
            available[_composed_key(part is vision, name)] = (part, name)
        wanted = [key for key in shapes if key.startswith(prefix)]
        if missing := [key for key in wanted if key not in available]:
            raise ValueError(
                f"{part.weights.label} lacks {len(missing)} of the {len(wanted)} weights of a {part.config.model_type} "
                f"model, e.g. {', '.join(missing[:3])}; is it incomplete, or not the model its config.json says?"
            )
    for key, (part, name) in available.items():
        if key in shapes and not _fits(part.weights.shapes[name], shapes[key], key):
            raise ValueError(
                f"{part.weights.label}: {name} is {tuple(part.weights.shapes[name])}, but its config.json asks for "
                f"{tuple(shapes[key])}; weights and config are of two models: fetch both from one"
            )
    new = {key for key in shapes if key.startswith(("multi_modal_projector.", "image_newline"))}
    # sources first and in their files' order, so that every file is opened once
    order = [key for key in available if key in shapes] + [key for key in shapes if key in new]
    return {key: (*available.get(key, (None, key)), shapes[key]) for key in order}


def _fits(shape: torch.Size, wanted: torch.Size, key: str) -> bool:
    if key.endswith(VOCABULARY_KEYS):  # rows are appended
        return shape[1:] == wanted[1:] and shape[0] <= wanted[0]
    return shape == wanted


def _composed_key(is_vision: bool, name: str) -> str:
    if is_vision:
        # CLIPModel, CLIPVisionModel and their transformers-5 forms differ in these prefixes only
        return f"vision_tower.vision_model.{name.rpartition('vision_model.')[2]}"
    return f"language_model.{name}"


def composed_tensors(
    config: LlavaNextConfig, sources: dict[str, tuple[Part | None, str, torch.Size]], seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """(key, tensor) of the whole model, one at a time."""
    for key, (part, name, shape) in sources.items():
        if part is None:
            yield key, new_tensor(key, shape, config, seed)
            continue
        tensor = part.weights.get(name)
        yield key, pad_rows(tensor, shape[0]) if key.endswith(VOCABULARY_KEYS) else tensor


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
    # in chunks: a float32 copy of LLaMA3's embedding would be 2 GB
    mean = sum(chunk.float().sum(dim=0) for chunk in weight.split(8192)) / weight.shape[0]
    return torch.cat([weight, mean.to(weight.dtype).expand(missing, -1)])


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a language model's folder or repository.

    Raises:
        ValueError: there is none, or only a slow one.
    """
    folder = resolve_folder(name, "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        cures = f"give the language model's own, or {cure(folder)}"
        raise ValueError(f"{folder}: no tokenizer could be loaded ({error}); {cures}") from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"{folder}: {type(tokenizer).__name__} is a slow tokenizer, which does not tell where in a text its tokens "
            "lie, as supervising answers needs; give a folder with a tokenizer.json (--tokenizer)"
        )
    return tokenizer
