"""Scores without lmms-eval: what metrics want of a record, noise, the row, the folder, and what is refused."""

import json
import math
import sys
from dataclasses import replace

import pytest

import evaluate
from evaluation.metrics import METRICS, chosen
from evaluation.published import comparable, noise, published_scores, row, table
from evaluation.questions import Question
from evaluation.run import read_score
from evaluation.scores import Sample, Score, ScoreFolder, model_hash
from llava_next.data.format.tar import BadSample
from llava_next.data.storage.lease import LeaseHeld
from support.builds import Result, call
from support.tiny import tiny_pair

ASKED = Question([], [], "What?", None, "cat")
LETTERS = replace(ASKED, text="Which?\nA. red\nB. dark red.\nC. blue", right="B")


def letter(answer: str, letters: list[str]) -> str:
    """Stands for lmms-eval's."""
    return answer[0] if answer[:1] in letters else ""


@pytest.mark.parametrize(
    ("metric", "question", "record", "answers", "choices"),
    [
        ("exact", ASKED, {}, ("cat",), {}),
        ("anls", ASKED, {"answers": ["cat ", "a cat"]}, ("cat", "a cat"), {}),
        ("vqa", ASKED, {}, ("cat",) * 10, {}),
        ("vqa", ASKED, {"answers": ["a", "b", "b", "c"]}, ("a", "b", "b", "c"), {}),
        ("choices", LETTERS, {}, ("B",), {"A": "red", "B": "dark red.", "C": "blue"}),
        ("choices", ASKED, {"choices": ["dog", "cat"]}, ("cat",), {"A": "dog", "B": "cat"}),
        ("choices", ASKED, {"choices": {"x": "dog", "y": "cat"}}, ("cat",), {"x": "dog", "y": "cat"}),
    ],
)
def test_a_metric_takes_what_it_wants_of_a_record(metric, question, record, answers, choices):
    complete = METRICS[metric].complete(question, record)
    assert (complete.answers, complete.choices) == (answers, choices)


@pytest.mark.parametrize(
    ("metric", "record", "reason"),
    [
        ("exact", {"answers": "cat"}, "answers is no list of texts"),
        ("exact", {"answers": []}, "answers is no list of texts"),
        ("vqa", {"answers": ["a", "b"]}, "fewer than 4 answers"),
        ("choices", {}, "no choices"),
        ("choices", {"choices": ["dog", "cow"]}, "the right answer is none of the choices"),
    ],
)
def test_a_record_without_it_is_left_out_with_its_reason(metric, record, reason):
    with pytest.raises(BadSample, match=reason):
        METRICS[metric].complete(ASKED, record)


def test_a_choice_is_named_by_its_text_its_letter_or_the_only_option_spoken_of():
    letters = METRICS["choices"].complete(LETTERS, {})
    named = [chosen(answer, letters, letter) for answer in ("B", "Dark red", "C. blue", "a red one", "no idea")]
    assert named == ["B", "B", "C", None, None]
    words = METRICS["choices"].complete(ASKED, {"choices": ["dog", "cat", "wildcat"]})
    named = [chosen(answer, words, letter) for answer in ("Cat.", "It is a cat", "cat or dog", "A", "a wildcat")]
    assert named == ["B", "B", None, None, "C"]


def test_noise_is_the_binomial_standard_error_in_the_scores_own_unit():
    assert noise("held_out", "exact_match", 0.5, 4, [1, 0, 1, 0]) == pytest.approx(0.25)
    assert noise("textvqa_val", "exact_match", 0.64, 5000, [None] * 5000) == pytest.approx(0.006788, abs=1e-6)
    # percent, of questions that are each asked in a circle
    assert noise("mmbench_en_dev", "gpt_eval_score", 67.4, 4329, []) == pytest.approx(
        100 * math.sqrt(0.674 * 0.326 / 1164)
    )
    assert noise("mme", "mme_perception_score", 1500, 2374, [1.0] * 2374) is None
    assert noise("held_out", "f1", 0.6, 2, [1, 0]) is None  # not the mean of its samples


