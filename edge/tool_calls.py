"""MiMo's tool-call format, read from text as it is generated.

    <tool_call>
    <function=NAME>
    <parameter=P>VALUE</parameter>
    </function>
    </tool_call>

Entities (`&lt;`) of values are replaced, and they are cast by the tool's JSON schema; arrays and
objects that are JSON as they stand are read as they stand. Text that only looks like a call stays
text and is reported as malformed: a model's mistake never raises.
Source: spec section 1.3; sgl-project/sglang:python/sglang/srt/function_call/mimo_detector.py.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mimo_edge.errors import UsageError

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>")
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>")
# What may follow a value: anything else starting with '<' is part of the value.
_AFTER_VALUE = re.compile(r"\s*(?:<parameter=[^>\n]+>|</function>|</tool_call>|\Z)")
_ENTITY = re.compile(r"&(?:#[0-9]+|#[xX][0-9a-fA-F]+|[A-Za-z][A-Za-z0-9]*);")
# Values nested deeper are text: whoever copies or writes them recursively would fall over.
_MAX_DEPTH = 64


@dataclass(frozen=True)
class ToolCall:
    """One call the model asks for. `arguments` are cast by the tool's schema."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Malformed:
    """Text that began like a tool call and is not one; `why` says what is wrong."""

    text: str
    why: str


Event = str | ToolCall | Malformed


def tool_schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Parameter schema by tool name, from OpenAI-style tools (wrapped in "function" or bare).

    Raises UsageError on a tool without a name, a double name or a schema that is no object.
    """
    if isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence):
        raise UsageError(f"tools are a {type(tools).__name__}, not a list")
    schemas: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        if not isinstance(tool, Mapping):
            raise UsageError(f"a tool is {type(tool).__name__}, not an object")
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise UsageError("a tool has no name", 'expected {"function": {"name": ...}}')
        parameters = function.get("parameters") or {}
        properties = parameters.get("properties", {}) if isinstance(parameters, Mapping) else None
        if not isinstance(properties, Mapping):
            raise UsageError(f"the parameters of tool {name!r} are not a JSON schema object")
        if name in schemas:
            raise UsageError(f"two tools are named {name!r}")
        schemas[name] = parameters
    return schemas


class ToolCallParser:
    """Splits generated text into text and tool calls, fed in pieces of any size.

    Text is released as soon as it cannot be the start of a call; a call is released when
    it is complete. `finish` releases what is left, reading a call cut off at its end if
    everything but closing tags is there.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._schemas = tool_schemas(tools)
        self._buffer = ""
        self._scanned = 0  # where a search for the closing tag may start
        self._inside = False

    def feed(self, text: str) -> list[Event]:
        """Events that became certain with this text."""
        self._buffer += text
        events: list[Event] = []
        while self._step(events):
            pass
        return events

    def finish(self) -> list[Event]:
        """Events of the rest; the parser is empty afterwards."""
        rest, self._buffer = self._buffer, ""
        inside, self._inside, self._scanned = self._inside, False, 0
        if not rest:
            return []
        return [self._parse(rest)] if inside else [rest]

    def _step(self, events: list[Event]) -> bool:
        """Consume one text run or one call; False when more input is needed."""
        if not self._inside:
            start = self._buffer.find(OPEN)
            free = start if start >= 0 else len(self._buffer) - held_back(self._buffer, (OPEN,))
            if free:
                events.append(self._buffer[:free])
                self._buffer = self._buffer[free:]
            self._inside, self._scanned = start >= 0, len(OPEN)
            return start >= 0
        end = self._close(self._buffer)
        if end is None:
            return False
        events.append(self._parse(self._buffer[:end]))
        self._buffer, self._inside = self._buffer[end:], False
        return True

    def _close(self, text: str) -> int | None:
        """End of the call: after its closing tag, or before the next call when it has none.

        Decided by the text before the tag alone, so pieces of any size give the same calls.
        An opening tag inside a parameter value that is still open is that value's text.
        """
        while True:
            close, reopen = text.find(CLOSE, self._scanned), text.find(OPEN, self._scanned)
            if reopen >= 0 and (close < 0 or reopen < close):
                if text.rfind("<parameter=", 0, reopen) <= text.rfind("</parameter>", 0, reopen):
                    return reopen
                self._scanned = reopen + len(OPEN)
                continue
            if close >= 0:
                return close + len(CLOSE)
            self._scanned = max(self._scanned, len(text) - len(CLOSE) + 1)
            return None

    def _parse(self, text: str) -> ToolCall | Malformed:
        body = text[len(OPEN) :]
        if body.endswith(CLOSE):
            body = body[: -len(CLOSE)]
        head = _FUNCTION.match(body)
        if head is None:
            return Malformed(text, "no <function=NAME> after <tool_call>")
        name = head[1].strip()
        if name not in self._schemas:
            return Malformed(text, f"unknown function {name!r}")
        properties = self._schemas[name].get("properties", {})
        arguments: dict[str, Any] = {}
        at = head.end()
        while (parameter := _PARAMETER.match(body, at)) is not None:
            key = parameter[1].strip()
            value, at = _value(body, parameter.end())
            if key in arguments:
                return Malformed(text, f"parameter {key!r} is given twice")
            arguments[key] = cast_value(value, properties.get(key), self._schemas[name])
        if body[at:].strip() not in ("", "</function>"):
            return Malformed(
                text, f"unexpected text in the call of {name!r}: {body[at : at + 40]!r}"
            )
        return ToolCall(name, arguments)


