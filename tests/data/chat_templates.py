"""Chat templates in the styles of well-known models, with conversations and their texts, written by hand."""

from typing import Any, NamedTuple

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = r"""
{%- for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{%- endif %}
"""

# The system message goes into the first question; roles must alternate.
LLAMA_2 = r"""
{%- set ns = namespace(system='') %}
{% if messages[0].role == 'system' %}
    {% set ns.system = '<<SYS>>\n' ~ messages[0].content ~ '\n<</SYS>>\n\n' %}
    {% set messages = messages[1:] %}
{% endif %}
{% for message in messages %}
    {% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate: user, assistant, user, ...') }}
    {% endif %}
    {% if message.role == 'user' %}
        {{- bos_token ~ '[INST] ' ~ (ns.system if loop.first else '') ~ message.content.strip() ~ ' [/INST]' }}
    {%- else %}
        {{- ' ' ~ message.content.strip() ~ ' ' ~ eos_token }}
    {%- endif %}
{% endfor %}
"""

LLAMA_3 = r"""{{ bos_token }}
{%- macro head(role) %}<|start_header_id|>{{ role }}<|end_header_id|>

{% endmacro %}
{%- for message in messages %}
{{- head(message.role) ~ message.content | trim ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ head('assistant') }}{% endif %}"""

# Thinking stays in the answers after the last question only.
QWEN_3 = r"""
{%- macro think(text) %}{{ '<think>\n' ~ text ~ '\n</think>\n\n' }}{% endmacro %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
            {%- if loop.index0 > ns.last and (loop.last or thought) %}{{- think(thought) }}{%- endif %}
            {{- content ~ '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- else %}
        {{- '<|im_start|>' ~ message.role ~ '\n' ~ content ~ '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

GEMMA = r"""{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages -%}
    {% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor -%}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
"""

RWKV = r"""{{ eos_token }}{% for message in messages %}
{% if message.role == 'user' %}
User: {{ message.content | trim }}

{% elif message.role == 'assistant' %}
Assistant: {{ message.content | trim }}

{% elif message.role == 'system' %}
System: {{ message.content | trim }}

{% else %}
{% continue %}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}Assistant:{% endif %}"""

JSON = r"""{% for message in messages %}{{ message | tojson }}
{{ message | tojson(indent=2, sort_keys=true) }}
{{ [1, none, true] | tojson(separators=(',', ':')) }}{{ message.role | tojson(ensure_ascii=true) }}{% endfor %}"""


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | more


SYSTEM = {"role": "system", "content": "Be brief."}


class Case(NamedTuple):
    template: str
    messages: list[dict[str, Any]]
    prompt: bool  # add_generation_prompt
    text: str


CASES = {
    "ChatML": Case(CHATML, [SYSTEM, user("Hi")], True,
                   "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
    "ChatML, whole": Case(CHATML, [user("Hi\n\n"), answer(" Hello")], False,
                          "<|im_start|>user\nHi\n\n<|im_end|>\n<|im_start|>assistant\n Hello<|im_end|>\n"),
    "Llama 2": Case(LLAMA_2, [SYSTEM, user(" Hi "), answer("Hello"), user("Bye")], True,
                    "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] Bye [/INST]"),
    "Llama 2, no system": Case(LLAMA_2, [user("Hi"), answer("Hello")], False, "<s>[INST] Hi [/INST] Hello </s>"),
    "Llama 3": Case(LLAMA_3, [SYSTEM, user("Hi\n")], True,
                    "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
                    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
    "Qwen 3": Case(QWEN_3, [user("1+1"), answer("<think>\nEasy.\n</think>\n\n2"), user("2+2"), answer("4")], False,
                   "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\n2+2<|im_end|>\n"
                   "<|im_start|>assistant\n<think>\n\n</think>\n\n4<|im_end|>\n"),
    "Qwen 3, thinking": Case(QWEN_3, [user("1+1"), answer("<think>\nEasy.\n</think>\n\n2")], False,
                             "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n<think>\nEasy.\n</think>\n\n2<|im_end|>\n"),
    "Qwen 3, thinking apart": Case(QWEN_3, [user("1+1"), answer("2", reasoning_content="Easy.")], False,
                                   "<|im_start|>user\n1+1<|im_end|>\n"
                                   "<|im_start|>assistant\n<think>\nEasy.\n</think>\n\n2<|im_end|>\n"),
    "Qwen 3, thinking by another name": Case(QWEN_3, [user("1+1"), answer("2", reasoning="Easy.", tool_calls=None)], True,
                                             "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n<think>\nEasy.\n</think>\n\n"
                                             "2<|im_end|>\n<|im_start|>assistant\n"),
    "Gemma": Case(GEMMA, [user("Hi "), answer("Hello"), user("Bye")], True,
                  "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
                  "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"),
    "RWKV": Case(RWKV, [SYSTEM, user(" Hi"), answer("Hello\n"), {"role": "tool", "content": "left out"}, user("Bye")], True,
                 "</s>System: Be brief.\n\nUser: Hi\n\nAssistant: Hello\n\nUser: Bye\n\nAssistant:"),
    "RWKV, whole": Case(RWKV, [user("Hi"), answer("Hello")], False, "</s>User: Hi\n\nAssistant: Hello\n\n"),
    "JSON": Case(JSON, [user('<é> & "\u2028"')], False,
                 '{"role": "user", "content": "<é> & \\"\u2028\\""}\n'
                 '{\n  "content": "<é> & \\"\u2028\\"",\n  "role": "user"\n}\n[1,null,true]"user"'),
    "what is not given": Case("{{ tools }}{{ documents }}{{ pad_token }}{{ name }}{{ tools is defined }}", [user("Hi")], False,
                              "NoneNoneTrue"),
    "no key without a value": Case("{{ 'name' in messages[0] }}{{ messages[0].keys() | list }}",
                                  [user("Hi") | {"name": None}], False,
                                   "False['role', 'content']"),
    "dict": Case("{{ dict(a=1).items() | list }}{{ dict.fromkeys([1, 2], 0) }}", [user("Hi")], False, "[('a', 1)]{1: 0, 2: 0}"),
    "namespace": Case("{% set ns = namespace({'a': 1}, self=2) %}{% set ns.b = 3 %}{{ ns.a ~ ns.self ~ ns.b }}",
                      [user("Hi")], False,
                      "123"),
    "line endings": Case("a\r\nb {# no #}\r\n{{ messages[0].content }}\r\n", [user("x\r\ny")], False, "a\nb x\r\ny"),
    "one line break at the end": Case("a\n\n", [user("Hi")], False, "a\n"),
    "no escapes": Case("{{ messages[0].content }}{{ messages[0].content | e }}", [user("<&>")], False, "<&>&lt;&amp;&gt;"),
}
