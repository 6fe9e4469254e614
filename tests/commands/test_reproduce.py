"""Repeating a run: its path is a script of commands that exist, what is there and whole is skipped, figures hold."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import reproduce
from evaluation.scores import model_hash
from llava_next.data.plan import profile
from reproducing import digits, published
from reproducing.digits import digits_steps, tolerance, verdict
from reproducing.ledger import check_scores, known_index, read_ledger, read_scores, record
from reproducing.published import MIXES, Forecast, Places, forecast, published_steps, score_lines
from reproducing.steps import Step, Stopped, run_steps, script, told_dataset, whole_model
from test_readme import words_wrong

FORECAST = Forecast(
    *(558128, 2181, 256, 3.0, 252 * 10**6, 3, 14 * 10**9, 10**11),
    picked="--data.token_budget 16640",
    too_large="",
)


def said(name: str, *words: str, capsys) -> str:
    with pytest.raises(SystemExit):
        reproduce.main([name, *words])
    return capsys.readouterr().err


def path_of(name: str, tmp_path: Path, ledger: Path = Path("none")) -> list[Step]:
    if name == "digits":
        return digits_steps(tmp_path, 0, ledger=ledger)
    launch = ["accelerate", "launch", "--config_file", "accelerate_configs/h100x8_fsdp.yaml"]
    places = Places(tmp_path / "data", str(tmp_path / "shards"), tmp_path, MIXES[0])
    return published_steps(name, places, launch, (FORECAST, FORECAST), ledger, gpus=8)


@pytest.mark.parametrize("name", ["digits", *published.published_names()])
def test_path_is_a_shell_script_of_commands_that_exist(name, tmp_path):
    steps = path_of(name, tmp_path)
    assert [wrong for step in steps for wrong in words_wrong(list(step.command))] == []
    text = script(steps, {"OMP_NUM_THREADS": "1"}, ["a head"], ["a foot"])
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    # the shell reads back each command word for word
    shown = re.sub(r"^(accelerate launch|python) ", r"echo \1 ", text.replace("\\\n", ""), flags=re.M)
    done = subprocess.run(["bash", "-c", shown], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [" ".join(step.command) for step in steps]


def test_published_path_says_what_to_expect_and_what_nobody_knows(tmp_path):
    text = " ".join(script(path_of("vicuna-7b", tmp_path), {}).replace("\n#", "").split())
    assert "pretrain: 558,128 samples, which the build checks" in text and "mix665k: 665,298 samples" in text
    assert "accelerate launch --num_processes 8 scripts/evaluate.py" in text
    assert text.count("unknown until built") == 2 and "2,181 steps of 256 samples, 3.0 hours" in text
    data = [{"name": "mix665k", "index": "0123456789abcdef"}]
    line = {"name": "vicuna-7b", "result": "r", "scores": {}, "data": data}
    assert record(line, tmp_path / "ledger.jsonl") and not record(line, tmp_path / "ledger.jsonl")
    assert known_index(tmp_path / "ledger.jsonl", "llama3-8b", "mix665k") == ""
    text = script(path_of("vicuna-7b", tmp_path, tmp_path / "ledger.jsonl"), {})
    assert text.count("unknown until built") == 1 and "0123456789abcdef" in text


def test_forecast_of_a_stage_is_that_of_its_plan(tmp_path, monkeypatch):
    """On a profile of 1,000 samples, which stands in for the published one."""
    source = {"name": "web", "samples": 1000, "sizes": [[[640, 480], 1.0]], "text_tokens": {"mean": 60, "sigma": 0.5}}
    (tmp_path / "mix665k.json").write_text(json.dumps({"sources": [source]}))
    monkeypatch.setattr(profile, "FOLDER", tmp_path)
    found = forecast("vicuna-7b", "finetune", "8xh100-80g", MIXES[1], "shards")
    assert (found.steps, found.batch_size) == (12, 128)  # 1,020,000 / 665,298 as many samples as in the profile
    # 640 x 480: 2,340 image tokens; 128 of them with 60 tokens take 8 GPUs about 3 s (46 % of 989 TFLOP/s)
    assert found.hours * 3600 / 12 == pytest.approx(3.2, rel=0.2)
    weights = 6_738_939_904 + 303_507_456 + 20_979_712 + 4096
    assert found.result == 2 * weights and found.kept == 1 and not found.too_large
    assert round(found.checkpoint / 1e9, 1) == 84.6


def test_name_and_place_that_are_none_are_refused_with_what_there_is(tmp_path, capsys):
    assert "there are digits, llama3-8b" in said("vicuna7b", capsys=capsys)
    assert "did you mean vicuna-7b?" in said("vicuna7b", capsys=capsys)
    assert "did you mean qwen3-8b-siglip2?" in said("Qwen3-8B", capsys=capsys)
    with pytest.raises(SystemExit, match=r"--step shard: the parts are data, compose, shards, stage-1"):
        reproduce.main(["digits", "--step", "shard", "--gpus", "0", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"error: --machine 8xfoo: give a number of GPUs and their kind"):
        reproduce.main(["vicuna-7b", "--machine", "8xfoo"])
    with pytest.raises(SystemExit, match=r"error: --gpus 9xh100-80g: give 1 to 8 GPUs"):
        reproduce.main(["vicuna-7b", "--run", "--gpus", "9"])
    on_two = reproduce.parse(["vicuna-7b", "--machine", "8xrtx4090-24g", "--gpus", "2"])
    assert reproduce.launch_here(on_two)[-2:] == ["--num_processes", "2"]
    missing = Places(tmp_path, str(tmp_path / "s"), tmp_path, MIXES[0]).missing()
    assert [Path(path).name for path in missing] == ["blip_laion_cc_sbu_558k.json", "images", "llava_v1_5_mix665k.json"]
    with pytest.raises(SystemExit, match=r"has no whole model/"):
        reproduce.main(["--record", str(tmp_path)])


def step(tmp_path: Path, code: str, **more) -> Step:
    begin = f"import pathlib, sys; here = pathlib.Path({str(tmp_path)!r})"
    return Step("part", ("about",), ("python", "-c", f"{begin}; {code}"), **more)


def test_steps_run_in_turn_skip_what_is_there_and_stop_at_the_first_that_fails(tmp_path, capfd):
    one, two = step(tmp_path, "(here / 'a').touch()"), step(tmp_path, "sys.exit(3)")
    there = step(tmp_path, "(here / 'never').touch()", there=lambda: "b")
    with pytest.raises(Stopped, match=r"part: ended with exit status 3, .* the same command goes on from there"):
        run_steps([one, there, two, there], {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"] and "b is there already" in capfd.readouterr().out
    with pytest.raises(Stopped, match=r"stopped in .*; the same command goes on"):  # it ended well, as asked to stop
        run_steps([step(tmp_path, "pass", result=tmp_path / "run/model")], {})


def test_signal_reaches_the_step_once_and_ends_the_path(tmp_path):
    code = "import signal, time; got = []; signal.signal(15, lambda *_: got.append(1)); (here / 'up').touch()\n"
    code += "while not got: time.sleep(0.01)\ntime.sleep(0.1); (here / 'got').write_text(str(len(got)))"
    watch = threading.Thread(target=lambda: (wait_for(tmp_path / "up"), os.kill(os.getpid(), signal.SIGTERM)))
    watch.start()
    with pytest.raises(Stopped, match="part: stopped by SIGTERM; the same command goes on"):
        run_steps([step(tmp_path, f"exec({code!r})"), step(tmp_path, "(here / 'next').touch()")], {})
    watch.join()
    assert (tmp_path / "got").read_text() == "1" and not (tmp_path / "next").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def wait_for(path: Path) -> None:
    for _ in range(3000):
        if path.exists():
            return
        threading.Event().wait(0.01)


def test_outputs_that_are_cut_off_are_not_whole(built, tmp_path):
    assert whole_model(tmp_path) == ""
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    save_file({"a": torch.zeros(100)}, tmp_path / "model.safetensors")
    assert whole_model(tmp_path) == str(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    for end in (len(content) - 1, 20, 3):
        (tmp_path / "model.safetensors").write_bytes(content[:end])
        assert whole_model(tmp_path) == ""
    shutil.copytree(built, tmp_path / "set")
    text = (built / "dataset.json").read_bytes()
    told = f"{json.loads(text)['samples']} samples, sha256 of its dataset.json: {hashlib.sha256(text).hexdigest()[:16]}"
    assert told_dataset(str(tmp_path / "set")) == f"{tmp_path}/set: {told}"
    shard = next((tmp_path / "set").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    assert told_dataset(str(tmp_path / "set")) == told_dataset("s3://bucket/set") == ""


def test_row_of_the_digits_is_held_against_what_was_measured(tmp_path, monkeypatch):
    assert digits.expected()[1] == 500  # the figure stands where it is looked for
    monkeypatch.setattr(digits, "expected", lambda: (0.91, 500))
    assert tolerance(0.91, (500, 500)) == pytest.approx(2 * (2 * 0.91 * 0.09 / 500) ** 0.5)
    for exact, is_inside in ((455, True), (437, True), (436, False), (473, True), (474, False)):
        (tmp_path / "answers.json").write_text(json.dumps({"exact": exact, "of": 500}))
        row, found = verdict(tmp_path / "answers.json")
        assert found is is_inside and ("OUTSIDE" in row) is not is_inside
        assert f"{exact / 5:.1f} % of 500 | expected 91.0 ± 3.6" in row


def test_scores_are_read_in_both_forms_and_nothing_else(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"exact": 455, "of": 500}))
    found = read_scores(path)["exact"]
    assert found["value"] == 0.91 and found["noise"] == pytest.approx((0.91 * 0.09 / 500) ** 0.5)
    path.write_text(json.dumps({"model": "m", "scores": {"gqa": {"value": 0.642, "metric": "exact_match"}}}))
    assert read_scores(path) == {"gqa": {"value": 0.642, "metric": "exact_match"}} and read_scores(None) == {}
    for wrong in ("[]", '{"scores": {"gqa": 3}}', "{", '{"exact": 0, "of": 0}'):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="holds no scores"):
            read_scores(path)
    (tmp_path / "ledger.jsonl").write_text('{"name": "a"}\n[]\n')
    with pytest.raises(ValueError, match="line 2 is none of a ledger"):
        read_ledger(tmp_path / "ledger.jsonl")


def test_scores_of_another_model_are_not_recorded(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"model": "m", "model_hash": model_hash(tmp_path / "model"), "scores": {}}))
    check_scores(path, tmp_path)
    (tmp_path / "model/config.json").write_text("{ }")
    with pytest.raises(ValueError, match=r"scores.json is of m as it was then, which is not what .*: score it again"):
        check_scores(path, tmp_path)
    path.write_text('{"exact": 1, "of": 2}')
    check_scores(path, tmp_path)  # says nothing of whose they are


def test_published_scores_stand_beside_their_binomial_noise(monkeypatch):
    scores = {"MME-P": 1519, "TextVQA": 64.9, "MM-Vet": 43.9}
    table = {
        "benchmarks": {
            "MME-P": {"task": "mme", "metric": "mme_perception_score", "share": False},
            "TextVQA": {"task": "textvqa_val", "metric": "exact_match", "share": True},
            "MM-Vet": {"task": "mmvet", "metric": "gpt_eval_score", "share": False},
        },
        "models": [
            {"name": "LLaVA-1.6-vicuna-7B", "template": "vicuna_v1", "source": "https://one", "scores": scores},
            {"name": "another", "template": "llama_3", "source": "https://two", "scores": {"TextVQA": 65.0}},
        ],
    }
    monkeypatch.setattr(published, "table", lambda: table)
    text = "\n".join(score_lines("vicuna-7b"))
    # 2 sqrt(0.649 x 0.351 / 5000)
    assert "TextVQA, textvqa_val: 64.9 ± 1.3 (LLaVA-1.6-vicuna-7B)" in text
    assert "MME-P, mme: 1519 (LLaVA-1.6-vicuna-7B)" in text
    assert "MM-Vet" not in text and "another" not in text and "https://one" in text  # a judge; another template
    for name in ("vicuna-7b-siglip", "qwen2-7b"):
        assert "none is published of this pairing" in score_lines(name)[0]


@pytest.mark.skipif(not os.environ.get("LLAVA_NEXT_REPRODUCE"), reason="takes ten minutes; set LLAVA_NEXT_REPRODUCE=1")
def test_digits_walked_whole_end_inside_the_tolerance_with_a_line_in_the_ledger(tmp_path):
    command = [sys.executable, "scripts/reproduce.py", "digits", "--run", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=published.ROOT)
    assert done.returncode == 0 and "| inside |" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    first, second = read_ledger(tmp_path / "ledger.jsonl")
    assert (first["title"], second["title"]) == ("stage 1", "stage 2") and second["scores"]["exact"]["samples"] == 500
