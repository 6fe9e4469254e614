"""Records in every form, in every kind of file: all become the same samples, or are refused with the same reason."""

import contextlib
import io
import json
import re
import tarfile
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from building.cutting import Cutter
from building.embedded import list_hub
from llava_next.data.format.picture_forms import picture_names
from llava_next.data.format.records import SYSTEM_KEYS, TEXT_KEYS, read_record, source_name
from llava_next.data.format.shards import RawSample, decode_strip
from llava_next.data.format.tar import BadSample
from llava_next.data.inputs.samples import model_template
from llava_next.templates import get_template
from support.builds import GEOMETRY, SMALL, call, samples, tool_result
from support.forms import ASK, BLUE, FORMS, ONE, RED, SYSTEM, WHICH, chat, make_root, part, record_of, turns

COLORS = {"r": (255, 0, 0), "b": (0, 0, 255)}
GOOD = [name for name, form in FORMS.items() if not form.refused]


def colors(sample: RawSample) -> str:
    """First letters of the colours that its pictures have."""
    middles = [decode_strip(image.data, 32)[0, 16, 16] for image in sample.images]
    near = [(pixel.astype(int), letter, color) for pixel in middles for letter, color in COLORS.items()]
    return "".join(letter for pixel, letter, color in near if abs(pixel - color).max() < 3)  # one is a JPEG


def reasons(out: Path) -> dict[str, str]:
    return {entry["id"]: entry["reason"] for entry in map(json.loads, (out / "rejected.jsonl").open())}


def build(folder: Path, *arguments):
    options = [*GEOMETRY, "--workers", 0, "--codec", "webp", "--max_rejected_share", 0.9]
    return tool_result(*arguments, "--out", folder, *options)


def written(records: list, container: str) -> str:
    if container == "jsonl":
        return "\n".join(map(json.dumps, records))
    return json.dumps({"version": 1, "data": records} if container == "wrapped" else records, indent=1)


@pytest.fixture(scope="module", params=["list", "jsonl", "wrapped"])
def built(request, tmp_path_factory) -> tuple[Path, str]:
    """All forms at once, and two items that are no objects."""
    folder = tmp_path_factory.mktemp("forms")
    root = make_root(folder)
    records = [record_of(name, root) for name in FORMS]
    (folder / "a.json").write_text(written([*records[:3], 7, ["x"], *records[3:]], request.param))
    result = build(folder / "out", "--json", folder / "a.json", "--images", root)
    assert result.returncode == 0, result.stderr
    return folder / "out", result.stdout


def test_every_form_becomes_its_sample_or_is_refused_with_its_reason(built):
    out, stdout = built
    stored, refused = samples(out), reasons(out)
    assert set(stored) == set(GOOD)
    for name in GOOD:
        assert (name, stored[name].conversations) == (name, FORMS[name].becomes)
        assert (name, colors(stored[name])) == (name, FORMS[name].colors)
    strangers = [reason for reason in refused.values() if reason.startswith("no object but")]
    assert len(strangers) == 2 and len(refused) == len(FORMS) - len(GOOD) + 2
    for name, form in FORMS.items():
        assert not form.refused or re.search(form.refused, refused[name]), (name, refused[name])
    assert "1 samples begin with a turn that is not human" in stdout
    assert "5 samples have a system prompt of their own" in stdout
    assert f"{len(refused)} samples rejected" in stdout and "\n  path leaves the image root (4): " in stdout


def test_pictures_of_all_forms_are_named_in_reports(built):
    files = {entry["id"]: entry["file"] for entry in map(json.loads, (built[0] / "rejected.jsonl").open())}
    assert files["url"] == "https://a.b/c.png" and files["object_without_bytes"] == "embedded"


def columns(record: dict) -> dict:
    """A record as a row of a table with all columns, nested ones too."""

    def message(values: dict) -> dict:
        content = values["content"]
        parts = [part("text", text=content)] if isinstance(content, str) else content
        empty = {"text": None, "image": None, "index": None}
        return {"role": values["role"], "content": [empty | entry for entry in parts]}

    return record | {"messages": [message(values) for values in record["messages"]]}


