"""The jinja texts of saved chat templates: a skeleton for named ones, and what stands before a language model's own.

Both take content as a string, where <image> stands for an image, or as a list of parts. A question gets the form that
`turns.place_images` gives it. They render in transformers 4.45 and later.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava_next.templates import Template

_FLAT = """\
{%- macro flat(content, image) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {{- image if 'image' in part['type'] else part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
"""
_COUNT = """\
{%- for message in messages if message['role'] == 'user' -%}
    {%- set images.count = images.count + flat(message['content'], '<image>').split('<image>')|length - 1 -%}
{%- endfor -%}
"""
_SINGLE_IMAGE_IN_FRONT = """\
{%- if images.count == 1 and '<image>' in text -%}
            {%- set text = ('<image>\\n' + text.replace('<image>', '')|trim)|trim -%}
        {%- endif -%}"""
_IMAGES_ONLY = "{%- set text = '<image>' * (text.split('<image>')|length - 1) -%}"

# The names in capitals are replaced by literals.
_SKELETON = (
    _FLAT
    + """\
{%- set images = namespace(count=0) -%}
"""
    + _COUNT
    + """\
{%- if messages[0]['role'] != 'system' -%}
    {{- DEFAULT_SYSTEM -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set text = flat(message['content'], '<image>' if images.count == 1 else '<image>\\n') -%}
    {%- if message['role'] == 'user' -%}
        QUESTION
        {{- USER_BEFORE + text + USER_AFTER -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- ANSWER_BEFORE + text + ANSWER_AFTER -}}
    {%- elif message['role'] == 'system' and loop.first -%}
        {{- SYSTEM_TURN if text -}}
    {%- else -%}
        {{- raise_exception('Only user and assistant turns, after at most one system turn, can be rendered.') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- HEADER -}}
{%- endif -%}
"""
)


def skeleton(template: Template) -> str:
    """The chat template text of a named template."""
    before, after = map(json.dumps, template.system_turn or ("", ""))
    no_system = json.dumps(f"The {template.name} format has no system prompt.")
    user, answer = json.dumps(template.user[0]), json.dumps(template.answer[1])
    system_turn = f"({before} + text + {after})" if template.system_turn else f"raise_exception({no_system})"
    if template.system_inside:
        system = "flat(messages[0]['content'], '')"
        is_first = f"loop.index0 == 1 and messages[0]['role'] == 'system' and {system}"
        user, system_turn = f'{user} + ({before} + {system} + {after} if {is_first} else "")', '""'
    if template.between:
        answer += f' + ("" if loop.last else {json.dumps(template.between)})'
    literals = {
        "DEFAULT_SYSTEM": json.dumps(template.default_system),
        "QUESTION": _IMAGES_ONLY if template.caption_only else _SINGLE_IMAGE_IN_FRONT,
        "USER_BEFORE": user,
        "USER_AFTER": json.dumps(template.user[1]),
        "ANSWER_BEFORE": json.dumps(template.header + template.answer[0]),
        "ANSWER_AFTER": answer,
        "SYSTEM_TURN": system_turn,
        "HEADER": json.dumps(template.header),
    }
    return re.sub("|".join(literals), lambda match: literals[match[0]], _SKELETON)


# A language model's own text follows on a line of its own, which jinja's trim_blocks takes for its very beginning; it
# sees contents that are strings.
_BEFORE_OWN = (
    _FLAT
    + """\
{%- set images = namespace(count=0, messages=[]) -%}
"""
    + _COUNT
    + """\
{%- for message in messages -%}
    {%- set text = flat(message['content'] or '', '<image>' if images.count == 1 else '<image>\\n') -%}
    {%- if message['role'] == 'user' -%}
        """
    + _SINGLE_IMAGE_IN_FRONT
    + """
    {%- endif -%}
    {%- set images.messages = images.messages + [dict(message, content=text)] -%}
{%- endfor -%}
"""
)
_MESSAGES = "{%- set messages = images.messages %}\n"
_WITHOUT_BOS = "{%- set bos_token = '' %}\n"


def with_images(own: str, without_bos: bool) -> str:
    """A language model's own chat template plus the image.

    Args:
        without_bos: the tokenizer adds the beginning-of-sequence token, so the text must not.
    """
    return _BEFORE_OWN + (_WITHOUT_BOS if without_bos else "") + _MESSAGES + own


def without_images(saved: str) -> tuple[str, bool] | None:
    """What `with_images` was given; None: the text is none of its."""
    for without_bos in (True, False):
        before = with_images("", without_bos)
        if saved.startswith(before):
            return saved[len(before) :], without_bos
    return None
