"""Chatting with a finished folder: streaming, follow-up turns, one shot; stock transformers, random weights."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import chat
from support.demo import build_demo_by_command


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The composed demo model, and a few pictures: folder with digits/ and model/."""
    folder = tmp_path_factory.mktemp("chat")
    build_demo_by_command(folder, "mistral")
    return folder


@pytest.fixture(scope="module")
def loaded(demo):
    return chat.load(str(demo / "model"))


@pytest.fixture
def conversation(loaded):
    return chat.Chat(*loaded, max_new_tokens=8)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 90, 3), dtype=np.uint8))


def stock_answer(conversation, messages, pictures) -> str:
    """Greedy answer without streaming, thread or `Chat`."""
    text = conversation.processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = conversation.processor(images=pictures or None, text=text, return_tensors="pt")
    inputs = inputs.to(conversation.model.device, conversation.model.dtype)
    with torch.no_grad():
        output = conversation.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    return conversation.processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_follow_up_turns_see_the_whole_conversation_and_all_pictures(conversation):
    pieces = []
    first = conversation.ask("What number is written?", [picture(0)], pieces.append)
    assert "".join(pieces).strip() == first and first
    second = conversation.ask("And here?", [picture(1)], pieces.append)
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"] * 2
    assert conversation.messages[1]["content"][0]["text"] == first
    for turns, pictures, answer in ((1, 1, first), (3, 2, second)):
        assert answer == stock_answer(conversation, conversation.messages[:turns], conversation.pictures[:pictures])
    conversation.reset()
    assert conversation.messages == [] and conversation.pictures == []
    assert conversation.ask("What number is written?", [picture(0)], pieces.append) == first


def test_failed_answer_is_an_error_and_leaves_the_conversation_as_it_was(conversation, monkeypatch):
    conversation.ask("What number is written?", [picture(0)], lambda piece: None)
    before = [*conversation.messages]

    def fail(**_):
        raise ValueError("out of memory")

    monkeypatch.setattr(conversation.model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        conversation.ask("And now?", [], lambda piece: None)
    assert conversation.messages == before and len(conversation.pictures) == 1


def run_main(monkeypatch, capsys, *arguments, typed: str = "") -> str:
    monkeypatch.setattr(sys, "argv", ["chat.py", "--max_new_tokens", "8", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    chat.main()
    return capsys.readouterr().out


def test_one_shot_prints_the_answer_and_nothing_else(demo, conversation, monkeypatch, capsys):
    name = json.loads((demo / "digits/held_out.json").read_text())[0]["image"]
    file = demo / "digits/images" / name
    out = run_main(monkeypatch, capsys, "--model", demo / "model", "--image", file, "--prompt", "What is written?")
    shown = chat.open_picture(str(file))
    assert out.strip() == conversation.ask("What is written?", [shown], lambda piece: None)


def test_terminal_conversation_with_commands(demo, conversation, monkeypatch, capsys, tmp_path):
    picture(3).save(tmp_path / "later.png")
    typed = (
        f"Hello?\n/image {tmp_path}/nothing.png\n/image {tmp_path}/later.png\nWhat is written?\n/reset\nHello?\n/quit\n"
    )
    out = run_main(monkeypatch, capsys, "--model", demo / "model", typed=typed)
    hello = conversation.ask("Hello?", [], lambda piece: None)
    written = conversation.ask("What is written?", [picture(3)], lambda piece: None)
    answers = [part.split("\n")[0].split("you: ")[0].strip() for part in out.split("model: ")[1:]]
    assert answers == [" ".join(text.split("\n")[:1]).strip() for text in (hello, written, hello)]
    assert "nothing.png: No such file" in out


def test_missing_picture_or_model_is_one_line(demo, monkeypatch, tmp_path):
    for arguments in (["--image", tmp_path / "none.png"], ["--model", tmp_path / "none"]):
        monkeypatch.setattr(sys, "argv", ["chat.py", "--model", str(demo / "model"), *map(str, arguments)])
        with pytest.raises(SystemExit, match=r"error: .*none"):
            chat.main()


def test_no_input_ends_the_chat_and_the_conversation_goes_on(loaded, monkeypatch, capsys, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    picture(1).save(tmp_path / "fine.png")
    lines = [
        ("", ""),
        ("What does <image> mean?", "error: <image> stands for a picture: the text has 1, and 0 picture(s) go"),
        (f"/image {tmp_path}/broken.png", "error: "),
        (f"/image {tmp_path}", "error: "),
        ("/image", "error: "),
        ("/image a\x00b", "error: "),
        ("/help", "error: /help is no command: /image FILE adds"),
        ("Hel\x1b[Alo \ud800 there", "model: "),
        ("Say </s> twice", "note: </s> is a mark of the model's own"),
        (f'/image "{tmp_path}/fine.png"', ""),
        ("<image> and <image>?", "error: <image> stands for a picture: the text has 2, and 1 picture(s) go"),
        ("Compare <image> with nothing", "model: "),  # the picture's place
        ("word " * 3000, "error: the conversation is 15,106 tokens long with this, the model takes 1,024"),
        ("Still there?", "model: "),
    ]
    conversation = chat.Chat(*loaded, max_new_tokens=2)
    given = iter([line for line, _ in lines])

    def typed(prompt: str) -> str:
        try:
            line = next(given)
        except StopIteration:
            raise EOFError from None
        print("\n>>> ", end="")
        return line

    monkeypatch.setattr("builtins.input", typed)
    chat.converse(conversation, [])
    said = [part.strip() for part in capsys.readouterr().out.split("\n>>> ")[1:]]
    assert len(said) == len(lines)
    for (line, expected), found in zip(lines, said, strict=True):
        assert expected in found, (line[:50], found)
    assert len(conversation.messages) == 2 * 4 and len(conversation.pictures) == 1
    places = [part["type"] for part in conversation.messages[4]["content"]]
    assert places == ["text", "image", "text"]


def test_interrupted_answer_is_kept_as_far_as_it_was_shown(conversation):
    shown = []

    def interrupt(piece: str) -> None:
        shown.append(piece)
        if "".join(shown).strip() and len(shown) > 1 and "(stopped)" not in piece:
            raise KeyboardInterrupt

    conversation.max_new_tokens = 400
    conversation.ask("Tell me everything.", [], interrupt)
    assert shown[-1] == " (stopped)" and len(shown) < 100
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"]
    assert conversation.ask("And now?", [], lambda piece: None) is not None


def test_spelled_placeholder_of_an_answer_does_not_end_the_conversation(conversation, monkeypatch):
    monkeypatch.setattr(conversation, "_generate", lambda *_: iter(["an <image> ", "it is"]))
    assert conversation.ask("What is it?", [], lambda piece: None) == "an <image> it is"
    monkeypatch.undo()
    assert conversation.ask("And now?", [picture(0)], lambda piece: None) is not None


def test_system_message_without_a_place_is_said_and_left_out(demo, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["chat.py", "--model", str(demo / "model"), "--system", "Be brief."])
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello?\n"))
    chat.main()
    said = capsys.readouterr()
    assert "note: --system: the model's chat template does not take it: The mistral format has no" in said.err
    assert "model: " in said.out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--max_new_tokens", "0"], "at least 1"),
        (["--temperature", "-1"], "0 or more"),
        (["--prompt", " "], "is empty"),
    ],
)
def test_options_that_cannot_work_are_refused_before_the_model_loads(monkeypatch, capsys, options, expected):
    monkeypatch.setattr(sys, "argv", ["chat.py", "--model", "none", *options])
    with pytest.raises(SystemExit):
        chat.main()
    assert expected in capsys.readouterr().err
