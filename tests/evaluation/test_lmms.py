"""lmms-eval's real classes on a tiny exported model, offline: the same scores as our own greedy answers.

Installs the extra `eval` into an empty environment (about 2 GB and three minutes), and keeps it in
`~/.cache/llava-next-tests`, or in the folder that LLAVA_NEXT_TEST_CACHE names. To run it:

    LLAVA_NEXT_LMMS=1 python -m pytest tests/evaluation/test_lmms.py

LLAVA_NEXT_LMMS=PYTHON takes the Python of an environment that has the extra.
"""

import configparser
import json
import os
import subprocess
import venv
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from evaluation.engines import Transformers
from llava_next.model.folders.adapters import save_adapter
from llava_next.model.folders.merging import merge_adapter
from llava_next.model.forward.lora import Lora, add_adapters
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration
from support.demo import compose_demo
from support.launching import ROOT

WANTED = os.environ.get("LLAVA_NEXT_LMMS", "")
CACHE = Path(os.environ.get("LLAVA_NEXT_TEST_CACHE", Path.home() / ".cache" / "llava-next-tests"))
WORKER = ROOT / "tests/support/workers/score.py"
VARIABLES = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
COUNT, TASK_COUNT, TOKENS = 20, 6, 8
TASK = """\
task: tiny_vqa
dataset_path: lab/tiny
test_split: validation
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  max_new_tokens: 8
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
UTILS = """\
import io

from PIL import Image


def visual(doc):
    return [Image.open(io.BytesIO(doc["png"]))]
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not WANTED, reason="installs lmms-eval; set LLAVA_NEXT_LMMS=1 to run"),
]


