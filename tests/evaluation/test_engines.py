"""What answers prompts, on tiny models: batches, end tokens, errors, adapters, other evaluators' classes."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import make_digits
from evaluation.answers import Answers
from evaluation.engines import Transformers, start_engine
from llava_next.data.format.pictures import open_rgb
from llava_next.model.folders.adapters import merge_adapter, save_adapter
from llava_next.model.forward.lora import Lora, add_adapters
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration
from llava_next.templates import get_template
from support.demo import compose_demo

TEMPLATES = ("vicuna_v1", "llama_3", "qwen", "mistral")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """60 pictures of numbers, and a folder for models."""
    folder = tmp_path_factory.mktemp("engines")
    make_digits.build(folder / "digits", train=60, held_out=4, seed=0)
    return folder


@pytest.fixture(scope="module")
def pictures(digits):
    """Of different shapes."""
    files = sorted((digits / "digits/images").rglob("*.png"))
    found = {open_rgb(file).size: open_rgb(file) for file in files}
    assert len(found) >= 3
    return [*found.values()]


@pytest.fixture(scope="module")
def model(digits):
    """A model folder in fp32."""
    return compose_demo(digits / "model", digits / "digits/train.json")


@pytest.fixture(scope="module")
def engine(model):
    return Transformers(model, "cpu")


def prompt(engine: Transformers, text: str) -> str:
    return engine.processor.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)


def test_a_batch_of_all_lengths_is_answered_as_one_by_one(engine, pictures):
    one, two, three = pictures[:3]
    asked = [
        (prompt(engine, "<image>\nWhat number is written?"), [one]),
        (prompt(engine, "<image> or <image>?"), [two, three]),
        (prompt(engine, "What number?"), []),
        (prompt(engine, "<image>\n" + "What number is written? " * 9), [three]),
    ]
    prompts, shown = zip(*asked, strict=True)
    together = engine.answer(prompts, shown, 12)
    assert together == [engine.answer([text], [images], 12)[0] for text, images in asked]
    assert len(set(together)) > 1 and all(together)
    assert engine.answer(prompts[2:3], shown[2:3], 12) == [together[2]]


def test_every_end_token_of_the_saved_generation_config_ends_an_answer(model, engine, tmp_path):
    text = prompt(engine, "What number?")
    ids = engine.processor.tokenizer(engine.answer([text], [[]], 12)[0], add_special_tokens=False)["input_ids"]
    config = engine.model.generation_config
    before = config.eos_token_id
    try:
        config.eos_token_id = [before, *ids]
        assert engine.answer([text], [[]], 12)[0] in ("", engine.processor.decode(ids[:1]))
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


def test_an_adapter_answers_as_merged_into_its_base(model, digits, pictures):
    lora = Lora(r=4, alpha=16, targets=["llm", "vision", "projector"])
    trained = LlavaNextForConditionalGeneration.from_pretrained(model)
    add_adapters(trained, lora, seed=0)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
            parameter.requires_grad_("lora_" in name)
    save_adapter(trained, digits / "adapter", lora, model, model)
    merge_adapter(model, digits / "adapter", digits / "merged", dtype=torch.float32)
    adapter, merged, base = (Transformers(digits / name, "cpu") for name in ("adapter", "merged", "model"))
    asked = [prompt(base, "<image>\nWhat number is written?")], [[pictures[0]]], 8
    assert adapter.answer(*asked) == merged.answer(*asked) != base.answer(*asked)
    for name, parameter in merged.model.named_parameters():
        torch.testing.assert_close(adapter.model.get_parameter(name), parameter, rtol=0, atol=1e-6)


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


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_vlmevalkit_class_asks_in_the_prompt_of_training_and_cuts_it_off(digits, template, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vlmeval", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vlmeval.vlm", SimpleNamespace(LLaVA_Next=object))
    known = {}
    monkeypatch.setitem(sys.modules, "vlmeval.config", SimpleNamespace(supported_VLM=known))
    monkeypatch.delitem(sys.modules, "evaluation.vlmevalkit", raising=False)
    from evaluation import vlmevalkit

    folder = compose_demo(tmp_path / "model", digits / "digits/train.json", template)
    vlmevalkit.register("mine", str(folder), max_new_tokens=8, device="cpu")
    asked, seen = known["mine"](), []
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    question = "What number is written?"
    generate = asked.model.generate
    asked.model.generate = lambda **inputs: seen.append(inputs) or generate(**inputs)
    message = [{"type": "image", "value": str(tmp_path / "red.png")}, {"type": "text", "value": question}]
    answer = asked.generate_inner(message, "MMBench_DEV_EN")

    ids = seen[0]["input_ids"][0].tolist()
    image_id, turns = asked.model.config.image_token_id, ({"from": "human", "value": f"<image>\n{question}"},)
    turns = [*turns, {"from": "gpt", "value": "7"}]
    trained, labels = get_template(template).encode(turns, asked.processor.tokenizer, image_id, [ids.count(image_id)])
    assert ids == trained[: int((labels != -100).argmax())].tolist()
    ours = Transformers(folder, "cpu")
    assert answer == ours.answer([prompt(ours, f"<image>\n{question}")], [[open_rgb(tmp_path / "red.png")]], 8)[0]
    assert answer and question not in answer


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
