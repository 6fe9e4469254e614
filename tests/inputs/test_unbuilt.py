"""A plan of records before anything is built: what the build of the same data gives, and nothing of it is decoded."""

import json
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

import build_shards
import finetune
import inspect_shards
from llava_next.data.format.index import Index, read_dataset
from llava_next.data.inputs import unbuilt
from llava_next.data.inputs.samples import SampleMaker
from llava_next.data.loading.encode import Encoder
from llava_next.data.plan.mixture import Mixture
from llava_next.training.recipe.config import parse_run
from llava_next.training.setup import load_parts, open_mixture
from support.builds import call, samples, tool_result
from support.demo import compose_demo
from support.forms import FORMS, RED, make_root, record_of, turns
from support.launching import ROOT

GOOD = [name for name, form in FORMS.items() if not form.refused]
UNKNOWN = ("offset", "nbytes", "crc32", "digest")  # columns of the index that a build alone knows


def write_records(folder: Path) -> None:
    """All forms, pictures of other sizes and kinds, long questions, and what is refused, in one list."""
    root, rng = make_root(folder), np.random.default_rng(0)
    records = [record_of(name, root) for name in FORMS]
    for number in range(12):
        picture = Image.fromarray(rng.integers(0, 256, (*rng.integers(20, 200, 2), 3), np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by 90 degrees, which training does not look at
        picture.save(root / f"{number}.jpg", exif=exif)
        question = "<image>\nWhat? " + "Look closely. " * (7 * number)
        records.append({"id": f"size{number}", "image": f"{number}.jpg", "conversations": turns(question)})
    (root / "cut.png").write_bytes(RED[:20])
    records.append({"id": "cut", "image": "cut.png", "conversations": turns("<image>\nWhat?")})
    (folder / "train.json").write_text(json.dumps([*records[:3], 7, *records[3:]]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """model, train.json with pictures/, and shards/ built of them, 16 samples a shard."""
    folder = tmp_path_factory.mktemp("unbuilt")
    write_records(folder)
    (folder / "texts.json").write_text(json.dumps([{"conversations": turns("What do you see?", "It is red.")}]))
    compose_demo(folder / "model", folder / "texts.json", "vicuna_v1")
    inputs = ["--json", folder / "train.json", "--images", folder / "pictures", "--out", folder / "shards"]
    lengths = ["--tokenizer", f"{folder / 'model'}:vicuna_v1", "--max_rejected_share", 0.9]
    result = tool_result(*inputs, "--model", folder / "model", *lengths, "--workers", 0, "--shard_samples", 16)
    assert result.returncode == 0, result.stderr
    return folder


def run(folder: Path, source: str, *more) -> list[str]:
    """Options of a run on a data set or a file of records in `folder`."""
    given = {"--model": "model", "--run_dir": "run", "--data.template": "vicuna_v1", "--data.batch_size": "4"}
    given |= {"--data.sources": folder / source, "--data.max_length": "200", "--data.image_root": folder / "pictures"}
    given["--model"] = folder / "model"
    return [*(str(word) for pair in given.items() for word in pair), *map(str, more)]


@pytest.fixture(scope="module")
def mixtures(folder) -> tuple[Mixture, Mixture, Encoder]:
    """The plan of the built data, the one of the records; and the run's encoder."""
    recipe = ROOT / "scripts/recipes/vicuna-7b/finetune.yaml"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unbuilt, "SHARD_SAMPLES", 16)
        patch.setattr(ImageFile.ImageFile, "load", None)  # nothing is decoded
        found = []
        for source in ("shards", "train.json"):
            config, _ = parse_run(run(folder, source), recipe)
            parts = load_parts(config)
            found.append(open_mixture(config, parts))
    return (*found, parts.encoder)


def test_index_is_that_of_the_build_but_for_the_places_in_shards(mixtures):
    built, planned = (mixture.indexes[0] for mixture in mixtures[:2])
    assert len(built) > 40 and len(built.exact_text_tokens) == len(built.first_targets) == 1
    for name in {field.name for field in fields(Index)} - {*UNKNOWN, "keys", "source_names"}:
        first, second = (getattr(index, name) for index in (built, planned))
        if isinstance(first, dict):
            assert list(first) == list(second)
            first, second = (next(iter(columns.values())) for columns in (first, second))
        assert np.array_equal(first, second), name
    assert built.keys == planned.keys and built.source_names == planned.source_names
    infos = [mixture.infos[0] for mixture in mixtures[:2]]
    assert [shard.samples for shard in infos[0].shards] == [shard.samples for shard in infos[1].shards]
    for name in ("samples", "images", "tiles", "text_bytes", "sources", "anyres"):
        assert getattr(infos[0], name) == getattr(infos[1], name)
    for name in ("rejected", "first_turns_left_out", "system_prompts"):
        assert infos[0].build[name] == infos[1].build[name] > 0


def test_the_same_samples_are_left_out_for_the_same_reasons(folder, mixtures):
    expected = [json.loads(line) for line in (folder / "shards/rejected.jsonl").open()]
    found = mixtures[1].storages[0].rejected
    assert sorted(map(json.dumps, found)) == sorted(map(json.dumps, expected))
    assert {entry["id"] for entry in found} >= {name for name, form in FORMS.items() if form.refused} | {"cut"}


def test_steps_are_those_of_the_built_data(mixtures):
    built, planned, _ = mixtures
    assert built.total_steps == planned.total_steps > 10 and planned.exact_lengths and planned.exact_cut
    for step in range(built.total_steps):
        assert np.array_equal(built.step_ids(step), planned.step_ids(step))
        assert np.array_equal(built.step_sizes(step), planned.step_sizes(step))


@pytest.mark.parametrize("length", [30, 45, 60, 120, 4096])
def test_samples_that_lose_all_answers_are_counted_as_training_would_find_them(folder, mixtures, length):
    """By the pictures and by long questions."""
    built, planned, encoder = mixtures
    encoder = Encoder(encoder.template, encoder.tokenizer, encoder.image_token_id, encoder.anyres, length)
    cut = 0
    for number, sample in enumerate(samples(folder / "shards").values()):
        cut += not (encoder.encode(sample, number, 0, 0).labels[1:] != -100).any()
    found = []
    for source in (folder / "shards", planned.storages[0]):
        settings = {"batch_size": 4, "max_length": length, "fingerprint": built._fingerprint}
        found.append(Mixture([(source, "s", 1.0)], encoder.anyres, **settings).num_all_cut)
    assert found == [cut, cut] and (length != 4096 or not cut) and (length != 60 or 0 < cut < len(built.indexes[0]))


def dry_run(monkeypatch, capsys, *options) -> str:
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--dry_run", *options])
    finetune.main(ROOT / "scripts/recipes/vicuna-7b/finetune.yaml")
    return capsys.readouterr().out


def test_banner_of_records_names_the_command_whose_build_has_the_same_plan(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    planned = dry_run(monkeypatch, capsys, *run(folder, "train.json"))
    refused = len(FORMS) - len(GOOD) + 2
    assert (
        f"  {refused} of {len(FORMS) + 14} samples a build would leave out:\n    path leaves the image root (4): "
        in planned
    )
    assert " [id outside, outside_by_name, outside_by_url, ...]\n" in planned
    assert "    the build refuses more than 5 % (--max_rejected_share)" in planned
    assert not (tmp_path / "run").exists()
    command = planned.split("  build    python data_tools/build_shards.py ")[1].split("\n")[0]
    arguments = [*shlex.split(command), "--max_rejected_share", "0.9", "--workers", "0"]
    assert call(build_shards.main, *arguments).returncode == 0
    built = dry_run(monkeypatch, capsys, *run(folder, "shards"), "--data.sources", "shards/train")
    same = ("  lengths", "  warning", "  in all", "steps", "dealing", "work")
    kept = [[line for line in out.split("\n") if line.startswith(same)] for out in (planned, built)]
    assert kept[0] == kept[1] and len(kept[0]) == len(same)


def test_training_on_records_is_refused_with_the_command_that_builds_them(folder, monkeypatch):
    options = run(folder, "shards", "--data.validation", folder / "train.json", "--data.images", "square")
    monkeypatch.setattr(sys, "argv", ["finetune.py", *options])
    with pytest.raises(SystemExit) as end:
        finetune.main(ROOT / "scripts/recipes/vicuna-7b/finetune.yaml")
    assert f"data.validation: {folder / 'train.json'} is no folder of shards" in str(end.value)
    model = f"--model {folder}/model --tokenizer {folder}/model:vicuna_v1 --square --out shards/train"
    assert f"build_shards.py --json {folder}/train.json --images {folder}/pictures {model}" in str(end.value)


def test_built_and_raw_data_are_planned_together(folder, monkeypatch, capsys):
    sources = json.dumps([str(folder / "shards"), {"path": str(folder / "train.json"), "repeat": 2.0}])
    out = dry_run(monkeypatch, capsys, *run(folder, "shards", "--data.sources", sources))
    count = len(read_dataset(folder / "shards")[1])
    assert f"data       shards: {count} samples x 1, " in out
    assert f"data       train.json: {count} samples x 2, not built yet, " in out
    assert f"steps      {-(-3 * count // 4)} of 4 samples" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory"),
        ("no json", r"Expecting value at byte 0 \(line 1\), after 0 whole samples"),
        ('[\n{"id": 1},\n{"id": "2', r"at byte 20 \(line 3\), after 1 whole samples: the file is cut off or damaged"),
        (
            '[{"image": "a.png", "caption": "A."}]',
            "1 of 1 samples rejected; most often: no such image file .1.: .*a.png .id 0.. ",
        ),
    ],
)
def test_what_gives_no_plan_is_an_error_that_names_the_file(folder, tmp_path, text, message):
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        unbuilt.measure(path, SampleMaker(tmp_path, read_dataset(folder / "shards")[0].anyres), ())
    assert str(error.value).startswith(f"{path}: ")


def test_a_wrong_image_root_is_named(folder):
    config, _ = parse_run(run(folder, "train.json", "--data.image_root", folder / "nowhere"))
    with pytest.raises(ValueError, match=rf"data\.image_root: {folder}/nowhere is not a folder"):
        open_mixture(config, load_parts(config))


def test_the_doctor_counts_records_as_it_counts_their_shards(folder, tmp_path):
    options = ["--model", folder / "model", "--template", "vicuna_v1", "--workers", 0, "--data.max_length", 60]
    planned = call(inspect_shards.main, folder / "train.json", "--image_root", folder / "pictures", *options,
                   "--html", tmp_path / "a.html")  # fmt: skip
    built = call(inspect_shards.main, folder / "shards", *options)
    assert planned.returncode == 1, planned.stderr
    assert "fault: 4 samples: left out by a build, path leaves the image root" in planned.stdout
    totals = [re.search(r": ([\d,]+ samples, .* tokens), ", result.stdout)[1] for result in (planned, built)]
    assert totals[0] == totals[1]
    lost = [re.findall(r"warning: (\d+ samples): nothing left to learn", result.stdout) for result in (planned, built)]
    assert lost[0] == lost[1] != []
    assert (tmp_path / "a.html").stat().st_size > 1000
    assert f"Not fit for training: {len(FORMS) - len(GOOD) + 2} samples: left out by a build (" in planned.stdout
    nothing = call(inspect_shards.main, folder / "train.json")
    assert nothing.returncode == 2 and "give --config or --model too" in nothing.stderr
