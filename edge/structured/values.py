"""A parameter's value as it stands between its tags, by the parameter's JSON schema.

Strings stand there as they are, everything else as JSON; `tool_calls.cast_value` makes values of
it again. A value is written so that this reading gives what the schema asks for, whatever else the
text might look like.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import Any

from mimo_edge.errors import ConstraintError
from mimo_edge.structured.lark import Lark, json_value, literal, pattern
from mimo_edge.tool_calls import JSON_TYPES, cast_value, referred, unescape

# Every value ends with this, in the same terminal: the tag is then never taken for text.
END = literal("</parameter>\n")

_ANNOTATIONS = {"title", "description", "default", "examples", "deprecated", "name", "$comment"}
_ANNOTATIONS |= {"readOnly", "writeOnly", "$schema", "$id", "$defs", "definitions"}
_INTEGER = r"-?(0|[1-9][0-9]{0,17})"
# Longer numbers and exponents than these are no longer what a float can hold.
_NUMBER = _INTEGER + r"(\.[0-9]{1,18})?([eE][+-]?[0-9]{1,2})?"
_SCALARS = {
    "integer": _INTEGER,
    "number": _NUMBER,
    "boolean": r"[Tt]rue|[Ff]alse",  # Python's templates write True
    "null": "null",
}
_BLANK = r"[\s\x1c-\x1f]*"  # what Python strips
# What a text must not be, when a value of that type may stand in the same place.
_LOOKS_LIKE = {
    "integer": _BLANK + r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?" + _BLANK,
    "number": _BLANK + r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?" + _BLANK,
    "boolean": _BLANK + r"(?i:true|false)" + _BLANK,
    "null": _BLANK + r"null" + _BLANK,
    "array": _BLANK + r"\[(?s:.*)",
    "object": _BLANK + r"\{(?s:.*)",
}
_BOUNDS = {
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
}
_TWO = r"([0-1][0-9]|2[0-3])"
_DATE = r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
_TIME = _TWO + r":[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?([Zz]|[+-]" + _TWO + r":[0-5][0-9])"
_OCTET = r"(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}[Tt]{_TIME}",
    "uuid": r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "ipv4": rf"({_OCTET}\.){{3}}{_OCTET}",
    "email": r"[A-Za-z0-9_%+-]+(\.[A-Za-z0-9_%+-]+)*@([A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,63}",
    "uri": r"[A-Za-z][A-Za-z0-9+.-]*:[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]+",
}


class Values:
    """Writes the values of one tool's parameters into a grammar. `root` is the schema of all
    parameters, where `$ref` looks."""

    def __init__(self, lark: Lark, root: Mapping[str, Any]) -> None:
        self._lark = lark
        self._root = root
        self._defs = {key: root[key] for key in ("$defs", "definitions") if key in root}

    def free(self) -> str:
        """Any text, up to its closing tag."""
        return self._lark.terminal(f"{self._text()} {END}")

    def value(self, schema: Any, where: str) -> str:
        """A value of `schema` with its closing tag, as a name in the grammar.

        Raises ConstraintError when the format cannot hold such values, or this cannot express them.
        """
        branches = self._branches(schema, where, 0)
        if any(not branch for branch in branches):
            return self.free()
        kinds = {branch.get("type") for branch in branches}
        strings = [b for b in branches if b.get("type") == "string" and "enum" not in b]
        literals = [v for b in branches if "enum" in b for v in b["enum"]]
        others = [b for b in branches if b.get("type") != "string" and "enum" not in b]
        terminals = [literal(self._written(v, schema, where)) for v in literals]
        names: list[str] = []
        compound = [b for b in others if b["type"] not in _SCALARS or _BOUNDS & b.keys()]
        if compound and strings:
            if any(b["type"] in _SCALARS for b in compound):
                raise ConstraintError(f"{where}: texts beside numbers with bounds", _HINT)
            others = [b for b in others if b not in compound]
        if compound:
            mine = compound if strings else others
            any_of = mine[0] if len(mine) == 1 else {"anyOf": mine}
            body = json_value({**any_of, **self._defs}, escapes=False)
            names.append(self._lark.rule(f"{body} {END}"))
        if not compound or strings:
            terminals += [pattern(_SCALARS[b["type"]]) for b in others]
        terminals += [self._string(b, kinds, where) for b in strings]
        if terminals:
            names.append(self._lark.terminal(f"({' | '.join(terminals)}) {END}"))
        return names[0] if len(names) == 1 else self._lark.rule(" | ".join(names))

    def _branches(self, schema: Any, where: str, depth: int) -> list[dict[str, Any]]:
        """The schema as alternatives, each of one type or an enumeration; {} is anything."""
        if schema is True:
            return [{}]
        if not isinstance(schema, Mapping):
            raise ConstraintError(f"{where}: nothing fits the schema {schema!r}")
        if depth > 16:
            raise ConstraintError(f"{where}: its schema refers to itself")
        said = {key: value for key, value in schema.items() if key not in _ANNOTATIONS}
        if not said:
            return [{}]
        for key in ("$ref", "anyOf", "oneOf", "allOf"):
            if key in said:
                if said.keys() - {key, "type"}:
                    raise ConstraintError(f"{where}: {key} beside other keywords", _HINT)
                return self._combined(key, said[key], where, depth)
        kinds = said.get("type")
        kinds = kinds if isinstance(kinds, list) else [kinds]
        if not all(kind is None or isinstance(kind, str) for kind in kinds):
            raise ConstraintError(f"{where}: a schema of type {said['type']!r}", _HINT)
        if "enum" in said or "const" in said:
            if len(said.keys() - {"type"}) > 1:
                raise ConstraintError(f"{where}: an enumeration beside other keywords", _HINT)
            return [_enumeration(said.get("enum", [said.get("const")]), kinds, where)]
        if not kinds or not all(kind in {*_LOOKS_LIKE, "string"} for kind in kinds):
            raise ConstraintError(f"{where}: a schema of type {said.get('type')!r}", _HINT)
        return [{**said, "type": kind} for kind in kinds]

    def _combined(self, key: str, inner: Any, where: str, depth: int) -> list[dict[str, Any]]:
        if key == "$ref":
            return self._branches(self._resolved(inner, where), where, depth + 1)
        if not isinstance(inner, list) or not inner:
            raise ConstraintError(f"{where}: {key} is no list of schemas")
        if key == "allOf" and len(inner) > 1:
            raise ConstraintError(f"{where}: allOf of several schemas", _HINT)
        found = [branch for one in inner for branch in self._branches(one, where, depth + 1)]
        kinds = [branch.get("type") for branch in found]
        if key == "oneOf" and (None in kinds or len(set(kinds)) < len(kinds)):
            raise ConstraintError(f"{where}: oneOf of schemas that may overlap", "use anyOf")
        return found

    def _resolved(self, pointer: Any, where: str) -> Any:
        """What a $ref into the tool's own definitions means."""
        found = referred(pointer, self._defs)
        if found is None:
            raise ConstraintError(f"{where}: $ref {pointer!r}", "refer to #/$defs/NAME")
        return found

    def _written(self, value: Any, schema: Any, where: str) -> str:
        """The text that is read as `value`. Raises ConstraintError when none is."""
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        tags = "</parameter>", "</tool_call>", "\n<parameter="
        if unescape(text) != text or any(tag in text for tag in tags):
            text = html.escape(text, quote=False)
        read = cast_value(text, schema, self._root)
        if read != value or isinstance(read, bool) != isinstance(value, bool):
            raise ConstraintError(f"{where}: the value {value!r} would be read as {read!r}", _HINT)
        return text

    def _string(self, schema: Mapping[str, Any], kinds: set[Any], where: str) -> str:
        """A text of the string schema that is not read as one of the other `kinds`."""
        parts = [self._text()]
        unlike = [_LOOKS_LIKE[kind] for kind in sorted(kinds - {"string", None})]
        parts += [f"~{pattern(look)}" for look in unlike]
        for key, wanted in schema.items():
            if key == "pattern":
                parts.append(pattern(_searched(wanted, where)))
            elif key == "format":
                if not isinstance(wanted, str) or wanted not in FORMATS:
                    known = ", ".join(FORMATS)
                    raise ConstraintError(f"{where}: format {wanted!r}", f"known are {known}")
                parts.append(pattern(FORMATS[wanted]))
            elif key in ("minLength", "maxLength"):
                low, high = schema.get("minLength", 0), schema.get("maxLength", "")
                parts.append(pattern(f"(?s:.{{{_count(low, where)},{_count(high, where)}}})"))
            elif key != "type":
                raise ConstraintError(f"{where}: {key} of a text", _HINT)
        if len(parts) > 1:  # an entity would become another text after it was checked
            parts.append(self._no_entity())
        return f"({' & '.join(dict.fromkeys(parts))})"

    def _text(self) -> str:
        """A value's text: valid UTF-8 that no reader takes for the end of the value."""
        tags = pattern(r"(?s:.*)(</parameter>|</tool_call>|\n<parameter=)(?s:.*)")
        return self._lark.terminal(f"{pattern('(?s:.*)')} & ~{tags}")

    def _no_entity(self) -> str:
        entity = pattern(r"(?s:.*)&#?[A-Za-z0-9]+;(?s:.*)")
        return f"~{entity}"


