# ruff: noqa: E501 (a template has no harmless place to break a line)
"""MiMo-V2's chat template, for models that came without one.

Source: spec section 1.3. Turns follow each other without a newline; every assistant turn of
the history has a think pair; results of tools share one turn.
"""

DEFAULT_SYSTEM = "You are MiMo, a helpful AI assistant engineered by Xiaomi."

_SCHEMA_MACRO = r"""
{%- macro others(fields, known) -%}
{%- for key, value in fields.items() if key not in known -%}
{{- '\n<' ~ key ~ '>' ~ (value if value is string else value | tojson if value is mapping or value is iterable else value | string) ~ '</' ~ key ~ '>' -}}
{%- endfor -%}
{%- endmacro -%}
"""

_TOOLS = r"""
{%- if tools -%}
{{- '\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou have access to the following functions:\n\n<tools>' -}}
{%- for tool in tools -%}
{%- set function = tool.function if tool.function is defined else tool -%}
{{- '\n<function>\n<name>' ~ function.name ~ '</name>' -}}
{%- if function.description is defined -%}{{- '\n<description>' ~ function.description | trim ~ '</description>' -}}{%- endif -%}
{{- '\n<parameters>' -}}
{%- set schema = function.parameters if function.parameters is mapping else {} -%}
{%- for name, fields in (schema.get('properties') or {}).items() -%}
{{- '\n<parameter>\n<name>' ~ name ~ '</name>' -}}
{%- if fields.type is defined -%}{{- '\n<type>' ~ fields.type ~ '</type>' -}}{%- endif -%}
{%- if fields.description is defined -%}{{- '\n<description>' ~ fields.description | trim ~ '</description>' -}}{%- endif -%}
{{- others(fields, ['name', 'type', 'description']) ~ '\n</parameter>' -}}
{%- endfor -%}
{{- others(schema, ['type', 'properties']) ~ '\n</parameters>' -}}
{{- others(function, ['type', 'name', 'description', 'parameters']) ~ '\n</function>' -}}
{%- endfor -%}
{{- '\n</tools>\n\nFor each function call, output the function name and arguments in the following format:\n<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>value_1</parameter>\n<parameter=example_parameter_2>This is the value for the second parameter\nthat can span\nmultiple lines</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\n- Function calls MUST follow the specified format: an inner <function=...></function> block must be nested within <tool_call></tool_call> XML tags\n- DO NOT use function calls inside <think></think> tags.\n- The value enclosed between parameter tags is preserved exactly as-is, including newlines and spaces.\n</IMPORTANT>' -}}
{%- endif -%}
"""

_TURNS = r"""
{%- for message in turns -%}
{%- if message.role == 'assistant' -%}
{%- set content = message.content -%}
{%- set reasoning = message.reasoning_content or '' -%}
{%- if not reasoning and '</think>' in content -%}
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1] -%}
{%- set content = content.split('</think>')[-1] -%}
{%- endif -%}
{{- '<|im_start|>assistant\n<think>' ~ reasoning ~ '</think>' ~ content -}}
{%- for call in message.tool_calls or [] -%}
{%- set function = call.function if call.function is defined else call -%}
{{- '<tool_call>\n<function=' ~ function.name ~ '>\n' -}}
{%- for name, value in (function.arguments or {}).items() -%}
{{- '<parameter=' ~ name ~ '>' ~ (value if value is string else value | tojson if value is mapping or value is iterable else value | string) ~ '</parameter>\n' -}}
{%- endfor -%}
{{- '</function>\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>' -}}
{%- elif message.role == 'tool' -%}
{%- if loop.first or loop.previtem.role != 'tool' -%}{{- '<|im_start|>tool\n' -}}{%- endif -%}
{{- '<tool_response>\n' ~ message.content ~ '\n</tool_response>\n' -}}
{%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>' -}}{%- endif -%}
{%- else -%}
{{- '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think></think>' -}}{%- endif -%}
{%- endif -%}
"""

MIMO_TEMPLATE = (
    _SCHEMA_MACRO
    + r"""
{%- if messages and messages[0].role == 'system' -%}
{%- set system = messages[0].content -%}
{%- set turns = messages[1:] -%}
{%- else -%}
{%- set system = '"""
    + DEFAULT_SYSTEM
    + r"""' -%}
{%- set turns = messages -%}
{%- endif -%}
{{- '<|im_start|>system\n' ~ system -}}
"""
    + _TOOLS
    + r"""{{- '<|im_end|>' -}}"""
    + _TURNS
)