def test_the_table_holds_the_published_scores_with_their_sources():
    models = {model["name"]: model for model in table()["models"]}
    assert models["LLaVA-1.6-vicuna-7B"]["scores"]["TextVQA"] == 64.9
    assert models["Open-LLaVA-NeXT-LLaMA3-8B"]["scores"]["SQA-I"] == 77.3
    assert all(model["source"].startswith("https://github.com/") for model in models.values())
    assert {label for model in models.values() for label in model["scores"]} <= set(table()["benchmarks"])
    assert published_scores("textvqa_val", "exact_match", comparable("vicuna_v1", 4096)) == pytest.approx(
        {"LLaVA-1.6-vicuna-7B": 0.649, "Open-LLaVA-NeXT-vicuna-7B": 0.672}
    )
    assert comparable("mistral", 128) == []


def test_the_row_has_differences_and_says_whether_they_are_noise():
    scores = {
        "mme": {"value": 1530.0, "metric": "mme_perception_score", "samples": 2374, "noise": None, "published": {},
                "others": {"mme_cognition_score": 300.0}},
        "textvqa_val": {"value": 0.645, "metric": "exact_match", "samples": 5000, "noise": 0.0068, "published": {}},
        "mine": {"value": 0.25, "metric": "anls", "samples": 4, "noise": 0.2, "published": None},
        "strange": {"value": 3.14159, "metric": "m", "samples": 4, "noise": None, "published": None},
    }  # fmt: skip
    lines = row("runs/x/model", scores, comparable("vicuna_v1", 4096)).splitlines()
    source = "https://github.com/haotian-liu/LLaVA/blob/main/docs/MODEL_ZOO.md"
    assert lines[0] == "|  | MME-P | MME-C | TextVQA | mine | strange |"
    assert lines[2] == "| runs/x/model | 1530 | 300.0 | 64.5 ± 0.7 | 25.0 ± 20.0 | 3.1 |"
    assert lines[3] == (
        f"| [LLaVA-1.6-vicuna-7B]({source}) | 1519 (+11.0) | 332.0 (-32.0) | 64.9 (-0.4, within noise) | - | - |"
    )
    assert "67.2 (-2.7, beyond noise)" in lines[4]


RESULTS = {
    "results": {"mme": {"alias": "mme", "mme_cognition_score,none": 250.0, "mme_perception_score,none": 1200.0,
                        "mme_perception_score_stderr,none": "N/A", "submission,none": None}},
    "samples": {"mme": [
        {"doc_id": 1, "doc": {"question_id": "b"}, "target": "No", "arguments": ["q1", {}], "filtered_resps": ["no"],
         "mme_perception_score": {"score": 1.0, "question_id": "b"}},
        {"doc_id": 0, "doc": {"question_id": "a"}, "target": "Yes", "arguments": ["q0", {}], "filtered_resps": ["no"],
         "mme_perception_score": {"score": 0.0, "question_id": "a"}},
        {"doc_id": 2, "doc": {"question_id": "c"}, "target": "Yes", "arguments": ["q2", {}], "filtered_resps": ["x"],
         "mme_cognition_score": {"score": 0.0, "question_id": "c"}},
    ]},
}  # fmt: skip


def test_of_what_lmms_eval_says_the_main_metric_its_samples_and_the_others_are_kept():
    score = read_score("mme", RESULTS, ["submission", "mme_cognition_score", "mme_perception_score"])
    assert not score.lower_is_better
    lower = {**RESULTS, "higher_is_better": {"mme": {score.metric: False}}}
    assert read_score("mme", lower, [score.metric]).lower_is_better
    assert (score.metric, score.value, score.others) == ("mme_perception_score", 1200.0, {"mme_cognition_score": 250.0})
    assert score.samples == [Sample("a", "q0", "no", "Yes", 0.0), Sample("b", "q1", "no", "No", 1.0)]
    with pytest.raises(ValueError, match="mme gives no score here, only submission"):
        read_score("mme", RESULTS, ["submission"])


def folder(path, hash="1", backend="transformers") -> ScoreFolder:
    return ScoreFolder(path, "m", hash, backend, "mistral", 128)


