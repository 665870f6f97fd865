"""Grammars of whole answers: what may come before, a value, calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mimo_edge.answer_reader import THINK_CLOSE, THINK_OPEN
from mimo_edge.structured.lark import Lark, json_value, markup, pattern
from mimo_edge.structured.limits import check_regex, check_schema
from mimo_edge.structured.tool_grammar import call_rule
from mimo_edge.tokenizer import Tokenizer
from mimo_edge.tool_calls import OPEN

Thinking = Literal["open", "possible", "over"]
"""Whether an answer begins inside of its think block, with or without one, or after it."""


@dataclass(frozen=True)
class Value:
    """What an answer's text must be: JSON that fits `schema`, or a text that `regex` matches."""

    schema: Mapping[str, Any] | None = None
    regex: str | None = None

    def rule(self, lark: Lark) -> str:
        """Its name in the grammar. Raises ConstraintError."""
        if self.regex is not None:
            return lark.terminal(pattern(check_regex(self.regex, "regex")))
        return lark.rule(json_value(check_schema(self.schema, "json_schema")))


def answer_grammar(
    tokenizer: Tokenizer,
    thinking: Thinking,
    value: Value | None,
    tools: Sequence[Mapping[str, Any]],
    several: bool,
) -> str:
    """Grammar of an answer that is `value`, or calls of `tools`, one or `several`; at least one of
    the two is given. A think block may come before."""
    lark = Lark()
    options = [] if value is None else [value.rule(lark)]
    if tools:
        call = lark.rule(f"{markup(tokenizer, OPEN)} {call_rule(lark, tools, tokenizer)}")
        more = lark.rule(f'"\\n"? {call}')
        options.append(lark.rule(f"{call} {more}*") if several else call)
    return lark.text(f"{_before(lark, tokenizer, thinking)}({' | '.join(options)})")


def call_grammar(tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]]) -> str:
    """Grammar of one call from after its opening tag to the end of its closing tag."""
    lark = Lark()
    return lark.text(call_rule(lark, tools, tokenizer))


def _before(lark: Lark, tokenizer: Tokenizer, thinking: Thinking) -> str:
    if thinking == "over" or THINK_OPEN not in tokenizer.special:
        return ""
    anything = pattern("(?s:.*)")
    # Spelled in letters, the tag would end the block for whoever reads the answer.
    text = lark.terminal(f"{anything} & ~{pattern(f'(?s:.*){THINK_CLOSE}(?s:.*)')}")
    rest = f"{text} {markup(tokenizer, THINK_CLOSE)}"
    if thinking == "open":
        return f"{rest} "
    return f"({markup(tokenizer, THINK_OPEN)} {rest})? "
