"""Jinja for chat templates that came with a model: sandboxed, bounded in output and time.

The sandbox of jinja2 keeps a template away from Python; it does not keep it from looping or
from doubling a string until memory is gone. Both are bounded here.
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Iterable, Mapping
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
TIME_LIMIT_S = 10.0
# Methods whose result can be enormous for a tiny argument; no chat template needs them.
_REFUSED_METHODS = frozenset(
    ["center", "expandtabs", "format", "format_map", "ljust", "rjust", "zfill", "translate"]
)
_REFUSED_FILTERS = ("center", "format", "indent", "wordwrap", "urlize", "xmlattr", "filesizeformat")


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


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def joined(self, parts: Iterable[Any]) -> str:
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
        if isinstance(result, (str, list, tuple)):
            _check_size(len(result))
        return result

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


def _refuse(message: str = "") -> None:
    """`raise_exception` of Hugging Face templates."""
    raise jinja2.TemplateRuntimeError(str(message))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any
) -> str:
    """JSON as Hugging Face templates expect it: readable, not HTML-escaped."""
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
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
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
