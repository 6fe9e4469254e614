"""The data doctor: its figures are those of the data, it names every planted fault, and its page is inert."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from skimage import data as photos
from transformers import LlavaNextConfig

import build_shards
import inspect_shards as tool
from doctor.checking import Checker, Findings, verify
from doctor.report_samples import TokenTexts, choose, show_picture
from doctor.survey import histogram
from llava_next.anyres import ORIGINAL_336, ORIGINAL_384, AnyRes
from llava_next.data.format.index import read_dataset
from llava_next.data.format.shards import RawSample, StripInfo, encode_strip, read_sample
from llava_next.data.format.writer import ShardWriter
from llava_next.data.loading.loader import LoaderOptions, build_loader
from llava_next.data.storage.client import Storage
from llava_next.model.folders import dry
from llava_next.templates import get_template
from llava_next.training.checkpoints.mirror import MANIFEST
from llava_next.training.checkpoints.recovery import FORMAT, checkpoint_name, state_checksum
from llava_next.training.setup import load_parts
from support.builds import Result, call
from support.demo import compose_demo
from support.faults import FaultServer
from support.real_tokenizers import vicuna

HOSTILE = "</script><script>alert(1)</script><img src=//example.org/x onerror=alert(2)> & \u2028"
MAX_LENGTH = 200
RUN = ["--template", "mistral", "--data.max_length", str(MAX_LENGTH), "--data.token_budget", "400"]
RUN += ["--data.batch_size", "8", "--workers", "0"]


def run(*arguments) -> Result:
    return call(tool.main, *arguments)


def turns(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]


def records() -> list[dict]:
    """Photos of many shapes with one to three questions, a pair, and texts with characters of several tokens."""
    found = [
        {"id": f"photo{k}", "image": f"coco/{k}.png", "conversations": turns(*["<image>\nWhat?", f"Part {k}."][:2])}
        for k in range(16)
    ]
    for k in (3, 4, 5):
        found[k]["conversations"] += turns("And how many?", "3 of them.") * (k - 2)
    found.append(
        {"id": "pair", "image": ["coco/0.png", "coco/1.png"], "conversations": turns("<image><image>?", "No.")}
    )
    found += [{"id": f"text{k}", "conversations": turns(f"Über\n日本 {k}?", "é" * k + "!")} for k in range(1, 8)]
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A model, and a sound data set `good` of 24 samples in three shards."""
    root = tmp_path_factory.mktemp("inspect")
    (root / "images/coco").mkdir(parents=True)
    photo = Image.fromarray(photos.astronaut())
    for k in range(16):
        photo.resize((20 + 9 * k, 40 + 37 * k % 70)).save(root / f"images/coco/{k}.png")
    (root / "train.json").write_text(json.dumps(records()))
    compose_demo(root / "model", root / "train.json")
    arguments = ["--json", root / "train.json", "--images", root / "images", "--out", root / "good", "--workers", 0]
    build_shards.main([str(a) for a in [*arguments, "--model", root / "model", "--shard_samples", 8]])
    return root


@pytest.fixture(scope="module")
def encoder(root):
    data = SimpleNamespace(template="mistral", images="anyres", max_length=MAX_LENGTH, keep_template=False)
    return load_parts(SimpleNamespace(lora=None, quantize=None, model=str(root / "model"), data=data)).encoder


@pytest.fixture(scope="module")
def samples(root) -> list[RawSample]:
    info, index = read_dataset(root / "good")
    checker = Checker(Storage(root / "good"), info)
    return [read_sample(checker.read(index, row)) for row in range(len(index))]


def embedded(page: Path) -> dict:
    """The report as the page holds it."""
    text = re.search(r'<script type="application/json" id="report">(.*?)</script>', page.read_text(), re.DOTALL)[1]
    return json.loads(text)


@pytest.fixture(scope="module")
def report(root) -> dict:
    """Of the sound data set, everything read."""
    result = run(root / "good", "--verify", "--html", root / "good.html", "--model", root / "model", *RUN)
    assert result.returncode == 0, result.stdout + result.stderr
    return embedded(root / "good.html")


