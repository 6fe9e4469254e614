"""Exact lengths: what a tokenizer with a chat template makes of a sample."""

import functools
from collections.abc import Sequence

import numpy as np

from llava_next.data.format.index import Lengths
from llava_next.data.format.tar import BadSample
from llava_next.own_template import NAMES, template_for
from llava_next.repositories import resolve_folder
from llava_next.tokenise import IGNORE_INDEX, IMAGE_TOKEN, fingerprint


class TextLength:
    """Counts the tokens of samples as a run will see them.

    Args:
        argument: `NAME_OR_FOLDER:template`. Best a composed model folder, whose tokenizer is the run's own. A published
            language model's is prepared as scripts/compose.py does it.

    Raises:
        ValueError: no such tokenizer or template, or they do not fit each other.
    """

    def __init__(self, argument: str):
        from transformers import AutoTokenizer  # here: it takes seconds

        name, _, template = argument.rpartition(":")
        if not name or template not in NAMES:
            raise ValueError(f"--tokenizer {argument}: expected NAME_OR_FOLDER:template, one of {', '.join(NAMES)}")
        self.argument = argument
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(resolve_folder(name, "tokenizer"))
            self.template = template_for(template, self.tokenizer)
            if IMAGE_TOKEN not in self.tokenizer.get_vocab():
                self.template.prepare_tokenizer(self.tokenizer)
            self.template.check_tokenizer(self.tokenizer)
        except (OSError, ValueError) as error:
            raise ValueError(f"--tokenizer {argument}: {str(error).splitlines()[0]}") from None
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.fingerprint = fingerprint(self.tokenizer, self.template.identity)

    def count(self, conversations: Sequence[dict], image_lengths: Sequence[int]) -> Lengths:
        """Of a sample whose images are so many tokens each. Raises BadSample when the template refuses it."""
        try:
            ids, labels = self.template.encode(conversations, self.tokenizer, self.image_token_id, image_lengths)
        except ValueError as error:
            raise BadSample(str(error)) from error
        return Lengths(len(ids) - sum(image_lengths), int(np.argmax(labels != IGNORE_INDEX)))


def fingerprints(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """What the index calls the tokenizers, whose folders may have any name. Raises ValueError as `TextLength`."""
    return tuple(length.fingerprint for length in text_lengths(arguments))


@functools.cache
def text_lengths(arguments: tuple[str, ...]) -> tuple[TextLength, ...]:
    """The tokenizers of a command line, loaded once in a process. Raises ValueError as `TextLength`."""
    return tuple(TextLength(argument) for argument in arguments)
