"""Evaluation asks what was trained: records in every form, any number of pictures, the same pixels and prompts."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

import chat
import evaluate
from evaluation.engines import load_processor
from llava_next.data.inputs.listing import list_json
from llava_next.templates import IMAGE_TOKEN, get_template
from support.builds import Result, call
from support.demo import build_demo_by_command
from support.forms import BLUE, DATA_URL, turns


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The composed demo model, and a few pictures: folder with digits/ and model/."""
    folder = tmp_path_factory.mktemp("evaluate")
    build_demo_by_command(folder, "vicuna_v1")
    (folder / "blue.png").write_bytes(BLUE)
    rng = np.random.default_rng(0)
    rotated = Image.Exif()
    rotated[0x0112] = 6  # orientation: turn by 90 degrees
    picture = Image.fromarray(rng.integers(0, 256, (40, 90, 3), dtype=np.uint8))
    picture.save(folder / "rotated.jpg", exif=rotated)
    return folder


SAMPLES = [
    {"id": "one", "image": "blue.png", "conversations": turns("<image>\nWhich?")},
    {"id": "two", "image": ["blue.png", "rotated.jpg"], "conversations": turns("<image> or <image>?")},
    {"id": "list", "images": ["blue.png"], "conversations": turns("Which?\n<image>")},
    {"id": "later", "image": ["blue.png", "rotated.jpg"],
     "conversations": [*turns("<image>\nWhich?"), *turns("And <image>?")]},
    {"id": "messages", "messages": [{"role": "system", "content": "Be brief."},
                                    {"role": "user", "content": [{"type": "image", "image": DATA_URL}]},
                                    {"role": "assistant", "content": "This."}]},
    {"id": "text", "conversations": turns("Hi")},
    {"id": "lost", "foto": "blue.png", "conversations": turns("<image>\nWhich?")},
    {"id": "missing", "image": "green.png", "conversations": turns("<image>\nWhich?")},
    {"id": "fewer", "image": ["blue.png", "blue.png"], "conversations": turns("<image>\nWhich?")},
]  # fmt: skip


def run(monkeypatch, folder, records: list, *arguments) -> Result:
    (folder / "held_out.jsonl").write_text("\n".join(map(json.dumps, records)))
    paths = ["--model", folder / "model", "--json", folder / "held_out.jsonl", "--images", folder]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, [*paths, "--max_new_tokens", 2, *arguments])])
    return call(lambda _: evaluate.main())


@pytest.fixture(scope="module")
def asked(demo):
    """One evaluation of all samples, and the prompts and pictures that the processor got."""
    seen = []

    def watching(model, processor, questions, most):
        seen.extend(questions)
        return evaluate_ask(model, processor, questions, most)

    with pytest.MonkeyPatch.context() as patch:
        evaluate_ask = evaluate.ask
        patch.setattr(evaluate, "ask", watching)
        files = ["--out", demo / "answers.json", "--sheet", demo / "sheet.png", "--batch_size", 4]
        return run(patch, demo, [*SAMPLES, 7], *files), seen


def test_every_sample_is_asked_or_left_out_with_its_reason(asked, demo):
    result, _ = asked
    assert result.returncode == 0, result.stderr
    assert "exact match: 0/6 = 0.0 %, 4 samples left out" in result.stdout
    for reason in (
        "a question has <image>, and the record has no picture (1): its keys are id, foto",
        "no such image file (1):",
        "no object but a number (1):",
    ):
        assert f"left out: {reason}" in result.stdout
    report = json.loads((demo / "answers.json").read_text())
    assert report["of"] == 6 and [entry["row"] for entry in report["left_out"]] == [6, 7, 8, 9]
    assert [entry["image"] for entry in report["results"]] == [
        *("blue.png", "blue.png, rotated.jpg", "blue.png", "blue.png", "embedded", None)
    ]
    assert Image.open(demo / "sheet.png").size == (928, 156)


def test_prompts_are_those_of_training(asked, demo):
    """As the saved chat template renders the sample's own messages up to the first answer."""
    _, questions = asked
    default = get_template("vicuna_v1").system
    expected = [
        f"{default} USER: <image>\nWhich? ASSISTANT:",
        f"{default} USER: <image> or <image>? ASSISTANT:",
        f"{default} USER: <image>\nWhich? ASSISTANT:",
        f"{default} USER: <image>\nWhich? ASSISTANT:",
        "Be brief. USER: <image> ASSISTANT:",
        f"{default} USER: Hi ASSISTANT:",
    ]
    assert [question.prompt for question in questions] == expected
    assert [len(question.files) for question in questions] == [text.count(IMAGE_TOKEN) for text in expected]


def test_pictures_have_the_same_pixels_in_training_evaluation_and_chat(asked, demo):
    """A camera's orientation is in none of them, as the original does not look at it."""
    _, questions = asked
    plain = np.asarray(Image.open(demo / "rotated.jpg").convert("RGB"))
    assert plain.shape == (40, 90, 3)
    assert np.array_equal(questions[1].pictures()[1], plain)
    assert np.array_equal(chat.open_picture(str(demo / "rotated.jpg")), plain)


@pytest.mark.parametrize(("records", "message"), [(SAMPLES[6:], "none of 3 samples can be asked"), ([], "found none")])
def test_no_question_is_an_error_and_no_score(demo, monkeypatch, records, message):
    result = run(monkeypatch, demo, records)
    assert result.returncode == 1 and message in result.stderr and "exact match" not in result.stdout


def test_what_a_run_is_to_be_scored_by_is_looked_at_without_weights(demo, monkeypatch):
    """`--check_only`, as a training asks: the names of the scores, or the error."""
    out = ("--out", demo / "nowhere", "--check_only", "true")
    monkeypatch.setattr("evaluation.engines.AutoModelForImageTextToText", None)
    assert run(monkeypatch, demo, SAMPLES, *out).stdout.splitlines()[-1] == '["held_out"]'
    assert '["mine"]' in run(monkeypatch, demo, SAMPLES, *out, "--name", "mine").stdout
    for records, options, message in (
        (SAMPLES[7:8], (), "error: none of 1 samples can be asked, so there is no score: no such image file (1):"),
        (SAMPLES, ("--metric", "anls"), "error: --tasks and --metric need lmms-eval"),
        (SAMPLES, ("--device", "cuda"), "error: --device cuda: of the GPUs "),
    ):
        monkeypatch.setattr("evaluation.run.has_lmms_eval", lambda: False)
        result = run(monkeypatch, demo, records, *out, *options)
        assert result.returncode == 1 and message in result.stderr
    assert not (demo / "nowhere").exists()


def test_a_limit_counts_what_is_asked_and_a_template_may_refuse(demo):
    processor = load_processor(demo / "model")
    (demo / "limited.jsonl").write_text("\n".join(map(json.dumps, SAMPLES[::-1])))
    listing = list_json(demo / "limited.jsonl", 0)
    questions, left_out = evaluate.read_questions(listing, demo, processor, 2)
    assert (len(questions), len(left_out)) == (2, 3)
    processor.chat_template = get_template("mistral").jinja
    questions, left_out = evaluate.read_questions(listing, demo, processor, 0)
    reasons = {entry["id"]: entry["reason"] for entry in left_out}
    assert len(questions) == 5 and reasons["messages"] == "The mistral format has no system prompt."
