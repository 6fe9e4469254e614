"""What the page asks, checked and answered: one question at a time, by the model that it names.

The page holds the conversation and sends all of it, so that tabs, reloads and other models need no state here.
"""

import gc
import math
import time
from dataclasses import dataclass
from itertools import groupby
from threading import Event
from typing import NamedTuple

import torch

from doctor.report_samples import TokenTexts
from talking.conversation import Prompt, one_line, start
from talking.models import Choice, choices, geometry, load
from talking.pictures import Pictures

MAX_TURNS = 1000
MOST_NEW_TOKENS = 1 << 20


class Turn(NamedTuple):
    """A question with the ids of its pictures, and its answer."""

    question: str
    pictures: list[str]
    answer: str = ""


@dataclass(frozen=True)
class Asked:
    """A request of the page: the conversation so far and a question, for one of the models."""

    model: str
    turns: list[Turn]
    last: Turn
    max_new_tokens: int
    temperature: float


class Loaded(NamedTuple):
    choice: Choice
    model: torch.nn.Module
    processor: object


def read_asked(request: object) -> Asked:
    """A request as it was sent. Raises ValueError: it is none."""

    def turn(value: dict) -> Turn:
        found = Turn(value["question"], value["pictures"], value.get("answer", ""))
        if not all(isinstance(text, str) for text in (found.question, found.answer, *found.pictures)):
            raise TypeError("a text is no text")
        return Turn(plain(found.question), list(found.pictures), plain(found.answer))

    try:
        most, temperature = int(request["max_new_tokens"]), float(request["temperature"])
        turns = [turn(value) for value in request["turns"][:MAX_TURNS]]
        asked = Asked(str(request["model"]), turns, turn(request["ask"]), most, temperature)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"this is no question as the page sends it: {one_line(error)}") from error
    if not 1 <= most <= MOST_NEW_TOKENS or not 0 <= temperature < math.inf:
        raise ValueError("an answer has at least 1 token, and the temperature is 0 or more")
    if not asked.last.question.strip() and not asked.last.pictures:
        raise ValueError("the question is empty")
    return asked


def plain(text: str) -> str:
    """A text that every tokenizer takes: without halves of surrogate pairs, line breaks as \\n."""
    return text.encode("utf-8", "replace").decode().replace("\r\n", "\n")


class Answerer:
    """The model that is loaded, and the pictures.

    Args:
        given: as `models.choices` takes it.
        system: of `Chat`.
    """

    def __init__(self, given: str, system: str | None = None):
        self.given, self.system = given, system
        self.pictures = Pictures()
        self.loaded: Loaded | None = None

    def choice(self, name: str) -> Choice:
        """One of the models that there are now. Raises ValueError: there is none of that name, or none at all."""
        for choice in choices(self.given):
            if choice.name == name:
                return choice
        raise ValueError(f"{name} is not there any more: choose another model")

    def load(self, choice: Choice) -> Loaded:
        """That model, from memory where it is there already. The one before it leaves memory first.

        Raises:
            ValueError: it cannot be loaded; none is in memory then.
        """
        if self.loaded is None or self.loaded.choice != choice:
            self.loaded = None
            gc.collect()
            torch.cuda.empty_cache()
            try:
                self.loaded = Loaded(choice, *load(choice.where))
            except Exception as error:  # a damaged folder can make the libraries raise anything
                raise ValueError(f"{choice.name} cannot be loaded: {one_line(error)}") from error
        return self.loaded

    def show(self, id: str, model: str) -> dict:
        """A picture for the page, as that model sees it. Raises ValueError."""
        return self.pictures.show(id, geometry(self.choice(model).where))

    def answer(self, asked: Asked, put, stop: Event) -> None:
        """Answers a question by events: `loading`, `note`, `prompt`, `piece`, and at last `end` or `error`.

        Not by two threads at once.

        Args:
            put: called with each event, a dict with its name under `event`.
            stop: ends the answer early once it is set, also before its first token; only loading goes to its end.
        """
        try:
            if not stop.is_set():
                self._answer(asked, put, stop)
        except Exception as error:  # it belongs to this question, the next one may go well
            put({"event": "error", "text": one_line(error)})

    def _answer(self, asked: Asked, put, stop: Event) -> None:
        choice = self.choice(asked.model)
        if self.loaded is None or self.loaded.choice != choice:
            put({"event": "loading"})
        _, model, processor = self.load(choice)
        if stop.is_set():
            return
        notes: list[str] = []
        options = {"max_new_tokens": asked.max_new_tokens, "temperature": asked.temperature}
        chat = start(model, processor, self.system, notes.append, **options)
        for turn in asked.turns:
            chat.recall(turn.question, [self.pictures.get(id) for id in turn.pictures], turn.answer)
        prompt = chat.prompt(asked.last.question, [self.pictures.get(id) for id in asked.last.pictures])
        for mark in chat.marks_in(asked.last.question):
            notes.append(f"{mark} is a mark of the model's own and is read as such, not as characters")
        for note in notes:
            put({"event": "note", "text": note})
        put({"event": "prompt", "tokens": len(prompt.ids), "parts": prompt_parts(prompt, model, processor, choice)})
        started = time.monotonic()
        text = chat.answer(prompt, lambda piece: piece and put({"event": "piece", "text": piece}), stop)
        seconds = round(time.monotonic() - started, 2)
        put({"event": "end", "text": text, "seconds": seconds, "cut": chat.is_cut, "stopped": stop.is_set()})


def prompt_parts(prompt: Prompt, model, processor, choice: Choice) -> list[tuple[str, str | int]]:
    """The prompt as its tokens spell it: ("text", characters), ("mark", a special token), ("picture", its tokens)."""
    tokenizer, anyres = processor.tokenizer, geometry(choice.where)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    lengths = [anyres.num_tokens(*picture.size) for picture in prompt.pictures] if anyres else []

    def kind(id: int) -> str:
        return "picture" if id == model.config.image_token_id else "mark" if id in special else "text"

    texts, parts = TokenTexts(tokenizer), []
    for name, run in groupby(prompt.ids, kind):
        ids = list(run)
        if name == "picture":
            left = len(ids)
            while left > 0 and lengths and lengths[0] <= left:  # two pictures may touch each other
                parts.append((name, lengths.pop(0)))
                left -= parts[-1][1]
            parts += [(name, left)] if left else []
        elif name == "mark":
            parts += [(name, piece) for piece in texts.pieces(ids)]
        else:
            parts.append((name, "".join(texts.pieces(ids))))
    return parts