def test_figures_are_those_of_the_samples(report, samples, encoder):
    uncut = replace(encoder, max_length=1 << 30)
    examples = [uncut.encode(sample, 0, 0, 0) for sample in samples]
    lengths = np.array([len(e.input_ids) for e in examples])
    tiles = np.array([len(e.tiles) for e in examples])
    assert report["totals"]["samples"] == report["read"] == 24 and report["exact"]
    assert report["totals"]["tokens"] == lengths.sum() and report["totals"]["tiles"] == tiles.sum()
    assert report["totals"]["image_tokens"] == sum(len(e.feature_index) for e in examples)
    sources = {s["name"]: s for s in report["sources"]}
    is_text = np.array([sample.source == "text" for sample in samples])
    assert sources["text"]["samples"] == 7 and sources["text"]["tokens"] == lengths[is_text].sum()
    assert sources["coco"]["samples"] == 17 and sources["coco"]["images"] == 18
    assert sources["coco"]["tiles"] == tiles.sum() and sources["coco"]["tokens"] == lengths[~is_text].sum()
    assert sources["coco"]["turns"] == sum(len(s.conversations) for s in samples if s.source == "coco")
    bars = {h["title"]: h for h in report["histograms"]}
    for title, values in (("Tokens of a sample", lengths), ("Tiles of a sample", tiles)):
        h = bars[title]
        places = np.minimum((values - h["start"]) // h["width"], len(h["counts"]) - 1)
        assert h["counts"] == np.bincount(places, minlength=len(h["counts"])).tolist() and sum(h["counts"]) == 24
        assert (h["least"], h["most"]) == (values.min(), values.max())
    supervised = [int((e.labels[1:MAX_LENGTH] != -100).sum()) for e in examples]
    assert bars["Supervised tokens of a sample"]["mean"] == pytest.approx(np.mean(supervised))
    assert report["recipe"]["steps"] == 3 and 0 < report["recipe"]["fill"] <= 1
    cut = {p["kind"]: p["count"] for p in report["problems"]}.get("truncated", 0)
    assert cut == (lengths > MAX_LENGTH).sum()


def test_page_shows_every_token_with_its_supervision(report, samples, encoder):
    by_key, texts = {sample.key: sample for sample in samples}, TokenTexts(encoder.tokenizer)
    uncut = replace(encoder, max_length=1 << 30)
    assert len(report["samples"]) == 24 and {s["key"] for s in report["samples"]} == set(by_key)
    for shown in report["samples"]:
        sample = by_key[shown["key"]]
        example = uncut.encode(sample, 0, 0, 0)
        ids, flags, images = [], [], []
        for token in shown["tokens"]:
            is_image = len(token) == 1
            images += token if is_image else []
            ids += [encoder.image_token_id] * token[0] if is_image else [token[1]]
            flags += [0] * token[0] if is_image else [token[2]]
        assert ids == example.input_ids.tolist() and flags == (example.labels != -100).astype(int).tolist()
        assert images == [encoder.anyres.num_tokens(i.width, i.height) for i in sample.images]
        learned = "".join(token[0] for token in shown["tokens"] if len(token) == 3 and token[2])
        answers = [turn["value"] for turn in sample.conversations if turn["from"] == "gpt"]
        assert learned.replace("</s>", "").split() == " ".join(answers).split()
    assert texts.pieces(encoder.tokenizer("日", add_special_tokens=False)["input_ids"])[-1] == "日"


def test_pieces_of_real_tokens_join_to_the_text():
    tokenizer = vicuna()  # text with marked spaces, and bytes for what its vocabulary lacks
    text = "A chat between a curious user\nand an <assistant> – 日本 é"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = TokenTexts(tokenizer).pieces([tokenizer.bos_token_id, *ids])
    assert len(pieces) == len(ids) + 1 and pieces[0] == "<s>" and "\n" in pieces
    assert "".join(pieces[1:]).removeprefix(" ") == text


@pytest.mark.parametrize("anyres", [AnyRes(336, 14, ORIGINAL_336), AnyRes(384, 14, ORIGINAL_384)], ids=["336", "384"])
@pytest.mark.parametrize("size", [(640, 480), (300, 900), (1200, 350), (500, 499)])
def test_outlined_area_holds_exactly_the_patches_that_the_model_sees(anyres, size):
    index, side = anyres.feature_index(*size), anyres.patches_per_side
    rows, cols = anyres.grid(*size)
    tiles = np.zeros((1 + rows * cols, anyres.tile_size, anyres.tile_size, 3), np.uint8)
    left, top, right, bottom = show_picture(tiles, *size, anyres)["kept"]
    width, height = cols * anyres.tile_size, rows * anyres.tile_size
    inside = set()
    for tile in range(rows * cols):
        for patch in range(anyres.patches_per_tile):
            x = tile % cols * anyres.tile_size + patch % side * anyres.patch_size
            y = tile // cols * anyres.tile_size + patch // side * anyres.patch_size
            fits = x >= left * width - 0.5 and x + anyres.patch_size <= right * width + 0.5
            if fits and y >= top * height - 0.5 and y + anyres.patch_size <= bottom * height + 0.5:
                inside.add(1 + (1 + tile) * anyres.patches_per_tile + patch)
    assert inside == set(index[index > anyres.patches_per_tile].tolist())


@pytest.fixture(scope="module")
def broken(root, encoder) -> Path:
    """A data set with every kind of problem, planted in the row that the sample's id names."""
    anyres, rng = encoder.anyres, np.random.default_rng(0)

    def strip(width: int, height: int) -> StripInfo:
        rows, cols = anyres.grid(width, height)
        tiles = rng.integers(0, 256, (1 + rows * cols, 32, 32, 3), np.uint8)
        return StripInfo(width, height, rows, cols, *encode_strip(tiles, "jpeg"))

    first, second = strip(60, 40), strip(50, 90)
    ask = turns("<image>\nWhat?", "A cat.")
    planted = [
        ("sound", ask, [first]),
        ("checksum", ask, [strip(60, 40)]),
        ("unusable", ask, [replace(first, data=first.data[: len(first.data) // 2])]),
        ("unusable", turns("<image>\nWhat?", " "), [strip(60, 40)]),
        ("duplicate", ask, [first]),
        ("sound", turns("<image>\nWhy?", "A dog."), [first]),
        ("truncated", turns("Go on.", "a b " * 300), []),
        ("nothing_learned", turns("a b " * 300, "Fine."), []),
        ("sound", ask, [second]),
        ("mismatch", ask, [strip(60, 40)]),
        ("sound", turns(HOSTILE, HOSTILE), []),
        ("unreadable", ask, [strip(200, 200)]),
    ]
    folder = root / "broken"
    with ShardWriter(folder, anyres, shard_samples=10) as writer:
        for row, (name, conversation, images) in enumerate(planted):
            source = HOSTILE if row == 10 else name
            writer.write(RawSample(f"{row:09d}", name if row != 10 else HOSTILE, source, conversation, images))
    info, index = read_dataset(folder)
    shard = bytearray((folder / info.shards[0].name).read_bytes())
    middle = int(index.offset[1] + index.nbytes[1] // 2)
    shard[middle] ^= 0xFF
    # another width in the JSON member, of as many digits: the index no longer knows
    start = int(index.offset[9])
    where = shard.index(b'"width":60', start)
    shard[where : where + 10] = b'"width":61'
    (folder / info.shards[0].name).write_bytes(shard)
    last = folder / info.shards[1].name
    last.write_bytes(last.read_bytes()[: int(index.offset[11]) + 1024])
    return folder


@pytest.fixture(scope="module")
def found(root, broken) -> tuple[Result, dict]:
    page = root / "broken.html"
    result = run(broken, "--verify", "--html", page, "--model", root / "model", "--samples", 40, *RUN)
    return result, embedded(page)


def test_verify_names_each_planted_fault(found):
    result, report = found
    rows = {p["kind"]: {e["row"] for e in p["examples"]} for p in report["problems"]}
    assert rows == {
        "checksum": {1, 9},
        "unusable": {2, 3},
        "duplicate": {4},
        "truncated": {6, 7},
        "nothing_learned": {7},
        "mismatch": {9},
        "unreadable": {11},
    }
    assert len(report["shards_wrong"]) == 2 and report["verdict"]["level"] == "bad"
    assert report["verdict"]["headline"].startswith("Not fit for training: 2 shards are not as indexed; 1 sample")
    assert result.returncode == 1
    for reason in ("row 1 (key 000000001): its bytes have the crc32", "turn 2 (gpt) is empty", "strip does not decode"):
        assert reason in result.stdout
    assert "widths [60], the sample has [61]" in result.stdout
    assert "the same as row 0 (key 000000000)" in result.stdout
    assert any("pictures are stored more than once" in note for note in report["notes"])


def test_page_shows_each_problem_first_and_says_what_is_wrong_with_it(found):
    samples = found[1]["samples"]
    assert {s["row"] for s in samples} == set(range(12))
    assert {s["row"] for s in samples[:8]} == {1, 2, 3, 4, 6, 7, 9, 11}
    by_row = {s["row"]: s for s in samples}
    assert "id" not in by_row[11] and "error" in by_row[2]["pictures"][0]
    assert by_row[7]["supervised"] == 0 and by_row[7]["max_length"] == MAX_LENGTH < by_row[7]["length"]


class Elements(HTMLParser):
    """What a browser makes of the page: elements with attributes, and the text of none of the scripts."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.found, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.text += text if self.found and self.found[-1][0] not in ("script", "style") else ""


def test_hostile_text_stays_text(root, found):
    page = Elements((root / "broken.html").read_text())
    tags = [tag for tag, _ in page.found]
    assert tags.count("script") == 2 and "img" not in tags and "iframe" not in tags and "link" not in tags
    for _, attributes in page.found:
        assert not {name for name in attributes if name.startswith("on") or name in ("src", "href", "srcset")}
    assert HOSTILE.split("\u2028")[0] in page.text  # as a source, in the table
    hostile = next(s for s in found[1]["samples"] if s["row"] == 10)
    assert hostile["id"] == hostile["source"] == HOSTILE
    assert "".join(token[0] for token in hostile["tokens"]).count(HOSTILE) == 2
    script = (Path(tool.__file__).parent / "doctor" / "report_page.js").read_text()
    for way_in in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "fetch(", "http"):
        assert way_in not in script
    assert "\x1b" not in found[0].stdout and "\u2028" not in found[0].stdout


def test_page_asks_for_nothing_outside(root, report):
    text = (root / "good.html").read_text()
    outside = re.findall(
        r"""(?:src|href|url)\s*[=(]\s*['"]?(?!['"]?data:)[^'")\s>]+""", re.sub(r"<script.*", "", text, flags=re.S)
    )
    assert outside == [] and "@import" not in text and "default-src 'none'" in text
    pictures = [p for s in report["samples"] for p in s.get("pictures", [])]
    assert len(pictures) == 18 and all(p["base"].startswith("data:image/webp;base64,") for p in pictures)


def test_step_lists_what_the_loader_delivers(root, encoder, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {root / 'model'}\nrun_dir: {tmp_path}\ndata:\n  sources: {root / 'good'}\n")
    given = ["--config", config, *RUN, "--ranks", 2]
    options = tool.parse_arguments([str(a) for a in [*given, "--step", 0]])
    mixture = tool.open_data(options).mixture
    for step in range(3):
        result = run(*given, "--step", step)
        assert result.returncode == 0, result.stderr
        listed, place = {}, None
        for line in result.stdout.splitlines():
            if opened := re.match(r"micro-batch (\d+) rank (\d+): (\d+) samples, ([\d,]+) tokens, (\d+) tiles", line):
                place = int(opened[1]), int(opened[2])
                listed[place] = (int(opened[5]), [])
            elif row := re.match(r" +(\d+) +(\d+) +\d+ +\d+ +\S+  good shard-\d{6}\.tar (\d{9})$", line):
                listed[place][1].append((int(row[1]), int(row[2])))
        delivered = {}
        for rank in range(2):
            for batch in build_loader(mixture, encoder, rank, 2, 400, 48, step, LoaderOptions(num_workers=0)):
                if batch.step == step:
                    pairs = list(zip(batch.slots, batch.sample_ids, strict=True))
                    delivered[batch.micro, rank] = (batch.num_tiles, pairs)
        assert listed == delivered and sum(len(pairs) for _, pairs in listed.values()) == 8
    late = run(*given, "--step", 3)
    assert late.returncode == 2 and "step 3 is not one of 0 to 2" in late.stderr


def test_step_of_a_run_whose_plan_changed_is_of_what_was_left(root, tmp_path):
    checkpoint = tmp_path / "checkpoints" / checkpoint_name(1)
    checkpoint.mkdir(parents=True)
    arguments = ["--step", "1", "--config", str(tmp_path / "config.yaml"), *RUN]
    (tmp_path / "config.yaml").write_text(
        f"model: {root / 'model'}\nrun_dir: {tmp_path}\ndata:\n  sources: {root / 'good'}\n"
    )
    before = tool.open_data(tool.parse_arguments(arguments)).mixture  # steps of 8
    state = {**before.state(), "step": 1, "counters": {}}
    manifest = {"format": FORMAT, "files": {}, "state": state, "state_crc32": state_checksum(state)}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    assert "batch_size: 8 -> 4" in run(*arguments, "--data.batch_size", 4).stderr
    listed = []
    for step in range(1, 5):
        result = run(*arguments, "--data.batch_size", 4, "--data.allow_changed_plan", "true", "--step", step)
        listed += [int(slot[1]) for slot in re.finditer(r"^ +\d+ +(\d+) .* good shard", result.stdout, re.MULTILINE)]
    assert len(listed) == 16 and sorted([*listed, *before.step_ids(0)]) == list(range(24))


def test_without_a_model_pictures_and_texts_are_shown_as_stored(root):
    with FaultServer(root) as server:  # read over http
        result = run(f"{server.url}/good", "--html", root / "plain.html")
    report = embedded(root / "plain.html")
    assert result.returncode == 0 and report["verdict"]["level"] == "good" and not report["with_model"]
    shown = {s["id"]: s for s in report["samples"]}
    assert shown["text1"]["turns"] == [["human", "Über\n日本 1?"], ["gpt", "é!"]]
    assert shown["pair"]["pictures"][1]["width"] == 29 and report["recipe"]["steps"] == 1


def test_processes_find_the_same_as_one(broken, encoder):
    info, index = read_dataset(broken)
    checker = Checker(Storage(broken), info, encoder)
    alone, many = (verify(checker, index, workers) for workers in (0, 1))
    assert alone.problems == many.problems and alone.shards == many.shards and len(alone.problems) == 5
    assert np.array_equal(alone.tokens, many.tokens) and np.array_equal(alone.supervised, many.supervised)


def test_wrong_usage_ends_with_2_and_says_why():
    for arguments, message in (
        ((), "give the URL of a data set"),
        (("--step", 1), "--step needs --config"),
        (("x", "--data.batch_size", 3), "go with --config"),
        (("x", "--samples", 0), "--samples must be 1 or more"),
        (("x", "--model", "nowhere"), "no config.json"),
    ):
        result = run(*arguments)
        assert result.returncode == 2 and message in result.stderr


def test_what_is_no_data_set_ends_with_1(root, tmp_path):
    for result in (run(tmp_path), run(tmp_path, "--model", root / "model", *RUN)):
        assert result.returncode == 1 and "has no dataset.json" in result.stderr


def test_samples_are_shown_in_equal_shares_of_the_sources(root):
    _, index = read_dataset(root / "good")
    rows = choose(index, Findings(len(index)), 12)
    names = [index.source_names[index.source[row]] for row in rows]
    assert len(set(rows)) == 12 and names.count("text") == names.count("coco") == 6


def test_histogram_has_every_value_in_one_bar_and_names_its_tail():
    values = np.concatenate([np.arange(1000), [10**6]])
    h = histogram("x", "px", values)
    assert sum(h["counts"]) == 1001 and len(h["counts"]) <= 24 and h["is_open"] and h["most"] == 10**6
    assert h["counts"][0] == h["width"] == 50 and h["median"] == 500
    assert histogram("x", "px", np.zeros(0))["counts"] == []


def test_the_models_own_template_is_taken_where_no_recipe_names_one(tmp_path, monkeypatch, capsys):
    vision, llm = dry.demo_configs()
    LlavaNextConfig(vision_config=vision, text_config=llm).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(get_template("llama_3").jinja)
    monkeypatch.setattr(tool, "load_parts", lambda config: None)
    given = dict.fromkeys(("config", "template", "image_root")) | {"model": str(tmp_path), "url": "x", "overrides": []}
    config, _ = tool.load_run(SimpleNamespace(**given))
    assert config.data.template == "llama_3" and "llama3-8b/finetune.yaml" in capsys.readouterr().out
