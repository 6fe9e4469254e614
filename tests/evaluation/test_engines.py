"""What answers prompts, on tiny models: batches, end tokens, errors, adapters, other evaluators' classes."""

import importlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.answers import Answers
from evaluation.engines import Transformers, start_engine
from llava_next.model.folders.dry import corpus_texts, train_tokenizer
from llava_next.templates import get_template
from support.demo import compose_demo
from support.template_setups import stock_processor

QUESTION = "What number is written?"
SAMPLES = [{"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "42 or 7."}]}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder in fp32."""
    folder = tmp_path_factory.mktemp("engines")
    (folder / "samples.json").write_text(json.dumps(SAMPLES))
    return compose_demo(folder / "model", folder / "samples.json")


@pytest.fixture(scope="module")
def pictures():
    """Of different shapes, so of different numbers of tiles."""
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((30, 30), (60, 90), (30, 120))
    ]


@pytest.fixture(scope="module")
def engine(model):
    return Transformers(model, "cpu")


def prompt(engine: Transformers, text: str) -> str:
    return engine.processor.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)


def test_a_batch_of_all_lengths_is_answered_as_one_by_one(engine, pictures):
    one, two, three = pictures[:3]
    asked = [
        (prompt(engine, f"<image>\n{QUESTION}"), [one]),
        (prompt(engine, "<image> or <image>?"), [two, three]),
        (prompt(engine, "What number?"), []),
        (prompt(engine, "<image>\n" + "What number is written? " * 9), [three]),
    ]
    prompts, shown = zip(*asked, strict=True)
    together = engine.answer(prompts, shown, 12)
    assert together == [engine.answer([text], [images], 12)[0] for text, images in asked]
    assert len(set(together)) > 1 and all(together)
    assert engine.answer(prompts[2:3], shown[2:3], 12) == [together[2]]


def test_every_end_token_of_the_saved_generation_config_ends_an_answer(engine):
    text, tokenizer, config = prompt(engine, "What number?"), engine.processor.tokenizer, engine.model.generation_config
    inputs = engine.processor(text=text, return_tensors="pt")
    ids = engine.model.generate(**inputs, max_new_tokens=12, do_sample=False)[
        0, inputs["input_ids"].shape[1] :
    ].tolist()
    last = next(place for place, id in enumerate(ids) if id not in ids[:place] and place)
    before = config.eos_token_id
    try:
        config.eos_token_id = [before, ids[last]]
        assert engine.answer([text], [[]], 12) == [tokenizer.decode(ids[: last + 1], skip_special_tokens=True).strip()]
    finally:
        config.eos_token_id = before


def test_a_model_of_no_numbers_and_a_prompt_too_long_are_errors(model, engine):
    with pytest.raises(ValueError, match=r"the prompt is [\d,]+ tokens long, the model takes"):
        engine.answer([prompt(engine, "What? " * 9000)], [[]], 2)
    head, broken = engine.model.lm_head.weight, Transformers(model, "cpu")
    with torch.no_grad():
        broken.model.lm_head.weight[3] = float("nan")
    with pytest.raises(ValueError, match="logits are no numbers"):
        broken.answer([prompt(engine, "What number?")], [[]], 2)
    assert not head.isnan().any()


def test_vllm_is_asked_for_where_it_is_not(model):
    with pytest.raises(ValueError, match="vllm is not installed here"):
        start_engine("vllm", model, "cpu")


def test_vllm_gets_our_prompts_pictures_and_greedy(model, engine, pictures, monkeypatch):
    asked = []

    class Llm:
        def __init__(self, folder, **options):
            asked.append(folder)

        def generate(self, prompts, sampling, use_tqdm):
            asked.append((prompts, sampling))
            return [SimpleNamespace(outputs=[SimpleNamespace(text=" 7 ")]) for _ in prompts]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Llm, SamplingParams=dict, __spec__=object()))
    answers = start_engine("vllm", model, "cpu").answer(["a", "b"], [[], [pictures[0]]], 5)
    assert answers == ["7", "7"] and asked == [
        str(model),
        (
            [{"prompt": "a"}, {"prompt": "b", "multi_modal_data": {"image": [pictures[0]]}}],
            {"temperature": 0.0, "max_tokens": 5},
        ),
    ]