TABLES = {
    "llava": [{"image": {"bytes": RED, "path": None}, "conversations": ONE, "system": "Be brief."},
              {"image": None, "conversations": turns("Hi"), "system": None}],
    "messages": [columns({"messages": chat([part("image"), ASK]), "images": [{"bytes": RED, "path": "a.png"}]}),
                 columns({"messages": [{"role": "system", "content": "Be brief."}, *chat("Hi")], "images": []})],
    "index": [columns({"messages": chat([part("image", index=1), part("image", index=0), WHICH]),
                       "images": [{"bytes": RED, "path": None}, {"bytes": BLUE, "path": None}]})],
    "prompt": [{"prompt": "What?", "completion": "This.", "images": [{"bytes": BLUE, "path": None}]},
               {"prompt": "Hi", "completion": "This.", "images": None}],
    "nested": [columns({"messages": chat([part("image", image={"bytes": BLUE, "path": None}), ASK])})],
}  # fmt: skip
EXPECTED = {
    "llava": [([SYSTEM, *ONE], "r"), (turns("Hi"), "")],
    "messages": [(FORMS["parts"].becomes, "r"), (FORMS["system_role"].becomes, "")],
    "index": [(FORMS["parts_index"].becomes, "br")],
    "prompt": [(ONE, "b"), (turns("Hi"), "")],
    "nested": [(FORMS["parts"].becomes, "b")],
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_hold_the_same_forms(name, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    table = datasets.Dataset.from_list(TABLES[name])
    for column in {"image", "images"} & set(table.column_names):  # pictures, as the hub's own data sets declare them
        kind = datasets.Image() if column == "image" else datasets.List(datasets.Image())
        table = table.cast_column(column, kind)
    table.to_parquet(tmp_path / "a.parquet")
    listing = list_hub(str(tmp_path / "a.parquet"), "train")
    cutter = Cutter(None, SMALL, codec="webp")
    found = [cutter.make_sample(row, listing.reader.read(address)) for row, address in enumerate(listing.addresses)]
    assert [(sample.conversations, colors(sample)) for sample in found] == EXPECTED[name]


def write_shard(path: Path, root: Path) -> dict[str, tuple[list, str]]:
    """Shards of others: records that name members, hold pictures or leave it to the one member; what they become."""
    two = [{"from": "user", "value": "<image> or <image>?"}, {"from": "assistant", "value": "This."}]
    named = {"messages": [{"role": turn["from"], "content": turn["value"]} for turn in two]}
    names = {
        "one_member": (record_of("messages_unplaced", root) | {"images": None}, {"jpg": RED}),
        "named": (named | {"images": ["0.png", "named.1.png"]}, {"0.png": BLUE, "1.png": RED}),
        "by_another_name": (record_of("llava", root), {"png": RED}),
        "part": (record_of("parts", root) | {"images": None}, {"png": BLUE}),
        "embedded": (record_of("data_url", root), {}),
        "system": (record_of("system_beside", root) | {"image": None}, {"png": RED}),
        "not_there": (record_of("llava", root), {}),
        "two_unnamed": (record_of("caption", root) | {"image": None}, {"jpg": RED, "png": BLUE}),
    }  # fmt: skip
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, (record, pictures) in names.items():
            for extension, data in {**pictures, "json": json.dumps(record | {"id": key}).encode()}.items():
                header = tarfile.TarInfo(f"{key}.{extension}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    return {
        "one_member": (FORMS["messages"].becomes, "r"),
        "named": (two, "br"),
        "by_another_name": (ONE, "r"),
        "part": (FORMS["parts"].becomes, "b"),
        "embedded": (ONE, "r"),
        "system": ([SYSTEM, *ONE], "r"),
    }


def test_shards_of_others_hold_the_same_forms_built_or_indexed(tmp_path):
    import index_shards

    (tmp_path / "raw").mkdir()
    expected = write_shard(tmp_path / "raw" / "a.tar", make_root(tmp_path))
    result = build(tmp_path / "out", "--shards", tmp_path / "raw")
    assert result.returncode == 0, result.stderr
    found = samples(tmp_path / "out")
    assert {name: (sample.conversations, colors(sample)) for name, sample in found.items()} == expected
    text = (tmp_path / "out" / "rejected.jsonl").read_text()
    assert "names the picture red.png, which is not among its members" in text
    assert "has the pictures jpg, png; expected one, or their names in the record" in text
    options = [*GEOMETRY, "--workers", 0, "--max_rejected_share", 0.9]
    assert call(index_shards.main, tmp_path / "raw", *options).returncode == 0
    indexed = samples(tmp_path / "raw")
    assert {name: sample.conversations for name, sample in indexed.items()} == {
        n: turns for n, (turns, _) in expected.items()
    }
    assert [Image.open(io.BytesIO(i.data)).getpixel((0, 0)) for i in indexed["named"].images] == [
        COLORS[c] for c in "br"
    ]


def test_characters_that_spell_the_placeholder_need_a_word(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "a", "conversations": turns("What is <image>?")}) + "\n")
    refused = build(tmp_path / "out", "--json", tmp_path / "a.jsonl")
    assert refused.returncode == 1 and "--allow_text_image_token" in refused.stderr
    allowed = build(tmp_path / "allowed", "--json", tmp_path / "a.jsonl", "--allow_text_image_token")
    assert allowed.returncode == 0 and samples(tmp_path / "allowed")["a"].conversations == turns("What is <image>?")


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        ("keep", [SYSTEM, *ONE]),
        ("drop", ONE),
        ("prepend", turns("Be brief.\n\n<image>\nWhat?")),
    ],
)
def test_the_build_decides_about_system_prompts(system, expected):
    record = FORMS["system_turn"].record | {"image": {"bytes": RED}}
    cutter = Cutter(None, SMALL, system=system, template=get_template("vicuna_v1"))
    assert cutter.make_sample(0, record).conversations == expected
    cutter = Cutter(None, SMALL, system=system, template=get_template("mistral"))
    if system != "keep":
        assert cutter.make_sample(0, record).conversations == expected
    else:
        with pytest.raises(
            BadSample, match=r"mistral has no place for a system prompt.*--system drop or --system prepend"
        ):
            cutter.make_sample(0, record)


