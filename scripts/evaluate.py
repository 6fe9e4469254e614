"""Asks a trained model the first question of held-out samples and counts exact answers, with stock transformers only.

    python scripts/evaluate.py --model runs/finetune/model --json held_out.json --images ROOT --show 8

Samples may have any number of pictures and lie in any file that data_tools/build_shards.py reads. Those that cannot be
asked are left out of the score, counted and named. The model folder is loaded by `AutoModelForImageTextToText` and
`AutoProcessor` as anybody else would load it; nothing of this project runs the model.
"""

import json
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jinja2 import TemplateError
from jsonargparse import ArgumentParser
from PIL import Image, ImageDraw, ImageFont, ImageOps
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from llava_next.data.format.picture_forms import Picture, picture_file
from llava_next.data.format.pictures import open_rgb
from llava_next.data.format.records import has_system, read_record
from llava_next.data.format.tar import BadSample
from llava_next.data.inputs.listing import Listing
from llava_next.data.inputs.samples import common_reasons, rejection
from llava_next.data.storage.client import written_aside
from llava_next.paths import drawing_path, folder_or_name, local_path
from llava_next.tokenise import IMAGE_TOKEN
from llava_next.turns import place_images, read_turns

sys.path.append(str(Path(__file__).parents[1] / "data_tools"))
from building.inputs import add_input_arguments, list_input

REASONS_SHOWN = 5


@dataclass(frozen=True)
class Question:
    """A sample's first question.

    Args:
        names: of its pictures; files: where they lie, or their bytes.
        text: with an `<image>` for each picture, where it stands in the sample.
        system: the sample's own system prompt; None: the chat template's.
        right: the answer in the data.
        prompt: rendered by the model's chat template.
    """

    names: list[str]
    files: list[Path | bytes]
    text: str
    system: str | None
    right: str
    prompt: str = ""

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


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=folder_or_name, required=True, help="model folder or hub repository")
    add_input_arguments(parser)
    parser.add_argument("--limit", type=int, default=0, help="samples to ask; 0: all")
    parser.add_argument("--show", type=int, default=8, help="answers to print")
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--max_new_tokens", type=int, default=16)
    parser.add_argument("--out", type=local_path, help="JSON file for score and answers")
    parser.add_argument("--sheet", type=drawing_path, help="PNG or WebP file: first pictures with answers")
    args = parser.parse_args()
    if sum(given is not None for given in (args.json, args.hf, args.shards)) != 1:
        parser.error("give one of --json, --hf and --shards")
    try:
        listing = list_input(args)
        logging.disable_progress_bar()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto").to(device).eval()
        processor = AutoProcessor.from_pretrained(args.model)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

    questions, left_out = read_questions(listing, args.images, processor, args.limit)
    for line in common_reasons(left_out, REASONS_SHOWN):
        print(f"left out: {line}")
    if not questions:
        sys.exit(f"error: none of {len(listing)} samples can be asked: there is no score")
    results = ask_all(model, processor, questions, args.batch_size, args.max_new_tokens)
    correct = sum(r["answer"] == r["right"] for r in results)
    for r in results[: args.show]:
        mark = "ok   " if r["answer"] == r["right"] else "WRONG"
        print(f"{mark} {r['image']}  {r['question']}  model: {r['answer']!r}  right: {r['right']!r}")
    about = f", {len(left_out)} samples left out" if left_out else ""
    print(f"exact match: {correct}/{len(results)} = {100 * correct / len(results):.1f} %{about}  ({args.model})")
    if args.sheet:
        with written_aside(args.sheet) as temporary:
            draw_sheet(questions[:40], results).save(temporary, format=args.sheet.suffix[1:].upper())
        print(f"pictures with answers: {args.sheet}")
    if args.out:
        report = {"exact": correct, "of": len(results), "left_out": left_out, "results": results}
        with written_aside(args.out) as temporary:
            temporary.write_text(json.dumps(report, indent=1))


def read_questions(listing: Listing, images: Path | None, processor, limit: int) -> tuple[list[Question], list[dict]]:
    """The first questions, at most `limit` (0: all), and the samples left out: `row`, `id`, `file` and `reason`."""
    questions, left_out = [], []
    for row, address in enumerate(listing.addresses):
        if limit and len(questions) == limit:
            break
        record = {}
        try:
            record = listing.reader.read(address)
            question = first_question(record, images)
            prompt = processor.apply_chat_template(question.messages(), add_generation_prompt=True)
            if prompt.count(IMAGE_TOKEN) != len(question.files):
                raise BadSample(
                    f"the chat template shows {prompt.count(IMAGE_TOKEN)} of {len(question.files)} pictures"
                )
            questions.append(replace(question, prompt=prompt))
        except (BadSample, TemplateError) as error:
            left_out.append(rejection(row, record, str(error)))
    return questions, left_out


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


def ask_all(model, processor, questions: list[Question], batch_size: int, max_new_tokens: int) -> list[dict]:
    """Question, answer and right answer of each, with the names of its pictures."""
    answers, started = [], time.monotonic()
    for start in range(0, len(questions), batch_size):
        answers += ask(model, processor, questions[start : start + batch_size], max_new_tokens)
        left = (time.monotonic() - started) / len(answers) * (len(questions) - len(answers))
        print(f"asked {len(answers)}/{len(questions)}, about {left:.0f} s left", file=sys.stderr, flush=True)
    return [
        {"image": ", ".join(q.names) or None, "question": q.shown, "answer": answer, "right": q.right}
        for q, answer in zip(questions, answers, strict=True)
    ]


@torch.inference_mode()
def ask(model, processor, questions: list[Question], max_new_tokens: int) -> list[str]:
    """Greedy answers."""
    pictures = [picture for question in questions for picture in question.pictures()]
    texts = [question.prompt for question in questions]
    inputs = processor(images=pictures or None, text=texts, padding=True, return_tensors="pt")
    inputs = inputs.to(model.device, model.dtype)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def draw_sheet(questions: list[Question], results: list[dict], columns: int = 8, cell: int = 116) -> Image.Image:
    """First pictures in a grid, each with the answer under it: green when exact, red with the right one when not."""
    rows, text_height = math.ceil(len(questions) / columns), 40
    sheet = Image.new("RGB", (columns * cell, rows * (cell + text_height)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for number, (question, result) in enumerate(zip(questions, results, strict=False)):
        x, y = number % columns * cell, number // columns * (cell + text_height)
        if question.files:
            picture = ImageOps.contain(open_rgb(question.files[0]), (cell - 12, cell - 12))
            sheet.paste(picture, (x + (cell - picture.width) // 2, y + cell - 6 - picture.height))
        exact = result["answer"] == result["right"]
        text = result["answer"] if exact else f"{result['answer']}\nnot {result['right']}"
        place = (x + cell // 2, y + cell)
        draw.multiline_text(place, text, "#007030" if exact else "#c00000", font, "ma", spacing=2, align="center")
    return sheet


if __name__ == "__main__":
    main()
