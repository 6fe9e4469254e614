"""A record as people write them becomes a sample as it is stored, whatever its form and the file it lies in.

Texts: `conversations` (LLaVA, ShareGPT), `messages` (roles and contents, a content being a string or a list of parts),
`prompt` with `completion`, or a `caption`. A system prompt is a first turn from `system` or a string beside the turns.
Pictures: see `picture_forms`; also in the parts of a message. What each form becomes: a table in data_tools/README.md.
One way for all: builds, shards of others, evaluation, plans of raw data.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llava_next.data.format.picture_forms import (
    VIDEO_KEYS,
    Picture,
    is_path,
    key_names,
    listed,
    media_key,
    opened,
    pictures_of,
)
from llava_next.data.format.tar import BadSample
from llava_next.paths import PathError, below, local_path
from llava_next.tokenise import IMAGE_TOKEN
from llava_next.turns import HUMAN, SYSTEM

TURN_KEYS = ("conversations", "conversation", "messages")
TEXT_KEYS = (*TURN_KEYS, "prompt", "completion", "caption")
SYSTEM_KEYS = ("system", "system_prompt")
_SYSTEM_ROLES = (SYSTEM, "developer")  # in any case
_PART_KEYS = ("image", "path", "image_url", "url", "bytes", "data")  # where a part of a message may hold its picture
_PICTURE_PARTS = ("image", "image_url", "input_image")
_TEXT_PARTS = ("text", "input_text", "output_text")


class Record(NamedTuple):
    """A sample in the stored form; what its turns say is checked by `turns.read_turns` and `place_images`.

    Args:
        id: as the record names it; None: not at all.
        conversations: turns `{"from", "value"}`. A first one from `system` is the sample's own system prompt.
        pictures: in the order of their placeholders: embedded ones, or paths as the record has them.
    """

    id: str | None
    conversations: list
    pictures: list[str | Picture]


def read_record(record: dict, *, allow_text_image_token: bool = False) -> Record:
    """The stored form of a record.

    Args:
        allow_text_image_token: take a record without pictures whose question has `<image>`, as characters.

    Raises:
        BadSample: no text or several, parts or pictures that are none of the known forms, pictures under unknown keys,
            a video; the record's keys are named.
    """
    if any(record.get(key) for key in VIDEO_KEYS):
        raise BadSample("the record has a video, which cannot be trained on: take it out, or give frames as pictures")
    turns, places_none = _turns(record)
    parts = [part for turn in turns for part in _picture_parts(turn)]
    pictures = _placed(parts, record)
    image = IMAGE_TOKEN if len(parts) <= 1 else IMAGE_TOKEN + "\n"  # as a saved chat template renders parts
    stored = [_stored_turn(number, turn, image) for number, turn in enumerate(turns, start=1)]
    stored = _with_system(record, stored)
    if places_none and pictures and not parts and not has_text_image_token(stored):
        stored = _in_front(stored, len(pictures))
    if not pictures and not allow_text_image_token and has_text_image_token(stored):
        raise BadSample(
            f"a question has {IMAGE_TOKEN}, and the record has no picture: its keys are {key_names(record)}. Put the "
            "picture under 'image' or 'images'; if the characters are meant, a build takes --allow_text_image_token"
        )
    if not pictures and (key := media_key(record, (*TEXT_KEYS, *SYSTEM_KEYS))) is not None:
        raise BadSample(
            f"{key} names a picture, and that is no key for one: put it under 'image' or 'images', or take the key out "
            "to train on the text alone"
        )
    name = record.get("id")
    return Record(None if name is None else str(name), stored, [opened(value) for value in pictures])


def has_text_image_token(conversations: list) -> bool:
    """Whether a question of the stored form spells `<image>`; without pictures that is trained as characters."""
    return any(IMAGE_TOKEN in turn["value"] for turn in conversations if _is_human(turn))


def drops_first_turn(conversations: list) -> bool:
    """Whether a conversation in the stored form begins, after its system prompt, with a turn that is not human.

    Such a turn is left out of training, as in the original.
    """
    turns = without_system(conversations)
    return bool(turns) and isinstance(turns[0], dict) and turns[0].get("from") not in HUMAN


def without_system(conversations: list) -> list:
    """The stored turns without their system prompt, if any."""
    return conversations[has_system(conversations) :]


def prepend_system(conversations: list) -> list:
    """The stored turns with their system prompt, if any, in front of the first question instead."""
    turns = list(without_system(conversations))
    system = conversations[0]["value"].strip() if has_system(conversations) else ""
    return _before_question(turns, f"{system}\n\n") if system else turns


def has_system(conversations: list) -> bool:
    """Whether the stored turns begin with the sample's own system prompt."""
    first = conversations[0] if conversations else None
    return isinstance(first, dict) and first.get("from") == SYSTEM and isinstance(first.get("value"), str)


