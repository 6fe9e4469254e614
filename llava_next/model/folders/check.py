"""Proves that a model folder is whole and agrees with itself, without loading its weights.

A folder can load and still answer badly: random weights under a wrong name, an image processor with other canvases
than the model, a chat template that is not the training's. Each check here finds one kind of that. Headers of the
weight files are read, never the tensors, so a 7B folder takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoConfig, AutoProcessor, LlavaNextConfig, PreTrainedTokenizerFast, ProcessorMixin
from transformers.utils import logging

from llava_next.anyres import AnyRes
from llava_next.model.folders.companions import image_processor_config, processor_config
from llava_next.model.folders.export import INDEX_NAME, file_key, old_rope
from llava_next.model.forward.kinds import check_language_model, check_tower, tower_kind
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration
from llava_next.own_template import NAMES, template_of
from llava_next.templates import Template
from llava_next.tokenise import IMAGE_TOKEN, data_tokens
from llava_next.turns import SYSTEM

ROLES = {SYSTEM: "system", "human": "user", "gpt": "assistant"}
DTYPE_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# (width, height) of pictures: every kind of canvas, padding on either side, smaller than a tile, very thin
PICTURE_SIZES = ((640, 480), (480, 640), (300, 200), (90, 100), (1200, 300), (300, 1200), (535, 1071), (1071, 535))
PICTURE_SIZES += ((1000, 1000), (1500, 40), (40, 1500))
QUESTION, ANSWER = "What is  written here ?\nThe number's digits , please.", "It says 42 , I think.\nNo, 43."
# (number of pictures, turns)
CHATS = (
    (1, (f"{IMAGE_TOKEN}\n{QUESTION}", ANSWER, "Sure?", "Yes.")),
    (0, ("Écris « 2 + 2 » 🐱", ANSWER)),
    (2, (f"{IMAGE_TOKEN}\nWhat?", "A cat.", f"And {IMAGE_TOKEN}\nthis? ", ANSWER)),
)


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: name of the check.
        ok: whether the folder passed.
        text: what was found in order; or what is wrong, where, and what to do.
    """

    check: str
    ok: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok    ' if self.ok else 'FAILED'}  {self.check:<13} {self.text}"


def check_folder(folder: str | Path, names: Collection[str] | None = None) -> list[Finding]:
    """Runs every check on a model folder; reads its files only, on one process.

    Args:
        names: of the checks to run; None: all.

    Returns:
        One finding for each check, in a fixed order. A check that cannot run, for example because a file is not
        there, has failed.
    """
    subject, verbosity = ModelFolder(Path(folder)), logging.get_verbosity()
    logging.set_verbosity_error()  # a warning of a library about a folder is no finding
    try:
        return [_finding(subject, name) for name in CHECKS if names is None or name in names]
    finally:
        logging.set_verbosity(verbosity)


def _finding(subject: ModelFolder, name: str) -> Finding:
    try:
        return Finding(name, True, CHECKS[name](subject))
    except Exception as error:  # whatever a damaged folder makes the libraries raise is a finding
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return Finding(name, False, kind + " ".join(str(error).split()))


