"""What a template promises: the stock processor's ids, a prompt that was trained on, no special tokens from text."""

import copy
import json
import re
import shutil
import unicodedata

import numpy as np
import pytest
import sentencepiece
import tiktoken
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer

from llava_next.templates import TEMPLATES, get_template
from llava_next.tokenise import IMAGE_TOKEN
from support import real_tokenizers
from support.chats import any_text, plain_text, quick, stock_ids
from support.template_setups import (
    POSITION_MATTERS,
    SENTENCEPIECE,
    SETUPS,
    chat,
    encode,
    learned_texts,
    setup,
    supervised_runs,
    turns,
)

# ---- the stock processor ---------------------------------------------------------------------------------------------

CHATS = {
    "one_turn": (1, turns("<image>\nWhat is it?", "A cat.")),
    "three_turns": (
        1,
        turns("<image>\nWho?", "Tom.", "Sure?\n\n", "Yes, 100 %.", "Why 3?", "1. He said so\n2. I know\n"),
    ),
    "image_behind": (1, turns("What is it?\n<image>", "A cat.")),
    "image_in_the_middle": (1, turns("Is <image> a cat?", "Yes")),
    "image_in_second_turn": (1, turns("Hello", "Hi!", "<image>\nWhat is it?", "A cat.")),
    "image_alone": (1, turns("<image>", "A cat.")),
    "spaces": (1, turns("  <image>\n  What is this?  ", "  A chair.  ", "  and that ", " \tA table")),
    "unicode": (
        1,
        turns("<image>\n请描述这张图片。🐱 e\u0301", "图中有一只橘色的小猫🐈‍⬛，e\u0301 坐\u200b在\xa0上。"),
    ),
    "code": (0, turns("Write C.", '```c\nint main(void) {\n    puts("hi");\n}\n```')),
    "text": (0, turns("Write one sentence about the sea.", "The sea was calm.", "Again", "It was not.")),
    "two_images": (2, turns("<image>\n<image>\nCompare them.", "One is red.")),
    "two_images_two_turns": (2, turns("<image>\nWhat?", "A cat.", "And <image>\nthis? ", "A dog.")),
}


@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.parametrize("chat_id", CHATS)
def test_ids_are_the_stock_processors(name: str, chat_id: str):
    s, (n_images, conversations) = setup(name), CHATS[chat_id]
    input_ids, _ = encode(s, conversations, n_images)
    for as_list in (False, True):
        for at_once in (False, True):
            assert stock_ids(s, chat(conversations, as_list), n_images, at_once) == input_ids.tolist(), (
                as_list,
                at_once,
            )


@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.parametrize("chat_id", CHATS)
def test_generation_prompt_is_what_precedes_the_last_answer(name: str, chat_id: str):
    s, (n_images, conversations) = setup(name), CHATS[chat_id]
    input_ids, labels = encode(s, conversations, n_images)
    start, _ = supervised_runs(input_ids, labels)[-1]
    for at_once in (False, True):
        prompt = stock_ids(s, chat(conversations[:-1], True), n_images, at_once, add_generation_prompt=True)
        assert prompt == input_ids[:start].tolist()


@pytest.mark.parametrize(("name", "family"), [("llama3", "llama_3_1"), ("qwen2", "qwen3")])
def test_todays_templates_keep_this_on_real_vocabularies(name: str, family: str):
    s, template = setup(name), get_template(family)
    s = s._replace(template=template, processor=copy.copy(s.processor))
    s.processor.chat_template = template.jinja
    for chat_id in ("three_turns", "spaces", "code", "two_images_two_turns"):
        n_images, conversations = CHATS[chat_id]
        input_ids, labels = encode(s, conversations, n_images)
        assert stock_ids(s, chat(conversations), n_images, False) == input_ids.tolist()
        start, _ = supervised_runs(input_ids, labels)[-1]
        prompt = stock_ids(s, chat(conversations[:-1]), n_images, False, add_generation_prompt=True)
        assert prompt == input_ids[:start].tolist()


