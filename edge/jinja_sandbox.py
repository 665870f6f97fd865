"""Jinja for chat templates that came with a model: sandboxed, bounded in output and time.

The sandbox of jinja2 keeps a template away from Python; it does not keep it from looping or
from doubling a string until memory is gone. Both are bounded here. So are containers, counted
with everything they hold: a list doubled forty times takes little memory, but writing it is one
call into C that no time limit can end.
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mimo_edge.errors import TokenizerError

MAX_OUTPUT_CHARS = 16 << 20
MAX_SOURCE_CHARS = 1 << 20
MAX_ITEMS = 1 << 18  # in one container, those inside its containers counted too
TIME_LIMIT_S = 10.0
# Methods whose result can be enormous for a tiny argument; no chat template needs them.
_REFUSED_METHODS = frozenset(
    ["center", "expandtabs", "format", "format_map", "ljust", "rjust", "zfill", "translate"]
)
_REFUSED_FILTERS = (
    "center",
    "format",
    "indent",
    "wordwrap",
    "urlize",
    "xmlattr",
    "filesizeformat",
    "pprint",
)


class _TimeOut(BaseException):
    """Raised inside the rendering thread when its time is up; templates cannot catch it."""


class _Generator(CodeGenerator):
    """`a ~ b` goes through the environment, so that its size can be checked."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._bounded(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._bounded(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":  # not the names of an assignment
            self._bounded(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _bounded(self, write: Callable[[Any, Frame], None], node: Any, frame: Frame) -> None:
        self.write("environment.bounded(")
        write(node, frame)
        self.write(")")


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def bounded(self, value: Any) -> Any:
        """`value`, if it is not too large with everything in it."""
        _check_value(value)
        return value

    def joined(self, parts: Iterable[Any]) -> str:
        parts = self.bounded(tuple(parts))
        text: str = str_join(parts)
        _check_size(len(text))
        return text

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise jinja2.TemplateRuntimeError("powers are not allowed in a chat template")
        if operator == "%" and isinstance(left, (str, bytes)):
            raise jinja2.TemplateRuntimeError("string formatting is not allowed in a chat template")
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, (str, bytes, list, tuple)) and isinstance(times, int):
                    _check_size(len(value) * max(0, times))
        result = super().call_binop(context, operator, left, right)
        return self.bounded(result)

    def call(*args: Any, **options: Any) -> Any:
        # No names of its own: the options are the template's, whatever they are called.
        self, context, called, *rest = args
        owner, name = getattr(called, "__self__", None), getattr(called, "__name__", "")
        if isinstance(owner, str) and name == "replace":
            return _replace(owner, *rest, **options)
        if isinstance(owner, str) and name == "join":
            return _join(rest[0] if rest else (), owner)
        return self.bounded(
            ImmutableSandboxedEnvironment.call(self, context, called, *rest, **options)
        )

    def wrap_str_format(self, value: Any) -> Any:
        if super().wrap_str_format(value) is not None:
            raise SecurityError("str.format is not allowed in a chat template")
        return None

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, (str, bytes)) and attr in _REFUSED_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)


def _check_size(size: int) -> None:
    if size > MAX_OUTPUT_CHARS:
        raise jinja2.TemplateRuntimeError(f"the template builds more than {MAX_OUTPUT_CHARS} items")


def _check_value(value: Any) -> None:
    """Raise when a value counts more than the limits with everything it holds."""
    if isinstance(value, str):
        _check_size(len(value))
        return
    items, chars, waiting = 0, 0, [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            chars += len(item)
        elif isinstance(item, Mapping):
            items += 2 * len(item)
            waiting += [*item, *item.values()]
        elif isinstance(item, (list, tuple)):
            items += len(item)
            waiting += item
        _check_size(chars)
        if items > MAX_ITEMS:
            raise jinja2.TemplateRuntimeError(f"the template builds more than {MAX_ITEMS} items")


def _gather(values: Iterable[Any]) -> list[Any]:
    """The `list` filter: what comes one by one is measured as it comes."""
    gathered: list[Any] = []
    chars = 0
    for value in values:
        gathered.append(value)
        chars += len(value) if isinstance(value, str) else 0
        _check_size(chars)
        _check_size(len(gathered))
    _check_value(gathered)
    return gathered


def _join(values: Iterable[Any], separator: Any = "", attribute: Any = None) -> str:
    """The `join` filter, and str.join."""
    gathered = _gather(values)
    if attribute is not None:
        gathered = _gather(value[attribute] for value in gathered)
    between = str(separator)
    _check_size(len(gathered) * len(between))
    return between.join(map(str, gathered))


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    """The `replace` filter, and str.replace: its result is measured before it is made."""
    _check_value([text, old, new])
    text, old, new = str(text), str(old), str(new)
    times = text.count(old)
    if count is not None and count >= 0:
        times = min(times, count)
    _check_size(len(text) + times * (len(new) - len(old)))
    return str(text.replace(old, new, times))


def _text(value: Any) -> str:
    """The `string` filter."""
    _check_value(value)
    return str(value)


def _written(value: Any) -> Any:
    """Every expression a template writes passes here."""
    _check_value(value)
    return value


def _refuse(message: str = "") -> None:
    """`raise_exception` of Hugging Face templates."""
    raise jinja2.TemplateRuntimeError(str(message))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any
) -> str:
    """JSON as Hugging Face templates expect it: readable, not HTML-escaped."""
    _check_value(value)
    separators = options.get("separators")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=None if indent is None else min(int(indent), 16),
        separators=tuple(separators) if separators else None,
        sort_keys=bool(options.get("sort_keys", False)),
    )


class SandboxedTemplate:
    """A compiled chat template. Raises TokenizerError when it cannot be compiled."""

    def __init__(self, source: str, time_limit_s: float = TIME_LIMIT_S) -> None:
        if len(source) > MAX_SOURCE_CHARS:
            raise TokenizerError(f"the chat template has {len(source)} characters")
        environment = _Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols"],
            finalize=_written,
        )
        environment.filters.update(
            tojson=_tojson, list=_gather, join=_join, replace=_replace, string=_text
        )
        for name in _REFUSED_FILTERS:
            environment.filters.pop(name, None)
        environment.globals["raise_exception"] = _refuse
        self._time_limit_s = time_limit_s
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise TokenizerError(f"the chat template does not compile: {error}") from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text. Raises TokenizerError when the template fails, or runs too long or large.

        It runs in its own thread: only so can a loop without end be stopped.
        """
        result: list[str] = []
        failure: list[BaseException] = []

        def work() -> None:
            try:
                size = 0
                parts = []
                for part in self._template.generate(variables):
                    size += len(part)
                    _check_size(size)
                    parts.append(part)
                result.append("".join(parts))
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=work, name="chat-template", daemon=True)
        thread.start()
        thread.join(self._time_limit_s)
        if thread.is_alive():
            ident = ctypes.c_ulong(thread.ident or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(_TimeOut))
            thread.join(1.0)
            raise TokenizerError(f"the chat template ran for more than {self._time_limit_s:g} s")
        if failure:
            error = failure[0]
            if not isinstance(error, Exception):
                raise error
            raise TokenizerError(f"the chat template failed: {error}") from error
        return result[0]
