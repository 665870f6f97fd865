"""The grammar of MiMo's tool calls, from the tools of a session.

A call names one of the tools and gives its parameters in any order, each at most once, the
required ones always, with values that fit their schemas: `ToolCallParser` reads every such text
as that call.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mimo_edge.errors import ConstraintError
from mimo_edge.structured.lark import Lark, literal, markup
from mimo_edge.structured.limits import check_schema
from mimo_edge.structured.values import Values
from mimo_edge.tokenizer import Tokenizer
from mimo_edge.tool_calls import CLOSE, tool_schemas

MAX_TOOLS = 256
# A rule remembers in the bits of one number which parameters were given.
MAX_PARAMETERS = 64
# What a name cannot hold: the tag around it would end there.
_NAME = re.compile(r"[^>\n\s]([^>\n]*[^>\n\s])?")
_KNOWN = {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
_KNOWN |= {"title", "description", "default", "examples", "strict", "$schema", "$id", "$comment"}


def call_rule(lark: Lark, tools: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> str:
    """The name of a rule for what follows `<tool_call>`, its closing tag included.

    A tool with `"strict": false` gets its name and parameter names enforced, its values are any
    text. Raises ConstraintError for names and schemas that the format cannot hold.
    """
    if len(tools) > MAX_TOOLS:
        raise ConstraintError(f"{len(tools)} tools, at most {MAX_TOOLS} can be enforced")
    loose = {_name(tool) for tool in tools if _function(tool).get("strict") is False}
    options = []
    for name, schema in tool_schemas(tools).items():
        if not _NAME.fullmatch(name):
            raise ConstraintError(f"a tool cannot be called {name!r}")
        plain = check_schema(schema, f"the parameters of tool {name}")
        rest = _parameters(lark, name, plain, name in loose)
        options.append(f"{literal(f'{chr(10)}<function={name}>{chr(10)}')} {rest}")
    body = lark.rule("\n  | ".join(options))
    return lark.rule(f"{body} {markup(tokenizer, CLOSE)}")


def select_tool(tools: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """The tool of that name. Raises ConstraintError."""
    for tool in tools:
        if _name(tool) == name:
            return tool
    raise ConstraintError(f"there is no tool {name!r}", "name one of the tools given")


def _parameters(lark: Lark, tool: str, schema: dict[str, Any], loose: bool) -> str:
    """The rest of a call from its first parameter on, as an item of a rule."""
    unknown = [key for key in schema if key not in _KNOWN]
    if unknown and not loose:
        raise ConstraintError(
            f"the parameters of tool {tool} use {unknown[0]!r}, which cannot be enforced",
            'describe them with properties and required, or give the tool "strict": false',
        )
    required = schema.get("required") or []
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise ConstraintError(f"tool {tool}: required is {required!r}, not a list of names")
    properties = {**schema.get("properties", {})}
    properties |= {name: {} for name in required if name not in properties}
    if len(properties) > MAX_PARAMETERS:
        raise ConstraintError(
            f"tool {tool} has {len(properties)} parameters, "
            f"at most {MAX_PARAMETERS} can be enforced"
        )
    end = literal("</function>\n")
    if not properties:
        return end
    values = Values(lark, schema)
    # The bits of required parameters come first: all of them set is one comparison.
    must = [name for name in properties if name in required]
    order = [*must, *(name for name in properties if name not in must)]
    lines = [f"{end} %if is_ones([0:{len(must)}])" if must else end]
    rule = lark.new_rule()
    for bit, name in enumerate(order):
        if not _NAME.fullmatch(name):
            raise ConstraintError(f"tool {tool} cannot have a parameter called {name!r}")
        where = f"parameter {name} of tool {tool}"
        value = values.free() if loose else values.value(properties[name], where)
        tag = literal(f"<parameter={name}>")
        lines.append(f"{tag} {value} {rule}::set_bit({bit}) %if bit_clear({bit})")
    lark.define(rule, "::_ : " + "\n  | ".join(lines))
    return f"{rule}::0x0"


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    inner: Mapping[str, Any] = tool.get("function", tool)
    return inner


def _name(tool: Mapping[str, Any]) -> str:
    return str(_function(tool).get("name"))
