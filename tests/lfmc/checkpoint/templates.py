"""Chat templates in the styles of published models; each uses another part of the language."""

from __future__ import annotations

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

LFM2 = """{{- bos_token -}}
{%- set system_prompt = "" -%}
{%- set ns = namespace(system_prompt="") -%}
{%- if messages[0]["role"] == "system" -%}
    {%- set ns.system_prompt = messages[0]["content"] -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{%- if tools -%}
    {%- set ns.system_prompt = ns.system_prompt + ("\\n" if ns.system_prompt else "") -%}
    {%- set ns.system_prompt = ns.system_prompt + "List of tools: <|tool_list_start|>[" -%}
    {%- for tool in tools -%}
        {%- if tool is not string -%}{%- set tool = tool | tojson -%}{%- endif -%}
        {%- set ns.system_prompt = ns.system_prompt + tool -%}
        {%- if not loop.last -%}{%- set ns.system_prompt = ns.system_prompt + ", " -%}{%- endif -%}
    {%- endfor -%}
    {%- set ns.system_prompt = ns.system_prompt + "]<|tool_list_end|>" -%}
{%- endif -%}
{%- if ns.system_prompt -%}
    {{- "<|im_start|>system\\n" + ns.system_prompt + "<|im_end|>\\n" -}}
{%- endif -%}
{%- for message in messages -%}
    {{- "<|im_start|>" + message["role"] + "\\n" -}}
    {%- set content = message["content"] -%}
    {%- if content is not string -%}{%- set content = content | tojson -%}{%- endif -%}
    {{- content + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}
"""

GENERATION = """{{- bos_token -}}
{%- set keep_past_thinking = keep_past_thinking | default(false) -%}
{%- for message in messages -%}
    {{- "<|im_start|>" + message["role"] + "\\n" -}}
    {%- if message["role"] == "assistant" -%}
        {%- generation -%}
            {%- set content = message["content"] -%}
            {%- if not keep_past_thinking and not loop.last and "</think>" in content -%}
                {%- set content = content.split("</think>")[-1] | trim -%}
            {%- endif -%}
            {{- content + "<|im_end|>" -}}
        {%- endgeneration -%}
        {{- "\\n" -}}
    {%- else -%}
        {{- message["content"] + "<|im_end|>\\n" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}
"""

DATED = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%Y") %}
{%- endif %}
{{- "<|im_start|>system\\nToday: " + date_string + "<|im_end|>" }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n\\n' }}
{%- endif %}
"""

JOINED_JSON = """{{ bos_token }}{% for message in messages %}{{ "<|im_start|>" + message.role
+ " " + (message | tojson) + "<|im_end|>" }}{% endfor %}{{ '<tools>' + (tools | tojson(indent=2)) }}
"""

LOOP_CONTROLS = """{{ bos_token }}{% for message in messages %}
{%- if message.role == "system" %}{% continue %}{% endif %}
{%- if loop.index > 3 %}{% break %}{% endif %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
"""

MACROS = """{%- macro turn(role, text) -%}
<|im_start|>{{ role }}
{{ text }}<|im_end|>
{%- endmacro -%}
{%- for message in messages if message.content %}
{{ turn(message.role, message.content) }}
{%- endfor %}
{% if tools is not none %}{{ turn("system",
tools | map(attribute="function") | map(attribute="name") | join(", ")) }}{% endif %}
<|im_start|>assistant
"""

ALTERNATING = """{{ bos_token }}{% for message in messages %}
{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}
{{ raise_exception('unknown role ' + message['role']) }}
{%- endif %}
{%- if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]
{%- elif message['role'] == 'assistant' %} {{ message['content'] + eos_token }}
{%- endif %}
{%- endfor %}"""

LAST_QUERY = """{%- set ns = namespace(last=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if not ns.found and message.role == "user" and message.content is string %}
        {%- set ns.last, ns.found = index, true %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if loop.index0 > ns.last and message.content.startswith("a") %}<think>{% endif %}
    {{- message.content.strip() + '<|im_end|>\\n' }}
{%- endfor %}
{%- if tools %}{{- "\\n".join(tools | map("tojson") | list) }}{% endif %}
{{- '<|im_start|>assistant\\n' }}
"""

UNICODE_JSON = """{{ bos_token }}{{ messages | tojson(ensure_ascii=True) }}
{{ messages | tojson(separators=(",", ":"), sort_keys=True) }}
{{ unk_token }}{{ pad_token }}{{ eos_token }}{{ missing_token }}
{{ tools | length if tools else "-" }}
"""

TEMPLATES: dict[str, str] = {
    "chatml": CHATML,
    "lfm2": LFM2,
    "generation": GENERATION,
    "dated": DATED,
    "joined-json": JOINED_JSON,
    "loop-controls": LOOP_CONTROLS,
    "macros": MACROS,
    "alternating": ALTERNATING,
    "last-query": LAST_QUERY,
    "unicode-json": UNICODE_JSON,
}
