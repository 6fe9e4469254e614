"""From atoms to ids: what `templates` needs to know about fast tokenizers, and nothing about chats.

A sample arrives as atoms: texts, special tokens and images, each flagged as supervised or not. A tokenizer that reads
the sample as one rendered string cuts it at special tokens and images, and sees neighbouring texts as one. So do we:
each such text is tokenised on its own, with special tokens switched off, so that a text that spells one is harmless,
and the offsets of its tokens tell where the supervised part begins. Where a tokenizer declares tokens that data may
contain, texts are cut at these before they become atoms.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IMAGE_TOKEN = "<image>"
IGNORE_INDEX = -100
# Entry of tokenizer_config.json, so of a model folder: special tokens that data may contain, one id each
DATA_TOKENS = "data_tokens"
RENDERING = 2  # counted up when data that is stored already gets other ids: lengths counted before are then not exact


class Special(str):
    """A token that a template, never a text, puts in: always one id."""


IMAGE = Special(IMAGE_TOKEN)

Atom = tuple[str, bool]  # (text or special token, supervised)


class Binding(NamedTuple):
    """What was found out about one tokenizer."""

    prefix: list[int]  # ids before any text: [BOS] or []
    special_ids: dict[str, int]
    # SentencePiece tokenizers with legacy=False put a "▁" before the first text of a sequence, but not before later
    # ones. Those are therefore tokenised behind this anchor, whose ids are cut off again; "": position is irrelevant.
    anchor: str
    anchor_ids: list[int]
    known_ids: dict[str, list[int]]  # of later texts that every sample has, such as a role's name
    data_tokens: re.Pattern | None  # see `data_pattern`


def assemble(
    atoms: Iterable[Atom],
    tokenizer: PreTrainedTokenizerFast,
    binding: Binding,
    image_lengths: Sequence[int],
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels of a sample.

    Args:
        atoms: in order. Supervised text runs up to the next special token, image or the end.
        image_lengths: number of image tokens for each image among the atoms.

    Returns:
        `input_ids [T]` and `labels [T]`, int64; labels are the ids at supervised positions and -100 elsewhere. A token
        that starts before the supervised part of its text is not supervised.
    """
    parts, spans = [binding.prefix], []  # spans: supervised [start, end) in the sequence
    length = start = len(binding.prefix)
    lengths = iter(image_lengths)
    text, cut = "", None  # cut: where the supervised part of the text begins

    def flush() -> None:
        nonlocal length, text, cut
        if text:
            later = None if length == start else binding
            ids, first = _tokenise(tokenizer, text, len(text) if cut is None else cut, later)
            parts.append(ids)
            spans.append((length + first, length + len(ids)))
            length += len(ids)
        text, cut = "", None

    for atom, supervised in atoms:
        if not isinstance(atom, Special):
            cut = len(text) if supervised and cut is None else cut
            text += atom
            continue
        flush()
        count = next(lengths) if atom is IMAGE else 1
        parts.append(np.full(count, binding.special_ids[atom]))
        if supervised:
            spans.append((length, length + 1))
        length += count
    flush()
    input_ids = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
    labels = np.full_like(input_ids, IGNORE_INDEX)
    for begin, end in spans:
        labels[begin:end] = input_ids[begin:end]
    return input_ids, labels


