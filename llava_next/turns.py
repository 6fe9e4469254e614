"""Conversations as data sets write them: who speaks, the system prompt, questions with answers, where images stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from llava_next.tokenise import IMAGE_TOKEN

SYSTEM = "system"  # role of a first turn with the system prompt
HUMAN = ("human", "user")  # as data sets spell them
_ROLES = dict.fromkeys(HUMAN, "human") | {"gpt": "gpt", "assistant": "gpt"}


class Turn(NamedTuple):
    """A question and its answer."""

    number: int  # of the human turn, counted from 1 in the conversation as given
    question: str
    answer: str


def read_turns(conversations: Sequence[Mapping[str, str]]) -> list[Turn]:
    """Questions with their answers, behind the system prompt; a first turn that is not human is dropped, as in the
    original.

    Raises:
        ValueError: as `templates.Template.encode` about roles and texts, naming the turn.
    """
    turns = [(number, *_read_turn(number, turn)) for number, turn in enumerate(conversations, start=1)]
    if turns and turns[0][1] == SYSTEM:
        turns = turns[1:]
        if turns and turns[0][1] == SYSTEM:
            raise ValueError(f"turn {turns[0][0]} is a second system prompt: join the two, or leave one of them out")
    if turns and turns[0][1] != "human":
        turns = turns[1:]
    if not turns:
        raise ValueError("the conversation has no human turn: it needs a human turn and an answer")
    for position, (number, role, value) in enumerate(turns):
        due = ("human", "gpt")[position % 2]
        if role != due:
            raise ValueError(f"turn {number} is from {role!r} where {due!r} is due: human and gpt turns must alternate")
        if role == "gpt" and not value.strip():
            raise ValueError(f"turn {number} (gpt) is empty: remove it together with its question")
    if len(turns) % 2:
        raise ValueError(f"the conversation ends with turn {turns[-1][0]} (human): add its answer or remove it")
    return [Turn(human[0], human[2], gpt[2]) for human, gpt in zip(turns[::2], turns[1::2], strict=True)]


def read_system(conversations: Sequence[Mapping[str, str]]) -> str | None:
    """The system prompt that a conversation begins with; None: it has none of its own. Raises ValueError."""
    role, text = _read_turn(1, conversations[0]) if conversations else (None, None)
    return text if role == SYSTEM else None


def place_images(turns: Sequence[Turn], n_images: int) -> list[list[str]]:
    """Every question as the texts before, between and after its images.

    With one image, its placeholder goes to the front of the stripped question (several become one), as LLaVA does it;
    with several images placeholders stay where they are; without, they are text.

    Raises:
        ValueError: the number of placeholders is not the number of images.
    """
    questions = [turn.question.split(IMAGE_TOKEN) if n_images else [turn.question] for turn in turns]
    if n_images == 1:
        # the strip leaves the placeholder alone when the question is nothing else
        questions = [["", f"\n{''.join(q).strip()}".rstrip()] if len(q) > 1 else q for q in questions]
    found = [str(turn.number) for turn, texts in zip(turns, questions, strict=True) for _ in texts[1:]]
    if len(found) != n_images:
        where = f" (turn {', '.join(found)})" if found else ""
        raise ValueError(
            f"{n_images} image(s) but {len(found)} {IMAGE_TOKEN} placeholder(s) in the human turns{where}: "
            f"write one {IMAGE_TOKEN} for each image, in the order of the images"
        )
    return questions


def _read_turn(number: int, turn: Mapping[str, str]) -> tuple[str, str]:
    if not isinstance(turn, Mapping):
        raise ValueError(f"turn {number} is {turn!r}: write an object with 'from' and 'value'")
    role, value = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(value, str):
        raise ValueError(f"turn {number} holds {value!r} under 'value' or 'content': write a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"turn {number} holds half a surrogate pair at character {error.start}: repair the text's encoding"
        ) from None
    return _ROLES.get(role, role), value
