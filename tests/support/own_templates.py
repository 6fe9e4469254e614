"""Chat templates as language models bring them, without their tools: what they write of a plain chat, and how."""

_TURNS = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# a default system prompt, as SmolLM2's and Qwen2.5's
_CHATML = """\
{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}
"""
# Llama 3.1: dates that are fixed, contents trimmed, the beginning token in front
_LLAMA_3_1 = """\
{{- bos_token }}
DATE
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date + '\\n\\n' + system + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
_OLMO_2 = """\
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' -%}
{{ '<|assistant|>\\n' + message['content'] + eos_token + ('' if loop.last else '\\n') }}
{%- else %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}
{%- endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"""
# Gemma 3: a system prompt in the first question
_GEMMA_3 = """\
{{ bos_token }}
{%- set first = '' -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first = messages[0]['content'] + '\\n\\n' -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
    {{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\\n' }}
    {{- first if loop.first }}
    {{- message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""
# Mistral v0.3: the system prompt goes with the last question
_MISTRAL_V3 = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}{%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' }}{{- system + '\\n\\n' if loop.last and system is defined }}{{- message['content'] + '[/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
# Zephyr: roles are plain text, an end token behind every turn, none in front
_ZEPHYR = """\
{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
# Llama 2: the beginning token before every question
_LLAMA_2 = """\
{% for message in messages %}
{% if message['role'] == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}
{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' if message['role'] == 'user' }}
{{- ' ' + message['content'] + ' ' + eos_token if message['role'] == 'assistant' }}
{%- endfor %}"""
# marks around what an assistant says
_MARKED = """\
{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ message['content'] + '<|im_end|>' }}{% endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# Qwen3: an empty thinking block before the last answer; one in a text is cut from the past
_QWEN_3 = """\
{%- for message in messages %}
    {%- set content = message['content'] %}
    {%- if message['role'] == 'assistant' %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.last %}{%- set content = '<think>\\n\\n</think>\\n\\n' + content %}{%- endif %}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
_PHI_4_MINI = """\
{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"""

# name -> (family of the tokenizer, text)
TRAINED = {
    "chatml": ("chatml", _CHATML + _TURNS),
    "llama_3_1": ("llama_3_1", _LLAMA_3_1.replace("DATE", "{%- set date = '26 Jul 2024' %}")),
    "olmo_2": ("olmo_2", _OLMO_2),
    "gemma_3": ("gemma_3", _GEMMA_3),
    "mistral_v3": ("mistral_v3", _MISTRAL_V3),
    "zephyr": ("vicuna_v1", _ZEPHYR),
    "llama_2": ("vicuna_v1", _LLAMA_2),
    "marked": ("chatml", _MARKED),
    # cuts thinking blocks out of the texts that have them
    "thoughtless": ("chatml", _QWEN_3.replace("loop.last", "false")),
}
# name -> (family, text, what is wrong)
REFUSED = {
    "llama_3_2": (
        "llama_3_1",
        _LLAMA_3_1.replace("DATE", "{%- set date = strftime_now('%d %b %Y') %}"),
        "it writes today's date",
    ),
    "qwen_3": ("chatml", _QWEN_3, r"a later turn changes what it writes for earlier ones .*<think>"),
    "phi_4_mini": ("phi_4_mini", _PHI_4_MINI, r"a later turn changes .*<\|end\|><\|endoftext\|>'"),
    "asked_to_think": (
        "chatml",
        _TURNS.replace("{%- if add", "{%- if add_generation_prompt %}{{- '<think>' }}{%- endif %}{%- if add"),
        "an answer does not follow its generation prompt",
    ),
    "no_end": ("chatml", _TURNS.replace("<|im_end|>", ""), "no special token ends its answers"),
    "marks_without_end": (
        "chatml",
        _MARKED.replace("'<|im_end|>' }}{% endgeneration %}", "'' }}{% endgeneration %}{{ '<|im_end|>' }}"),
        "generation marks are not around",
    ),
    "twice": ("chatml", _TURNS.replace("message['content'] +", "message['content'] * 2 +"), "user turn 2 times"),
    "broken": ("chatml", "{% for %}", "does not render this chat"),
    "none": ("chatml", None, "the tokenizer brings no chat template"),
}
