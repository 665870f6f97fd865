"""What is too much to compile. Schemas may come from strangers, and whoever asks for a grammar
must not be able to keep the process busy or fill its memory.

The compiler itself counts its work and gives up; these bounds are for what it does before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mimo_edge.errors import ConstraintError

MAX_SCHEMA_BYTES = 256 << 10
MAX_DEPTH = 48
MAX_NODES = 20_000
MAX_REGEX = 4096
MAX_REPEATS = 100_000
# Keywords that say how often something may come.
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")


def check_schema(schema: Any, what: str) -> dict[str, Any]:
    """A JSON schema that may be compiled, as plain objects of its own.

    Raises ConstraintError: no object, no JSON, too large, too deep, or repeats too many.
    """
    if not isinstance(schema, Mapping):
        raise ConstraintError(f"{what} is a {type(schema).__name__}, not a JSON schema object")
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConstraintError(f"{what} has no JSON form: {error}") from None
    if len(text) > MAX_SCHEMA_BYTES:
        raise ConstraintError(
            f"{what} has {len(text):,} bytes of JSON, at most {MAX_SCHEMA_BYTES:,} are compiled"
        )
    level: list[Any] = [schema]
    nodes = 0
    for _ in range(MAX_DEPTH):
        nodes += len(level)
        for node in level:
            if isinstance(node, Mapping):
                _check_node(node, what)
        level = [
            child
            for node in level
            if isinstance(node, (Mapping, list))
            for child in (node.values() if isinstance(node, Mapping) else node)
        ]
        if not level:
            break
    else:
        raise ConstraintError(f"{what} is nested more than {MAX_DEPTH} deep")
    if nodes > MAX_NODES:
        raise ConstraintError(f"{what} has {nodes:,} values, at most {MAX_NODES:,} are compiled")
    plain: dict[str, Any] = json.loads(text)
    return plain


def check_regex(regex: Any, what: str) -> str:
    """A regular expression that may be compiled. Raises ConstraintError."""
    if not isinstance(regex, str) or not regex:
        raise ConstraintError(f"{what} is not a regular expression: {regex!r}")
    if len(regex) > MAX_REGEX:
        raise ConstraintError(
            f"{what} has {len(regex):,} characters, at most {MAX_REGEX:,} are compiled"
        )
    try:
        regex.encode()
    except UnicodeEncodeError:
        raise ConstraintError(f"{what} holds half of a surrogate pair") from None
    return regex


def _check_node(node: Mapping[str, Any], what: str) -> None:
    for name in _COUNTS:
        count = node.get(name)
        if isinstance(count, (int, float)) and not isinstance(count, bool) and count > MAX_REPEATS:
            raise ConstraintError(f"{what}: {name} = {count}, at most {MAX_REPEATS:,} are compiled")
    if isinstance(node.get("pattern"), str):
        check_regex(node["pattern"] or ".*", f"the pattern of {what}")
