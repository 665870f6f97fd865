"""What a request wants of its answer's form, and the constraint that ensures it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from mimo_edge.errors import UsageError
from mimo_edge.sampling import Constraint
from mimo_edge.structured.answers import Thinking, Value
from mimo_edge.structured.grammars import Grammars, can_compile
from mimo_edge.structured.tool_grammar import select_tool

Tools = Sequence[Mapping[str, Any]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """`value` what the text must be, `tool_choice` "auto", "none", "required" or a tool's name,
    `several` whether more than one call may come, `constrain_tools` whether calls are held to their
    grammar: None where that can be done."""

    value: Value | None = None
    tool_choice: str = "auto"
    several: bool = True
    constrain_tools: bool | None = None

    @classmethod
    def of(
        cls,
        json_schema: Mapping[str, Any] | None,
        regex: str | None,
        tool_choice: str,
        several: bool,
        constrain_tools: bool | None,
    ) -> Wanted:
        """From the options of a stream. Raises UsageError when they contradict each other."""
        if json_schema is not None and regex is not None:
            raise UsageError("json_schema and regex are both given", "an answer can be only one")
        if not isinstance(tool_choice, str):
            raise UsageError(
                f"tool_choice = {tool_choice!r}",
                'use "auto", "none", "required" or the name of a tool',
            )
        value = None
        if json_schema is not None or regex is not None:
            value = Value(json_schema, regex)
        if value is not None and tool_choice not in ("auto", "none"):
            raise UsageError("a forced tool call cannot be a json_schema or regex answer too")
        return cls(value, tool_choice, several, constrain_tools)

    def needs_grammars(self, tools: Tools) -> bool:
        """Whether `constraint` can be other than None."""
        if self.tool_choice not in ("auto", "none") and not tools:
            raise UsageError(f"tool_choice = {self.tool_choice!r} without tools")
        forced = self.tool_choice not in ("auto", "none")
        return self.value is not None or forced or (bool(tools) and self._holds_calls())

    def constraint(self, grammars: Grammars, tools: Tools, thinking: Thinking) -> Constraint | None:
        """The constraint at an answer's beginning; None when anything may come.

        Raises ConstraintError when it cannot be enforced.
        """
        if not self.needs_grammars(tools):
            return None
        choice = self.tool_choice
        if choice not in ("auto", "none"):
            some = tools if choice == "required" else [select_tool(tools, choice)]
            return grammars.of_answer(thinking, None, some, several=self.several)
        if self.value is not None:
            some = tools if choice == "auto" else ()
            return grammars.of_answer(thinking, self.value, some, several=self.several)
        return grammars.of_calls(thinking, tools, allowed=choice == "auto", several=self.several)

    def _holds_calls(self) -> bool:
        """Whether calls in free text are looked after."""
        if self.constrain_tools is None and self.tool_choice == "auto" and not can_compile():
            _say_once()
            return False
        return self.constrain_tools is not False


@cache
def _say_once() -> None:
    _log.warning("llguidance is not installed: tool calls are not held to their grammar")
