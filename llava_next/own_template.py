"""`own`: the chat template that a language model's tokenizer brings, as one to train in.

What it writes around the texts of a chat is found by rendering the chat turn by turn, with a letter of a private use
area in the place of each text: what an answer adds to its generation prompt is supervised, up to the token that ends
the answer. Where the template marks what an assistant says (`{% generation %}`), its marks must agree. A sample's texts
then take the letters' places, and its own rendering must be that very text: what a template does to some texts only
(cuts thinking blocks out, say) is found on the sample that has them.

Refused are templates for which the promises of `templates` cannot hold: what was trained on would not be what the model
is asked later, because a later turn changes earlier ones, or today's date is in it.

The beginning-of-sequence token is the one that the language model's own `apply_chat_template` gives, or none. Where a
template writes it in front, the tokenizer adds it instead, as for all templates here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from llava_next.template_jinja import with_images, without_images
from llava_next.templates import OWN, TEMPLATES, Template, get_template
from llava_next.tokenise import IMAGE, IMAGE_TOKEN, Atom, cut_special, cut_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NAMES = (*TEMPLATES, OWN)
ROLES = ("system", "user", "assistant")
PROBE_PAIRS = 3  # questions with answers of the longest chat that a template is tried on
_FIRST_LETTER = 0x100000
_MARKED = re.compile(r"{%-?\s*generation\s*-?%}")


class Layout(NamedTuple):
    """What a template writes for chats of a number of turns.

    Attributes:
        pieces: in order, (text, special token or number of the message whose content stands there, supervised).
        prompt: how many of them the prompt of the last answer has.
        stop: the token that ends answers.
    """

    pieces: tuple[tuple[str | int, bool], ...]
    prompt: int
    stop: str


@dataclass(frozen=True)
class OwnTemplate(Template):
    """A language model's own chat template. Attributes beside those of `Template`, of whose strings it uses none:

    text: as its tokenizer brings it.
    variables: special tokens that the text may name, such as `eos_token`.
    without_bos: the text would write the beginning-of-sequence token in front; the tokenizer adds it instead.
    trims: roles whose contents lose the white space around them.
    """

    text: str = ""
    variables: tuple[tuple[str, str], ...] = ()
    without_bos: bool = False
    trims: tuple[str, ...] = ()

    @cached_property
    def jinja(self) -> str:
        return with_images(self.text, self.without_bos)

    def render(self, messages: Sequence[dict[str, str]], prompt: bool = False) -> str:
        """The text of a chat of string contents. Raises ValueError: the template refuses it."""
        return self._rendered(messages, add_generation_prompt=prompt)[0]

    def _rendered(self, messages: Sequence[dict[str, str]], **how) -> tuple[str, list[tuple[int, int]]]:
        """The text of a chat, and what its marks enclose where they are asked for."""
        from transformers.utils.chat_template_utils import render_jinja_template  # here: it takes seconds

        try:
            texts, marks = render_jinja_template([messages], chat_template=self.text, **dict(self.variables), **how)
        except Exception as error:  # whatever a template makes jinja raise
            raise ValueError(f"the model's own chat template does not render this chat: {error}") from error
        return texts[0], (marks or [[]])[0]

    def _prefix(self, tokenizer: PreTrainedTokenizerFast) -> list[int]:
        return [tokenizer.bos_token_id] if self.without_bos else []

    def _atoms(
        self, questions: Iterable[list[str]], answers: Iterable[str], own: str | None, declared: re.Pattern | None
    ) -> Iterator[Atom]:
        """As in `Template`. Raises ValueError: the template renders this chat otherwise than others."""
        contents = [
            texts for question, answer in zip(questions, answers, strict=True) for texts in (question, [answer])
        ]
        layout = _layout(self, len(contents) // 2, None if own is None else bool(own))
        contents = contents if own is None else [[own], *contents]
        messages = chat([IMAGE_TOKEN.join(texts) for texts in contents], own is not None)
        contents = [
            _trimmed(texts) if message["role"] in self.trims else texts
            for texts, message in zip(contents, messages, strict=True)
        ]
        self._check(layout, messages, [IMAGE_TOKEN.join(texts) for texts in contents])
        for piece, supervised in layout.pieces:
            if isinstance(piece, str):
                yield piece, supervised
                continue
            for number, text in enumerate(contents[piece]):
                for atom in ([IMAGE] if number else []) + cut_text(text, declared):
                    yield atom, supervised

    def _check(self, layout: Layout, messages: list[dict[str, str]], contents: list[str]) -> None:
        """Whether a chat and the prompt of its last answer are rendered as laid out. Raises ValueError."""
        written = [piece if isinstance(piece, str) else contents[piece] for piece, _ in layout.pieces]
        due = ("".join(written), "".join(written[: layout.prompt]))
        for text, found in zip(due, (self.render(messages), self.render(messages[:-1], prompt=True)), strict=True):
            if text != found:
                raise ValueError(f"the model's own chat template changes what a text says: {_around(text, found)}")


def template_for(name: str, tokenizer: PreTrainedTokenizerFast) -> Template:
    """The template of that name, `own` included.

    Raises:
        ValueError: no such template; or `own`, and the promises do not hold for the tokenizer's.
    """
    return own_template(tokenizer) if name == OWN else get_template(name)


def template_of(saved: str | None, tokenizer: Callable[[], PreTrainedTokenizerFast]) -> Template | None:
    """The template that a model was composed with; None: none of this project.

    Args:
        saved: chat template text of the model.
        tokenizer: gives its tokenizer, where that is needed.

    Raises:
        ValueError: as `own_template`.
    """
    if isinstance(saved, str) and without_images(saved) is not None:
        return own_template(tokenizer())
    return next((t for t in TEMPLATES.values() if t.jinja == saved and not t.caption_only), None)


def own_template(tokenizer: PreTrainedTokenizerFast) -> OwnTemplate:
    """The template of a language model's tokenizer, or of one that it has prepared.

    Raises:
        ValueError: it has none, or the promises do not hold for it; what fails, and what to take instead.
    """
    try:
        return _found(tokenizer)
    except ValueError as error:
        raise ValueError(
            f"template own: {error}. Take the named template of the model's family, or chatml where its tokens are "
            "in the vocabulary"
        ) from error


def _found(tokenizer: PreTrainedTokenizerFast) -> OwnTemplate:
    text, without_bos = _text_of(tokenizer)
    variables = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    specials = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    draft = OwnTemplate(name=OWN, user=("", ""), answer=("", ""), special=specials, text=text, pad_token="<pad>")
    draft = replace(draft, variables=tuple(sorted(variables.items())))
    _check_dates(draft)
    if without_bos is None:
        without_bos = _writes_bos_in_front(draft, variables.get("bos_token"))
    if without_bos:
        variables["bos_token"] = ""
    draft = replace(draft, variables=tuple(sorted(variables.items())), without_bos=without_bos)
    plain = [_layout(draft, pairs, None) for pairs in range(1, PROBE_PAIRS + 1)]
    stop = plain[0].stop
    # as the tokenizer will be when it is prepared
    variables = {"pad_token": draft.pad_token} | variables | {"eos_token": stop}
    template = replace(draft, variables=tuple(sorted(variables.items())), stop=stop)
    if plain != [_layout(template, pairs, None) for pairs in range(1, PROBE_PAIRS + 1)]:
        raise ValueError(f"it writes {tokenizer.eos_token}, and ends answers with {stop}, which the end token becomes")
    layouts = plain + _system_layouts(template)
    has_system = len(layouts) > len(plain)
    used = {str(piece) for layout in layouts for piece, _ in layout.pieces}
    return replace(
        template,
        special=tuple(token for token in specials if token in used),
        system_turn=("", "") if has_system else None,
        trims=tuple(role for role in ROLES[not has_system :] if _trims(template, role)),
    )


def _text_of(tokenizer: PreTrainedTokenizerFast) -> tuple[str, bool | None]:
    """The language model's own text, and whether it must write no beginning-of-sequence token where that is known."""
    text = tokenizer.chat_template
    if isinstance(text, dict):
        text = text.get("default")
    if not text:
        raise ValueError("the tokenizer brings no chat template")
    return without_images(text) or (text, None)


