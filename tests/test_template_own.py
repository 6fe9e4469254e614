"""`own`: a language model's own chat template is trained as its tokenizer renders it, or refused with the reason."""

import json
import pickle
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llava_next.data.inputs.samples import model_template
from llava_next.data.inputs.text_lengths import TextLength
from llava_next.own_template import own_template, template_of
from llava_next.template_jinja import with_images, without_images
from llava_next.templates import get_template
from llava_next.tokenise import fingerprint
from support.chats import (
    CHATS,
    SYSTEM,
    TRAPS,
    assert_stock_reads_it,
    assert_text_stays_text,
    messages_of,
    plain_text,
    quick,
    stock_ids,
)
from support.own_templates import REFUSED, TRAINED
from support.template_setups import (
    Setup,
    chat,
    encode,
    learned_texts,
    setup,
    small,
    supervised_runs,
    turns,
    with_template,
)

STRIPS = {"llama_3_1": "sua", "gemma_3": "ua", "mistral_v3": "a", "thoughtless": ""}  # system, user, assistant
WITHOUT_SYSTEM = ("mistral_v3", "llama_2")


def own(name: str) -> Setup:
    return setup(f"own_{name}")


def answers_of(name: str, conversations: list[dict]) -> list[str]:
    texts = [turn["value"] for turn in conversations if turn["from"] == "gpt"]
    return [text.strip() if "a" in STRIPS.get(name, "") else text for text in texts]


@pytest.mark.parametrize("name", TRAINED)
def test_text_has_the_ids_of_the_language_models_own_tokenizer(name: str):
    """As it came, by its own `apply_chat_template`: the beginning token too."""
    s, tokenizer = own(name), with_template(name)
    for n_images, conversations in CHATS:
        if n_images or (conversations[0] == SYSTEM and name in WITHOUT_SYSTEM):
            continue
        ids, labels = encode(s, conversations)
        messages = messages_of(conversations, False)
        assert tokenizer.apply_chat_template(messages, return_dict=False) == ids.tolist()
        before = " " if name in ("mistral_v3", "llama_2") else ""
        after = (" " if name == "llama_2" else "") + s.template.stop
        assert learned_texts(s, ids, labels) == [before + text + after for text in answers_of(name, conversations)]


@pytest.mark.parametrize("name", TRAINED)
def test_chats_with_pictures_have_the_stock_processors_ids(name: str):
    s = own(name)
    for n_images, conversations in CHATS:
        if conversations[0] == SYSTEM and name in WITHOUT_SYSTEM:
            with pytest.raises(ValueError, match="template own has no place for a system prompt"):
                encode(s, conversations, n_images)
            continue
        ids, labels = encode(s, conversations, n_images)
        assert ids.tolist().count(s.image_id) == n_images * s.image_length
        assert_stock_reads_it(s, conversations, n_images, ids, labels)


@pytest.mark.parametrize("name", ["own_llama_3_1", "own_zephyr", "olmo_2", "gemma_3"])
@settings(quick, max_examples=15)
@given(pairs=st.lists(st.tuples(plain_text, plain_text.filter(str.strip)), min_size=1, max_size=3), system=plain_text)
def test_any_ordinary_text_has_the_stock_processors_ids(name: str, pairs, system: str):
    s, conversations = setup(name), [{"from": "system", "value": system}, *turns(*sum(pairs, ()))]
    ids, labels = encode(s, conversations)
    messages = messages_of(conversations, False)
    assert stock_ids(s, messages, 0, False) == ids.tolist()
    if not re.match(r"\s*[\r\n]", pairs[-1][1]):
        start, _ = supervised_runs(ids, labels)[-1]
        assert stock_ids(s, messages[:-1], 0, False, add_generation_prompt=True) == ids[:start].tolist()


@pytest.mark.parametrize("name", TRAINED)
def test_no_text_becomes_a_special_token(name: str):
    assert_text_stays_text(own(name), *(trap for trap in TRAPS if trap != "\n"))


@pytest.mark.parametrize(
    ("name", "named"), [("olmo_2", "olmo_2"), ("mistral_v3", "mistral_v3"), ("gemma_3", "gemma_3")]
)
def test_the_named_template_of_a_family_writes_what_its_own_does(name: str, named: str):
    s, other = own(name), setup(named)
    for texts in (("Hi", "Yes."), ("Hi", "Yes.", "And 3?", "No."), ("<image>\nWhat?", "A cat.", "Why?", "So.")):
        conversations = turns(*texts)
        ours, theirs = (encode(x, conversations, "<image>" in texts[0])[0].tolist() for x in (s, other))
        assert ours == theirs


