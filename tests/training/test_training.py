"""Schedule, loss weighting, configuration, and whole runs: launched, stopped, resumed, exported, loaded."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import evaluate
import finetune
import merge
import reproduce
from llava_next.data.inputs.listing import list_json
from llava_next.model.folders.adapters import read_adapter
from llava_next.model.folders.card import points_of, read_story
from llava_next.model.folders.check_adapter import check_adapter
from llava_next.model.folders.export import save_model
from llava_next.model.folders.starting import model_fingerprint
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration
from llava_next.training.checkpoints.recovery import checkpoint_to_resume, complete_checkpoints
from llava_next.training.devices.agreement import slot_weights
from llava_next.training.provenance import code_hash
from llava_next.training.recipe.config import parse_run, save_run
from llava_next.training.recipe.optim import rate_multiplier, warmup_steps
from llava_next.training.scores import jobs_of
from llava_next.training.setup import report_export
from llava_next.training.watch.metrics import si
from reproducing.ledger import ledger_table, read_ledger
from support.demo import build_demo, compose_demo
from support.launching import ROOT, launch
from support.runs import demo_arguments, read_lines, run_demo

SAMPLES, BATCH = 96, 16


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Digits, shards and the demo model, all small: folder with digits/, shards/ and base/."""
    folder = tmp_path_factory.mktemp("demo")
    build_demo(folder, SAMPLES)
    return folder


def run_stage(demo, run, *options, processes=2, check=True):
    """A launched run in steps of `BATCH` samples; the finished process and its metrics."""
    return run_demo(demo, run, "--data.batch_size", BATCH, *options, processes=processes, check=check)


@pytest.fixture(scope="module")
def straight_run(demo, tmp_path_factory):
    """All 6 steps in one go on 2 ranks: run folder and metrics."""
    run = tmp_path_factory.mktemp("straight") / "run"
    return run, run_stage(demo, run)[1]


def test_schedule_equals_the_original_at_every_recorded_step():
    golden = json.loads((Path(__file__).parents[1] / "data" / "schedule.json").read_text())["schedules"]
    assert len(golden) == 2
    for schedule in golden:
        total, ratio = schedule["total_steps"], schedule["warmup_ratio"]
        assert warmup_steps(total, ratio) == schedule["warmup_steps"]
        for step, value in schedule["multipliers"]:
            assert rate_multiplier(step, total, ratio) == float(value)


def test_slot_weights_sum_to_one_and_follow_their_definition():
    supervised = torch.tensor([3, 0, 5, 2, 1, 1, 1, 1, 4, 6], dtype=torch.float64)  # groups: slots 0-7 and 8-9
    for weighting in ("token", "sample", "micro_batch_mean"):
        assert (slot_weights(supervised, weighting).double() * supervised).sum() == pytest.approx(1, abs=1e-6)
    assert slot_weights(supervised, "token")[2] == pytest.approx(1 / 24)
    assert slot_weights(supervised, "sample")[2] == pytest.approx(1 / 5 / 9)
    assert slot_weights(supervised, "micro_batch_mean")[2] == pytest.approx(1 / 14 / 2)
    assert slot_weights(supervised, "micro_batch_mean")[9] == pytest.approx(1 / 10 / 2)
    assert slot_weights(torch.zeros(4, dtype=torch.float64), "token").sum() == 0


def test_run_trains_on_every_sample_and_its_loss_falls(straight_run):
    _, metrics = straight_run
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    assert sum(m["samples"] for m in metrics) == SAMPLES and sum(m["holes"] for m in metrics) == 0
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.5


REAL = os.environ.get("LLAVA_NEXT_SCORED")  # takes a minute


