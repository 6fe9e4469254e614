"""Chat templates: a conversation becomes token ids and labels, and a jinja text renders the same tokens.

A `Template` is a handful of strings around the turns; those of the named ones stand in templates.json.
`Template.encode` lays a conversation out as atoms (text, special tokens, images), each flagged as supervised or not, so
the mask is known before anything is tokenised and no string is ever searched for it. `Template.jinja` is made from the
same strings.

Three promises, each held by a test:

- The ids are those of the stock `LlavaNextProcessor` for the same chat through `Template.jinja`, as long as the texts
  spell no special token. Every tokenizer is checked for it on a small chat before its first use.
- Up to the last answer, they are the ids of the chat rendered with `add_generation_prompt=True`: the model is asked
  what it was trained on. (Exception: an answer that starts with a line break, below.)
- Text never becomes a special token, whatever it spells: `</s>`, `<|eot_id|>` and, in a sample without images,
  `<image>` are tokenised as the characters they are. Only tokens that the tokenizer declares (`tokenise.DATA_TOKENS`)
  may come from data, and then they are one id in training as at inference.

The beginning-of-sequence token is in no template: the tokenizer adds it, in the processor as in training, so that
rendering first and tokenising at once both give one. `Template.prepare_tokenizer` switches that on, where the family's
chats have one. Where it is the token that every chat opens with anyway (`<|im_start|>` in SmolLM2), it is switched off:
never two.

A conversation may begin with a system prompt of its own, which takes the place of the template's.

Byte-level tokenizers (LLaMA3, Qwen) join line breaks: a header's last "\\n" and an answer that starts with "\\n" share
a token. A token that starts before the answer is not supervised, so the first line breaks of such an answer are not.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import AddedToken

from llava_next.template_jinja import skeleton
from llava_next.tokenise import (
    DATA_TOKENS,
    IMAGE,
    IMAGE_TOKEN,
    Atom,
    Binding,
    assemble,
    bind,
    cut_special,
    cut_text,
    data_pattern,
    data_tokens,
    put_blank_merges_last,
    rendered_ids,
)
from llava_next.turns import place_images, read_system, read_turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Template:
    """How a conversation is written for one family of language models. Immutable, picklable, without state.

    Attributes:
        name: as in `get_template`.
        special: tokens in the strings below that must be special tokens of the tokenizer.
        user: text before and after a question.
        answer: text before and after an answer; supervised. SentencePiece makes the space before a word part of the
            word's token, so the space after "ASSISTANT:" belongs to the answer and not to the header.
        header: text that opens an answer; not supervised. A generation prompt ends with it.
        stop: the terminator: end token of the tokenizer and of the generation config. None: captions have none.
        pad_token: padding for a tokenizer that has none; added to the vocabulary if it is not in there.
        system: default system prompt; None: there is no system turn where a sample has none.
        system_turn: text before and after a system prompt; None: the format has no place for one.
        system_inside: the system turn stands in the first question, behind `user[0]`.
        between: text between an answer and the next question; not supervised.
        writes_bos: chats of this format begin with the tokenizer's beginning-of-sequence token; else with what the
            tokenizer adds by itself.
        caption_only: stage 1: one prompt and one caption; of the prompt, only the images stay.
    """

    name: str
    user: tuple[str, str]
    answer: tuple[str, str]
    special: tuple[str, ...] = ()
    header: str = ""
    stop: str | None = None
    pad_token: str = "<pad>"
    system: str | None = None
    system_turn: tuple[str, str] | None = None
    system_inside: bool = False
    between: str = ""
    writes_bos: bool = True
    caption_only: bool = False

    @classmethod
    def of(cls, entry: Mapping) -> Template:
        """A template of an entry in templates.json, whose `note` is for readers."""
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in entry.items() if name != "note"}
        return cls(**values)

    @property
    def identity(self) -> str:
        """What lengths are counted for: the same for templates that write the same."""
        return next((t.name for t in TEMPLATES.values() if t.jinja == self.jinja), self.jinja)

    def encode(
        self,
        conversations: Sequence[Mapping[str, str]],
        tokenizer: PreTrainedTokenizerFast,
        image_token_id: int,
        image_lengths: Sequence[int],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and labels of one sample; nothing is truncated.

        Args:
            conversations: turns `{"from": "human" | "gpt", "value": text}`, or keys `role` and `content` with roles
                `user` and `assistant`. A first one from `system` is the system prompt in place of the template's, an
                empty one leaves that out. A next turn that is not human is dropped; then human and gpt alternate.
            tokenizer: a fast tokenizer as `prepare_tokenizer` leaves it. What is found out about it at its first use
                is remembered: add no tokens to it afterwards.
            image_token_id: the id repeated in an image's place.
            image_lengths: number of image tokens of each image, in order; empty for a sample without images.
                With one image, the `<image>` of its human turn moves to the turn's front (several become one); with
                more, each stays where it is. Without images, and in every answer, the string `<image>` is text.

        Returns:
            `input_ids [T]` and `labels [T]`, int64. Labels are not shifted; -100 except on answers and terminators.

        Raises:
            ValueError: roles that do not alternate, a human turn at the end (nothing would be learned from it), an
                empty answer, a system prompt that the format has no place for, another number of placeholders than of
                images (an image without any included), text that is not Unicode, or a tokenizer that does not fit.
        """
        turns, system = read_turns(conversations), read_system(conversations)
        self.check_system(system)
        questions = place_images(turns, len(image_lengths))
        if self.caption_only:
            if len(turns) > 1 or not image_lengths:
                raise ValueError(
                    f"template {self.name!r} takes one prompt with an image and one caption, not {len(turns)} "
                    f"question(s) with {len(image_lengths)} image(s): train on such samples with a chat template"
                )
            questions = [[""] * len(texts) for texts in questions]
        binding = _bind(self, tokenizer, image_token_id)
        atoms = self._atoms(questions, [turn.answer for turn in turns], system, binding.data_tokens)
        return assemble(atoms, tokenizer, binding, image_lengths)

    def check_system(self, system: str | None) -> None:
        """Refuses a sample's own system prompt where the format has no place for one. Raises ValueError."""
        if system and self.system_turn is None:
            raise ValueError(
                f"template {self.name} has no place for a system prompt, and the sample has one of its own: build with "
                "--system drop or --system prepend"
            )

    @cached_property
    def jinja(self) -> str:
        """Chat template text to save with the tokenizer and the processor.

        It takes string content (`<image>` marks an image) and list content, keeps terminators in the history and puts
        the training's system prompt in front. A system message replaces that prompt; an empty one leaves it out.
        """
        return skeleton(self)

    def prepare_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> int:
        """Turns a language model's fast tokenizer, in place, into the one to train and save with; idempotent.

        Adds `<image>`, then a padding token if there is none; lets the tokenizer add its beginning-of-sequence token,
        unless chats open with it; makes the terminator the end token; pads on the left, for generation; sets the chat
        template; mends merges (see `put_blank_merges_last`). Both stages train with the result: `plain` needs nothing
        more.

        Returns:
            The id of `<image>`.

        Raises:
            ValueError: as `check_tokenizer`; or the template is `plain`, which fits any model and so sets up none.
        """
        if self.stop is None:
            raise ValueError(f"{self.name!r} is no chat template: prepare the tokenizer with the model's own template")
        put_blank_merges_last(tokenizer)
        if IMAGE_TOKEN not in tokenizer.get_vocab():
            tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
        if tokenizer.pad_token is None:
            tokenizer.add_special_tokens({"pad_token": AddedToken(self.pad_token, special=True, normalized=False)})
        tokenizer.eos_token = self.stop
        due = self._prefix(tokenizer)
        if rendered_ids(tokenizer, "") != due:
            tokenizer.add_bos_token = bool(due)
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # the second is what gets saved
        tokenizer.chat_template = self.jinja
        self.check_tokenizer(tokenizer)
        return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Checks that `encode` can keep its promises with this tokenizer.

        Raises:
            ValueError: a slow tokenizer, a missing special token, no or two beginning-of-sequence tokens, special
                tokens that plain text can produce, declared data tokens that are none or build chats, or a small chat
                whose ids are not those of its rendered text.
        """
        declared = data_tokens(tokenizer)
        if wrong := [token for token in declared if self._builds_chats(token, tokenizer)]:
            raise ValueError(
                f"data may not contain {', '.join(wrong)}, of which chats are built: take it out of {DATA_TOKENS} "
                "(compose.py --data_tokens)"
            )
        pattern = data_pattern(declared)
        questions, answers = [["", "\nWhat is it? "], ["And \nnow?"]], [" A cat , on 2 mats.\n", "No."]
        if declared:
            questions, answers = [*questions, ["Where?"]], [*answers, " . ".join(declared)]
        probe = None if self.caption_only else list(self._atoms(questions, answers, None, pattern))
        binding = bind(tokenizer, (*self.special, *declared), probe, self._prefix(tokenizer), pattern)
        _BINDINGS.setdefault(tokenizer, {})[self] = binding

    def undeclared_tokens(self, tokenizer: PreTrainedTokenizerFast) -> list[str]:
        """Special tokens that someone has added behind the model's own and that data may not contain: characters in
        training, one token each at inference. A family's reserved ones are not meant."""
        added, declared = tokenizer.added_tokens_decoder, data_tokens(tokenizer)
        last = max((id for id, token in added.items() if token.content in self.special), default=-1)
        names = [token.content for id, token in sorted(added.items()) if token.special and id > last]
        names = [name for name in names if name not in declared and "reserved" not in name]
        return [name for name in names if not self._builds_chats(name, tokenizer)]

    def _builds_chats(self, token: str, tokenizer: PreTrainedTokenizerFast) -> bool:
        """Whether chats are built of a token: no data may contain it."""
        named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
        in_chats = any(token in template.special for template in (self, *TEMPLATES.values()))
        return in_chats or token in (IMAGE_TOKEN, *named) or token in (tokenizer.chat_template or "")

    def _prefix(self, tokenizer: PreTrainedTokenizerFast) -> list[int]:
        """Ids that the tokenizer must put before every text: its beginning-of-sequence token, which no chat may open
        with then. Captions begin with what a prepared tokenizer adds, as the model's chats do."""
        begin = tokenizer.bos_token
        openings = [self.user[0], *(self.system_turn or ())[:1]]
        if begin is None or all(text.startswith(begin) for text in openings):
            return []
        adds = self.writes_bos or rendered_ids(tokenizer, "")[:1] == [tokenizer.bos_token_id]
        return [tokenizer.bos_token_id] if adds else []

    @property
    def default_system(self) -> str:
        """The system turn where a chat has none of its own; empty: none."""
        before, after = self.system_turn or ("", "")
        return "" if self.system is None else before + self.system + after

    @cached_property
    def _frame(self) -> tuple[list[str], ...]:
        """The template's own strings, cut at special tokens: its system turn; around another system prompt, a question,
        an answer; between turns."""
        before, after = self.system_turn or ("", "")
        strings = (
            self.default_system,
            before,
            after,
            self.user[0],
            self.user[1] + self.header,
            *self.answer,
            self.between,
        )
        return tuple(cut_special(string, self.special) for string in strings)

    def _atoms(
        self, questions: Iterable[list[str]], answers: Iterable[str], own: str | None, declared: re.Pattern | None
    ) -> Iterator[Atom]:
        """(text or special token, supervised) of the whole sample; what the data brings is text or a declared token.

        Args:
            own: the sample's system prompt, see `read_system`.
            declared: see `tokenise.data_pattern`.
        """
        system, system_before, system_after, before, after, answer_before, answer_after, between = self._frame
        if own is not None:
            system = [*system_before, *cut_text(own, declared), *system_after] if own else []
        opening = [*before, *system] if self.system_inside else [*system, *before]
        for texts, answer in zip(questions, answers, strict=True):
            for atom in (*opening, *cut_text(texts[0], declared)):
                yield atom, False
            for text in texts[1:]:
                for atom in (IMAGE, *cut_text(text, declared)):
                    yield atom, False
            for atom in after:
                yield atom, False
            for atom in (*answer_before, *cut_text(answer, declared), *answer_after):
                yield atom, True
            opening = [*between, *before]