def states_system(conversations: list) -> bool:
    """Whether the sample's own system prompt says something: an empty one takes the training's away."""
    return has_system(conversations) and bool(conversations[0]["value"].strip())


def source_name(record: dict, root: Path | None = None) -> str:
    """The part of a mixture that a record belongs to: its `source` or `data_source`, else its first image's folder.

    Recipes name the parts of a mixture by image root: coco, gqa, ocr_vqa, ... `root`: of images, for absolute paths.
    """
    named = record.get("source") or record.get("data_source")
    if named:
        return str(named)
    try:
        first = next(_all_pictures(record), None)
    except BadSample:
        first = None
    if first is None:
        return "text"
    inside = first if is_path(first) else None
    if inside and (inside[0] in "/~." or ":" in inside):
        try:
            inside = below(local_path(inside), root or os.devnull)
        except PathError:
            inside = None
    return inside.split("/")[0] if inside and "/" in inside else "image"


def holds_pictures(record: dict) -> bool:
    """Whether a record names or holds a picture, beside its messages or in them. Raises BadSample."""
    return next(_all_pictures(record), None) is not None


def _turns(record: dict) -> tuple[list, bool]:
    """The messages as the record has them, and whether its form has no way to place a picture. Raises BadSample."""
    given = {key: _rows(_parsed(record[key])) for key in TURN_KEYS if record.get(key) is not None}
    given = {key: turns for key, turns in given.items() if turns != []} or given
    turns = next(iter(given.values()), None)
    if any(other != turns for other in given.values()):
        raise BadSample(f"{' and '.join(given)} hold different conversations: leave one of them out")
    if given:
        if not isinstance(turns, list):
            raise BadSample(f"{next(iter(given))} is not a list of turns. The record's keys: {key_names(record)}")
        return turns, "messages" in given
    prompt, completion = _rows(record.get("prompt")), _rows(record.get("completion"))
    if prompt is not None and completion is not None:
        asked = prompt if isinstance(prompt, list) else [{"from": "human", "value": prompt}]
        told = completion if isinstance(completion, list) else [{"from": "gpt", "value": completion}]
        return asked + told, True
    if isinstance(record.get("caption"), str):
        return [{"from": "human", "value": IMAGE_TOKEN}, {"from": "gpt", "value": record["caption"]}], False
    raise BadSample(
        "conversations is missing or not a list of turns, and there are no messages, prompt with completion, or "
        f"caption instead. The record's keys: {key_names(record)}"
    )