@pytest.fixture(scope="module")
def python() -> Path:
    """Of an environment with the project's requirements and those of the extra, by the pins."""
    if WANTED != "1":
        return Path(WANTED)
    folder = CACHE / f"eval-{zlib.crc32((ROOT / 'constraints.txt').read_bytes()):08x}"
    if not (folder / "complete").exists():
        venv.create(folder, clear=True, with_pip=True)
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        texts = setup["options"]["install_requires"], setup["options.extras_require"]["eval"]
        wanted = [line for text in texts for line in text.splitlines() if line and not line.lstrip().startswith("#")]
        pip = [folder / "bin/python", "-m", "pip", "install", "-q", "--no-compile", "-c", ROOT / "constraints.txt"]
        # torch first: what is pinned and there is not looked for anywhere else
        for names in (["torch"], wanted):
            done = subprocess.run([*map(str, pip), *names], capture_output=True, text=True, timeout=1800)
            assert done.returncode == 0, done.stderr[-3000:]
        # beside a CPU build of torch, the package index's torchvision does not load, and nothing needs it
        if subprocess.run([folder / "bin/python", "-c", "import torchvision"], capture_output=True).returncode:
            subprocess.run([*map(str, pip[:3]), "uninstall", "-q", "-y", "torchvision"], check=True)
        (folder / "complete").touch()
    return folder / "bin/python"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with model/, other/, broken/, adapter/, merged/, pictures, held_out.json, and a task with its data.

    Of the right answers, every fifth and the two after it are the model's own: 12 of 20, and of the task's 3 of 6.
    """
    folder = tmp_path_factory.mktemp("lmms")
    turns = [{"from": "human", "value": "What number is it?"}, {"from": "gpt", "value": "42"}]
    (folder / "samples.json").write_text(json.dumps([{"conversations": turns}]))
    model = compose_demo(folder / "model", folder / "samples.json", "vicuna_v1")
    engine, rng = Transformers(model, "cpu"), np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (*rng.integers(20, 120, 2), 3), dtype=np.uint8)) for _ in range(9)]
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")

    def answer(messages, shown) -> str:
        prompt = engine.processor.apply_chat_template(messages, add_generation_prompt=True)
        return engine.answer([prompt], [shown], TOKENS)[0]

    records, answers = [], []
    for number in range(COUNT):
        shown = [number % 9, (number + 1) % 9][: number % 3]
        question = " and ".join(["<image>"] * len(shown)) + "\nWhat number is it? " * (1 + number % 4) + f"({number})"
        question = question.strip()
        messages = [{"role": "user", "content": question}]
        record = {"id": f"r{number}", "image": [f"{n}.png" for n in shown]}
        turns = [{"from": "human", "value": question}]
        if number % 7 == 1:
            messages = [{"role": "system", "content": "Be brief."}, *messages]
            turns = [{"from": "system", "value": "Be brief."}, *turns]
        answers.append(answer(messages, [pictures[n] for n in shown]))
        right = answers[-1] if number % 5 in (0, 1, 2) else "no"
        records.append(record | {"conversations": [*turns, {"from": "gpt", "value": right}]})
    (folder / "held_out.json").write_text(json.dumps(records))
    (folder / "answers.json").write_text(json.dumps(answers))

    documents = [
        {"question": f"What number is {n}?", "png": (folder / f"{n}.png").read_bytes()} for n in range(TASK_COUNT)
    ]
    for number, document in enumerate(documents):
        ours = answer([{"role": "user", "content": f"<image>\n{document['question']}"}], [pictures[number]])
        document["answer"] = ours if number % 2 else "no"
    (folder / "data/lab/tiny").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(documents), folder / "data/lab/tiny/validation-00000-of-00001.parquet")
    (folder / "tasks").mkdir()
    (folder / "tasks/tiny.yaml").write_text(TASK)
    (folder / "tasks/utils.py").write_text(UTILS)
    for name, factor in (("other", 1.5), ("broken", float("nan"))):
        compose_demo(folder / name, folder / "samples.json", "vicuna_v1")
        weights = load_file(folder / name / "model.safetensors")
        weights["language_model.lm_head.weight"] *= factor
        save_file(weights, folder / name / "model.safetensors", {"format": "pt"})
    trained, lora = LlavaNextForConditionalGeneration.from_pretrained(model), Lora(r=4, alpha=64)
    add_adapters(trained, lora, seed=0)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    save_adapter(trained, folder / "adapter", lora, model, model)
    merge_adapter(model, folder / "adapter", folder / "merged", dtype=torch.float32)
    return folder


CASES = [
    ("exact", "cat", ["cat"], {}, 1.0),
    ("exact", "Cat", ["cat", "dog"], {}, 0.0),
    ("vqa", "2 cats", ["2 cats."] * 2 + ["cat"] * 8, {}, 0.6),
    ("vqa", "The cat", ["cat"] * 10, {}, 1.0),
    ("anls", "cats", ["cat", "dog"], {}, 0.75),
    ("anls", "mouse", ["cat"], {}, 0.0),
    ("relaxed", "104", ["100"], {}, 1.0),
    ("relaxed", "106", ["100"], {}, 0.0),
    ("relaxed", "Cat", ["cat"], {}, 1.0),
    ("choices", "The answer is (B).", ["B"], {"A": "red", "B": "blue"}, 1.0),
    ("choices", "A", ["B"], {"A": "red", "B": "blue"}, 0.0),
    ("choices", "it is blue", ["blue"], {"A": "red", "B": "blue"}, 1.0),
]


@pytest.fixture(scope="module")
def done(python, place):
    """All command lines in one process: name -> status and output; `metrics`: scores of `CASES`."""

    def own(model: str, out: str, *more) -> list:
        paths = ["--model", place / model, "--json", place / "held_out.json", "--images", place, "--out", place / out]
        return [*paths, "--metric", "exact", "--max_new_tokens", TOKENS, "--device", "cpu", *more]

    def benchmark(model: str, names: str, out: str, *more) -> list:
        paths = ["--model", place / model, "--tasks", names, "--data", place / "data", "--own_tasks", place / "tasks"]
        return [*paths, "--out", place / out, "--device", "cpu", *more]

    runs = {
        "seven": own("model", "out", "--limit", 7, "--batch_size", 1),
        "all": own("model", "out", "--batch_size", 6),
        "one by one": own("model", "single", "--batch_size", 1),
        "fewer": own("model", "out", "--limit", 3),
        "adapter": own("adapter", "adapter-out"),
        "merged": own("merged", "merged-out"),
        "task": benchmark("model", "tiny_vqa", "out"),
        "other model": benchmark("other", "tiny_vqa", "out"),
        "broken": benchmark("broken", "tiny_vqa", "broken-out"),
        "unknown": benchmark("model", "tiny_vqas", "none"),
        "no data": benchmark("model", "tiny_vqa,gqa", "none"),
        "check": benchmark("model", "tiny_vqa", "none", "--check_only", "true"),
        "check own": own("model", "none", "--check_only", "true"),
        "check unknown": benchmark("model", "tiny_vqas", "none", "--check_only", "true"),
    }
    orders = {"runs": [[str(word) for word in words] for words in runs.values()], "metrics": [c[:4] for c in CASES]}
    (place / "orders.json").write_text(json.dumps(orders))
    command = [python, WORKER, place / "orders.json", place / "done.json"]
    ended = subprocess.run([*map(str, command)], env=VARIABLES, capture_output=True, text=True, timeout=1500)
    assert ended.returncode == 0, ended.stderr[-4000:]
    found = json.loads((place / "done.json").read_text())
    return dict(zip(runs, found["runs"], strict=True)) | {"metrics": found["metrics"]}


def answers_in(place: Path, out: str, name: str = "held_out") -> list[str]:
    return [json.loads(line)["answer"] for line in (place / out / f"samples/{name}.jsonl").read_text().splitlines()]


def score_in(place: Path, out: str, name: str = "held_out") -> dict:
    return json.loads((place / out / "scores.json").read_text())["scores"][name]


def test_own_questions_score_as_our_own_greedy_answers(done, place):
    assert done["all"]["status"] == 0, done["all"]["stderr"]
    assert answers_in(place, "out") == json.loads((place / "answers.json").read_text())
    score = score_in(place, "out")
    assert (score["value"], score["metric"], score["samples"]) == (0.6, "exact_match", COUNT)
    assert score["noise"] == pytest.approx((0.6 * 0.4 / 20) ** 0.5)
    assert json.loads((place / "out/scores.json").read_text())["versions"]["lmms-eval"] == "0.7.3"
    assert "60.0 ± 11.0" in (place / "out/row.md").read_text()


def test_batches_answer_as_one_by_one(done, place):
    assert done["one by one"]["status"] == 0, done["one by one"]["stderr"]
    assert answers_in(place, "single") == answers_in(place, "out")


def test_a_stopped_run_goes_on_and_a_smaller_one_does_not_replace_it(done):
    assert "held_out: exact_match 0.7143 of 7 samples" in done["seven"]["stdout"]
    assert "7 of 20 answers are there already" in done["all"]["stderr"]
    assert done["fewer"]["status"] == 1 and "has a score of 20 samples of held_out" in done["fewer"]["stderr"]


def test_a_local_parquet_task_scores_as_our_own_greedy_answers(done, place):
    assert done["task"]["status"] == 0, done["task"]["stderr"]
    assert score_in(place, "out", "tiny_vqa")["value"] == 0.5 and score_in(place, "out")["value"] == 0.6


def test_an_adapter_scores_as_merged(done, place):
    assert done["adapter"]["status"] == 0, done["adapter"]["stderr"]
    assert answers_in(place, "adapter-out") == answers_in(place, "merged-out") != answers_in(place, "out")


def test_a_broken_model_ends_with_the_sample_and_without_a_score(done, place):
    assert done["broken"]["status"] == 1
    assert "error: tiny_vqa, sample " in done["broken"]["stderr"]
    assert "logits are no numbers" in done["broken"]["stderr"] and not (place / "broken-out/scores.json").exists()


def test_bad_input_is_named(done, place):
    assert "has scores of another model" in done["other model"]["stderr"]
    assert "'tiny_vqas' is no task of lmms-eval; the nearest names are tiny_vqa" in done["unknown"]["stderr"]
    fetch = f"hf download lmms-lab-encoder/GQA --repo-type dataset --local-dir {place}/data/lmms-lab-encoder/GQA"
    assert "gqa needs the data set lmms-lab-encoder/GQA" in done["no data"]["stderr"]
    assert fetch in done["no data"]["stderr"] and not (place / "none").exists()


def test_a_check_names_the_scores_and_what_cannot_be_asked(done, place):
    assert done["check"]["stdout"].splitlines()[-1] == '["tiny_vqa"]'
    assert done["check own"]["stdout"].splitlines()[-1] == '["held_out"]'
    assert done["check unknown"]["status"] == 1
    assert "'tiny_vqas' is no task of lmms-eval" in done["check unknown"]["stderr"] and not (place / "none").exists()


def test_metrics_are_lmms_evals(done):
    assert done["metrics"] == pytest.approx([case[-1] for case in CASES])


def test_two_processes_score_as_one(python, place, done):
    arguments = ["--model", place / "model", "--json", place / "held_out.json", "--images", place, "--metric", "exact"]
    arguments += ["--out", place / "two", "--max_new_tokens", TOKENS, "--device", "cpu"]
    launch = [python, "-m", "accelerate.commands.launch", "--config_file", ROOT / "accelerate_configs/cpu2_fsdp.yaml"]
    command = [*map(str, [*launch, ROOT / "scripts/evaluate.py", *arguments])]
    ended = subprocess.run(command, env=VARIABLES, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert answers_in(place, "two") == answers_in(place, "out") and score_in(place, "two") == score_in(place, "out")
    assert len(list((place / "two/answers").iterdir())) == 2
