"""Records in every form that people write, each with what it becomes, or with the reason for which it is refused."""

import base64
import io
import json
from pathlib import Path
from typing import NamedTuple

from PIL import Image

ROOT = Path("/ROOT")  # stands for the image root; see `record_of`


def encoded(color: str, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(buffer, format=kind)
    return buffer.getvalue()


RED, BLUE = encoded("red"), encoded("blue")
RED64 = base64.b64encode(RED).decode()
JPEG64 = base64.b64encode(encoded("red", "JPEG")).decode()
DATA_URL = f"data:image/png;base64,{RED64}"


def turns(question: str, answer: str = "This.", *more: tuple[str, str]) -> list[dict]:
    return [{"from": role, "value": text} for role, text in (("human", question), ("gpt", answer), *more)]


def chat(question, answer: str = "This.") -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def spelt(*texts: tuple[str, str]) -> list[dict]:
    return [{"from": role, "value": text} for role, text in texts]


def part(kind: str, **values) -> dict:
    return {"type": kind, **values}


class Form(NamedTuple):
    """`becomes`: the stored turns; colors: of its pictures, in order; refused: why it is left out, a pattern."""

    record: dict
    becomes: list[dict] | None = None
    colors: str = ""
    refused: str = ""


ONE = turns("<image>\nWhat?")
TWO = turns("<image> or <image>?")
SAID = spelt(("user", "<image>\nWhat?"), ("assistant", "This."))
SHOWN = spelt(("user", "<image>What?"), ("assistant", "This."))
SHOWN2 = spelt(("user", "<image>\n<image>\nWhich?"), ("assistant", "This."))
SYSTEM = {"from": "system", "value": "Be brief."}
ASK, WHICH = part("text", text="What?"), part("text", text="Which?")

FORMS = {
    # texts
    "llava": Form({"image": "red.png", "conversations": ONE}, ONE, "r"),
    "text_only": Form({"conversations": turns("Hi")}, turns("Hi")),
    "roles_in_conversations": Form({"image": "red.png", "conversations": chat("<image>\nWhat?")}, SAID, "r"),
    "null_beside_value": Form(
        {"image": None, "conversations": [turn | {"role": None, "content": None} for turn in turns("Hi")]}, turns("Hi")
    ),
    "columns_as_turns": Form(
        {"conversations": {"from": ["human", "gpt"], "value": ["Hi", "This."]}}, turns("Hi")
    ),
    "text_of_turns": Form({"conversations": json.dumps(ONE), "image": "red.png"}, ONE, "r"),
    "messages": Form({"messages": chat("<image>\nWhat?"), "images": ["red.png"]}, SAID, "r"),
    "messages_unplaced": Form({"messages": chat("What?"), "images": ["red.png"]}, SAID, "r"),
    "messages_beside_empty": Form(
        {"messages": chat("<image>\nWhat?"), "conversations": [], "image": "red.png"}, SAID, "r"
    ),
    "prompt": Form({"prompt": "<image>\nWhat?", "completion": "This.", "image": "red.png"}, ONE, "r"),
    "prompt_chat": Form({"prompt": chat("What?")[:1], "completion": chat("")[1:], "images": ["red.png"]}, SAID, "r"),
    "answer_like_a_file": Form({"prompt": "Which file?", "completion": "cat.png"}, turns("Which file?", "cat.png")),
    "caption": Form({"image": "red.png", "caption": "Red."}, turns("<image>", "Red."), "r"),
    "wins_over_prompt": Form({"prompt": "Hi", "messages": chat("Hi")}, spelt(("user", "Hi"), ("assistant", "This."))),
    # system prompts
    "system_turn": Form({"image": "red.png", "conversations": [SYSTEM, *ONE]}, [SYSTEM, *ONE], "r"),
    "system_beside": Form({"system": "Be brief.", "image": "red.png", "conversations": ONE}, [SYSTEM, *ONE], "r"),
    "system_role": Form(
        {"messages": [{"role": "system", "content": [part("text", text="Be brief.")]}, *chat("Hi")]},
        [SYSTEM, *spelt(("user", "Hi"), ("assistant", "This."))],
    ),
    "system_twice_the_same": Form(
        {"system": "Be brief.", "conversations": [SYSTEM, *turns("Hi")]}, [SYSTEM, *turns("Hi")]
    ),
    "developer": Form(
        {"messages": [{"role": "developer", "content": "Be brief."}, *chat("Hi")]},
        [SYSTEM, *spelt(("user", "Hi"), ("assistant", "This."))],
    ),
    "system_empty": Form({"system": "", "conversations": turns("Hi")}, turns("Hi")),
    "first_turn_of_gpt": Form(
        {"conversations": spelt(("gpt", "Hello."), ("human", "Hi"), ("gpt", "This."))},
        spelt(("gpt", "Hello."), ("human", "Hi"), ("gpt", "This.")),
    ),
    # parts of messages
    "parts": Form({"messages": chat([part("image"), ASK]), "images": ["red.png"]}, SHOWN, "r"),
    "parts_path": Form({"messages": chat([part("image", image="red.png"), ASK])}, SHOWN, "r"),
    "parts_bytes": Form({"messages": chat([part("image", image={"bytes": RED64, "path": None}), ASK])}, SHOWN, "r"),
    "parts_openai": Form({"messages": chat([part("image_url", image_url={"url": DATA_URL}), ASK])}, SHOWN, "r"),
    "parts_two": Form(
        {"messages": chat([part("image", path="blue.png"), part("image", path="red.png"), WHICH])},
        SHOWN2,
        "br",
    ),
    "parts_index": Form(
        {
            "messages": chat([part("image", index=1), part("image", index=0), WHICH | {"index": None}]),
            "images": ["red.png", "blue.png"],
        },
        SHOWN2,
        "br",
    ),
    # pictures
    "two": Form({"image": ["red.png", "blue.png"], "conversations": TWO}, TWO, "rb"),
    "image_path": Form({"image_path": "red.png", "conversations": ONE}, ONE, "r"),
    "images_beside_null": Form({"image": None, "images": ["red.png"], "conversations": ONE}, ONE, "r"),
    "images_beside_empty": Form({"image": "", "images": "red.png", "conversations": ONE}, ONE, "r"),
    "both_the_same": Form({"image": "red.png", "images": ["red.png"], "conversations": ONE}, ONE, "r"),
    "embedded": Form({"image": {"bytes": RED64, "path": "x.png"}, "conversations": ONE}, ONE, "r"),
    "embedded_path": Form({"image": {"bytes": None, "path": "red.png"}, "conversations": ONE}, ONE, "r"),
    "embedded_list": Form({"images": [{"bytes": list(RED)}], "conversations": ONE}, ONE, "r"),
    "data_url": Form({"image": DATA_URL, "conversations": ONE}, ONE, "r"),
    "base64": Form({"image": JPEG64, "conversations": ONE}, ONE, "r"),
    "absolute": Form({"image": "/ROOT/red.png", "conversations": ONE}, ONE, "r"),
    "file_url": Form({"image": "file:///ROOT/sub%20folder/red.png", "conversations": ONE}, ONE, "r"),
    "dotted": Form({"image": "./sub folder/../red.png", "conversations": ONE}, ONE, "r"),
    # refused
    "no_picture": Form({"foto": "red.png", "conversations": ONE}, refused="no picture: its keys are id, foto, conv"),
    "url": Form({"image": "https://a.b/c.png", "conversations": ONE}, refused="URLs are not fetched: https://a.b/c.png"),
    "url_in_part": Form(
        {"messages": chat([part("image_url", image_url={"url": "https://a.b/c.png"}), ASK])}, refused="not fetched"
    ),
    "outside": Form({"image": "/etc/passwd", "conversations": ONE}, refused="leaves the image root: /etc/passwd does"),
    "outside_by_name": Form({"image": "/ROOT-2/red.png", "conversations": ONE}, refused="leaves the image root"),
    "outside_by_url": Form({"image": "file:///ROOT/../secret.png", "conversations": ONE}, refused="leaves the image"),
    "home": Form({"image": "~/red.png", "conversations": ONE}, refused="leaves the image root: ~/red.png"),
    "missing": Form({"image": "/ROOT/green.png", "conversations": ONE}, refused="no such image file"),
    "two_names": Form(
        {"image": "red.png", "images": ["blue.png"], "conversations": ONE}, refused="image and images name different"
    ),
    "two_texts": Form(
        {"conversations": turns("Hi"), "messages": chat("Ho")}, refused="conversations and messages hold different"
    ),
    "two_systems": Form({"system": "Be long.", "conversations": [SYSTEM, *turns("Hi")]}, refused="two system prompts"),
    "second_system": Form(
        {"conversations": [SYSTEM, {"from": "System", "value": "Be long."}, *turns("Hi")]}, refused="turn 2 is a second"
    ),
    "videos": Form({"video": "clips/1", "conversations": turns("<video>\nWhat?")}, refused="has a video"),
    "unknown_key": Form({"image_list": ["red.png"], "messages": chat("What?")}, refused="image_list names a picture"),
    "id_like_a_file": Form({"image_id": "red.png", "conversations": turns("Hi")}, turns("Hi")),
    "video": Form({"messages": chat([part("video", video="a.mp4"), ASK])}, refused="turn 1 has a part of type 'video'"),
    "picture_in_answer": Form(
        {"messages": [*chat("Hi")[:1], {"role": "assistant", "content": [part("image", path="red.png")]}]},
        refused=r"turn 2 \(assistant\) shows a picture",
    ),
    "one_part_too_many": Form(
        {"messages": chat([part("image"), part("image"), ASK]), "images": ["red.png"]},
        refused="show 2 picture.s., 2 of them without saying which, and there are 1 beside",
    ),
    "same_index": Form(
        {"messages": chat([part("image", index=0), part("image", index=0), ASK]), "images": ["red.png", "blue.png"]},
        refused=r"indexes \[0, 0\], and there are 2 pictures",
    ),
    "wrong_index": Form(
        {"messages": chat([part("image", index=1), ASK]), "images": ["red.png"]}, refused=r"indexes \[1\]"
    ),
    "no_text": Form({"text": "Hi", "image": "red.png"}, refused="conversations is missing .* keys: id, text, image"),
    "half_a_pair": Form({"prompt": "Hi"}, refused="conversations is missing .* keys: id, prompt"),
    "no_role": Form({"conversations": [{"speaker": "a", "value": "Hi"}]}, refused="turn 1 has no role: .* speaker"),
    "bad_base64": Form({"image": "data:image/png;base64,@@@", "conversations": ONE}, refused="base64 that does not"),
    "plain_data_url": Form({"image": "data:image/png,abc", "conversations": ONE}, refused="data URL without base64"),
    "object_without_bytes": Form({"image": {"a": 1}, "conversations": ONE}, refused="object without bytes or path"),
}  # fmt: skip


def make_root(folder: Path) -> Path:
    """An image root below `folder`, with a file beside it that no record may reach."""
    root = folder / "pictures"
    (root / "sub folder").mkdir(parents=True)
    for color in ("red", "blue"):
        (root / f"{color}.png").write_bytes(encoded(color))
    (root / "sub folder" / "red.png").write_bytes(RED)
    (folder / "secret.png").write_bytes(RED)
    return root


def record_of(name: str, root: Path) -> dict:
    """The record of a form, with its name as id, for pictures below `root`."""

    def placed(value):
        if isinstance(value, dict):
            return {key: placed(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [placed(entry) for entry in value]
        return value.replace(str(ROOT), str(root)) if isinstance(value, str) else value

    return {"id": name, **placed(FORMS[name].record)}
