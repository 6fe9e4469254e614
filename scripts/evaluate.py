"""Scores a trained model: exact answers to the first question of held-out samples, or benchmarks by lmms-eval.

    python scripts/evaluate.py --model runs/finetune/model --json held_out.json --images ROOT --show 8
    python scripts/evaluate.py --model runs/finetune/model --json held_out.json --images ROOT --metric anls --out scores
    python scripts/evaluate.py --model runs/finetune/model --tasks mme,textvqa_val,mmmu_val --out scores

The first needs stock transformers only. Samples may have any number of pictures and lie in any file that
data_tools/build_shards.py reads. Those that cannot be asked are left out of the score, counted and named. The model
folder (or an adapter's base, into which the adapter is merged) is loaded by `AutoModelForImageTextToText` and
`AutoProcessor` as anybody else would load it; nothing of this project runs the model. With --tasks or --metric
lmms-eval asks and scores (extra `eval`), through `accelerate launch` on several GPUs, and --out is a folder:
scores.json, samples/NAME.jsonl and row.md. Run again it goes on.
"""

import json
import math
import sys
import time
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from PIL import Image, ImageDraw, ImageFont, ImageOps
from transformers.utils import logging

from evaluation.engines import BACKENDS, Transformers, generate
from evaluation.metrics import METRICS
from evaluation.questions import Question, check_any_asked, read_questions
from evaluation.scores import Sample, Score, ScoreFolder, model_hash, open_scores, score_name
from llava_next.data.format.pictures import open_rgb
from llava_next.data.inputs.listing import Listing
from llava_next.data.inputs.samples import common_reasons
from llava_next.data.storage.client import written_aside
from llava_next.model.folders.check import ModelFolder
from llava_next.paths import drawing_path, folder_or_name, local_path, output_file, output_folder, shown_as
from llava_next.repositories import resolve_folder

sys.path.append(str(Path(__file__).parents[1] / "data_tools"))
from building.inputs import add_input_arguments, list_input

REASONS_SHOWN = 5


def main() -> None:
    args = parse()
    try:
        if args.check_only:
            from evaluation.run import check

            print(json.dumps(check(args)))
        elif args.tasks or args.metric:
            from evaluation.run import score

            score(args)
        else:
            ask_exactly(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


@shown_as("path")
def scores_place(text: str) -> Path:
    """Where scores go: a .json file, or a folder. Raises PathError."""
    return (output_file if str(text).endswith(".json") else output_folder)(text)


def parse() -> Namespace:
    """What the command line asks for."""
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=folder_or_name, required=True, help="model or adapter folder, or hub name")
    add_input_arguments(parser)
    parser.add_argument("--tasks", help="benchmarks by their names in lmms-eval, separated by commas")
    parser.add_argument("--metric", choices=METRICS, help="score --json by lmms-eval (default: count exact answers)")
    parser.add_argument("--name", help="of the score of --json (default: the file's)")
    parser.add_argument("--out", type=scores_place, help="folder of scores; of exact answers also a .json file")
    parser.add_argument("--limit", type=int, default=0, help="samples to ask; 0: all")
    parser.add_argument("--batch_size", type=int, help="prompts at once (default: 50, by lmms-eval 8 a GPU)")
    parser.add_argument("--max_new_tokens", type=int, default=16, help="of an answer to --json")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument("--show", type=int, default=8, help="exact answers to print")
    parser.add_argument("--sheet", type=drawing_path, help="PNG or WebP file: first pictures with exact answers")
    parser.add_argument("--backend", choices=BACKENDS, default=BACKENDS[0], help="what answers for lmms-eval")
    parser.add_argument("--data", type=local_path, help="folder of data sets as on the hub, DATA/ORG/NAME, for --tasks")
    parser.add_argument("--own_tasks", type=local_path, help="folder of more tasks, as lmms-eval's YAML files")
    parser.add_argument(
        "--keep_template", type=bool, default=False, help="score a model with a chat template of its own"
    )
    parser.add_argument(
        "--check_only", type=bool, default=False, help="look whether it can be asked, print the names of the scores"
    )
    args = parser.parse_args()
    given = sum(given is not None for given in (args.json, args.hf, args.shards))
    if given > 1 or given + bool(args.tasks) != 1:
        parser.error("give one of --json, --hf and --shards, or --tasks")
    if args.limit < 0 or args.max_new_tokens < 1 or (args.batch_size is not None and args.batch_size < 1):
        parser.error("--limit is 0 or more, --batch_size and --max_new_tokens are 1 or more")
    return args


def ask_exactly(args: Namespace) -> None:
    """Counts exact answers. Raises ValueError, OSError."""
    listing = list_input(args)
    folder = resolve_folder(args.model)
    scores = score_folder(args, folder)
    with scores.hold() if scores else nullcontext():
        count_exact(args, listing, folder, scores)


def count_exact(args: Namespace, listing: Listing, folder: Path, scores: ScoreFolder | None) -> None:
    """What `ask_exactly` does in its place. Raises ValueError, OSError."""
    logging.disable_progress_bar()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    engine = Transformers(folder, device)
    model, processor = engine.model, engine.processor

    questions, left_out = read_questions(listing, args.images, processor, args.limit)
    for line in common_reasons(left_out, REASONS_SHOWN):
        print(f"left out: {line}")
    check_any_asked(questions, left_out)
    results = ask_all(model, processor, questions, args.batch_size or 50, args.max_new_tokens)
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
    if scores is not None:
        asked = [
            Sample(q.id, q.shown, r["answer"], r["right"], float(r["answer"] == r["right"]))
            for q, r in zip(questions, results, strict=True)
        ]
        scores.add(Score(score_name(args), correct / len(results), METRICS["exact"].name, asked, {}))
        print(f"\n{scores.row()}")
    elif args.out:
        report = {"exact": correct, "of": len(results), "left_out": left_out, "results": results}
        with written_aside(args.out) as temporary:
            temporary.write_text(json.dumps(report, indent=1))


def score_folder(args: Namespace, model: Path) -> ScoreFolder | None:
    """Where --out is a folder of scores. Raises ValueError: it has those of another model."""
    if args.out is None or args.out.suffix == ".json":
        return None
    folder, name = ModelFolder(model), score_name(args)
    scores = open_scores(args.out, args.model, model_hash(folder.path), BACKENDS[0], folder)
    scores.check_limit(name, args.limit)
    return scores


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
    pictures = [question.pictures() for question in questions]
    return generate(model, processor, [question.prompt for question in questions], pictures, max_new_tokens)


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
