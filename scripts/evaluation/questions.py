"""Held-out samples as questions: read as training reads them, asked in the saved chat template's words."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from jinja2 import TemplateError
from PIL import Image

from llava_next.data.format.picture_forms import Picture, picture_file
from llava_next.data.format.pictures import open_rgb
from llava_next.data.format.records import has_system, read_record
from llava_next.data.format.tar import BadSample
from llava_next.data.inputs.listing import Listing
from llava_next.data.inputs.samples import common_reasons, rejection
from llava_next.tokenise import IMAGE_TOKEN
from llava_next.turns import place_images, read_turns


@dataclass(frozen=True)
class Question:
    """A sample's first question.

    Args:
        names: of its pictures; files: where they lie, or their bytes.
        text: with an `<image>` for each picture, where it stands in the sample.
        system: the sample's own system prompt; None: the chat template's.
        right: the answer in the data.
        prompt: rendered by the model's chat template.
        id: as the record has it, else its row.
        answers: all right answers, where a metric takes several; choices: letter -> text of each option.
    """

    names: list[str]
    files: list[Path | bytes]
    text: str
    system: str | None
    right: str
    prompt: str = ""
    id: str = ""
    answers: tuple[str, ...] = ()
    choices: dict[str, str] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """The text without placeholders."""
        return (self.text.replace(IMAGE_TOKEN, "") if self.files else self.text).strip()

    def messages(self) -> list[dict]:
        """The chat that asks it, placeholders in the text: every saved chat template takes that as training did."""
        turns = [] if self.system is None else [("system", self.system)]
        return [
            {"role": role, "content": [{"type": "text", "text": text}]} for role, text in (*turns, ("user", self.text))
        ]

    def pictures(self) -> list[Image.Image]:
        """Its pictures with the pixels that training sees. Raises BadSample."""
        return [open_rgb(file) for file in self.files]


def read_questions(
    listing: Listing,
    images: Path | None,
    processor,
    limit: int,
    complete: Callable[[Question, dict], Question] = lambda question, record: question,
) -> tuple[list[Question], list[dict]]:
    """The first questions, at most `limit` (0: all), and the samples left out: `row`, `id`, `file` and `reason`.

    Args:
        complete: adds what a metric wants of the record; may raise BadSample.
    """
    questions, left_out = [], []
    for row, address in enumerate(listing.addresses):
        if limit and len(questions) == limit:
            break
        record = {}
        try:
            record = listing.reader.read(address)
            question = complete(first_question(record, images), record)
            prompt = processor.apply_chat_template(question.messages(), add_generation_prompt=True)
            if prompt.count(IMAGE_TOKEN) != len(question.files):
                raise BadSample(
                    f"the chat template shows {prompt.count(IMAGE_TOKEN)} of {len(question.files)} pictures"
                )
            questions.append(replace(question, prompt=prompt, id=str(record.get("id", row))))
        except (BadSample, TemplateError) as error:
            left_out.append(rejection(row, record, str(error)))
    return questions, left_out


def check_any_asked(questions: list[Question], left_out: list[dict]) -> None:
    """Refuses samples none of which can be asked, with the most common reason. Raises ValueError."""
    if not questions:
        reason = next(iter(common_reasons(left_out)), "there are none")
        raise ValueError(f"none of {len(left_out)} samples can be asked, so there is no score: {reason}")


def first_question(record: dict, images: Path | None) -> Question:
    """Of a record in any form. Raises BadSample."""
    sample = read_record(record)
    try:
        turns = read_turns(sample.conversations)
        count = len(place_images(turns, len(sample.pictures))[0]) - 1
    except ValueError as error:
        raise BadSample(str(error)) from error
    pictures = sample.pictures[:count]  # the others belong to later questions
    names = [picture.name if isinstance(picture, Picture) else picture for picture in pictures]
    files = [picture.data if isinstance(picture, Picture) else picture_file(picture, images) for picture in pictures]
    for file in files:
        open_rgb(file)
    text = turns[0].question
    if count == 1:  # several placeholders of one picture become one, in front, as in training
        text = f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()
    system = sample.conversations[0]["value"] if has_system(sample.conversations) else None
    return Question(names, files, text, system, turns[0].answer.strip())