@pytest.mark.parametrize("name", SETUPS)
def test_captions_have_the_stock_processors_prompt(name: str):
    s, plain = setup(name), get_template("plain")
    conversations = turns("Describe it.\n<image>", "a red boat")
    input_ids, labels = encode(s, conversations, 1, plain)
    prompt = stock_ids(s, chat(conversations[:1]), 1, True, chat_template=plain.jinja, add_generation_prompt=True)
    bos = [] if name == "qwen2" else [s.tokenizer.bos_token_id]
    assert prompt == bos + [s.image_id] * s.image_length == input_ids[: len(prompt)].tolist()
    assert supervised_runs(input_ids, labels) == [(len(prompt), len(input_ids))]
    rendered = stock_ids(s, chat(conversations, True), 1, False, chat_template=plain.jinja)
    assert (rendered == input_ids.tolist()) == (name not in POSITION_MATTERS)


@pytest.mark.parametrize("name", SETUPS)
def test_evaluation_clients_find_the_answer(name: str):
    """lmms-eval renders string content with the tokenizer; VLMEvalKit splits the decoded sequence."""
    s = setup(name)
    conversations = turns("<image>\nWhat is it?", "A cat.", "Sure?", "Yes.")
    text = s.tokenizer.apply_chat_template(chat(conversations), tokenize=False)
    assert text == s.processor.apply_chat_template(chat(conversations, as_list=True))
    decoded = s.tokenizer.decode(encode(s, conversations, 1)[0], skip_special_tokens=True)
    separator = {"vicuna_v1": "ASSISTANT:", "qwen": "assistant\n", "mistral": "[/INST]", "llama_3": "assistant\n\n"}
    assert decoded.split(separator[s.template.name])[-1].strip() == "Yes."


@pytest.mark.parametrize("name", ["vicuna", "llama3", "qwen2"])
def test_system_prompt_can_be_replaced_or_left_out(name: str):
    s = setup(name)
    user = [{"role": "user", "content": "Hi"}]
    default = s.processor.apply_chat_template(user)
    assert default.count(s.template.system) == 1
    bare = s.processor.apply_chat_template([{"role": "system", "content": ""}, *user])
    assert default.endswith(bare) and bare == "".join([s.template.user[0], "Hi", s.template.user[1]])
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert s.processor.apply_chat_template([system, *user]) == default.replace(s.template.system, "Be brief.")


def test_turns_that_no_format_has_are_refused_in_jinja():
    s = setup("mistral")
    with pytest.raises(Exception, match="mistral format has no system prompt"):
        s.processor.apply_chat_template([{"role": "system", "content": "x"}, {"role": "user", "content": "Hi"}])
    with pytest.raises(Exception, match="Only user and assistant turns"):
        s.processor.apply_chat_template([{"role": "user", "content": "Hi"}, {"role": "tool", "content": "x"}])


# ---- any text --------------------------------------------------------------------------------------------------------

answers_text = any_text.filter(str.strip)


