#!/usr/bin/env python3
"""What Hugging Face transformers renders of conversations. Writes chat.json beside this file (transformers 5.24.0, jinja2 3.1.6).

usage: make_chat_goldens.py
"""
import json
import pathlib

import jinja2
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# in the manner of Llama 3's: whitespace control everywhere, reassigned messages, JSON with an indent, exceptions
LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}

{#- System message #}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Tools:\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant', 'tool'] %}
        {{- raise_exception("unexpected role " + message.role) }}
    {%- endif %}
    {%- if 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# what templates in the wild use of Jinja and of Python
KINKS = """{% for message in messages %}
    {% if loop.index0 == 2 %}
        {% break %}
    {% endif %}
    {% generation %}
[{{ message.role.upper() }}] {{ message.content.split('\\n')[-1].strip() }}
    {%- endgeneration %}

{% endfor %}
{{ none }} {{ true }} {{ 1.0 }} {{ 1e20 }} {{ 0.00001 }} {{ [1, 'a', {'b': none}] }} {{ messages[::-1][0]['role'] }}
{% set ns = namespace(n=0) %}
{% for m in messages if m.role == 'user' %}{% set ns.n = ns.n + 1 %}{% endfor %}
{{ ns.n }} {{ undefined_thing }}{{ flag }} {{ {'z': 1, 'a': "é<'>"} | tojson }}
{{ {'z': 1, 'a': "é🙂"} | tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}
{%- macro twice(x) %}{{ x }}{{ x }}{% endmacro %}
{{ twice('ab') }}{{ ' x '.join(['1', '2']) }}{% if messages is iterable and messages is not mapping %}!{% endif %}
{{ "a" ~ 1 ~ "b" }} {{ 7 // 2 }} {{ 'abc'[1:] }} {{ messages | map(attribute='role') | list }} {{ messages[0].items() | list }}
{{ "%s-%d" | format("x", 3) }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ 'x' if false }} {{ dict(a=1) }} {{ ["it's"] }} {{ (1,) }}
{% if messages[0].reasoning_content is defined %}{{ messages[0].reasoning_content }}{% endif %}
{{ messages[1].content is string }} {{ messages[1].get('name', 'nobody') }} {{ messages[1].content.startswith('thr') }}
"""

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": []}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2, "p": 0.5}}}
COUNT = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "1, 2, "}]
CASES = [
    {"name": "llama3 with a system message", "template": LLAMA3, "messages": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi"}]},
    {
        "name": "llama3 with tools",
        "template": LLAMA3,
        "messages": [{"role": "user", "content": "Weather?"}, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": '{"t": 21}'}],
        "tools": TOOLS,
    },
    {"name": "llama3 continued: trimmed", "template": LLAMA3, "messages": COUNT, "continue_final_message": True},
    {"name": "chatml continued: not trimmed", "template": CHATML, "messages": COUNT, "continue_final_message": True},
    {"name": "chatml without a generation prompt", "template": CHATML, "messages": COUNT, "add_generation_prompt": False},
    {
        "name": "kinks",
        "template": KINKS,
        "messages": [{"role": "user", "content": "one\n two ", "reasoning": "hm"}, {"role": "assistant", "content": "three"}, {"role": "user", "content": "4"}],
        "kwargs": {"flag": 7},
    },
]


def main():
    for case in CASES:
        case.setdefault("tools", None)
        case.setdefault("continue_final_message", False)
        case.setdefault("add_generation_prompt", not case["continue_final_message"])
        case.setdefault("kwargs", {})
        rendered, _ = render_jinja_template(
            [case["messages"]],
            tools=case["tools"],
            chat_template=case["template"],
            continue_final_message=case["continue_final_message"],
            add_generation_prompt=case["add_generation_prompt"],
            bos_token="<|begin_of_text|>",
            **case["kwargs"],
        )
        case["text"] = rendered[0]
    golden = {"versions": {"transformers": transformers.__version__, "jinja2": jinja2.__version__}, "cases": CASES}
    path = pathlib.Path(__file__).with_name("chat.json")
    path.write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