@pytest.fixture
def vlmevalkit(monkeypatch):
    """The file for VLMEvalKit with stand-ins for its packages; `known`: its models by name."""
    known = {}
    monkeypatch.setitem(sys.modules, "vlmeval", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vlmeval.vlm", SimpleNamespace(LLaVA_Next=object))
    monkeypatch.setitem(sys.modules, "vlmeval.config", SimpleNamespace(supported_VLM=known))
    monkeypatch.delitem(sys.modules, "evaluation.vlmevalkit", raising=False)
    module = importlib.import_module("evaluation.vlmevalkit")
    module.known = known
    return module


def message(tmp_path, picture: Image.Image) -> list[dict]:
    """As VLMEvalKit puts a question about a picture."""
    picture.save(tmp_path / "picture.png")
    return [{"type": "image", "value": str(tmp_path / "picture.png")}, {"type": "text", "value": QUESTION}]


def test_the_vlmevalkit_class_answers_as_the_model_does(vlmevalkit, model, engine, pictures, tmp_path):
    vlmevalkit.register("mine", str(model), max_new_tokens=8, device="cpu")
    answer = vlmevalkit.known["mine"]().generate_inner(message(tmp_path, pictures[1]), "MMBench_DEV_EN")
    assert [answer] == engine.answer([prompt(engine, f"<image>\n{QUESTION}")], [[pictures[1]]], 8) != [""]


@pytest.mark.parametrize("name", ["vicuna_v1", "llama_3", "qwen", "mistral"])
def test_the_vlmevalkit_class_asks_in_the_ids_of_training_and_cuts_them_off(vlmevalkit, name, pictures, tmp_path):
    template = get_template(name)
    tokenizer = train_tokenizer(corpus_texts(SAMPLES, name), 400, name)
    image_id = template.prepare_tokenizer(tokenizer)
    asked = object.__new__(vlmevalkit.LlavaNextFolder)
    asked.processor, asked.max_new_tokens, seen = stock_processor(tokenizer, template), 8, []

    def generate(input_ids, **_):
        seen.append(input_ids[0].tolist())
        said = tokenizer("42 or 7.", add_special_tokens=False)["input_ids"]
        return torch.tensor([[*seen[0], *said, tokenizer.eos_token_id]])

    asked.model = SimpleNamespace(generate=generate, device="cpu", dtype=torch.float32)
    assert asked.generate_inner(message(tmp_path, pictures[0])) == "42 or 7."
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "7"}]
    trained, labels = template.encode(turns, tokenizer, image_id, [seen[0].count(image_id)])
    assert seen == [trained[: int((labels != -100).argmax())].tolist()]


def test_answers_are_kept_and_found_by_all_that_made_them(tmp_path, pictures):
    made_by = {"model_hash": "1", "versions": {"torch": "2"}}
    first = Answers(tmp_path, made_by)
    key = first.key("gqa", "What?", pictures[:1], 16)
    first.add({key: "7"})
    with open(tmp_path / "0.jsonl", "ab") as file:
        file.write(b'{"key": "cut off')
    Answers(tmp_path, made_by, process=1).add({"other": "8"})
    again = Answers(tmp_path, made_by)
    again.add({"third": "9"})
    assert Answers(tmp_path, made_by).known == {key: "7", "other": "8", "third": "9"}
    others = [
        again.key("pope", "What?", pictures[:1], 16),
        again.key("gqa", "Who?", pictures[:1], 16),
        again.key("gqa", "What?", pictures[1:2], 16),
        again.key("gqa", "What?", pictures[:1], 17),
        Answers(tmp_path, made_by | {"model_hash": "2"}).key("gqa", "What?", pictures[:1], 16),
    ]
    assert key == again.key("gqa", "What?", pictures[:1], 16) and len({key, *others}) == 6
    assert [json.loads(line)["answer"] for line in (tmp_path / "1.jsonl").read_text().split("\n") if line] == ["8"]
