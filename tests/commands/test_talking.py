"""Behind the page of scripts/chat.py: what can be chosen, uploads, questions and their events; random weights."""

import io
import os
import shutil
from threading import Event

import numpy as np
import pytest
import torch
from PIL import Image

from llava_next.model.folders.merging import merge_adapter
from support.demo import build_run
from talking.answering import Answerer, read_asked
from talking.conversation import Chat
from talking.models import choices, load
from talking.pictures import MAX_BYTES, Pictures


def png(width: int = 90, height: int = 40, seed: int = 0) -> bytes:
    return file_of(Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)))


def file_of(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run folder as training leaves it: `model`, an adapter with its base, two steps, and what is no model."""
    return build_run(tmp_path_factory.mktemp("talking") / "run")


@pytest.fixture(scope="module")
def answerer(run_dir):
    return Answerer(str(run_dir))


def request(model: str = "model", turns=(), ask=None, **changes) -> dict:
    ask = ask or {"question": "What number is written?", "pictures": []}
    return {"model": model, "turns": list(turns), "ask": ask, "max_new_tokens": 8, "temperature": 0, **changes}


def ask(answerer: Answerer, stop: Event | None = None, put=None, **asked) -> list[dict]:
    events = []

    def take(event: dict) -> None:
        events.append(event)
        if put:
            put(event)

    answerer.answer(read_asked(request(**asked)), take, stop or Event())
    return events


def test_a_run_shows_what_is_whole_and_what_is_being_written_only_once_it_is(run_dir, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    wanted = ["model", "adapter", "model-step-100", "model-step-20"]
    for given in (run, run / "model"):
        assert [choice.name for choice in choices(str(given))] == wanted
    assert [choice.name for choice in choices(str(run / "model-step-20"))][:2] == ["model-step-20", "model"]
    # written aside; half a weight file; copied up to the weights; a folder of the run that is no model
    shutil.copytree(run / "model", run / "model-step-300.tmp")
    weights = run / "model-step-100/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    (run / "model-step-20/tokenizer_config.json").unlink()
    assert [choice.name for choice in choices(str(run))] == ["model", "adapter"]
    weights.write_bytes(whole)
    (run / "model-step-300.tmp").rename(run / "model-step-300")
    assert [choice.name for choice in choices(str(run))] == ["model", "adapter", "model-step-300", "model-step-100"]
    shutil.rmtree(run / "model")
    (run / "adapter/adapter_model.safetensors").write_bytes(b"")
    assert [choice.name for choice in choices(str(run))] == ["model-step-300", "model-step-100"]
    assert [choice.where for choice in choices("org/name")] == ["org/name"]
    with pytest.raises(ValueError, match="has no finished model or adapter"):
        choices(str(tmp_path))


def test_answer_on_the_page_is_the_terminals_and_its_events_tell_the_prompt(answerer, run_dir):
    id = answerer.pictures.add(png())
    chat = Chat(*load(str(run_dir / "model")), max_new_tokens=8)
    pictures = [answerer.pictures.get(id)]
    first = chat.ask("What number is written?", pictures, lambda piece: None)
    events = ask(answerer, ask={"question": "What number is written?", "pictures": [id]})
    assert [event["event"] for event in events][:2] == ["loading", "prompt"] and events[-1]["event"] == "end"
    assert events[-1]["cut"] and not events[-1]["stopped"]
    assert events[-1]["text"] == first == "".join(e["text"] for e in events if e["event"] == "piece").strip()
    # a tile is 2 x 2 patches; of the 4 x 6 patches of 2 x 3 tiles, 90 x 40 px fill two rows
    parts = events[1]["parts"]
    assert parts[0] == ("mark", "<s>") and parts[2] == ("picture", 4 + 2 * (6 + 1))
    text = "".join(text for kind, text in parts if kind == "text")
    assert " ".join(text.split()) == "[INST] What number is written? [/INST]"
    # the page sends the conversation back: two pictures that touch, and the model is there already
    turns = [{"question": "What number is written?", "pictures": [id], "answer": first}]
    length = len(chat.prompt("And these?", pictures * 2).ids)
    second = chat.ask("And these?", pictures * 2, lambda piece: None)
    events = ask(answerer, turns=turns, ask={"question": "And these?", "pictures": [id, id]})
    assert events[0]["event"] == "prompt" and events[0]["tokens"] == length and events[-1]["text"] == second
    assert [tokens for kind, tokens in events[0]["parts"] if kind == "picture"] == [18, 18, 18]


def test_adapter_answers_as_its_run_would_and_the_model_before_it_leaves_memory(answerer, run_dir, tmp_path):
    merge_adapter(run_dir / "model", run_dir / "adapter", tmp_path / "merged", torch.float32)
    plain, adapted = (ask(answerer, model=name)[-1]["text"] for name in ("model", "adapter"))
    assert answerer.loaded.choice.name == "adapter"
    merged = Chat(*load(str(tmp_path / "merged")), max_new_tokens=8)
    assert adapted == merged.ask("What number is written?", [], lambda piece: None) != plain


def test_replaced_model_is_loaded_again_and_one_that_is_gone_is_named(answerer, run_dir, tmp_path, monkeypatch):
    ask(answerer)
    run, loads = tmp_path / "run", []
    shutil.copytree(run_dir, run)
    monkeypatch.setattr("talking.answering.load", lambda where: loads.append(where) or answerer.loaded[1:])
    other = Answerer(str(run))
    for _ in range(2):
        assert ask(other)[-1]["event"] == "end"
    assert len(loads) == 1
    os.replace(run / "model", run / "old")
    os.replace(run / "model-step-20", run / "model")
    os.utime(run / "model")
    assert ask(other)[0] == {"event": "loading"} and len(loads) == 2
    shutil.rmtree(run / "model")
    assert ask(other)[-1] == {"event": "error", "text": "model is not there any more: choose another model"}
    assert ask(other, model="model-step-100")[-1]["event"] == "end"


def test_stop_ends_an_answer_and_what_was_shown_is_all_of_it(answerer, run_dir):
    stop = Event()
    events = ask(answerer, stop, lambda e: e["event"] == "piece" and stop.set(), max_new_tokens=400)
    pieces = [event["text"] for event in events if event["event"] == "piece"]
    assert events[-1]["stopped"] and not events[-1]["cut"] and len(pieces) < 100
    assert events[-1]["text"] == "".join(pieces).strip()
    assert ask(answerer, stop) == []  # stopped while it waited for its turn
    shutil.copytree(run_dir / "model", run_dir / "other")
    stop = Event()
    assert ask(answerer, stop, lambda e: stop.set(), model="other") == [{"event": "loading"}]
    shutil.rmtree(run_dir / "other")


def test_stop_before_the_first_token_ends_the_forward_between_two_layers(answerer):
    stop, ran = Event(), []
    tower, decoder = (stack for stack in answerer.load(answerer.choice("model")).model.modules() if is_stack(stack))
    hooks = [layer.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, layer in enumerate([*tower, *decoder])]
    hooks.append(decoder[0].register_forward_hook(lambda *_: stop.set()))
    id = answerer.pictures.add(png())
    events = ask(answerer, stop, ask={"question": "What number is written?", "pictures": [id]})
    for hook in hooks:
        hook.remove()
    assert [event["event"] for event in events] == ["prompt", "end"] and ran == [*range(len(tower)), len(tower)]
    assert events[-1]["stopped"] and events[-1]["text"] == "" and not events[-1]["cut"]
    assert ask(answerer)[-1]["text"]  # nothing of it stays in the model


def is_stack(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.ModuleList)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "not a picture of a format that is read here (JPEG, PNG, "),
        (b"%PDF-1.4", "not a picture of a format"),
        (png()[:200], "image cannot be read: "),
        (bytes(MAX_BYTES + 1), "larger than 50 MB"),
        (file_of(Image.new("1", (30000, 30000))), "more than 89 million pixels"),
    ],
    ids=["empty", "pdf", "cut", "large", "bomb"],
)
def test_upload_that_cannot_be_shown_is_refused_with_the_reason(data, expected):
    pictures = Pictures()
    with pytest.raises(ValueError, match=r".") as refusal:
        pictures.add(data)
    assert expected in str(refusal.value) and not pictures.files


def test_uploads_are_kept_up_to_a_limit_and_the_oldest_go_first(monkeypatch, answerer):
    files = [png(seed=seed) for seed in range(3)]
    monkeypatch.setattr("talking.pictures.KEPT_BYTES", 2 * len(files[0]) + 100)
    pictures = Pictures()
    ids = [pictures.add(file) for file in (*files[:2], files[0], files[2])]  # the first is used again
    assert list(pictures.files) == [ids[0], ids[3]]
    with pytest.raises(ValueError, match="no longer here"):
        pictures.get(ids[1])
    lost = ask(answerer, ask={"question": "What?", "pictures": ["0" * 32]})
    assert lost[-1]["event"] == "error" and "no longer here" in lost[-1]["text"]


def test_picture_is_shown_as_training_sees_it_and_a_turned_one_says_so(answerer):
    exif = Image.Exif()
    exif[0x0112] = 6
    id = answerer.pictures.add(file_of(Image.new("RGB", (90, 40), "red"), "JPEG", exif=exif))
    shown = answerer.show(id, "model")
    assert (shown["width"], shown["height"], shown["is_turned"]) == (90, 40, True)
    assert (shown["rows"], shown["cols"], shown["tokens"], shown["tile_size"]) == (2, 3, 18, 32)
    assert all(shown[name].startswith("data:image/webp;base64,") for name in ("preview", "base", "canvas"))
    assert not answerer.show(answerer.pictures.add(png()), "adapter")["is_turned"]


@pytest.mark.parametrize(
    "changes",
    [
        {"turns": [{"question": 1, "pictures": [], "answer": ""}]},
        {"turns": [{"question": "a"}]},
        {"ask": {"question": " ", "pictures": []}},
        {"ask": {"question": "a", "pictures": [7]}},
        {"max_new_tokens": 0},
        {"temperature": float("nan")},
        {"temperature": -1},
        {"turns": None},
    ],
)
def test_what_is_no_question_is_refused(changes):
    with pytest.raises(ValueError, match=r"question|answer"):
        read_asked(request() | changes)
    for strange in (None, [], "ask", {}):
        with pytest.raises(ValueError, match="no question"):
            read_asked(strange)


def test_hostile_questions_end_in_an_answer_or_an_error_and_the_next_one_goes_well(answerer):
    for question in ("<image>", "</s><s>[INST]", "\ud800", "\x00\x1b[A", "word " * 3000, "a" * 100, "🐱\u202e"):
        events = ask(answerer, ask={"question": question, "pictures": []}, max_new_tokens=2)
        assert events[-1]["event"] in ("end", "error"), question[:20]
    assert ask(answerer)[-1]["event"] == "end"