@pytest.mark.parametrize("name", SETUPS)
@quick
@given(pairs=st.lists(st.tuples(any_text, answers_text), min_size=1, max_size=3), with_image=st.booleans())
def test_text_never_becomes_a_special_token_and_the_mask_is_the_answers(name: str, pairs, with_image: bool):
    s = setup(name)
    if with_image:  # placeholders of the first question become one; in later ones they would be one too many
        assume(not any(IMAGE_TOKEN in question for question, _ in pairs[1:]))
        pairs = [(f"{IMAGE_TOKEN}\n{pairs[0][0]}", pairs[0][1]), *pairs[1:]]
    input_ids, labels = encode(s, turns(*sum(pairs, ())), int(with_image))
    harmless, _ = encode(
        s, turns(IMAGE_TOKEN if with_image else "q", "a", *["q", "a"] * (len(pairs) - 1)), int(with_image)
    )
    special = [id for id, token in s.tokenizer.added_tokens_decoder.items() if token.special]
    assert input_ids[np.isin(input_ids, special)].tolist() == harmless[np.isin(harmless, special)].tolist()
    learned = learned_texts(s, input_ids, labels)
    assert len(learned) == len(pairs)
    for text, (_, answer) in zip(learned, pairs, strict=True):
        expected = answer + s.template.answer[1]
        if name in SENTENCEPIECE:
            expected = expected.replace("▁", " ")  # the same character to SentencePiece
        elif name == "qwen2":
            expected = unicodedata.normalize("NFC", expected)
        if name not in SENTENCEPIECE and re.match(r"\s*[\r\n]", answer):
            assert expected.endswith(text) and not expected.removesuffix(text).strip()
        else:
            assert text == expected


@pytest.mark.parametrize("name", SETUPS)
@quick
@given(
    pairs=st.lists(st.tuples(plain_text, plain_text.filter(str.strip)), min_size=1, max_size=3),
    with_image=st.booleans(),
)
def test_any_ordinary_text_gets_the_stock_processors_ids(name: str, pairs, with_image: bool):
    s = setup(name)
    if with_image:
        pairs = [(f"{IMAGE_TOKEN}\n{pairs[0][0]}", pairs[0][1]), *pairs[1:]]
    conversations = turns(*sum(pairs, ()))
    input_ids, labels = encode(s, conversations, int(with_image))
    assert stock_ids(s, chat(conversations), int(with_image), at_once=False) == input_ids.tolist()
    if not re.match(r"\s*[\r\n]", pairs[-1][1]):
        start, _ = supervised_runs(input_ids, labels)[-1]
        prompt = stock_ids(s, chat(conversations[:-1]), int(with_image), at_once=False, add_generation_prompt=True)
        assert prompt == input_ids[:start].tolist()


@pytest.mark.parametrize(("name", "learned"), [("llama3", "Yes.<|eot_id|>"), ("qwen2", "Yes.<|im_end|>\n")])
def test_line_breaks_that_join_the_header_are_not_learned(name: str, learned: str):
    s = setup(name)
    input_ids, labels = encode(s, turns("Well?", "\nYes."))
    assert learned_texts(s, input_ids, labels) == [learned]
    assert stock_ids(s, chat(turns("Well?", "\nYes.")), 0, at_once=False) == input_ids.tolist()


# ---- tokenizers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "image_id", "pad_id", "eos_id", "size"),
    [
        ("vicuna", 32000, 0, 2, 32001),
        ("mistral", 32000, 32001, 2, 32002),
        ("llama3", 128256, 128257, 128009, 128258),
        ("qwen2", 151646, 151643, 151645, 151647),
    ],
)
def test_prepared_tokenizer_has_the_published_ids(name: str, image_id: int, pad_id: int, eos_id: int, size: int):
    s = setup(name)
    for _ in range(2):
        assert s.template.prepare_tokenizer(s.tokenizer) == s.image_id == image_id
        assert (s.tokenizer.pad_token_id, s.tokenizer.eos_token_id, len(s.tokenizer)) == (pad_id, eos_id, size)
    assert s.tokenizer.padding_side == "left" and s.tokenizer.chat_template == s.template.jinja
    assert s.tokenizer.eos_token == s.template.stop


@pytest.mark.parametrize("name", SETUPS)
def test_saved_tokenizer_comes_back_the_same(name: str, tmp_path):
    """From a folder of model type llava_next, under the class name that means "as in tokenizer.json" to 4.x and 5.x."""
    s = setup(name)
    s.tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "llava_next"}')
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    s.template.check_tokenizer(loaded)
    assert (loaded.padding_side, loaded.eos_token, loaded.pad_token) == ("left", s.template.stop, s.tokenizer.pad_token)
    conversations = CHATS["three_turns"][1]
    ids = s.template.encode(conversations, loaded, s.image_id, [3])[0].tolist()
    assert ids == s.template.encode(conversations, s.tokenizer, s.image_id, [3])[0].tolist()
    text = s.tokenizer.apply_chat_template(chat(conversations), tokenize=False)
    assert loaded.apply_chat_template(chat(conversations), tokenize=False) == text
    assert loaded(text)["input_ids"] == s.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("legacy", [False, True])