def _parsed(value):
    """Turns that a table holds as JSON in a string."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _rows(value):
    """Turns that a table holds as columns, {"from": [...], "value": [...]}, as a list of turns."""
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    return value


def _first(turn: dict, *keys: str):
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


def _is_human(turn) -> bool:
    return isinstance(turn, dict) and turn.get("from") in HUMAN and isinstance(turn.get("value"), str)


def _picture_parts(turn) -> Iterator[dict]:
    content = _first(turn, "value", "content") if isinstance(turn, dict) else None
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and _kind(part) in _PICTURE_PARTS:
            yield part


def _kind(part) -> str | None:
    """What a part is: its `type`; without one, what it holds tells."""
    if isinstance(part, str):
        return "text"
    if not isinstance(part, dict) or part.get("type") is not None:
        return part["type"] if isinstance(part, dict) else None
    return "text" if part.get("text") is not None else "image" if _first(part, *_PART_KEYS) is not None else None


def _stored_turn(number: int, turn, image: str):
    """A turn as it is stored, its parts joined. What is no turn stays, for the check of texts. Raises BadSample."""
    if not isinstance(turn, dict):
        return turn
    role, content = _first(turn, "from", "role"), _first(turn, "value", "content")
    if not isinstance(role, str):
        raise BadSample(f"turn {number} has no role: its keys are {key_names(turn)}; write 'from' (or 'role')")
    if role.lower() in _SYSTEM_ROLES:
        role = SYSTEM
    if isinstance(content, list):
        content = "".join(_part_text(number, role, part, image) for part in content)
    return {"from": role, "value": content}


def _part_text(number: int, role: str, part, image: str) -> str:
    """A part of a message as text. Raises BadSample."""
    kind = _kind(part)
    if kind in _PICTURE_PARTS:
        if role not in HUMAN:
            raise BadSample(f"turn {number} ({role}) shows a picture: only questions can")
        return image
    text = part if isinstance(part, str) else part.get("text") if kind in _TEXT_PARTS else None
    if not isinstance(text, str):
        raise BadSample(f"turn {number} has a part of type {kind!r}: only text and image can be trained on")
    return text


def _with_system(record: dict, turns: list) -> list:
    """The turns, the record's own system prompt first. Raises BadSample when it has two."""
    given = [record[key] for key in SYSTEM_KEYS if record.get(key) is not None]
    if not all(isinstance(text, str) for text in given):
        raise BadSample("system is not a string")
    texts = dict.fromkeys(text for text in given if text.strip())  # an empty one beside the turns says nothing
    if not texts:
        return turns
    if has_system(turns) and turns[0]["value"].strip():
        texts[turns[0]["value"]] = None
    if len(texts) > 1:
        raise BadSample("the record has two system prompts that differ: leave one of them out")
    return [{"from": SYSTEM, "value": next(iter(texts))}, *without_system(turns)]


def _in_front(turns: list, count: int) -> list:
    """Placeholders in front of the first question: forms that cannot place pictures mean that."""
    return _before_question(turns, f"{IMAGE_TOKEN}\n" * count)


def _before_question(turns: list, text: str) -> list:
    number = next((number for number, turn in enumerate(turns) if _is_human(turn)), None)
    if number is None:
        return turns
    return [*turns[:number], turns[number] | {"value": text + turns[number]["value"]}, *turns[number + 1 :]]


def _part_picture(part: dict) -> str | bytes | Picture | None:
    """The picture that a part holds itself. Raises BadSample."""
    held = listed(_first(part, *_PART_KEYS))
    if len(held) > 1:
        raise BadSample("one image part holds several pictures")
    return held[0] if held else None


def _all_pictures(record: dict) -> Iterator[str | bytes | Picture]:
    """Pictures of the record's own keys, or those that its messages hold. Raises BadSample."""
    beside = pictures_of(record)
    yield from beside
    for turn in _turns(record)[0] if not beside else ():
        yield from (picture for part in _picture_parts(turn) if (picture := _part_picture(part)) is not None)


def _placed(parts: list[dict], record: dict) -> list:
    """The record's pictures in the order in which its messages show them: held by the parts, or beside. BadSample."""
    beside = pictures_of(record)
    if not parts:
        return beside
    held = [_part_picture(part) for part in parts]
    missing = sum(picture is None for picture in held)
    order = [part.get("index") for part, picture in zip(parts, held, strict=True) if picture is None]
    if any(index is not None for index in order):
        if not all(isinstance(index, int) for index in order) or sorted(order) != list(range(len(beside))):
            raise BadSample(
                f"image parts have the indexes {order}, and there are {len(beside)} pictures beside the messages: each "
                f"must be shown once, counted from 0. The record's keys: {key_names(record)}"
            )
        beside = [beside[index] for index in order]
    elif len(beside) not in ((missing,) if missing else (0, len(parts))):
        raise BadSample(
            f"the messages show {len(parts)} picture(s), {missing} of them without saying which, and there are "
            f"{len(beside)} beside them. The record's keys: {key_names(record)}"
        )
    rest = iter(beside)
    return [next(rest) if picture is None else picture for picture in held]