def parse_tool_calls(text: str, tools: Sequence[Mapping[str, Any]]) -> list[Event]:
    """Split a whole answer into text, ToolCall and Malformed, in order."""
    parser = ToolCallParser(tools)
    return parser.feed(text) + parser.finish()


def held_back(text: str, markers: Sequence[str]) -> int:
    """Characters at the end of `text` that may be the start of one of `markers`."""
    longest = 0
    for marker in markers:
        for size in range(min(len(marker) - 1, len(text)), longest, -1):
            if text.endswith(marker[:size]):
                longest = size
                break
    return longest


def _value(body: str, start: int) -> tuple[str, int]:
    """The value at `start` and where reading goes on.

    It ends at the first </parameter> that is followed by another parameter or the end of
    the function, so a value may hold '<', newlines or even the tag's own text. Without
    any, it ends where the next parameter or the end of the function begins.
    """
    at = start
    while (close := body.find("</parameter>", at)) >= 0:
        end = close + len("</parameter>")
        between = _PARAMETER_START.search(body, start, close)
        if between is not None:
            return body[start : between.start()], between.end() - len(between[1])
        if _AFTER_VALUE.match(body, end):
            return body[start:close], end
        at = end
    for tag in ("\n<parameter=", "</function>"):
        if (stop := body.find(tag, start)) >= 0:
            return body[start:stop].rstrip("\n"), stop
    return body[start:].rstrip("\n"), len(body)


# A parameter that starts on its own line before the previous one was closed.
_PARAMETER_START = re.compile(r"\n(<parameter=[^>\n]+>)")


def cast_value(text: str, schema: Any, root: Any = None) -> Any:
    """A parameter's text as the type its JSON schema asks for; `root` is the schema of all
    parameters, where a $ref looks.

    "null" is None where the schema allows it or says nothing. What does not parse as the
    asked type stays the unescaped text, so nothing the model said is lost.
    """
    raw, text = text, unescape(text)
    types = _types(schema, root)
    if text == "null" and (not types or "null" in types or "string" not in types):
        return None
    for kind in types:
        # JSON has escapes of its own: an entity inside of its strings is meant as it stands.
        cast = _cast(raw, kind) if kind in ("array", "object") else _MISS
        if cast is _MISS:
            cast = _cast(text, kind)
        if cast is not _MISS:
            return cast
    return text


def unescape(text: str) -> str:
    """Text with HTML's entities replaced. They end with a semicolon: HTML's older names without one
    would turn `?a=1&copy=2` into something else."""
    return _ENTITY.sub(lambda found: html.unescape(found[0]), text)


_MISS: Any = object()
JSON_TYPES: dict[type, str] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
    list: "array",
    dict: "object",
}
"""Python types of values that are no text, by their names in JSON schemas."""


def _types(schema: Any, root: Any = None, depth: int = 0) -> list[str]:
    """JSON types a schema allows, strings last because every text is one."""
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return []
    kind = schema.get("type")
    types = [name for name in [kind, *_list(kind)] if isinstance(name, str)]
    for key in ("anyOf", "oneOf", "allOf"):
        for branch in _list(schema.get(key)):
            types += _types(branch, root, depth + 1)
    if not types and "$ref" in schema:
        types = _types(referred(schema["$ref"], root), root, depth + 1)
    if not types:
        values = [*_list(schema.get("enum")), *([schema["const"]] if "const" in schema else [])]
        types = [JSON_TYPES.get(type(value), "string") for value in values]
    return sorted(dict.fromkeys(types), key=lambda kind: kind == "string")


def referred(pointer: Any, root: Any) -> Any:
    """What a $ref into `root` means; None when it leads elsewhere or nowhere."""
    if not isinstance(pointer, str) or not pointer.startswith("#/"):
        return None
    for part in pointer[2:].split("/"):
        part = part.replace("~1", "/").replace("~0", "~")
        root = root.get(part) if isinstance(root, Mapping) else None
    return root


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _cast(text: str, kind: str) -> Any:
    stripped = text.strip()
    if kind == "string":
        return text
    if kind == "boolean":
        return {"true": True, "false": False}.get(stripped.lower(), _MISS)
    if kind == "null":
        return None if stripped == "null" else _MISS
    if kind not in ("integer", "number", "array", "object"):
        return _MISS
    try:
        value = json.loads(stripped)
    except (ValueError, RecursionError):
        return _MISS
    if not is_sound(value):
        return _MISS
    if kind == "array":
        return value if isinstance(value, list) else _MISS
    if kind == "object":
        return value if isinstance(value, dict) else _MISS
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _MISS
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value if kind == "number" or isinstance(value, int) else _MISS


def is_sound(value: Any, depth: int = 0) -> bool:
    """Whether a parsed value is JSON that anyone can write again.

    Python's reader also takes NaN, numbers that overflow to infinity and halves of surrogate
    pairs; writing those fails.
    """
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        return depth < _MAX_DEPTH and all(is_sound(item, depth + 1) for item in value)
    return True
