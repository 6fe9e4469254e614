"""Templates of today's families: what they write, as the families publish it, and the promises of all templates."""

import hashlib
import re

import pytest
from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers import LlamaTokenizer

from llava_next.templates import TEMPLATES, get_template
from llava_next.tokenise import fingerprint
from support import real_tokenizers
from support.chats import CHATS, SYSTEM, TRAPS, assert_stock_reads_it, assert_text_stays_text
from support.template_setups import (
    FAMILIES,
    POSITION_MATTERS,
    chat,
    encode,
    learned_texts,
    setup,
    small,
    supervised_runs,
    turns,
)

HEADERS = "<|start_header_id|>{}<|end_header_id|>\n\n"
LLAMA_3_1_SYSTEM = HEADERS.format("system") + "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
CHATML = "<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\nB.<|im_end|>\n"
CHATML += "<|im_start|>user\nC?<|im_end|>\n<|im_start|>assistant\n"
SMOLLM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
# name -> what stands in front of every chat; with the system prompt "S."; and the prompt of A? B. C?
PUBLISHED = {
    "llama_3_1": (
        LLAMA_3_1_SYSTEM + "<|eot_id|>",
        LLAMA_3_1_SYSTEM + "S.<|eot_id|>",
        "".join(
            HEADERS.format(role) + text
            for role, text in (("user", "A?<|eot_id|>"), ("assistant", "B.<|eot_id|>"), ("user", "C?<|eot_id|>"))
        )
        + HEADERS.format("assistant"),
    ),
    "qwen3": ("", "<|im_start|>system\nS.<|im_end|>\n", CHATML),
    "chatml": ("", "<|im_start|>system\nS.<|im_end|>\n", CHATML),
    "smollm": (SMOLLM, "<|im_start|>system\nS.<|im_end|>\n", CHATML),
    "olmo_2": (
        "",
        "<|system|>\nS.\n",
        "<|user|>\nA?\n<|assistant|>\nB.<|endoftext|>\n<|user|>\nC?\n<|assistant|>\n",
    ),
    "phi_4": (
        "",
        "<|im_start|>system<|im_sep|>S.<|im_end|>",
        "<|im_start|>user<|im_sep|>A?<|im_end|><|im_start|>assistant<|im_sep|>B.<|im_end|>"
        "<|im_start|>user<|im_sep|>C?<|im_end|><|im_start|>assistant<|im_sep|>",
    ),
    "phi_4_mini": (
        "",
        "<|system|>S.<|end|>",
        "<|user|>A?<|end|><|assistant|>B.<|end|><|user|>C?<|end|><|assistant|>",
    ),
    "gemma_3": (
        "<start_of_turn>user\n",
        "<start_of_turn>user\nS.\n\n",
        "A?<end_of_turn>\n<start_of_turn>model\nB.<end_of_turn>\n"
        "<start_of_turn>user\nC?<end_of_turn>\n<start_of_turn>model\n",
    ),
    "mistral_v3": ("", None, "[INST] A?[/INST] B.</s>[INST] C?[/INST]"),
    "mistral_nemo": ("", None, "[INST]A?[/INST]B.</s>[INST]C?[/INST]"),
}


