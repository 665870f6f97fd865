"""Grammar text in llguidance's Lark dialect, put together piece by piece.

Source of the syntax: guidance-ai/llguidance:docs/syntax.md and docs/parametric.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mimo_edge.tokenizer import Tokenizer

# At most this many white space characters in one place of a JSON answer: enough for any usual
# indentation, and no model can go on with blanks for ever.
_BLANKS = r"[\x20\x0A\x0D\x09]{1,64}"

# Where only one text can follow, the library would allow but one way to spell it in tokens. The
# model's own distribution over all of them is what is wanted.
_OPTIONS = '%llguidance { "no_forcing": true }'


class Lark:
    """Rules and terminals under made-up names; the same body is written once."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._lines: list[str] = []

    def terminal(self, body: str) -> str:
        """A name for a terminal: one regular expression."""
        return self._named("T", body)

    def rule(self, body: str) -> str:
        """A name for a rule."""
        return self._named("r", body)

    def new_rule(self) -> str:
        """A name for a rule that `define` will describe: one that calls itself."""
        name = f"p{len(self._names)}"
        self._names[name] = name
        return name

    def define(self, name: str, line: str) -> None:
        """Write a rule's whole line, `line` from its parameter on."""
        self._lines.append(f"{name}{line}")

    def text(self, start: str) -> str:
        """The grammar that begins with the rule body `start`."""
        return "\n".join([_OPTIONS, f"start: {start}", *self._lines, ""])

    def _named(self, kind: str, body: str) -> str:
        if body not in self._names:
            name = self._names[body] = f"{kind}{len(self._names)}"
            self._lines.append(f"{name}: {body}")
        return self._names[body]


def literal(text: str) -> str:
    """A string of the grammar. Lark takes JSON's strings, but no raw DEL."""
    return json.dumps(text).replace("\x7f", "\\u007f")


def pattern(regex: str) -> str:
    """A regular expression of the grammar, `regex` in Rust's syntax."""
    out, escaped = [], False
    for character in regex:
        if character == "/" and not escaped:
            out.append("\\")
        out.append({"\n": "\\n", "\r": "\\r"}.get(character, character))
        escaped = character == "\\" and not escaped
    return f"/{''.join(out)}/"


def markup(tokenizer: Tokenizer, tag: str) -> str:
    """A tag of MiMo's format: its token where the vocabulary has one, else its text."""
    id_ = tokenizer.special.get(tag)
    return literal(tag) if id_ is None else f"<[{id_}]>"


def json_value(schema: Mapping[str, Any], *, escapes: bool = True) -> str:
    """A JSON text that fits `schema`; without `escapes` no \\uXXXX, which could be half of a
    surrogate pair."""
    settings = {"whitespace_pattern": _BLANKS}
    if not escapes:
        settings["json_allowed_escapes"] = 'nrbtf\\"'
    return "%json " + json.dumps({**schema, "x-guidance": settings})