# Per tokenizer and template. Derived facts only: a new process finds them out again.
_BINDINGS: weakref.WeakKeyDictionary[PreTrainedTokenizerFast, dict[Template, Binding]] = weakref.WeakKeyDictionary()


def _bind(template: Template, tokenizer: PreTrainedTokenizerFast, image_token_id: int) -> Binding:
    bindings = _BINDINGS.setdefault(tokenizer, {})
    if template not in bindings:
        template.check_tokenizer(tokenizer)
    binding = bindings[template]
    known = binding.special_ids[IMAGE_TOKEN]
    if image_token_id != known:
        raise ValueError(f"image_token_id is {image_token_id}, but {IMAGE_TOKEN} is {known} in the tokenizer: use that")
    return binding


OWN = "own"  # names the language model's own chat template
_NAMED = json.loads(Path(__file__).with_name("templates.json").read_text(encoding="utf-8"))
TEMPLATES: Mapping[str, Template] = MappingProxyType({entry["name"]: Template.of(entry) for entry in _NAMED})


def get_template(name: str) -> Template:
    """The template of that name.

    Raises:
        ValueError: no such template, or `own`, which is a tokenizer's (see `own_template.template_for`).
    """
    if name == OWN:
        raise ValueError(f"template {OWN} is that of a language model's tokenizer, and there is none here")
    if name not in TEMPLATES:
        raise ValueError(f"no template {name!r}: choose one of {', '.join(TEMPLATES)} or {OWN}")
    return TEMPLATES[name]