def test_resume_is_bit_exact_at_the_same_world_size_also_of_a_run_that_is_scored(demo, straight_run, tmp_path):
    """Stopped while its model is scored. By the real scripts/evaluate.py on request, then without the stop."""
    run, held_out = tmp_path / "run", demo / "digits/held_out.json"
    options = ("--evaluate.every", 2, "--evaluate.json", held_out, "--evaluate.images", demo / "digits/images")
    options += ("--checkpoint.export_every", 4, "--data.batch_size", BATCH)
    arguments = [*demo_arguments(demo, run), *options]
    worker = "scripts/finetune.py" if REAL else "tests/support/workers/scored.py"
    if not REAL:
        said = launch(worker, *arguments, "--evaluate.options", "--name stop").stdout
        assert "waiting for the scores of step 2" in said and "stopped after step 2; to continue:" in said
        assert [path.name for path in complete_checkpoints(run / "checkpoints")] == ["step-00000002"]
        assert jobs_of(run) == {2: {"passing": True, "outcome": None}}
    done = launch(worker, *arguments, timeout=600)
    lines = read_lines(run / "metrics.jsonl")
    steps, scores = ([line for line in lines if ("scores" in line) == scored] for scored in (False, True))
    assert [(m["step"], m["loss"], m["grad_norm"]) for m in steps] == [
        (m["step"], m["loss"], m["grad_norm"]) for m in straight_run[1]
    ]
    assert (run / "model/model.safetensors").read_bytes() == (straight_run[0] / "model/model.safetensors").read_bytes()
    assert [line["step"] for line in scores] == [2, 4, 6]
    values = [line["scores"]["held_out"]["value"] for line in scores]
    if REAL:
        expected = [evaluate_by_hand(run, folder, demo) for folder in ("model-step-2", "model-step-4", "model")]
        assert values == [expected[0] or values[0], *expected[1:]]  # the first one's model may be gone
    else:
        assert values[2] == zlib.crc32((run / "model/model.safetensors").read_bytes()) / 2**32
        assert values[1] == zlib.crc32((run / "model-step-4/model.safetensors").read_bytes()) / 2**32
    best = (2, 4, 6)[values.index(max(values))]
    assert json.loads((run / "best/best.json").read_text())["step"] == best
    assert sorted(path.name for path in run.glob("model-step-*")) == sorted({"model-step-4", f"model-step-{best}"})
    assert f"| held_out | exact_match | {values[2]:.4g}" in (run / "model/README.md").read_text()
    reproduce.main(["digits", "--record", str(run), "--ledger", str(tmp_path / "ledger.jsonl")])
    assert read_ledger(tmp_path / "ledger.jsonl")[0]["scores"]["held_out"]["value"] == values[2]
    assert report_export(run / "best") is None and "Traceback" not in done.stderr


def evaluate_by_hand(run: Path, name: str, demo: Path) -> float | None:
    """The share of exact answers of a run's model, if it is still there."""
    if not (run / name).exists():
        return None
    words = ["--model", run / name, "--json", demo / "digits/held_out.json", "--images", demo / "digits/images"]
    command = [sys.executable, "scripts/evaluate.py", *words, "--out", run / "by-hand.json"]
    subprocess.run([str(word) for word in command], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    found = json.loads((run / "by-hand.json").read_text())
    return found["exact"] / found["of"]


def test_exported_model_loads_in_stock_transformers_and_answers(demo, straight_run):
    folder = straight_run[0] / "model"
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert type(model).__module__.startswith("transformers.")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.dtype == torch.bfloat16
    processor = AutoProcessor.from_pretrained(folder)
    held_out = list_json(demo / "digits/held_out.json", seed=0)
    questions, _ = evaluate.read_questions(held_out, demo / "digits/images", processor, limit=1)
    answers = evaluate.ask(model.eval(), processor, questions, max_new_tokens=4)
    assert len(answers) == 1 and isinstance(answers[0], str)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_gives_bit_equal_logits_in_the_dtype_written(demo, tmp_path, dtype):
    ours = LlavaNextForConditionalGeneration.from_pretrained(demo / "base", dtype=dtype)
    save_model(ours, tmp_path / "model", demo / "base", dtype=dtype)
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype="auto")
    assert stock.dtype == dtype
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    picture = np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    inputs = processor(images=picture, text="[INST] <image>\nWhat number is written? [/INST]", return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, stock(**inputs).logits)


