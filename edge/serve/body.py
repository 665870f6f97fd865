"""Request bytes to checked fields. Whatever a client sends ends in a value or a Refusal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from mimo_edge.serve.refusal import Refusal

# Deeper JSON is refused: what walks it later may be recursive.
MAX_DEPTH = 64


def parse_json(raw: bytes) -> dict[str, Any]:
    """A request's JSON object. Raises Refusal 400: not UTF-8, not JSON (NaN and numbers beyond
    floating point included), nested too deep, or no object."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is not UTF-8: byte {error.start}") from None
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise Refusal(400, f"the body is nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:  # also integers of more digits than Python converts
        raise Refusal(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refusal(400, "the body is not a JSON object")
    _check_depth(value)
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is out of range")
    return value


def _check_depth(value: Any) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for parent in level
            for item in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return
    raise Refusal(400, f"the body is nested more than {MAX_DEPTH} deep")


class Fields:
    """The fields of one JSON object, each taken once with its type checked. null is absent."""

    def __init__(self, raw: Mapping[str, Any], where: str = "") -> None:
        self._left = {key: value for key, value in raw.items() if value is not None}
        self._where = where

    def take(self, name: str, default: Any = None) -> Any:
        """The value of any type."""
        return self._left.pop(name, default)

    def text(self, name: str) -> str | None:
        """A string."""
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, value, "a text")
        return value

    def flag(self, name: str) -> bool | None:
        """true or false."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def number(self, name: str, default: float) -> float:
        """A number; `default` when absent."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(name, value, "a number")
        try:
            return float(value)
        except OverflowError:
            raise Refusal(
                400, f"{self.name(name)} is out of range", param=self.name(name)
            ) from None

    def count(self, name: str) -> int | None:
        """A whole number."""
        value = self.take(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self.wrong(name, value, "a whole number")
        return value

    def inner(self, name: str) -> Fields | None:
        """An object's own fields."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, value, "an object")
        return Fields(value, f"{self.name(name)}.")

    def finish(
        self, harmless: frozenset[str] = frozenset(), neutral: Mapping[str, Any] | None = None
    ) -> None:
        """What is left must be in `harmless`, or hold the value that changes nothing.

        Raises Refusal naming the first field whose absence here would change the answer.
        """
        for name, value in self._left.items():
            if name in harmless:
                continue
            shown = self.name(name)
            if neutral is None or name not in neutral:
                raise Refusal(
                    400, f"{shown[:80]!r} is not supported", param=shown[:80], code="unsupported"
                )
            means = neutral[name]
            if isinstance(value, bool) != isinstance(means, bool) or value != means:
                raise Refusal(
                    400,
                    f"{shown!r} is not supported, except as {json.dumps(means)}",
                    param=shown,
                    code="unsupported",
                )

    def name(self, name: str) -> str:
        """A field's full name, for messages."""
        return f"{self._where}{name}"

    def wrong(self, name: str, value: Any, wanted: str) -> Refusal:
        """The refusal of a value of the wrong type."""
        shown = self.name(name)
        kind = _KINDS.get(type(value), "null")
        return Refusal(400, f"{shown} is {kind}, not {wanted}", param=shown)


_KINDS = {
    str: "a text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}
