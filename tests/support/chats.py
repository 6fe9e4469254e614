"""Chats and texts that templates are tried with, and what is asked of all templates alike."""

import re

import transformers
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from packaging import version

from llava_next.tokenise import IMAGE_TOKEN
from support.template_setups import IMAGE, Setup, chat, encode, supervised_runs, turns

SYSTEM = {"from": "system", "value": "S."}
CHATS = (
    (
        1,
        turns(
            "Is this <image> a cat?", "A cat.", "Sure?\n\n", "  Yes, 100 %.\n", " Why 3?", "1. He said so\n2. I know"
        ),
    ),
    (2, turns("<image>\nWhat?", "A cat.", "And <image>\nthis? ", "\xe9🐈‍⬛")),
    (0, turns("Hello", "Hi!\n")),
    (0, [SYSTEM, *turns("Hello", "Hi!", "Well", "No.")]),
    (1, [SYSTEM, *turns("<image>", "A \t cat.")]),
)
TRAPS = [
    *("<s>", "</s>", "<unk>", "<pad>", IMAGE_TOKEN, "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|reserved_special_token_7|>"),
    *("[INST]", "[/INST]", " ASSISTANT: ", "USER: ", "user", "assistant", "system", "<0x0A>", "▁"),
    *(
        " ",
        "  ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "\xa0",
        ":",
        "<",
        "</",
        "s>",
        "<|",
        "|>",
        "e\u0301",
        "\u0301",
        "🐈‍⬛",
        "1234",
        "word",
    ),
]
any_text = st.lists(st.one_of(st.sampled_from(TRAPS), st.text(max_size=6)), min_size=1, max_size=7).map("".join)
plain_text = any_text.filter(lambda text: not re.search(r"<[^>]*>|<\||\|>", text))
quick = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.filter_too_much]
)


def messages_of(conversations: list[dict], as_list: bool = False) -> list[dict]:
    """As `chat`, with system messages."""
    texts = [turn["value"] for turn in conversations if turn["from"] == "system"]
    contents = [[{"type": "text", "text": text}] for text in texts] if as_list else texts
    system = [{"role": "system", "content": content} for content in contents]
    return system + chat(conversations[len(system) :], as_list)


def stock_ids(s: Setup, messages: list[dict], n_images: int, at_once: bool, **kwargs) -> list[int]:
    """Ids by rendering and then processing, or by `apply_chat_template(tokenize=True)`."""
    images = [IMAGE] * n_images or None
    if not at_once:
        text = s.processor.apply_chat_template(messages, **kwargs)
        return s.processor(text=text, images=images)["input_ids"][0]
    if images and not isinstance(messages[0]["content"], list):
        if version.parse(transformers.__version__) < version.parse("5.23"):  # would pass them twice
            return stock_ids(s, messages, n_images, False, **kwargs)
        kwargs["processor_kwargs"] = {"images": images}
    return s.processor.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)["input_ids"][0]


def assert_stock_reads_it(s: Setup, conversations: list[dict], n_images: int, ids, labels) -> None:
    """The stock processor's ids, through the saved chat template: of the whole chat and of its last prompt."""
    start, _ = supervised_runs(ids, labels)[-1]
    for as_list in (False, True):
        messages = messages_of(conversations, as_list)
        assert stock_ids(s, messages, n_images, False) == ids.tolist()
        prompt = stock_ids(s, messages[:-1], n_images, as_list, add_generation_prompt=True)
        assert prompt == ids[:start].tolist()


def assert_text_stays_text(s: Setup, *more: str) -> None:
    """Spelled out in a question and an answer, the template's special strings and `more` add no special token."""
    spelled = "".join([*s.template.special, *more])
    got, plain = (encode(s, turns(text, text, "q", "a"))[0] for text in (spelled, "a"))
    special = [id for id, token in s.tokenizer.added_tokens_decoder.items() if token.special]
    assert [id for id in got if id in special] == [id for id in plain if id in special]