def data_tokens(tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    """The special tokens that data may contain, as the tokenizer declares them; it saves them and loads them again.

    Raises:
        ValueError: the entry is no list of strings.
    """
    declared = tokenizer.init_kwargs.get(DATA_TOKENS) or ()
    if not isinstance(declared, list | tuple) or not all(isinstance(token, str) and token for token in declared):
        raise ValueError(f"tokenizer_config.json: {DATA_TOKENS} is {declared!r}: write a list of special tokens")
    return tuple(dict.fromkeys(declared))


def listed(tokens: Sequence[str]) -> str:
    """Tokens for a message: the first ones, and how many more."""
    more = f" and {len(tokens) - 4} more" if len(tokens) > 4 else ""
    return ", ".join(tokens[:4]) + more


def data_pattern(tokens: Sequence[str]) -> re.Pattern | None:
    """Finds declared tokens in texts as a tokenizer does: the first one, and of those that begin there the longest."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(tokens, key=len, reverse=True)))})") if tokens else None


def cut_special(text: str, special: Sequence[str]) -> list[str]:
    """A template's own text as texts and special tokens, of those that begin at one place the longest."""
    cuts = "|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)"
    return [Special(part) if part in special else part for part in re.split(f"({cuts})", text) if part]


def cut_text(text: str, declared: re.Pattern | None) -> list[str]:
    """A text of the data as texts and declared tokens."""
    parts = declared.split(text) if declared else [text]
    return [Special(part) if number % 2 else part for number, part in enumerate(parts)]


def bind(
    tokenizer: PreTrainedTokenizerFast,
    special: Sequence[str],
    probe: Sequence[Atom] | None,
    prefix: list[int],
    declared: re.Pattern | None,
) -> Binding:
    """Checks a tokenizer and finds out how it treats texts in the middle of a sequence.

    Args:
        special: tokens that must be special besides `<image>`.
        probe: a small sample with one image, whose ids must be those of its rendered text; None: every text will be
            tokenised as if it came first.
        prefix: ids that it must put before a text.
        declared: see `data_pattern`.

    Raises:
        ValueError: as `Template.check_tokenizer`.
    """
    kind = type(tokenizer).__name__
    prepare = "run prepare_tokenizer of the model's chat template"
    if not tokenizer.is_fast:
        raise ValueError(f"{kind} is a slow tokenizer, which tells no offsets: load the fast one")
    special_ids = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    if missing := [token for token in (IMAGE_TOKEN, *special) if token not in special_ids]:
        raise ValueError(
            f"the tokenizer lacks the special token(s) {', '.join(missing)}: {prepare}, or choose the template of this "
            "model's family"
        )
    added = rendered_ids(tokenizer, "")
    if added != prefix:
        due = f"its beginning-of-sequence token ({tokenizer.bos_token}) alone"
        if not prefix:
            due = f"none: chats open with {tokenizer.bos_token} themselves" if tokenizer.bos_token else "none"
        raise ValueError(f"the tokenizer adds the ids {added} to a text, which should be {due}: {prepare}")
    # transformers 5.23 can lose the space before the first word where a folder has no tokenizer.json
    pieces = tokenizer.convert_ids_to_tokens(_tokenise(tokenizer, "A  A", 0, None)[0])
    if "▁A" in tokenizer.get_vocab() and pieces != ["▁A", "▁", "▁A"]:
        raise ValueError(
            f"{kind} reads 'A  A' as {pieces} where SentencePiece has ['▁A', '▁', '▁A']: load the tokenizer from a "
            f"folder with a tokenizer.json, or with LlamaTokenizer, and {prepare}"
        )
    from_text = {id for token in special_ids for id in _tokenise(tokenizer, token, 0, None)[0]}
    if made := [token for token, id in special_ids.items() if id in from_text]:
        raise ValueError(f"the tokenizer makes special tokens out of plain text ({', '.join(made)}): check its merges")
    if probe is None:
        return Binding(prefix, special_ids, "", [], {}, declared)
    return _find_anchor(tokenizer, prefix, special_ids, probe, declared)


def rendered_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """What the stock processor makes of a rendered text: special tokens are recognised, the tokenizer adds its own."""
    return tokenizer(text, split_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def fingerprint(tokenizer: PreTrainedTokenizerFast, template: str) -> str:
    """Names a tokenizer with a template (`Template.identity`): text lengths counted under the same name are exact for
    the run."""
    text = f"{RENDERING}\n{template}\n{data_tokens(tokenizer)}\n{tokenizer.backend_tokenizer.to_str()}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def put_blank_merges_last(tokenizer: PreTrainedTokenizerFast) -> None:
    """Restores SentencePiece's order of merges, in place: runs of spaces come last, so words get their space first.

    transformers 5.23 orders them by id where a folder has a tokenizer.model and no tokenizer.json (as Vicuna's) and
    then reads "two  spaces" as "▁two", "▁▁", "sp", "aces". Other tokenizers stay as they are.
    """
    if "▁▁" in tokenizer.get_vocab():
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        merges = backend["model"]["merges"]
        ordered = sorted(merges, key=lambda pair: not "".join(pair).strip("▁"))
        if ordered != merges:
            backend["model"]["merges"] = ordered
            tokenizer.backend_tokenizer.model = Tokenizer.from_str(json.dumps(backend)).model


def _find_anchor(
    tokenizer: PreTrainedTokenizerFast,
    prefix: list[int],
    special_ids: dict[str, int],
    probe: Sequence[Atom],
    declared: re.Pattern | None,
) -> Binding:
    """Takes the anchor with which the probe gets the ids that the tokenizer itself gives the rendered text.

    A line break is a safe one in SentencePiece vocabularies: it is a byte token that merges with nothing.
    """
    rendered = rendered_ids(tokenizer, "".join(atom for atom, _ in probe))
    for anchor in ("", "\n"):
        anchor_ids = _tokenise(tokenizer, anchor, 0, None)[0] if anchor else []
        binding = Binding(prefix, special_ids, anchor, anchor_ids, {}, declared)
        if assemble(probe, tokenizer, binding, [1])[0].tolist() == rendered:
            texts = [atom for atom, _ in probe if not isinstance(atom, Special)]
            binding.known_ids.update({text: _tokenise(tokenizer, text, 0, binding)[0] for text in texts})
            return binding
    raise ValueError(
        f"{type(tokenizer).__name__} reads a rendered chat in other pieces than training would: the template is for "
        "another model family, or the tokenizer has special tokens that swallow spaces"
    )


def _tokenise(tokenizer: PreTrainedTokenizerFast, text: str, cut: int, later: Binding | None) -> tuple[list[int], int]:
    """Ids of a text between two special tokens, and the index of the first that starts at or after character `cut`.

    `later` is the binding for a text that follows something, None for one that starts the sequence.
    """
    if later and text in later.known_ids and cut in (0, len(text)):
        ids = later.known_ids[text]
        return ids, len(ids) if cut else 0
    anchor, skip = (later.anchor, len(later.anchor_ids)) if later else ("", 0)
    encoded = tokenizer(
        anchor + text,
        add_special_tokens=False,
        split_special_tokens=True,  # special tokens that the text spells stay text
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,  # lengths are the caller's business
    )
    ids = encoded["input_ids"][skip:]
    if cut >= len(text):
        return ids, len(ids)
    return ids, bisect_left(encoded["offset_mapping"], cut + len(anchor), lo=skip, key=itemgetter(0)) - skip
