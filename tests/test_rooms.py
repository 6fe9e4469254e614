"""The order of the rooms: each package says what it is for, lists its files, and imports only what lies below it."""

import ast
import re
from pathlib import Path

import pytest

from support.launching import ROOT

# Lowest first: a room may import rooms above it in this list, never below it. `llava_next` stands for the root's files.
ROOMS = [
    "llava_next",
    "llava_next.model.forward",
    "llava_next.data.storage",
    "llava_next.data.format",
    "llava_next.data.inputs",
    "llava_next.data.plan",
    "llava_next.data.loading",
    "llava_next.model.folders",
    "llava_next.training.devices",
    "llava_next.training.recipe",
    "llava_next.training.forecast",
    "llava_next.training.watch",
    "llava_next.training.checkpoints",
    "llava_next.training",
    "building",
    "doctor",
]
STRANGERS = ("llava_next.data.", "llava_next.model.")  # neither imports the other, whatever their order


def folder_of(room: str) -> Path:
    return ROOT / room.replace(".", "/") if room.startswith("llava_next") else ROOT / "data_tools" / room


def room_of(module: str, rooms: list[str]) -> str | None:
    """The room a module lies in, or None when it is none of the project's."""
    while module:
        if module in rooms:
            return module
        module = module.rpartition(".")[0]
    return None


def imports(source: str) -> set[str]:
    """Modules that a source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def rooms_imported(room: str, source: str) -> set[str]:
    """The other rooms a source of `room` imports. The package `llava_next` itself is in every path."""
    names = {name for name in imports(source) if name.startswith("llava_next.") or name.split(".")[0] in ROOMS[-2:]}
    return {room_of(name, ROOMS) for name in names} - {room}


def wrong_imports(room: str, file: str, source: str) -> list[str]:
    """What a file imports that it must not, by both names."""
    below = ROOMS[: ROOMS.index(room)]
    wrong = {other for other in rooms_imported(room, source) if other not in below}
    mine = next((half for half in STRANGERS if room.startswith(half)), None)
    if mine:
        wrong |= {o for o in rooms_imported(room, source) if o.startswith(STRANGERS) and not o.startswith(mine)}
    return [f"{file} ({room}) imports {other}" for other in sorted(wrong)]


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_rooms_below_them(room):
    found = [
        wrong
        for path in sorted(folder_of(room).glob("*.py"))
        # the root hands out the model class, by name and when it is asked for
        if path != ROOT / "llava_next/__init__.py"
        for wrong in wrong_imports(room, path.name, path.read_text())
    ]
    assert found == []


def test_a_wrong_import_is_named_with_both_rooms():
    up = "def f():\n    from llava_next.training.loop import Trainer\n"
    assert wrong_imports("llava_next.data.plan", "order.py", up) == [
        "order.py (llava_next.data.plan) imports llava_next.training"
    ]
    assert wrong_imports("llava_next.model.folders", "check.py", "import llava_next.data.plan.order\n") == [
        "check.py (llava_next.model.folders) imports llava_next.data.plan"
    ]
    assert wrong_imports("llava_next.training", "loop.py", "from llava_next.data.plan import order\n") == []


def test_every_package_is_a_room_or_holds_rooms_only():
    packages = {path.parent for path in [*ROOT.glob("llava_next/**/*.py"), *ROOT.glob("data_tools/*/*.py")]}
    known = {folder_of(room) for room in ROOMS}
    assert {p for p in packages - known if [f.name for f in p.glob("*.py")] != ["__init__.py"]} == set()


@pytest.mark.parametrize("room", ROOMS[1:])
def test_a_room_says_what_it_is_for_lists_its_files_and_what_it_imports(room):
    folder = folder_of(room)
    tree = ast.parse((folder / "__init__.py").read_text())
    assert len(tree.body) == 1, "an __init__.py is its docstring and imports nothing"
    text = ast.get_docstring(tree)
    listed = re.findall(r"^(\w+)\.py: \S", text, re.M)
    assert sorted(listed) == sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    said = " ".join(text.split("May import: ")[1].split()).removesuffix(".").split(", ")
    sources = [path.read_text() for path in folder.glob("*.py")]
    actual = {other for source in sources for other in rooms_imported(room, source)}
    short = {"the root's files" if o == "llava_next" else o.removeprefix("llava_next.") for o in actual}
    assert sorted(short or {"nothing of the project"}) == sorted(said)