def test_an_absolute_path_belongs_to_its_folder_below_the_root(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    for name in ("coco/a.png", f"{tmp_path}/coco/a.png", f"file://{tmp_path}/coco/a.png", f"{link}/coco/a.png"):
        assert source_name({"image": name}, link) == "coco"
    assert source_name({"image": "/elsewhere/coco/a.png"}, link) == source_name({"image": "a.png"}) == "image"
    assert source_name({"messages": chat([part("image", path="vg/a.png")])}) == "vg"
    assert source_name({"image": [7]}) == source_name({}) == "text"


def test_a_record_is_not_changed_by_being_read():
    for name in FORMS:
        record, before = record_of(name, Path("/r")), json.dumps(record_of(name, Path("/r")))
        with contextlib.suppress(BadSample):
            read_record(record)
        assert json.dumps(record) == before, name


NAMES = [*TEXT_KEYS, *SYSTEM_KEYS, "image", "images", "image_path", "id", "source", "from", "value", "role", "content"]
NAMES += ["type", "text", "path", "bytes", "url", "image_url", "index"]
LEAVES = [None, True, 0, 1, 1.5, float("nan"), "", "human", "gpt", "user", "assistant", "system", "text", "image", b"x"]
LEAVES += ["a.png", "<image>", "data:,", "\ud800", "[1]", "~"]


def anything(random: Random, depth: int):
    """A value of any kind, made of what records are made of."""
    kind = random.choice(("leaf", "list", "object")) if depth else "leaf"
    if kind == "list":
        return [anything(random, depth - 1) for _ in range(random.randrange(4))]
    if kind == "object":
        return {random.choice(NAMES): anything(random, depth - 1) for _ in range(random.randrange(1, 5))}
    return random.choice(LEAVES)


def test_whatever_a_record_holds_it_is_a_sample_or_a_bad_one():
    """No other error, which would end a build; and what a report says of it is JSON."""
    random, used = Random(0), 0
    for number in range(4000):
        record = {random.choice(NAMES): anything(random, 4) for _ in range(random.randrange(6))}
        source_name(record, Path("/r"))
        json.dumps(picture_names(record), default=str)
        system = ("keep", "drop", "prepend")[number % 3]
        with contextlib.suppress(BadSample):
            Cutter(Path("/r"), SMALL, system=system, template=get_template("mistral")).make_sample(0, record)
            used += 1
    assert used < 4000


def test_a_model_folder_tells_the_template(tmp_path):
    assert model_template(tmp_path) is None
    for name in ("mistral", "qwen"):
        (tmp_path / "chat_template.jinja").write_text(get_template(name).jinja, encoding="utf-8")
        assert model_template(tmp_path) is get_template(name)
    (tmp_path / "chat_template.jinja").write_text("another", encoding="utf-8")
    assert model_template(tmp_path) is None