def test_composing_twice_gives_the_same_bytes(demo, tmp_path):
    again = compose_demo(tmp_path / "base", demo / "digits/train.json")
    assert (again / "model.safetensors").read_bytes() == (demo / "base/model.safetensors").read_bytes()
    assert (again / "config.json").read_bytes() == (demo / "base/config.json").read_bytes()


def test_saved_configuration_reads_back_to_the_same_run(tmp_path):
    config, _ = parse_run(["--model", "m", "--run_dir", "r", "--data.sources", "[a, {path: b, repeat: 0.5}]"])
    save_run(config, tmp_path / "config.yaml")
    assert parse_run(["--config", str(tmp_path / "config.yaml")])[0] == config


GOOD = {"--model": "base", "--data.sources": "shards", "--run_dir": "run", "--data.template": "mistral"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"--data.sorces": "x"}, "data.sorces"),
        ({"--data.batch_size": "many"}, "data.batch_size"),
        ({"--data.token_budget": "100"}, "data.token_budget: 100 is smaller than data.max_length"),
        ({"--data.sources": "digits"}, "has no dataset.json"),
        ({"--data.sources": "nowhere"}, "has no dataset.json"),
        ({"--data.template": "vicuna_v1"}, "is not the chat template saved in"),
        ({"--data.template": "vicuna"}, "no template 'vicuna'"),
        ({"--model": "digits"}, "has no config.json"),
        ({"--model": "other_tower"}, "was cut for another model"),
        ({"--data.images": "square"}, "the model takes 32 px tiles, 16 px patches, one square from the middle"),
        ({"--log_with": "[wandb]"}, "log_with: wandb is not installed"),
        ({"--checkpoint.resume": "digits"}, "is not a complete checkpoint"),
        ({}, "accelerate launch"),
    ],
    ids=lambda value: next(iter(value), "not launched") if isinstance(value, dict) else "",
)
def test_bad_input_is_one_error_that_names_it_before_anything_loads(
    demo, tmp_path, monkeypatch, capsys, changes, expected
):
    monkeypatch.chdir(demo)
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    if changes.get("--model") == "other_tower" and not Path("other_tower").exists():
        shutil.copytree("base", "other_tower")
        config = json.loads(Path("other_tower/config.json").read_text())
        config["vision_config"]["patch_size"] = 8
        Path("other_tower/config.json").write_text(json.dumps(config))
    options = {**GOOD, "--run_dir": str(tmp_path / "run"), **changes}
    monkeypatch.setattr(sys, "argv", ["finetune.py", *(x for pair in options.items() for x in pair)])
    with pytest.raises(SystemExit) as stopped:
        finetune.main(None)
    message = f"{stopped.value} {capsys.readouterr().err}"
    assert expected in message and "Traceback" not in message
    assert not (tmp_path / "run").exists()