def chat(contents: Sequence[str], with_system: bool) -> list[dict[str, str]]:
    """Messages of contents in turn."""
    roles = [*ROLES[:with_system], *ROLES[1:] * len(contents)]
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def _letters(pairs: int, system: bool | None) -> list[dict[str, str]]:
    """A chat with a letter for each text. `system`: whether its system prompt has one; None: there is none."""
    messages = chat([chr(_FIRST_LETTER + i) for i in range(2 * pairs + (system is not None))], system is not None)
    if system is False:
        messages[0]["content"] = ""
    return messages


@lru_cache(maxsize=512)
def _layout(template: OwnTemplate, pairs: int, system: bool | None) -> Layout:
    """What the template writes for chats of so many questions with answers.

    Args:
        system: of the chat's own system prompt: whether it has a text; None: there is none.

    Raises:
        ValueError: the promises do not hold for them.
    """
    messages, first = _letters(pairs, system), int(system is not None)
    marked = bool(_MARKED.search(template.text))
    whole, marks = template._rendered(messages, add_generation_prompt=False, return_assistant_tokens_mask=marked)
    places = {number: _place(whole, message) for number, message in enumerate(messages) if message["content"]}
    spans, stops = [], set()
    for answer in range(first + 1, len(messages), 2):
        prompt, past = template.render(messages[:answer], prompt=True), template.render(messages[: answer + 1])
        if not whole.startswith(past):
            raise ValueError(
                "a later turn changes what it writes for earlier ones (thinking blocks or system prompts that move, "
                f"say): {_around(past, whole)}"
            )
        if not past.startswith(prompt) or places[answer] < len(prompt):
            raise ValueError(f"an answer does not follow its generation prompt: {_around(prompt, past)}")
        tail = cut_special(past[places[answer] + 1 :], template.special)
        stop = next((part for part in tail if part in template.special), None)
        if stop is None:
            raise ValueError("no special token ends its answers: generation would never stop")
        end = places[answer] + 1 + len("".join(tail[: tail.index(stop) + 1]))
        if marked and not any(start <= len(prompt) and end <= last for start, last in marks):
            raise ValueError("its generation marks are not around what follows the prompt, up to the end token")
        spans.append((len(prompt), end))
        stops.add(stop)
    if len(stops) > 1 or sorted(places.values()) != list(places.values()):
        raise ValueError("it ends answers with several tokens, or changes the order of turns")
    return _cut(template, whole, places, spans, stops.pop())