def test_every_template_is_held_to_its_promises():
    old = {"plain", "vicuna_v1", "llama_3", "qwen", "mistral"}
    assert set(TEMPLATES) == old | set(PUBLISHED) and set(PUBLISHED) == {name for name, _ in FAMILIES.values()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_chats_are_written_as_the_family_publishes_them(name: str):
    front, system, rest = PUBLISHED[name]
    processor = setup(name).processor
    messages = chat(turns("A?", "B.", "C?"))
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == front + rest
    if system is not None:
        given = [{"role": "system", "content": "S."}, *messages]
        assert processor.apply_chat_template(given, add_generation_prompt=True) == system + rest
        bare = front if name == "gemma_3" else ""
        given[0]["content"] = ""
        assert processor.apply_chat_template(given, add_generation_prompt=True) == bare + rest


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_prompts_and_masks_are_those_of_the_saved_chat_template(name: str):
    s = setup(name)
    assert name not in POSITION_MATTERS
    for n_images, conversations in CHATS:
        if conversations[0] == SYSTEM and s.template.system_turn is None:
            with pytest.raises(ValueError, match="has no place for a system prompt"):
                encode(s, conversations, n_images)
            continue
        input_ids, labels = encode(s, conversations, n_images)
        answers = [turn["value"] for turn in conversations if turn["from"] == "gpt"]
        stop, before = s.template.answer[1], s.template.answer[0]
        assert learned_texts(s, input_ids, labels) == [before + answer + stop for answer in answers]
        assert_stock_reads_it(s, conversations, n_images, input_ids, labels)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_text_becomes_a_special_token_of_the_family(name: str):
    assert_text_stays_text(setup(name), *TRAPS)


@pytest.mark.parametrize(
    ("name", "begin"),
    [
        # written by the published template
        *((name, True) for name in ("olmo_2", "gemma_3", "mistral_v3", "mistral_nemo", "llama_3_1")),
        # neither written nor added by the family's tokenizer, which names one (or none)
        *((name, False) for name in ("phi_4", "phi_4_mini", "qwen3")),
    ],
)
def test_chats_begin_as_the_familys_own(name: str, begin: bool):
    s = setup(name)
    conversations = turns("<image>", "a")
    ids, caption = (encode(s, conversations, 1, t)[0].tolist() for t in (s.template, get_template("plain")))
    assert (ids.count(s.tokenizer.bos_token_id) - (name == "olmo_2") == 1) == begin
    assert (ids[0] == s.tokenizer.bos_token_id) == (caption[0] == s.tokenizer.bos_token_id) == begin


def test_a_tokenizer_that_adds_its_beginning_token_keeps_it_under_chatml():
    tokenizer = small("gemma_3")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    template = get_template("chatml")
    image_id = template.prepare_tokenizer(tokenizer)
    ids = template.encode(turns("Hi", "Yes."), tokenizer, image_id, [])[0].tolist()
    assert tokenizer.convert_ids_to_tokens(ids[:2]) == ["<bos>", "<|im_start|>"]


def test_mistral_v3_has_the_ids_of_mistrals_own_code():
    """With the real vocabulary, as `LlamaTokenizer` reads it with the published legacy=False."""
    vocab, merges = real_tokenizers.mistral_bpe("mistral_instruct_tokenizer_240323.model.v3")
    control = [token for token in vocab if re.fullmatch(r"\[/?INST\]", token)]
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, legacy=False, add_bos_token=True)
    tokenizer.add_special_tokens({"additional_special_tokens": control})
    template = get_template("mistral_v3")
    image_id = template.prepare_tokenizer(tokenizer)
    texts = ["Bonjour  à tous", "Yes, 100 %.", "Why\n3?", "1. He said so\n2. I know"]
    kinds = (UserMessage, AssistantMessage)
    request = ChatCompletionRequest(messages=[kinds[i % 2](content=text) for i, text in enumerate(texts[:-1])])
    published = MistralTokenizer.v3().encode_chat_completion(request).tokens
    ids, labels = template.encode(turns(*texts), tokenizer, image_id, [])
    start, _ = supervised_runs(ids, labels)[-1]
    assert ids[:start].tolist() == published


def test_templates_that_write_the_same_count_the_same():
    identities = {name: template.identity for name, template in TEMPLATES.items()}
    assert identities.pop("chatml") == "qwen3" and identities == {name: name for name in identities}
    tokenizer = setup("chatml").tokenizer
    assert fingerprint(tokenizer, get_template("chatml").identity) == fingerprint(tokenizer, "qwen3")


def test_folders_keep_the_chat_template_that_they_were_composed_with():
    """A folder's template is known by its text, so the text of a name never changes."""
    found = {name: hashlib.sha256(template.jinja.encode()).hexdigest()[:12] for name, template in TEMPLATES.items()}
    assert found == {
        "plain": "c82efff783a0",
        "vicuna_v1": "5ba45ceb1880",
        "llama_3": "772fca5e296a",
        "qwen": "3b0776a96724",
        "mistral": "41d6518c1231",
        "llama_3_1": "cd555eea97e6",
        "qwen3": "03fc699c9f3f",
        "chatml": "03fc699c9f3f",
        "smollm": "fb4969e722ed",
        "olmo_2": "8eac0a2be11a",
        "phi_4": "3c39174066c1",
        "phi_4_mini": "910ff6325b09",
        "gemma_3": "53b6e1d7e57d",
        "mistral_v3": "9f7cae286d5c",
        "mistral_nemo": "3f592fd420bf",
    }