def test_folder_with_a_template_of_its_own_trains_when_asked_and_keeps_it(demo, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "published"
    shutil.copytree(demo / "base", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name in ("chat_template.jinja", "chat_template.json"):
        (folder / name).unlink()
    run = {**GOOD, "--model": str(folder), "--run_dir": str(tmp_path / "run"), "--data.sources": str(demo / "shards")}
    arguments = ["finetune.py", "--dry_run", *(x for pair in run.items() for x in pair)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="keep_template"):
        finetune.main(None)
    monkeypatch.setattr(sys, "argv", [*arguments, "--data.keep_template", "true"])
    finetune.main(None)
    assert "template mistral" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"fails \d of 10 checks"):
        report_export(folder)
    report_export(folder, keep_template=True)


def test_unknown_key_in_a_recipe_file_is_named(tmp_path):
    (tmp_path / "recipe.yaml").write_text("data:\n  max_lenght: 3\n")
    with pytest.raises(ValueError, match="max_lenght"):
        parse_run(["--config", str(tmp_path / "recipe.yaml")])


def test_dry_run_prints_the_plan_and_writes_nothing(demo, tmp_path, monkeypatch, capsys):
    options = {**GOOD, "--run_dir": str(tmp_path / "run"), "--data.batch_size": "16"}
    monkeypatch.chdir(demo)
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--dry_run", *(x for pair in options.items() for x in pair)])
    finetune.main(None)
    out = capsys.readouterr().out
    assert "steps      6 of 16 samples, 1 warm-up" in out and "llm" in out and f"{SAMPLES} samples x 1" in out
    model = LlavaNextForConditionalGeneration.from_pretrained("base")
    disk = f"{si(2 * model.num_parameters(), 'B')} the result"
    assert f", {disk}\n" in out and "max_steps" not in out
    short = ["--max_steps", "2", "--lora.r", "16", "--optim.rates.vision", "null"]
    monkeypatch.setattr(sys, "argv", [*sys.argv, *short])
    finetune.main(None)
    out, whole = capsys.readouterr().out, out
    assert "steps      6 of 16 samples, 1 warm-up" in out and "\n           ends after step 2 by max_steps," in out
    adapters = 2 * 16 * (4 * (128 + 128) + 3 * (128 + 320))  # of rank 16 in 2 layers; merged in the result
    assert f", {disk}, {si(4 * adapters, 'B')} its adapter\n" in out
    ways = [line.split()[0] for line in out.split("ways  ")[1].splitlines()[2:7]]  # in fp32, without bf16 masters
    assert ways[:4] == ["LoRA", "in", "adamw8bit", "QLoRA"] and len(ways) == 5
    counted = [int(re.search(r"in all +([\d,]+) tokens", text)[1].replace(",", "")) for text in (out, whole)]
    assert counted[0] / counted[1] == pytest.approx(1 / 3, rel=0.1)
    assert not (tmp_path / "run").exists()


def test_damaged_sample_becomes_a_hole_and_the_run_goes_on(demo, tmp_path):
    """A strip that no longer decodes, checksums made to match: left out, written down, equal on all ranks."""
    from llava_next.data.format.index import read_dataset
    from llava_next.data.format.shards import StripInfo, read_sample
    from llava_next.data.format.writer import ShardFile, write_dataset
    from llava_next.data.storage.client import Storage

    info, index = read_dataset(demo / "shards")
    storage, folder, parts = Storage(demo / "shards"), tmp_path / "shards", []
    folder.mkdir()
    with ShardFile(folder / "shard-000000.tar") as shard:
        for row in range(len(index)):
            where = index.locate(row)
            data = storage.read_range(info.shards[where.shard].name, where.offset, where.nbytes)
            sample = read_sample(data, where.key)
            if row == 7:
                broken = StripInfo(**{**vars(sample.images[0]), "data": b"no picture"})
                sample = type(sample)(**{**vars(sample), "images": [broken]})
            shard.write(sample)
    parts.append((shard.info, shard.rows))
    write_dataset(folder, info.anyres, info.codec, parts)
    _, metrics = run_stage(demo, tmp_path / "run", "--data.sources", folder)
    assert sum(m["holes"] for m in metrics) == 1 and sum(m["samples"] for m in metrics) == SAMPLES - 1
    lines = [json.loads(line) for p in (tmp_path / "run").glob("skipped*.jsonl") for line in p.read_text().splitlines()]
    assert len(lines) == 1 and lines[0]["sample_id"] == 7 and "does not decode" in lines[0]["reason"]


LORA = ("--lora.r", 8, "--lora.alpha", 16, "--lora.dropout", 0.1, "--optim.rates.vision", "null", "--quantize", "nf4")


@pytest.fixture(scope="module")
def lora_run(demo, tmp_path_factory):
    """3 steps of LoRA with dropout, over matrices in 4 bits, on 2 ranks: run folder and metrics."""
    run = tmp_path_factory.mktemp("lora") / "run"
    return run, run_stage(demo, run, *LORA, "--data.batch_size", 32, "--checkpoint.export_every", 2)[1]


def test_qlora_is_the_same_on_1_rank_and_bit_equal_when_it_goes_on(demo, lora_run, tmp_path):
    options = (*LORA, "--data.batch_size", 32, "--data.token_budget", 600)
    done, straight = run_stage(demo, tmp_path / "straight", *options, processes=1)
    model, adapter, base = (f"{tmp_path}/straight/{name}" for name in ("model", "adapter", "base"))
    assert done.stdout.splitlines()[-2:] == [
        f"model written to {model}; 10 checks made",
        f"adapter written to {adapter}, for its base {base}; 14 checks made",
    ]
    run_stage(demo, tmp_path / "stopped", *options, "--max_steps", 1, processes=1)
    _, resumed = run_stage(demo, tmp_path / "stopped", *options, processes=1)
    figures = [[(m["step"], m["loss"], m["grad_norm"]) for m in metrics] for metrics in (straight, resumed)]
    assert figures[0] == figures[1] and straight[-1]["loss"] < straight[0]["loss"] - 0.3
    for name in ("model/model", "adapter/adapter_model", "base/trained"):
        one, two = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("straight", "stopped"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert [m["loss"] for m in lora_run[1]] == pytest.approx([m["loss"] for m in straight], rel=1e-5)
    assert lora_run[1][0]["micro_batches"] < straight[0]["micro_batches"]
    with pytest.raises(AssertionError, match=r"was made with adapters: r 8, alpha 16, .* this run has: r 8, alpha 32"):
        run_stage(demo, tmp_path / "stopped", *options, "--lora.alpha", 32, processes=1)


def test_lora_run_leaves_a_model_an_adapter_and_its_base_and_checkpoints_of_what_trains(lora_run, demo):
    run = lora_run[0]
    findings = check_adapter(run / "adapter")
    assert len(findings) == 14 and all(finding.ok for finding in findings), findings
    tensors = json.loads((run / "checkpoints/step-00000003/tensors.json").read_text())
    weights = [name for name in tensors if name.startswith("model.")]
    assert len(weights) == 2 * 14 + 4 + 1  # A and B of 7 matrices in 2 layers, projector, newline
    trained = sum(math.prod(tensors[name]["shape"]) for name in weights)
    sizes = [path.stat().st_size for path in (run / "checkpoints/step-00000003").glob("rank-*")]
    assert 0 < sum(sizes) - 12 * trained < 1e5  # weights and two moments; names and random numbers
    assert (run / "base/model-model.safetensors").samefile(demo / "base/model.safetensors")
    assert all(finding.ok for finding in check_adapter(run / "adapter-step-2"))  # beside model-step-2
    assert (run / "base-step-2/trained.safetensors").exists()
    assert len(load_file(run / "base/trained.safetensors")) == 5


def test_cards_of_a_run_tell_its_data_recipe_and_losses_and_not_where_it_lay(lora_run, demo):
    run, metrics = lora_run
    for name, library in (("model", "transformers"), ("adapter", "peft"), ("base", "transformers")):
        text = (run / name / "README.md").read_text()
        assert ("(LLaVA-1.6) base of an adapter (LoRA) in the layout" in text) == (name == "base")
        assert ("--lora-modules" in text) == (name != "model")
        story = read_story(run / name)
        assert f"library_name: {library}\n" in text and str(run.parent) not in text and str(demo) not in text
        assert all(part["name"].endswith(" (random weights)") for part in story.parts) and "license" not in text
        (stage,) = story.stages
        assert stage["title"] == "stage 2, LoRA" and stage["steps"] == len(metrics)
        assert points_of(stage) == [(m["step"], pytest.approx(m["loss"], rel=1e-4)) for m in metrics]
        assert stage["data"][0]["samples"] == json.loads((demo / "shards/dataset.json").read_text())["samples"]
        assert "ends with `</s>`" in text
    assert json.loads((run / "provenance.json").read_text())["stage"]["data"] == stage["data"]


def test_finished_run_gets_one_line_in_the_ledger_and_its_scores_a_place_in_the_card(lora_run, demo, tmp_path, capsys):
    run, metrics = lora_run
    (tmp_path / "scores.json").write_text(json.dumps({"exact": 455, "of": 500}))
    words = ["digits", "--record", run, "--scores", tmp_path / "scores.json", "--ledger", tmp_path / "ledger.jsonl"]
    for _ in range(2):
        reproduce.main([str(word) for word in words])
    assert re.findall(r"has a line in|is as it stands in", capsys.readouterr().out) == [
        "has a line in",
        "is as it stands in",
    ]
    (line,) = read_ledger(tmp_path / "ledger.jsonl")
    assert (line["name"], line["title"], line["steps"]) == ("digits", "stage 2, LoRA", len(metrics))
    assert line["hours"] == pytest.approx(sum(m["step_s"] for m in metrics) / 3600, abs=1e-4)
    assert line["scores"]["exact"]["value"] == 0.91 and line["start"] == model_fingerprint(demo / "base")
    assert line["loss"].split(", ")[0] == f"1 {metrics[0]['loss']:.5g}" and line["code"] == code_hash()
    assert "| exact | exact match | 0.91 ± 0.013 | 500 | - |" in (run / "model/README.md").read_text()
    assert "| digits, stage 2, LoRA |" in ledger_table([line])


def test_damaged_adapter_folders_are_found_out(lora_run, tmp_path):
    run, folder = lora_run[0], tmp_path / "adapter"

    def failed_with(change) -> list[str]:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(run / "adapter", folder)
        change()
        return [finding.check for finding in check_adapter(folder) if not finding.ok]

    def rename(old: str, new: str, metadata: dict | None = None) -> None:
        path = folder / "adapter_model.safetensors"
        with safe_open(path, "pt") as file:
            metadata = metadata or file.metadata()
        save_file({key.replace(old, new): t for key, t in load_file(path).items()}, path, metadata)

    def configure(without: str = "", **changes) -> None:
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in config.items() if key != without}))

    assert failed_with(lambda: None) == []
    assert failed_with(lambda: rename("model.language_model.model", "model.model.language_model")) == ["adapter"]
    assert failed_with(lambda: rename("lora_A", "lora_embedding_A")) == ["adapter"]
    assert failed_with(lambda: rename("", "", {"base": "another"})) == ["base"]
    assert failed_with(lambda: configure(base_model_name_or_path="/nowhere")) == ["base"]
    assert failed_with(lambda: configure(r=4)) == ["layers"]
    assert failed_with(lambda: configure(target_modules=r".*\.[qkv]_proj")) == ["layers"]
    assert failed_with(lambda: (folder / "tokenizer.json").unlink()) == ["beside"]
    assert failed_with(lambda: configure(modules_to_save=["lm_head"])) == ["adapter"]
    assert failed_with(lambda: configure(target_modules=["q_proj"])) == ["layers"]
    for key, missing in (("r", {}), ("lora_alpha", {}), ("r", {"r": "8"}), ("lora_alpha", {"lora_alpha": 0})):
        assert failed_with(lambda: configure("" if missing else key, **missing)) == ["adapter"]  # noqa: B023
        with pytest.raises(ValueError, match=rf"adapter_config.json: {key} is .*copy the folder again"):
            read_adapter(folder)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"adapter_config.json is damaged \(no object\)"):
        read_adapter(folder)


def test_merging_by_hand_gives_the_run_s_own_result_and_refuses_another_base(lora_run, demo, tmp_path, capsys):
    run, out = lora_run[0], tmp_path / "out"
    with pytest.raises(SystemExit) as refused:
        merge.main(["--model", f"{demo}/base", "--adapter", f"{run}/adapter", "--out", str(out)])
    assert "was not trained on" in str(refused.value) and not out.exists()
    with pytest.raises(SystemExit) as done:
        merge.main(["--model", f"{run}/base", "--adapter", f"{run}/adapter", "--out", str(out)])
    assert done.value.code == 0 and "merged and sound" in capsys.readouterr().out
    assert (out / "model.safetensors").read_bytes() == (run / "model/model.safetensors").read_bytes()
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in (run / "model").iterdir())


def test_resume_never_refuses_a_run_folder_with_checkpoints(straight_run):
    with pytest.raises(ValueError, match="step-00000006"):
        checkpoint_to_resume(straight_run[0] / "checkpoints", "never")
