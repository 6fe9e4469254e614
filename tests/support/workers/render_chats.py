"""Renders chats with whatever transformers runs it.

`CASES.json`: a list of [template, special tokens, messages, whether a prompt is asked for]; `OUT.json`: their texts.

Usage: render_chats.py CASES.json OUT.json. Must run with transformers 4.45 and later, so it imports nothing of this
project.
"""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast


def main() -> None:
    texts = []
    for template, tokens, messages, prompt in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **tokens)
        tokenizer.chat_template = template
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    Path(sys.argv[2]).write_text(json.dumps(texts), encoding="utf-8")


if __name__ == "__main__":
    main()