class ModelFolder:
    """What the checks look at, read when first asked for."""

    def __init__(self, path: Path):
        self.path = path

    def json(self, name: str) -> dict:
        """One JSON file. Raises ValueError when it is absent or no JSON."""
        path = self.path / name
        if not path.is_file():
            raise ValueError(f"{path} is missing: export again, or copy it from the folder that training started with")
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON ({error}): export again") from None

    @cached_property
    def config(self) -> LlavaNextConfig:
        self.json("config.json")
        config = AutoConfig.from_pretrained(self.path)
        if config.model_type != "llava_next":
            raise ValueError(f"config.json describes a {config.model_type!r}, not a llava_next: give another folder")
        return config

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape of every tensor that the config's architecture has."""
        with torch.device("meta"):
            model = LlavaNextForConditionalGeneration(self.config)
        return {file_key(name): tuple(p.shape) for name, p in model.named_parameters()}

    @cached_property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...], str]]:
        """Key -> (file, shape, dtype as safetensors names it), from the headers of the weight files."""
        files = ["model.safetensors"]
        if (self.path / INDEX_NAME).exists():
            files = sorted(set(self.json(INDEX_NAME)["weight_map"].values()))
        found = {}
        for file in files:
            if not (self.path / file).is_file():
                raise ValueError(f"{self.path / file} is missing: copy the folder again, with all its files")
            with safe_open(self.path / file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - not a dict
                    part = opened.get_slice(key)
                    found[key] = (file, tuple(part.get_shape()), part.get_dtype())
        return found

    @cached_property
    def processor(self) -> ProcessorMixin:
        return AutoProcessor.from_pretrained(self.path)

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self.processor.tokenizer

    @cached_property
    def template(self) -> Template:
        """The training template whose jinja the tokenizer has."""
        if (template := template_of(self.tokenizer.chat_template, lambda: self.tokenizer)) is not None:
            return template
        state = "has a chat template that no training used" if self.tokenizer.chat_template else "has no chat template"
        raise ValueError(f"the tokenizer {state} (known: {', '.join(NAMES[1:])}): compose the model with one of them")

    @property
    def anyres(self) -> AnyRes:
        vision = self.config.vision_config
        return AnyRes(vision.image_size, vision.patch_size, [tuple(p) for p in self.config.image_grid_pinpoints])

    def count_image_tokens(self, images: list[Image.Image]) -> list[int]:
        """How many image tokens the processor writes for each picture."""
        ids = self.processor(text=[IMAGE_TOKEN] * len(images), images=images)["input_ids"]
        return [list(row).count(self.config.image_token_id) for row in ids]


def check_config(f: ModelFolder) -> str:
    """config.json says what the files hold, in the words of old and new releases."""
    raw, config = f.json("config.json"), f.config
    if raw.get("architectures") != ["LlavaNextForConditionalGeneration"]:
        raise ValueError(
            f"config.json: architectures is {raw.get('architectures')}; vLLM needs LlavaNextForConditionalGeneration"
        )
    stated = {part.get(name) for part in (raw, raw["text_config"]) for name in ("dtype", "torch_dtype")} - {None}
    if len(stated) != 1 or raw.get("torch_dtype") is None:
        raise ValueError(f"config.json: dtype and torch_dtype are {sorted(stated)}: state one dtype under both names")
    check_language_model(config.text_config, "config.json, text_config")
    check_tower(config.vision_config, "config.json, vision_config")
    old = old_rope(config.text_config)
    for key, value in old.items():
        if (found := raw["text_config"].get(key)) != value:
            raise ValueError(
                f"config.json: text_config.{key} is {found}, rope_parameters say {value}: releases before 5.0 read the "
                "first, write it there too"
            )
    kinds = f"{config.text_config.model_type} + {config.vision_config.model_type}"
    return f"{kinds}, {stated.pop()}, rope theta {old['rope_theta']}"


def check_keys(f: ModelFolder) -> str:
    """Exactly the architecture's tensors, and the index tells the truth."""
    missing, unexpected = sorted(set(f.shapes) - set(f.tensors)), sorted(set(f.tensors) - set(f.shapes))
    if missing or unexpected:
        lists = [f"{len(k)} {word} {k[:3]}" for word, k in (("missing", missing), ("unexpected", unexpected)) if k]
        raise ValueError(f"weights: {' and '.join(lists)}: missing ones load as random numbers; export again")
    if (f.path / INDEX_NAME).exists():
        weight_map = f.json(INDEX_NAME)["weight_map"]
        if wrong := [key for key, (file, *_) in f.tensors.items() if weight_map.get(key) != file]:
            raise ValueError(f"{INDEX_NAME} names another file for {wrong[:3]}: export again")
    return f"{len(f.tensors)} tensors in {len({file for file, *_ in f.tensors.values()})} file(s)"


def check_shapes(f: ModelFolder) -> str:
    """Shapes are the architecture's."""
    for key, (file, shape, _) in f.tensors.items():
        if shape != f.shapes.get(key, shape):
            raise ValueError(
                f"{file}: {key} is {shape}, config.json asks for {f.shapes[key]}: take both from one model"
            )
    return f"{sum(torch.Size(shape).numel() for _, shape, _ in f.tensors.values()):,} parameters"


def check_dtypes(f: ModelFolder) -> str:
    """Every tensor has the dtype that config.json states."""
    stated = f.json("config.json").get("torch_dtype")
    for key, (file, _, dtype) in f.tensors.items():
        if dtype != DTYPE_NAMES.get(stated):
            raise ValueError(f"{file}: {key} is {dtype}, config.json states {stated}: correct dtype and torch_dtype")
    return f"all {stated}"


def check_processor(f: ModelFolder) -> str:
    """The image processor cuts the tiles that the model takes, and the processor counts the features it makes."""
    config, vision = f.config, f.config.vision_config
    size, strategy = vision.image_size, config.vision_feature_select_strategy
    looked_at = ("image_grid_pinpoints", "size", "crop_size", "image_mean", "image_std")
    preprocessor = {key: image_processor_config(config)[key] for key in looked_at}
    due = {"preprocessor_config.json": preprocessor, "processor_config.json": processor_config(config)}
    for name, values in due.items():
        saved = f.json(name)
        for key, value in values.items():
            if saved.get(key) != value and key != "processor_class":
                raise ValueError(f"{name}: {key} is {saved.get(key)}, the model's config needs {value}: write that")
    if strategy != ("default" if tower_kind(vision).has_cls else "full"):
        raise ValueError(f"config.json: vision_feature_select_strategy {strategy!r} does not fit a {vision.model_type}")
    if config.image_seq_length != f.anyres.patches_per_tile:
        raise ValueError(
            f"config.json: image_seq_length is {config.image_seq_length}, a tile has {f.anyres.patches_per_tile} "
            "features: write that"
        )
    # transformers 5 can take values from elsewhere in the folder
    if [list(p) for p in f.processor.image_processor.image_grid_pinpoints] != preprocessor["image_grid_pinpoints"]:
        raise ValueError(
            "processor_config.json: holds other image_grid_pinpoints than preprocessor_config.json: remove them there"
        )
    return f"{size} px tiles of {vision.patch_size} px patches, {len(config.image_grid_pinpoints)} canvases, {strategy}"


def check_tokenizer(f: ModelFolder) -> str:
    """The image token is the model's, every id has a row, and releases before 5.0 read the files alike."""
    saved, config, tokenizer = f.json("tokenizer_config.json"), f.config, f.tokenizer
    image_id = tokenizer.get_vocab().get(IMAGE_TOKEN)
    if image_id is None or not tokenizer.added_tokens_decoder[image_id].special:
        raise ValueError(f"tokenizer.json: {IMAGE_TOKEN} is no special token: compose the model again")
    if config.image_token_id != image_id:
        raise ValueError(
            f"config.json: image_token_index is {config.image_token_id}, but {IMAGE_TOKEN} is {image_id} in the "
            "tokenizer: write that"
        )
    rows, largest = config.text_config.vocab_size, max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ValueError(
            f"the tokenizer has ids up to {largest}, the model {rows} rows: compose it again with this tokenizer"
        )
    if tokenizer.padding_side != "left":
        raise ValueError(
            "tokenizer_config.json: padding_side is not left, batched generation would go wrong: write left"
        )
    if saved.get("tokenizer_class") == "TokenizersBackend" or isinstance(saved.get("extra_special_tokens"), list):
        raise ValueError(
            "tokenizer_config.json: transformers 4 cannot read a tokenizer_class TokenizersBackend or a list "
            "extra_special_tokens: write PreTrainedTokenizerFast and additional_special_tokens"
        )
    if saved.get("tokenizer_class") == "PreTrainedTokenizerFast" and "token_type_ids" in saved.get(
        "model_input_names", ["token_type_ids"]
    ):
        raise ValueError(
            "tokenizer_config.json: transformers 4 would give the model token_type_ids, which it does not take: write "
            'model_input_names ["input_ids", "attention_mask"]'
        )
    return f"{IMAGE_TOKEN} is {image_id}; ids up to {largest} in {rows} rows"


def check_terminator(f: ModelFolder) -> str:
    """Generation ends at the template's terminator, which is the tokenizer's end token."""
    stop, tokenizer = f.template.stop, f.tokenizer
    stop_id, generation = tokenizer.convert_tokens_to_ids(stop), f.json("generation_config.json")
    if generation.get("eos_token_id") not in (stop_id, [stop_id]):
        raise ValueError(
            f"generation_config.json: eos_token_id is {generation.get('eos_token_id')}, template {f.template.name} "
            f"ends answers with {stop} ({stop_id}): write that"
        )
    if tokenizer.eos_token_id != stop_id:
        raise ValueError(f"tokenizer_config.json: eos_token is {tokenizer.eos_token}, it must be {stop}: write that")
    if generation.get("do_sample"):
        raise ValueError("generation_config.json: do_sample is true; published scores are greedy: write false")
    return f"{stop} ({stop_id}), greedy"


def check_template(f: ModelFolder) -> str:
    """The chat template is the training's, in every file that some release reads it from."""
    template = f.template
    path = f.path / "chat_template.jinja"
    saved = {
        "tokenizer_config.json": f.json("tokenizer_config.json").get("chat_template"),
        "chat_template.jinja": path.read_text(encoding="utf-8") if path.exists() else None,
        "chat_template.json": f.json("chat_template.json").get("chat_template"),
    }
    for name, jinja in saved.items():
        if jinja != template.jinja:
            state = "has no" if jinja is None else "has another"
            raise ValueError(f"{name}: {state} chat template than {template.name}, the tokenizer's: write that one")
    return f"{template.name}, in {len(saved)} files"


def check_chats(f: ModelFolder) -> str:
    """Rendered chats, string and list content, give the ids that training uses; prompts end where answers begin."""
    image = Image.new("RGB", (50, 40), (200, 30, 90))
    length, chats = f.anyres.num_tokens(*image.size), [(count, None, texts) for count, texts in CHATS]
    if f.template.system_turn is not None:
        chats.append((0, "Answer in  one word .\nOr two.", (QUESTION, ANSWER)))
    if declared := data_tokens(f.tokenizer):
        first, last = declared[0], declared[-1]
        chats.append((0, None, (f"{first} or{last} ?", f"At {first}{last} .\n{first}")))
    for count, system, texts in chats:
        turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
        if system is not None:
            turns = [{"from": SYSTEM, "value": system}, *turns]
        ids, labels = f.template.encode(turns, f.tokenizer, f.config.image_token_id, [length] * count)
        answer = [at + 1 for at, (a, b) in enumerate(pairwise(labels.tolist())) if a == -100 != b][-1]
        for as_list in (False, True):
            form = _parts if as_list else str
            messages = [{"role": ROLES[turn["from"]], "content": form(turn["value"])} for turn in turns]
            for due, chat, prompt in ((ids, messages, False), (ids[:answer], messages[:-1], True)):
                text = f.processor.apply_chat_template(chat, add_generation_prompt=prompt)
                found = list(f.processor(text=text, images=[image] * count or None)["input_ids"][0])
                if found != due.tolist():
                    raise ValueError(
                        f"the chat {texts[0]!r} ({'list' if as_list else 'string'} content"
                        f"{', as a prompt' if prompt else ''}) is tokenised otherwise than in training: "
                        f"{_first_difference(f.tokenizer, found, due.tolist())}: processor, tokenizer.json or template "
                        f"{f.template.name} was changed, or they do not fit each other"
                    )
    return f"{len(chats)} chats, string and list content, with and without the last answer"


def _first_difference(tokenizer: PreTrainedTokenizerFast, found: list[int], due: list[int]) -> str:
    """The first tokens that are not the same, as words for a message."""
    at = next((at for at, (a, b) in enumerate(zip(found, due, strict=False)) if a != b), min(len(found), len(due)))
    ours, theirs = (tokenizer.convert_ids_to_tokens(ids[at : at + 3]) for ids in (due, found))
    return f"from token {at} on {theirs} where training has {ours}"


def _parts(text: str) -> list[dict]:
    """String content as a list of parts; the template writes the line break after a placeholder itself."""
    before, *after = text.split(IMAGE_TOKEN)
    parts = [{"type": "text", "text": before}] if before else []
    for rest in after:
        parts += [{"type": "image"}, {"type": "text", "text": rest.removeprefix("\n")}]
    return parts


def check_image_tokens(f: ModelFolder) -> str:
    """The processor writes as many image tokens as the model has features, for pictures of all shapes."""
    found = f.count_image_tokens([Image.new("RGB", size) for size in PICTURE_SIZES])
    for size, count in zip(PICTURE_SIZES, found, strict=True):
        due = f.anyres.num_tokens(*size)
        if count != due:
            raise ValueError(
                f"the processor writes {count} image tokens for {size[0]} x {size[1]} pixels, the model makes {due} "
                "features: compare processor_config.json and preprocessor_config.json with config.json"
            )
    return f"{len(found)} picture sizes, {min(found):,} to {max(found):,} tokens"


CHECKS: dict[str, Callable[[ModelFolder], str]] = {
    "config": check_config,
    "keys": check_keys,
    "shapes": check_shapes,
    "dtypes": check_dtypes,
    "processor": check_processor,
    "tokenizer": check_tokenizer,
    "terminator": check_terminator,
    "chat template": check_template,
    "chats": check_chats,
    "image tokens": check_image_tokens,
}