SCORE = Score("mine", 0.5, "exact_match", [Sample("a", "q", "x", "x", 1.0), Sample("b", "q", "y", "z", 0.0)], {})


def test_scores_of_one_model_come_together_and_no_other_models(tmp_path):
    folder(tmp_path).add(SCORE)
    folder(tmp_path).add(replace(SCORE, name="other"))
    found = json.loads((tmp_path / "scores.json").read_text())
    assert list(found) == ["model", "model_hash", "backend", "versions", "scores"] and "torch" in found["versions"]
    assert found["scores"]["other"] == {
        "value": 0.5, "metric": "exact_match", "samples": 2, "noise": pytest.approx(0.3535534), "published": None
    }  # fmt: skip
    assert json.loads((tmp_path / "samples/mine.jsonl").read_text().splitlines()[1]) == {
        "id": "b", "question": "q", "answer": "y", "target": "z", "score": 0.0
    }  # fmt: skip
    assert (tmp_path / "row.md").read_text().startswith("|  | mine | other |")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    with pytest.raises(ValueError, match="has scores of another model"):
        folder(tmp_path, hash="2")
    with pytest.raises(ValueError, match="made with backend transformers, now it is vllm"):
        folder(tmp_path, backend="vllm")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    (tmp_path / "scores.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no scores"):
        folder(tmp_path)


def test_one_scoring_at_a_time_in_a_folder_and_the_next_finds_its_scores(tmp_path):
    first, second = (folder(tmp_path / "scores") for _ in range(2))
    with first.hold():
        with pytest.raises(LeaseHeld, match=r"is in use by another scoring: process .* or give another --out"):
            second.hold()
        first.add(SCORE)
    with second.hold():
        second.add(replace(SCORE, name="other"))
    assert list(json.loads((tmp_path / "scores/scores.json").read_text())["scores"]) == ["mine", "other"]
    assert not (tmp_path / "scores/lease.json").exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder without a tokenizer."""
    path = tmp_path_factory.mktemp("model")
    tiny_pair(path)
    return path


def test_a_models_hash_covers_every_byte_of_it(model):
    before, weights = model_hash(model), (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    changed = model_hash(model)
    (model / "model.safetensors").write_bytes(weights)
    (model / "generation_config.json").write_text("{}")
    also = model_hash(model)
    (model / "generation_config.json").unlink()
    assert len({before, changed, also}) == 3 and model_hash(model) == before


def run(monkeypatch, *arguments) -> Result:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    return call(lambda _: evaluate.main())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "gqa", "--metric", "anls"], "benchmarks have metrics of their own"),
        (["--tasks", "gqa"], "--out: give a folder"),
        (["--tasks", "gqa", "--out", "none.json"], "--out: give a folder"),
        (["--tasks", "gqa", "--out", "OUT", "--model", "nowhere"], "nowhere is neither a folder nor a hub repository"),
        (["--tasks", "gqa", "--out", "OUT", "--data", "nowhere"], "--data nowhere is not a folder"),
        (["--json", "x.json", "--metric", "anls", "--out", "OUT", "--name", "a/b"], "--name 'a/b': give letters"),
        (["--shards", "s", "--metric", "anls", "--out", "OUT"], "--name: how is the score"),
        (["--tasks", "gqa", "--json", "x.json", "--out", "OUT"], "give one of --json, --hf and --shards, or --tasks"),
        (["--tasks", "gqa", "--out", "OUT", "--limit", "-1"], "--limit is 0 or more"),
        (["--tasks", "gqa", "--out", "OUT"], "fails 6 of 10 checks, see above (scripts/check_export.py)"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_any_work(model, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr("evaluation.run.has_lmms_eval", lambda: True)
    out = tmp_path / "out"
    result = run(monkeypatch, "--model", model, *[out if word == "OUT" else word for word in arguments])
    assert result.returncode and message in result.stderr and not out.exists()


def test_without_lmms_eval_it_says_what_to_install(model, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.run.has_lmms_eval", lambda: False)
    result = run(monkeypatch, "--model", model, "--tasks", "gqa", "--out", tmp_path / "out")
    assert "need lmms-eval: pip install -c constraints.txt -e '.[eval]'" in result.stderr
