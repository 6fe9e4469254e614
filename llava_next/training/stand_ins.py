"""What a plan takes for a model that is not at hand: an architecture, and a tokenizer that only fills its place."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from llava_next.model.folders.compose import compose_config
from llava_next.model.folders.dry import (
    ARCHITECTURES,
    LLMS,
    OTHER_LLMS,
    OTHER_TOWERS,
    TOWERS,
    architecture,
    corpus_texts,
    train_tokenizer,
)
from llava_next.model.folders.sources import read_config
from llava_next.model.forward.kinds import check_language_model
from llava_next.paths import local_path
from llava_next.repositories import resolve_folder
from llava_next.templates import OWN, get_template
from llava_next.training.recipe.config import RunConfig
from llava_next.training.setup import Parts, load_parts, parts_of

DEFAULT_TOWER = next(iter(TOWERS))
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def plan_parts(config: RunConfig) -> Parts:
    """The parts of a run that is only planned: of its model folder, or of the architecture that `model` names.

    `model` may be a hub name, a folder or a `config.json`, of a LLaVA-NeXT model or of a language model; a vision tower
    follows behind a plus: `lmsys/vicuna-7b-v1.5+google/siglip-so400m-patch14-384`, CLIP-L/336 without.

    Raises:
        ValueError: none of that.
    """
    folder = local_path(config.model)
    if any((folder / name).exists() for name in TOKENIZER_FILES):
        return load_parts(config)
    # no tokenizer brings an own template, and its lengths are estimated anyway
    template = get_template("chatml" if config.data.template == OWN else config.data.template)
    chat = get_template("vicuna_v1") if template.caption_only else template  # a folder is composed for a chat
    tokenizer = train_tokenizer(corpus_texts([], chat.name), 512, chat.name)
    chat.prepare_tokenizer(tokenizer)
    name, _, tower = config.model.partition("+")
    found = read_architecture(name, of_llm=True)
    if found.model_type != "llava_next":
        check_language_model(found, f"model: {name}")
        found.vocab_size += 2  # rows for the image and the pad token, as a composed model has
        found = compose_config(read_architecture(tower or DEFAULT_TOWER), found, tokenizer)
    parts = parts_of(config, found, tokenizer, template)
    parts.stands_in = "an architecture, no model folder: its vocabulary and special tokens are not looked at"
    return parts


def read_architecture(name: str, *, of_llm: bool = False) -> PretrainedConfig:
    """The config of a known name, a folder, a `config.json` or a hub repository; raises as `architecture` does."""
    if name in ARCHITECTURES:
        return architecture(name)
    path = local_path(name)
    folder = path.parent if path.is_file() else path if path.is_dir() else fetched(name)
    if (folder / "config.json").exists():
        config = read_config(folder)
        if config.model_type == "llava_next":
            return config
    return architecture(str(folder), of_llm=of_llm)


def fetched(name: str) -> Path:
    """The folder of a hub repository's `config.json`. Raises ValueError."""
    try:
        return resolve_folder(name, "config")
    except ValueError as error:
        llms, towers = ", ".join(LLMS | OTHER_LLMS), ", ".join(TOWERS | OTHER_TOWERS)
        raise ValueError(
            f"model: {name} is no folder, no config.json and no architecture known without network ({llms}; behind a "
            f"plus {towers}); {error}"
        ) from error
