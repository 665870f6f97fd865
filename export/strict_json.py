"""JSON read without trust: bounded size, no duplicate keys, no NaN, always a typed error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from mimo_edge.errors import CheckpointError


def loads(data: bytes, what: str) -> Any:
    """Parse UTF-8 JSON. Raises CheckpointError, naming `what`, on anything a careful writer
    would not produce: duplicate keys, NaN and infinities, bad UTF-8, absurd nesting."""
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys(what),
            parse_constant=_no_constant,
        )
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{what} is not UTF-8: byte {error.start} is bad") from None
    except RecursionError:
        raise CheckpointError(f"{what} is nested too deeply to be read") from None
    except ValueError as error:  # JSONDecodeError, and integers of thousands of digits
        raise CheckpointError(f"{what} is not valid JSON: {error}") from None


def load_object(path: Path, limit_bytes: int) -> tuple[dict[str, Any], bytes]:
    """The object in a file of at most `limit_bytes`, and the file's bytes.

    Raises CheckpointError when the file is unreadable, larger, or holds no object.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > limit_bytes:
        raise CheckpointError(f"{path.name} is larger than {limit_bytes} bytes")
    value = loads(data, path.name)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} holds a {type(value).__name__}, not an object")
    return value, data


def _unique_keys(what: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def hook(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise CheckpointError(f"{what} has the key {key!r} twice")
                seen.add(key)
        return result

    return hook


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
