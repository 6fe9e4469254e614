"""Asks a trained model the first question of held-out samples and counts exact answers, with stock transformers only.

    python scripts/evaluate.py --model runs/finetune/model --json held_out.json --images ROOT --show 8

The model folder is loaded by `AutoModelForImageTextToText` and `AutoProcessor` as anybody else would load it;
nothing of this project runs the model.
"""

import json
import math
import sys
import time
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from PIL import Image, ImageDraw, ImageFont, ImageOps
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from llava_next.templates import IMAGE_TOKEN, read_turns


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="model folder or hub repository")
    parser.add_argument("--json", required=True, help="LLaVA JSON list with single-image samples")
    parser.add_argument("--images", required=True, help="folder that the image paths are relative to")
    parser.add_argument("--limit", type=int, default=0, help="samples to ask; 0: all")
    parser.add_argument("--show", type=int, default=8, help="answers to print")
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--max_new_tokens", type=int, default=16)
    parser.add_argument("--out", help="JSON file for score and answers")
    parser.add_argument("--sheet", help="PNG file: the first pictures with the model's answers under them")
    args = parser.parse_args()

    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto").to(device).eval()
    processor = AutoProcessor.from_pretrained(args.model)

    samples = [s for s in json.loads(Path(args.json).read_text()) if isinstance(s.get("image"), str)]
    samples = samples[: args.limit or None]
    answers, started = [], time.monotonic()
    for start in range(0, len(samples), args.batch_size):
        batch = samples[start : start + args.batch_size]
        answers += ask(model, processor, batch, Path(args.images), args.max_new_tokens)
        left = (time.monotonic() - started) / len(answers) * (len(samples) - len(answers))
        print(f"asked {len(answers)}/{len(samples)}, about {left:.0f} s left", file=sys.stderr, flush=True)

    results = []
    for sample, answer in zip(samples, answers, strict=True):
        question, right = first_turn(sample)
        results.append({"image": sample["image"], "question": question, "answer": answer, "right": right})
    correct = sum(r["answer"] == r["right"] for r in results)
    for r in results[: args.show]:
        mark = "ok   " if r["answer"] == r["right"] else "WRONG"
        print(f"{mark} {r['image']}  {r['question']}  model: {r['answer']!r}  right: {r['right']!r}")
    print(f"exact match: {correct}/{len(results)} = {100 * correct / max(1, len(results)):.1f} %  ({args.model})")
    if args.sheet:
        draw_sheet(results[:40], Path(args.images)).save(args.sheet)
        print(f"pictures with answers: {args.sheet}")
    if args.out:
        Path(args.out).write_text(json.dumps({"exact": correct, "of": len(results), "results": results}, indent=1))


def first_turn(sample: dict) -> tuple[str, str]:
    """First question, without its image placeholder, and its answer."""
    turn = read_turns(sample["conversations"])[0]
    return turn.question.replace(IMAGE_TOKEN, "").strip(), turn.answer.strip()


def draw_sheet(results: list[dict], images: Path, columns: int = 8, cell: int = 116) -> Image.Image:
    """Pictures in a grid, each with the answer under it: green when exact, red with the right one when not."""
    rows, text_height = math.ceil(len(results) / columns), 40
    sheet = Image.new("RGB", (columns * cell, rows * (cell + text_height)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for number, result in enumerate(results):
        x, y = number % columns * cell, number // columns * (cell + text_height)
        picture = ImageOps.contain(Image.open(images / result["image"]).convert("RGB"), (cell - 12, cell - 12))
        sheet.paste(picture, (x + (cell - picture.width) // 2, y + cell - 6 - picture.height))
        exact = result["answer"] == result["right"]
        text = result["answer"] if exact else f"{result['answer']}\nnot {result['right']}"
        place = (x + cell // 2, y + cell)
        draw.multiline_text(place, text, "#007030" if exact else "#c00000", font, "ma", spacing=2, align="center")
    return sheet


@torch.inference_mode()
def ask(model, processor, samples: list[dict], images: Path, max_new_tokens: int) -> list[str]:
    """Greedy answers to the first question of each sample."""
    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": first_turn(s)[0]}]}] for s in samples
    ]
    texts = processor.apply_chat_template(chats, add_generation_prompt=True)
    pictures = [Image.open(images / s["image"]).convert("RGB") for s in samples]
    inputs = processor(images=pictures, text=texts, padding=True, return_tensors="pt").to(model.device, model.dtype)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


if __name__ == "__main__":
    main()