@pytest.mark.parametrize("name", REFUSED)
def test_templates_that_cannot_keep_the_promises_are_refused_with_the_reason(name: str):
    family, text, reason = REFUSED[name]
    tokenizer = small(family)
    tokenizer.chat_template = text
    with pytest.raises(ValueError, match=rf"(?s)template own: .*{reason}.* Take the named template"):
        own_template(tokenizer)


def test_a_sample_whose_texts_are_changed_is_refused():
    s = own("thoughtless")
    fine = turns("q", "a </think", "q", "b")
    assert learned_texts(s, *encode(s, fine)) == ["a </think<|im_end|>", "b<|im_end|>"]
    for conversations in (turns("q", "<think>x</think>a", "q", "b"), turns("q", "\n a")):
        with pytest.raises(ValueError, match=r"own chat template changes what a text says: '.*' becomes '"):
            encode(s, conversations)


def test_the_prepared_tokenizer_says_the_same_template_and_comes_back(tmp_path):
    for name in TRAINED:
        s, fresh = own(name), with_template(name)
        assert own_template(fresh) == own_template(s.tokenizer) == s.template == pickle.loads(pickle.dumps(s.template))
        assert without_images(s.tokenizer.chat_template) == (TRAINED[name][1], s.template.without_bos)
        assert template_of(s.tokenizer.chat_template, lambda s=s: s.tokenizer) == s.template
    s.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(s.tokenizer.chat_template)
    assert model_template(tmp_path) == s.template
    conversations = turns("Hi", "Yes.")
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    again = own_template(loaded).encode(conversations, loaded, s.image_id, [])[0]
    assert again.tolist() == encode(s, conversations)[0].tolist()


def test_lengths_are_counted_for_the_text_of_the_template(tmp_path):
    """Of a published tokenizer as of the model composed with it; another text is another column."""
    fresh, s = with_template("chatml"), own("chatml")
    fresh.save_pretrained(tmp_path / "published")
    s.tokenizer.save_pretrained(tmp_path / "composed")
    lengths = [TextLength(f"{tmp_path / name}:own") for name in ("published", "composed")]
    names = {fingerprint(s.tokenizer, s.template.identity), *(length.fingerprint for length in lengths)}
    assert len(names) == 1
    conversations = turns("Hi", "Yes.")
    ids, labels = encode(s, conversations)
    assert lengths[0].count(conversations, []) == (len(ids), int((labels != -100).argmax()))
    other = pickle.loads(pickle.dumps(s.tokenizer))
    other.chat_template = other.chat_template.replace("You are helpful", "You help")
    assert fingerprint(other, own_template(other).identity) not in names
    assert fingerprint(s.tokenizer, get_template("chatml").identity) not in names


def test_white_space_in_front_of_an_own_text_is_kept():
    """Jinja drops a line break behind a block, so what is put in front must not cost the text its first one."""
    body = "{% for message in messages %}{{ message['content'] }}|{% endfor %}"
    tokenizer = small("chatml")
    for front in ("", "\n", " ", "  {% if true %}x{% endif %}", "\n\n  ", "{{- 'x' }}", "{%- if true %}x{% endif %}"):
        texts = []
        for text in (front + body, with_images(front + body, False), with_images(front + body, True)):
            tokenizer.chat_template = text
            texts.append(tokenizer.apply_chat_template(chat(turns("Hi", "Yes.")), tokenize=False))
        assert texts[0] == texts[1] == texts[2] and re.fullmatch(r"\s*x?Hi\|Yes.\|", texts[0])


def test_of_several_templates_the_default_one_is_taken_and_calls_of_tools_pass_through():
    tokenizer = small("chatml")
    tokenizer.chat_template = {"default": TRAINED["chatml"][1], "tool_use": "x"}
    assert own_template(tokenizer) == own("chatml").template
    tokenizer.chat_template = with_images("{{ messages[1]['tool_calls'][0] }}", False)
    messages = [*chat(turns("Hi")), {"role": "assistant", "content": None, "tool_calls": ["call"]}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "call"
    assert json.dumps(messages[1]["content"]) == "null"