def _place(whole: str, message: dict[str, str]) -> int:
    """Where the text of a message stands. Raises ValueError."""
    if whole.count(message["content"]) != 1:
        raise ValueError(f"it writes the text of a {message['role']} turn {whole.count(message['content'])} times")
    return whole.index(message["content"])


def _cut(template: OwnTemplate, whole: str, places: dict[int, int], spans: list[tuple[int, int]], stop: str) -> Layout:
    """Cuts a rendered chat at the letters, at special tokens and where supervision changes."""
    numbers = {place: number for number, place in places.items()}
    edges = {0, len(whole), *(edge for span in spans for edge in span), *numbers, *(place + 1 for place in numbers)}
    pieces, prompt = [], 0
    for start, end in pairwise(sorted(edges)):
        if start == spans[-1][0]:
            prompt = len(pieces)
        supervised = any(first <= start < last for first, last in spans)
        parts = [numbers[start]] if start in numbers else cut_special(whole[start:end], template.special)
        pieces += [(part, supervised) for part in parts]
    return Layout(tuple(pieces), prompt, stop)


def _around(one: str, other: str) -> str:
    """Two texts where they begin to differ, letters as dots."""
    shorter = min(len(one), len(other))
    at = next((i for i in range(shorter) if one[i] != other[i]), shorter)
    short = (re.sub(r"[\U00100000-\U0010ffff]", "…", text[max(0, at - 30) : at + 30]) for text in (one, other))
    return "{!r} becomes {!r}".format(*short)


def _check_dates(template: OwnTemplate) -> None:
    """Refuses a template that asks for today's date. Raises ValueError."""
    for messages in _short_chats(template):
        try:
            template._rendered(messages, add_generation_prompt=False, strftime_now="no date")
        except ValueError as error:
            raise ValueError("it writes today's date: no later prompt would be what was trained on") from error


def _writes_bos_in_front(template: OwnTemplate, begin: str | None) -> bool:
    """Whether every chat is the beginning-of-sequence token, by its name, and then the chat without it."""
    if not begin:
        return False
    silent = replace(template, variables=tuple((n, "" if n == "bos_token" else v) for n, v in template.variables))
    chats = [*_short_chats(template), _letters(2, None)]
    return all(template.render(messages) == begin + silent.render(messages) for messages in chats)


def _short_chats(template: OwnTemplate) -> list[list[dict[str, str]]]:
    """A question with an answer, and the same behind a system prompt where the template renders that. ValueError."""
    template.render(_letters(1, None))
    try:
        template.render(_letters(1, True))
    except ValueError:  # no place for a system prompt
        return [_letters(1, None)]
    return [_letters(1, None), _letters(1, True)]


def _system_layouts(template: OwnTemplate) -> list[Layout]:
    """Layouts of chats with a system prompt of their own; none where the template has no place for one that stays."""
    try:
        return [_layout(template, pairs, True) for pairs in range(1, PROBE_PAIRS + 1)]
    except ValueError:
        return []


def _trims(template: OwnTemplate, role: str) -> bool:
    """Whether the contents of a role lose the white space around them."""
    messages = _letters(1, True if role == ROLES[0] else None)
    plain = template.render(messages)
    for message in messages:
        if message["role"] == role:
            message["content"] = f" \n{message['content']}\n "
    return template.render(messages) == plain


def _trimmed(texts: list[str]) -> list[str]:
    """The texts between a question's images without the white space around the whole."""
    *texts, last = texts
    texts = [*texts, last.rstrip()]
    return [texts[0].lstrip(), *texts[1:]]
