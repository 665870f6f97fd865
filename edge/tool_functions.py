"""Tools from Python functions: name, schema and descriptions from signature and docstring.

    def set_volume(percent: int, device: Literal["speaker", "headset"] = "speaker") -> str:
        \"\"\"Set the volume.

        Args:
            percent: 0 to 100
        \"\"\"

becomes the tool a model is shown (OpenAI's function format), and `Tool.call` checks what the model
made of it before the function sees it.
"""

from __future__ import annotations

import enum
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mimo_edge.errors import UsageError

_PLAIN: dict[Any, str] = {str: "string", bool: "boolean", int: "integer", float: "number"}
_KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}
_SECTION = re.compile(r"^(Args|Arguments|Parameters):\s*$", re.MULTILINE)
_NEXT_SECTION = re.compile(r"^\w[\w ]*:\s*$", re.MULTILINE)
_ENTRY = re.compile(r"^ +\*{0,2}(\w+)(?: *\([^)]*\))?: *(.+(?:\n {8,}.+)*)", re.MULTILINE)
_FIELD = re.compile(r"^:param (?:[\w\[\], |.]+ )?(\w+): *(.+(?:\n[ \t]+.+)*)", re.MULTILINE)


class ArgumentError(Exception):
    """The model's arguments do not fit the tool; the message is meant for the model."""


@dataclass(frozen=True)
class Tool:
    """A function the model may call. `parameters` is its JSON schema (type "object")."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    function: Callable[..., Any]
    enums: Mapping[str, type[enum.Enum]] = field(default_factory=dict)
    """Parameters that the function takes as members of an Enum."""

    @property
    def spec(self) -> dict[str, Any]:
        """The tool in OpenAI's format, as `Runtime.session(tools=...)` takes it."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": dict(self.parameters),
            },
        }

    def call(self, arguments: Mapping[str, Any]) -> Any:
        """Call the function. Raises ArgumentError before it when they do not fit the schema."""
        schema = self.parameters.get("properties", {})
        unknown = [name for name in arguments if name not in schema]
        if unknown:
            raise ArgumentError(f"{self.name} has no parameter {unknown[0]}")
        for name in self.parameters.get("required", ()):
            if name not in arguments:
                raise ArgumentError(f"{self.name} needs {name}")
        for name, value in arguments.items():
            _check(name, value, schema[name])
        values = {
            name: self.enums[name](value) if name in self.enums else value
            for name, value in arguments.items()
        }
        return self.function(**values)


def tool(function: Callable[..., Any], schema: Mapping[str, Any] | None = None) -> Tool:
    """The tool a function makes. With `schema` (OpenAI's format, wrapped or bare) name,
    description and parameters are taken from there, not from the function.

    Raises UsageError on a parameter without a type, a type with no JSON form, `*args`, a coroutine
    function or a schema without a name.
    """
    if not callable(function):
        raise UsageError(f"a tool is {type(function).__name__}, not a function")
    if inspect.iscoroutinefunction(function):
        raise UsageError(
            f"tool {_name(function)} is a coroutine function", "give a function that returns"
        )
    if schema is not None:
        inner = schema.get("function", schema)
        name = inner.get("name") if isinstance(inner, Mapping) else None
        if not isinstance(name, str) or not name:
            raise UsageError("a tool has no name", 'expected {"name": ..., "parameters": ...}')
        parameters = inner.get("parameters") or {"type": "object", "properties": {}}
        return Tool(name, str(inner.get("description", "")), parameters, function)
    return _from_signature(function)


def _from_signature(function: Callable[..., Any]) -> Tool:
    name = _name(function)
    text = inspect.getdoc(function) or ""
    about = _described(text)
    try:
        hints = typing.get_type_hints(function)
        signature = inspect.signature(function)
    except (NameError, TypeError, ValueError) as error:
        raise UsageError(f"tool {name}: its signature cannot be read: {error}") from error
    properties: dict[str, Any] = {}
    required: list[str] = []
    enums: dict[str, type[enum.Enum]] = {}
    for parameter in signature.parameters.values():
        where = f"tool {name}, parameter {parameter.name}"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UsageError(f"{where}: a model gives parameters by name, {parameter} has none")
        if parameter.name not in hints:
            raise UsageError(f"{where} has no type", "annotate it: str, int, Literal[...], ...")
        hint = hints[parameter.name]
        properties[parameter.name] = _schema(hint, where)
        if parameter.name in about:
            properties[parameter.name]["description"] = about[parameter.name]
        if parameter.default is parameter.empty:
            required.append(parameter.name)
        for option in (hint, *_options(hint)):
            if isinstance(option, type) and issubclass(option, enum.Enum):
                enums[parameter.name] = option
    parameters = {"type": "object", "properties": properties, "required": required}
    summary = " ".join(re.split(r"\n\s*\n", text, maxsplit=1)[0].split())
    return Tool(name, summary, parameters, function, enums)


def _name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", "")
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise UsageError(
            f"a tool needs a name, {name or type(function).__name__!r} is none",
            "give a named function, or tool(function, schema)",
        )
    return str(name)


def _described(text: str) -> dict[str, str]:
    """What a docstring says of each parameter, in Google's form or Sphinx's."""
    found = {m[1]: " ".join(m[2].split()) for m in _FIELD.finditer(text)}
    start = _SECTION.search(text)
    if start:
        rest = text[start.end() :]
        end = _NEXT_SECTION.search(rest)
        section = rest[: end.start()] if end else rest
        found |= {m[1]: " ".join(m[2].split()) for m in _ENTRY.finditer(section)}
    return found


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union type; nothing for other types."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return ()


def _schema(hint: Any, where: str) -> dict[str, Any]:
    if hint is Any:
        return {}
    if hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    if hint is type(None):
        return {"type": "null"}
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return _enumerated(args, where)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _enumerated(tuple(member.value for member in hint), where)
    if options := _options(hint):
        some = [option for option in options if option is not type(None)]
        if len(some) == 1:  # left out or given: a model has no use for null
            return _schema(some[0], where)
        return {"anyOf": [_schema(option, where) for option in some]}
    if hint is list or origin in (list, Sequence):
        return {"type": "array", "items": _schema(args[0], where) if args else {}}
    if hint is dict or origin in (dict, Mapping):
        return {"type": "object"}
    raise UsageError(
        f"{where}: type {hint} has no JSON form",
        "use str, int, float, bool, Literal, Enum, list, dict or | None",
    )


def _enumerated(values: tuple[Any, ...], where: str) -> dict[str, Any]:
    kinds = {_PLAIN.get(type(value)) for value in values}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is None:
        raise UsageError(f"{where}: its choices {values} are not all texts or all numbers")
    return {"type": kind, "enum": list(values)}


def _check(name: str, value: Any, schema: Mapping[str, Any]) -> None:
    if "anyOf" in schema:
        failures = []
        for option in schema["anyOf"]:
            try:
                return _check(name, value, option)
            except ArgumentError as error:
                failures.append(error)
        raise failures[0]
    if "enum" in schema and value not in schema["enum"]:
        choices = ", ".join(map(str, schema["enum"]))
        raise ArgumentError(f"{name} = {value} is not one of {choices}")
    kind = schema.get("type")
    if isinstance(kind, str) and kind in _KINDS:
        fits = isinstance(value, _KINDS[kind])
        if isinstance(value, bool) and kind in ("integer", "number"):
            fits = False
        if not fits:
            raise ArgumentError(f"{name} = {value!r} is not of type {kind}")
    if kind == "array":
        for item in value:
            _check(name, item, schema.get("items", {}))
    return None
