"""Templates against the original's ids, labels and prompts, and the rules about conversations and images."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from llava_next.templates import TEMPLATES, get_template
from llava_next.tokenise import IGNORE_INDEX
from support.template_setups import SETUPS, chat, encode, learned_texts, setup, turns

GOLDENS = json.loads((Path(__file__).parent / "data" / "templates.json").read_text(encoding="utf-8"))
CASES = {case["id"]: case for case in GOLDENS["cases"]}

# ---- the original's results ------------------------------------------------------------------------------------------

# version in the golden file -> (setup, template)
VERSIONS = {
    "v1": ("vicuna", "vicuna_v1"),
    "v1_legacy": ("vicuna_legacy", "vicuna_v1"),
    "llava_llama_3": ("llama3", "llama_3"),
    "mistral_instruct": ("mistral_prepending", "mistral"),
    "qwen_1_5": ("qwen2", "qwen"),
    "plain": ("vicuna", "plain"),
    "plain_llama3": ("llama3", "plain"),
    "plain_mistral": ("mistral_prepending", "plain"),
    "plain_qwen": ("qwen2", "plain"),
}

# Every habit and fault of the original that the golden file names, and what happens here instead
QUIRKS = {
    "tokenization_mismatch_all_masked": "the answer is supervised (golden)",
    "separator_in_text": "the mask comes from spans (golden)",
    "double_bos": "one (golden)",
    "supervises_markers_and_newlines": "answers and their terminators only (golden)",
    "literal_special_token_in_text": "test_text_never_becomes_a_special_token_and_the_mask_is_the_answers",
    "literal_image_stays_text": "test_literal_image_stays_text_without_images",
    "label_on_image_position": "test_placeholder_in_an_answer_is_text",
    "two_placeholders_collapse_to_one": "test_two_placeholders_of_one_image_become_one",
    "placeholder_count_exceeds_images": "ValueError: test_bad_conversations_are_refused",
    "empty_answer": "ValueError: test_bad_conversations_are_refused",
    "ends_with_human_turn": "ValueError: test_bad_conversations_are_refused",
}


def without_double_bos(ids: list[int], labels: list[int], case: dict) -> tuple[list[int], list[int]]:
    assert ids[0] == ids[1] == 128000
    return ids[1:], labels[1:]


def answers_only(ids: list[int], labels: list[int], case: dict) -> tuple[list[int], list[int]]:
    """Qwen: supervised from after <|im_start|>assistant\\n to <|im_end|>\\n."""
    expected, inside = [], False
    for i, id in enumerate(ids):
        inside = inside or ids[max(i - 3, 0) : i] == [151644, 77091, 198]
        expected.append(id if inside else IGNORE_INDEX)
        inside = inside and ids[i - 1 : i + 1] != [151645, 198]
    assert all(mine in (IGNORE_INDEX, theirs) for mine, theirs in zip(expected, labels, strict=True))
    return ids, expected


def without_space_after_image(ids: list[int], labels: list[int], case: dict) -> tuple[list[int], list[int]]:
    """The original tokenised the text after an image on its own, which put a "▁" in front of its line break."""
    at = ids.index(-200) + 1
    assert ids[at] == 29871 and labels[at] == IGNORE_INDEX
    return ids[:at] + ids[at + 1 :], labels[:at] + labels[at + 1 :]


def with_labels_on_the_answer(ids: list[int], labels: list[int], case: dict) -> tuple[list[int], list[int]]:
    """The stage-1 entry of the case has the ids of the answer: between the image and the line break."""
    assert set(labels) == {IGNORE_INDEX}
    answer = [*case["versions"]["plain"]["input_ids"][2:-1], 2]
    assert ids[-len(answer) :] == answer
    return ids, labels[: -len(answer)] + answer


def with_one_space_less(ids: list[int], labels: list[int], case: dict) -> tuple[list[int], list[int]]:
    """transformers 5 puts no "▁" before a text that starts with spaces, the slow tokenizer did: "▁▁", "▁A" lose one."""
    at = ids.index(-200) + 1
    assert ids[at] == labels[at] == 259
    return [*ids[:at], 29871, *ids[at + 1 :]], [*labels[:at], 29871, *labels[at + 1 :]]


# (version, case or None for all) -> what turns the original's result into the right one
CORRECTIONS = {
    ("llava_llama_3", None): [without_double_bos],
    ("qwen_1_5", None): [answers_only],
    ("v1", "text_only_single"): [],
    ("v1", "literal_assistant_separator"): [without_space_after_image, with_labels_on_the_answer],
    ("v1", None): [without_space_after_image],
    ("plain", "spaces_around"): [with_one_space_less],
}

ENTRIES = [(version, case) for case in CASES for version in CASES[case]["versions"]]


def test_golden_file_is_covered():
    assert len(CASES) == 10 and len(ENTRIES) == 70
    assert {version for version, _ in ENTRIES} == set(VERSIONS)
    assert set(GOLDENS["meta"]["quirks"]) == set(QUIRKS)
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_template*.py"))
    for quirk, answer in QUIRKS.items():
        named = re.search(r"test_\w+", answer)
        assert named is None or f"def {named[0]}(" in tests
        seen = any(quirk in entry["quirk"] for case in CASES.values() for entry in case["versions"].values())
        assert seen == ("golden" in answer), quirk


@pytest.mark.parametrize(("version", "case_id"), ENTRIES)
def test_ids_and_labels_are_the_originals(version: str, case_id: str):
    case, entry = CASES[case_id], CASES[case_id]["versions"][version]
    name, template_name = VERSIONS[version]
    s = setup(name)
    lengths = [1] if case["has_image"] else []
    input_ids, labels = get_template(template_name).encode(case["conversations"], s.tokenizer, s.image_id, lengths)
    corrections = CORRECTIONS.get((version, case_id), CORRECTIONS.get((version, None), []))
    ids, expected_labels = entry["input_ids"], entry["labels"]
    for correct in corrections:
        before = (ids, expected_labels)
        ids, expected_labels = correct(ids, expected_labels, case)
        assert (ids, expected_labels) != before, f"{correct.__name__} has nothing to correct"
    assert [-200 if id == s.image_id else id for id in input_ids.tolist()] == ids
    assert labels.tolist() == expected_labels
    assert input_ids.dtype == labels.dtype == np.int64


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize(("version", "case_id"), ENTRIES)
def test_jinja_renders_the_originals_prompt(version: str, case_id: str, as_list: bool):
    name, template_name = VERSIONS[version]
    messages = chat(CASES[case_id]["conversations"], as_list)
    rendered = setup(name).processor.apply_chat_template(messages, chat_template=get_template(template_name).jinja)
    assert rendered == CASES[case_id]["versions"][version]["prompt"].removeprefix("<|begin_of_text|>")


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETUPS)
def test_literal_image_stays_text_without_images(name: str):
    s = setup(name)
    input_ids, labels = encode(s, turns("What does <image> do in HTML?", "<image> is no tag."))
    assert s.image_id not in input_ids
    assert learned_texts(s, input_ids, labels) == ["<image> is no tag." + s.template.answer[1]]


@pytest.mark.parametrize("name", SETUPS)
def test_placeholder_in_an_answer_is_text(name: str):
    s = setup(name)
    input_ids, labels = encode(s, turns("<image>\nWhat?", "An <image> tag"), 1)
    assert (input_ids == s.image_id).sum() == s.image_length
    assert learned_texts(s, input_ids, labels) == ["An <image> tag" + s.template.answer[1]]
    assert s.image_id not in labels


@pytest.mark.parametrize("name", SETUPS)
def test_two_placeholders_of_one_image_become_one(name: str):
    s = setup(name)
    one, two = turns("<image>\nIs this  a cat?", "Yes"), turns("Is this <image> a cat?<image> ", "Yes")
    for mine, expected in zip(encode(s, two, 1), encode(s, one, 1), strict=True):
        assert mine.tolist() == expected.tolist()


def test_every_image_gets_its_own_length_in_order():
    s = setup("llama3")
    conversations = turns("<image> or <image>?", "a", "<image>", "b")
    input_ids, labels = s.template.encode(conversations, s.tokenizer, s.image_id, [3, 1, 5])
    is_image = np.concatenate([[0], input_ids == s.image_id, [0]])
    edges = np.flatnonzero(np.diff(is_image))
    assert (edges[1::2] - edges[::2]).tolist() == [3, 1, 5]
    assert (labels[input_ids == s.image_id] == IGNORE_INDEX).all()


# ---- conversations ---------------------------------------------------------------------------------------------------

IMG = "<image>\nWhat?"


@pytest.mark.parametrize(
    ("conversations", "n_images", "message"),
    [
        (turns("a", "b", "c"), 0, r"ends with turn 3 \(human\)"),
        (turns("a", ""), 0, r"turn 2 \(gpt\) is empty"),
        (turns("a", "b", "c", " \n"), 0, r"turn 4 \(gpt\) is empty"),
        ([*turns("a"), *turns("b", "c")], 0, "turn 2 is from 'human' where 'gpt' is due"),
        (
            [{"from": "system", "value": "x"}, *turns("a", "b"), {"from": "tool", "value": "c"}],
            0,
            "turn 4 is from 'tool'",
        ),
        ([{"from": "gpt", "value": "x"}], 0, "no human turn"),
        ([], 0, "no human turn"),
        ([{"from": "human"}, *turns("a", "b")[1:]], 0, "turn 1 holds None"),
        (["a", "b"], 0, "turn 1 is 'a'"),
        (turns("a", "b", "c", "x\ud83dy"), 0, "turn 4 holds half a surrogate pair at character 1"),
        (turns("What?", "b"), 1, r"1 image\(s\) but 0 <image> placeholder\(s\) in the human turns: write"),
        (turns("What?", "<image> b"), 1, r"1 image\(s\) but 0 <image>"),
        (turns(IMG, "b", IMG, "c"), 1, r"1 image\(s\) but 2 <image> placeholder\(s\) in the human turns \(turn 1, 3\)"),
        (turns(IMG, "b"), 2, r"2 image\(s\) but 1 <image>"),
        (turns("<image><image><image>", "b"), 2, r"2 image\(s\) but 3 <image> placeholder\(s\) .*\(turn 1, 1, 1\)"),
    ],
)
def test_bad_conversations_are_refused(conversations, n_images: int, message: str):
    for template in TEMPLATES.values():
        s = setup({"vicuna_v1": "vicuna", "llama_3": "llama3", "qwen": "qwen2"}.get(template.name, "mistral"))
        with pytest.raises(ValueError, match=message):
            encode(s, conversations, n_images, template)


def test_captions_are_one_pair_with_an_image():
    s, plain = setup("mistral"), get_template("plain")
    for conversations, n_images in [(turns("a", "b"), 0), (turns(IMG, "b", "c", "d"), 1)]:
        with pytest.raises(ValueError, match="'plain' takes one prompt with an image and one caption"):
            encode(s, conversations, n_images, plain)


def test_first_turn_is_dropped_when_not_human():
    s = setup("vicuna")
    expected = encode(s, turns(IMG, "A cat."), 1)
    for role in ("gpt", "tool"):
        got = encode(s, [{"from": role, "value": "Hello <image>"}, *turns(IMG, "A cat.")], 1)
        assert [x.tolist() for x in got] == [x.tolist() for x in expected]


def test_role_and_content_keys_are_read():
    s = setup("vicuna")
    expected, got = encode(s, turns(IMG, "A cat."), 1), encode(s, chat(turns(IMG, "A cat.")), 1)
    assert [x.tolist() for x in got] == [x.tolist() for x in expected]


# ---- templates -------------------------------------------------------------------------------------------------------


def test_templates_are_known_by_name_and_survive_pickling():
    with pytest.raises(
        ValueError, match=r"no template 'vicuna': choose one of plain, vicuna_v1, .*, mistral_nemo or own"
    ):
        get_template("vicuna")
    for name in ("plain", "vicuna_v1", "llama_3", "qwen", "mistral"):
        template = get_template(name)
        copy = pickle.loads(pickle.dumps(template))
        assert copy == template and copy.jinja == template.jinja
        s = setup({"vicuna_v1": "vicuna", "llama_3": "llama3", "qwen": "qwen2"}.get(template.name, "mistral"))
        conversations = turns(IMG, "A cat.")
        assert encode(s, conversations, 1, copy)[0].tolist() == encode(s, conversations, 1, template)[0].tolist()