_HINT = 'simplify the schema, or give the tool "strict": false to leave its values free'


def _enumeration(values: Any, kinds: list[Any], where: str) -> dict[str, Any]:
    """A branch of the values that are of one of the types `kinds`, or of any if that is [None]."""
    if isinstance(values, list) and kinds != [None]:
        wanted = {*kinds, *(("integer",) if "number" in kinds else ())}
        values = [v for v in values if JSON_TYPES.get(type(v), "string") in wanted]
    if not isinstance(values, list) or not values:
        raise ConstraintError(f"{where}: the enumeration is empty")
    found = {JSON_TYPES.get(type(value), "string") for value in values}
    return {"enum": values, "type": found.pop() if len(found) == 1 else "string"}


def _searched(regex: Any, where: str) -> str:
    """A JSON schema's pattern, which may match anywhere, as one of the whole text."""
    if not isinstance(regex, str):
        raise ConstraintError(f"{where}: pattern {regex!r} is no text")
    core = regex
    start, core = core.startswith("^"), core.removeprefix("^")
    backslashes = len(core) - 1 - len(core[:-1].rstrip("\\")) if core.endswith("$") else 0
    end = core.endswith("$") and backslashes % 2 == 0
    core = core[:-1] if end else core
    if (start or end) and _alternates(core):
        raise ConstraintError(f"{where}: pattern {regex!r}", "write ^(a|b)$ instead of ^a|b$")
    any_text = "(?s:.*)"
    return f"{'' if start else any_text}({core}){'' if end else any_text}"


def _alternates(regex: str) -> bool:
    """Whether a regular expression has an alternative outside of all groups and classes."""
    depth, inside, escaped = 0, False, False
    for character in regex:
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif inside:
            inside = character != "]"
        elif character == "[":
            inside = True
        elif character in "()":
            depth += 1 if character == "(" else -1
        elif character == "|" and not depth:
            return True
    return False


def _count(value: Any, where: str) -> str:
    if value == "":
        return ""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConstraintError(f"{where}: a length of {value!r}")
    return str(value)
