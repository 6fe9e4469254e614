"""From a record to a sample: its text checked by training's rules, its pictures by their headers.

A build cuts the pictures as well, by a maker of its own; all else is the same code, so what a plan of raw data counts
and leaves out is what a build would.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from llava_next.anyres import AnyRes
from llava_next.data.format.index import Lengths
from llava_next.data.format.picture_forms import Picture, picture_file, picture_names
from llava_next.data.format.pictures import open_picture
from llava_next.data.format.records import (
    drops_first_turn,
    prepend_system,
    read_record,
    source_name,
    states_system,
    without_system,
)
from llava_next.data.format.shards import RawSample, StripInfo
from llava_next.data.format.tar import BadSample
from llava_next.data.inputs.listing import Reader
from llava_next.data.inputs.text_lengths import text_lengths
from llava_next.own_template import template_of
from llava_next.templates import Template
from llava_next.turns import place_images, read_system, read_turns

SYSTEM_CHOICES = {"keep": lambda turns: turns, "drop": without_system, "prepend": prepend_system}
IDS_SHOWN = 3  # of the samples left out for one reason
# Of samples' conversations, kept in `dataset.json` under `build`: a first turn that training leaves out as the original
# does, and a system prompt of the sample's own.
TURN_COUNTS = {"first_turns_left_out": drops_first_turn, "system_prompts": states_system}


@dataclass(frozen=True)
class SampleMaker:
    """How records become samples, pictures by their headers.

    Args:
        root: folder that image paths are relative to; None: all pictures are embedded.
        anyres: geometry of the tiles.
        source: name for the part of the mixture; None: each record's own, see `records.source_name`.
        system: what becomes of a sample's own system prompt, one of `SYSTEM_CHOICES`.
        template: chat template of the training, where it is known; None: any.
        allow_text_image_token: take `<image>` in a sample without pictures as characters.
    """

    root: Path | None
    anyres: AnyRes
    source: str | None = None
    system: str = "keep"
    template: Template | None = None
    allow_text_image_token: bool = False

    reads_pixels = False

    def make_sample(self, row: int, record: dict) -> RawSample:
        """The record in row `row` of the input. Raises BadSample."""
        found = read_record(record, allow_text_image_token=self.allow_text_image_token)
        turns = SYSTEM_CHOICES[self.system](found.conversations)
        check_text(turns, len(found.pictures))
        check_system(turns, self.template)
        images = [self._strip(picture) for picture in found.pictures]
        name = str(row) if found.id is None else found.id
        return RawSample(f"{row:09d}", name, self.source or source_name(record, self.root), turns, images)

    def _strip(self, name: str | Picture) -> StripInfo:
        """One picture. Raises BadSample."""
        file = name.data if isinstance(name, Picture) else picture_file(name, self.root)
        image = open_picture(file, load=self.reads_pixels)
        try:
            return StripInfo(*image.size, *self.anyres.grid(*image.size), *self.strip_data(image))
        except ValueError as error:
            raise BadSample(str(error)) from error

    def strip_data(self, image: Image.Image) -> tuple[str, bytes]:
        """Extension and bytes of the picture's strip; here without bytes."""
        return "jpg", b""


def check_text(conversations: list, n_images: int) -> None:
    """Applies the rules of training; what they make of the text is not stored. Raises BadSample."""
    try:
        place_images(read_turns(conversations), n_images)
    except ValueError as error:
        raise BadSample(str(error)) from error


def check_system(conversations: list, template: Template | None) -> None:
    """Refuses a sample's own system prompt where the chat template has no place for one. Raises BadSample."""
    if template is not None:
        try:
            template.check_system(read_system(conversations))
        except ValueError as error:
            raise BadSample(str(error)) from error


def model_template(folder: Path) -> Template | None:
    """The chat template of this project that is saved in a model folder; None: another, or none. Raises ValueError as
    `own_template.template_of`."""

    def tokenizer():
        from transformers import AutoTokenizer  # here: it takes seconds

        return AutoTokenizer.from_pretrained(folder)

    try:
        saved = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except OSError:
        return None
    return template_of(saved, tokenizer)


def make_samples(
    reader: Reader,
    maker: SampleMaker,
    tokenizers: tuple[str, ...],
    rows: Sequence[int],
    addresses: np.ndarray,
    keep: Callable[[RawSample, dict[str, Lengths]], None],
) -> Iterator[dict | None]:
    """Makes samples one by one and hands them on; of each that was left out, its entry for the report.

    Args:
        tokenizers: `NAME_OR_FOLDER:template` of those whose lengths are counted.
        rows, addresses int64 [n, 3]: of the samples in the input.
        keep: takes a sample and its lengths by fingerprint; may raise BadSample.
    """
    counters = text_lengths(tokenizers)
    for row, address in zip(rows, addresses, strict=True):
        record = {}
        try:
            record = reader.read(address)
            sample = maker.make_sample(row, record)
            images = [maker.anyres.num_tokens(image.width, image.height) for image in sample.images]
            keep(sample, {counter.fingerprint: counter.count(sample.conversations, images) for counter in counters})
            yield None
        except BadSample as error:
            yield rejection(row, record, str(error))


def rejection(row: int, record: dict, reason: str) -> dict:
    """A sample that was left out, as reports have it; `record` is empty when it could not be read."""
    return {"row": row, "id": record.get("id", row), "file": picture_names(record), "reason": reason}


def turn_counts(sample: RawSample) -> dict[str, int]:
    """Which of `TURN_COUNTS` hold of a sample, 0 or 1 each."""
    return {name: int(holds(sample.conversations)) for name, holds in TURN_COUNTS.items()}


def by_reason(rejected: Iterable[dict]) -> list[tuple[str, list[dict]]]:
    """Entries of samples left out by what their reasons begin with, the most frequent first."""
    groups: dict[str, list[dict]] = {}
    for entry in rejected:
        groups.setdefault(entry["reason"].partition(":")[0], []).append(entry)
    return sorted(groups.items(), key=lambda group: -len(group[1]))


def common_reasons(rejected: Iterable[dict], most: int = 5) -> list[str]:
    """The reasons that left out most samples, each with how often, an example, and the first ids."""

    def ids(entries: list[dict]) -> str:
        more = ", ..." if len(entries) > IDS_SHOWN else ""
        return f" [id {', '.join(str(entry['id']) for entry in entries[:IDS_SHOWN])}{more}]"

    return [
        f"{reason} ({len(entries)}){entries[0]['reason'][len(reason) :]}{ids(entries)}"
        for reason, entries in by_reason(rejected)[:most]
    ]