def test_sentencepiece_folder_without_tokenizer_json_is_mended(legacy: bool, tmp_path):
    """Vicuna is published like that, and transformers 5.23 gets its merges wrong."""
    shutil.copy(real_tokenizers.mistral_model(), tmp_path / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"unk_token": "<unk>"}))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    TEMPLATES["mistral"].prepare_tokenizer(tokenizer)
    published = sentencepiece.SentencePieceProcessor(model_file=real_tokenizers.mistral_model())
    for text in ("two  spaces", "if x:\n    return 1", *(f"a{' ' * n}b" for n in range(40))):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == published.encode(text)


def test_tokenizers_that_do_not_fit_are_refused():
    encode_with = TEMPLATES["llama_3"].encode
    with pytest.raises(ValueError, match=r"lacks the special token\(s\) <image>: run prepare_tokenizer"):
        encode_with(turns("a", "b"), real_tokenizers.llama3(), 128256, [])
    with pytest.raises(ValueError, match=r"lacks the special token\(s\) <\|start_header_id\|>"):
        TEMPLATES["llama_3"].prepare_tokenizer(real_tokenizers.mistral())
    without_bos = real_tokenizers.llama3()
    without_bos.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    with pytest.raises(ValueError, match=r"adds the ids \[\] to a text.*<\|begin_of_text\|>"):
        encode_with(turns("a", "b"), without_bos, 128256, [])
    swallowing = real_tokenizers.mistral()
    swallowing.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False, rstrip=True)], special_tokens=True)
    with pytest.raises(ValueError, match="in other pieces than training would"):
        TEMPLATES["mistral"].prepare_tokenizer(swallowing)
    spaceless = real_tokenizers.mistral_prepending()
    spaceless.backend_tokenizer.normalizer = real_tokenizers.normalizers.Replace(" ", "▁")
    with pytest.raises(ValueError, match="where SentencePiece has"):
        TEMPLATES["mistral"].prepare_tokenizer(spaceless)
    with pytest.raises(ValueError, match="image_token_id is 7, but <image> is 32000"):
        TEMPLATES["mistral"].encode(turns("a", "b"), setup("mistral").tokenizer, 7, [])
    with pytest.raises(ValueError, match="'plain' is no chat template"):
        TEMPLATES["plain"].prepare_tokenizer(real_tokenizers.mistral())


def test_test_tokenizers_are_the_published_ones():
    texts = ["  two  spaces ", "日本語 🐈‍⬛ é \u0301", "a\n\nb\tc", "<s>[INST] x [/INST]</s>", "▁ ▁", "0 1\r\n2"]
    published = sentencepiece.SentencePieceProcessor(model_file=real_tokenizers.mistral_model())
    ours = setup("mistral_prepending").tokenizer
    for text in texts:
        assert ours(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == published.encode(text)
    letters = {letter: byte for byte, letter in real_tokenizers.bytes_to_unicode().items()}
    vocab, _ = real_tokenizers._qwen_bpe()
    ranks = {bytes(letters[letter] for letter in token): rank for token, rank in vocab.items()}
    qwen = setup("qwen2").tokenizer
    pattern = json.loads(qwen.backend_tokenizer.to_str())["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    published = tiktoken.Encoding("qwen", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    for text in texts:
        expected = published.encode_ordinary(unicodedata.normalize("NFC", text))
        assert qwen(text, split_special_tokens=True)["input_ids"] == expected
