"""Paths, text and JSON files as a user or another program gives them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mimo_edge.errors import MimoEdgeError, UsageError


def path_exists(path: str | Path) -> bool:
    """Whether there is something at `path`. Raises UsageError when it cannot be a path, as a
    prompt given in its place, or may not be looked at."""
    try:
        return Path(path).exists()
    except OSError as error:
        text = str(path)
        shown = text if len(text) <= 80 else f"{text[:77]}..."
        raise UsageError(f"cannot look at {shown}: {error.strerror}") from error


def read_text(path: str | Path, limit_bytes: int, purpose: str) -> str:
    """The first `limit_bytes` of a file as text; `purpose` names it in errors.

    Raises UsageError when it cannot be read, is blank, or is not UTF-8 (with the place).
    """
    try:
        with Path(path).open("rb") as file:
            raw = file.read(limit_bytes)
            cut = bool(file.read(1))
    except OSError as error:
        raise UsageError(f"cannot read {purpose} {path}: {error.strerror}") from error
    try:
        content = raw.decode()
    except UnicodeDecodeError as error:
        # Reading may have stopped inside a character; that one alone is no fault of the file.
        if not (cut and error.reason == "unexpected end of data" and error.end == len(raw)):
            raise UsageError(
                f"{purpose} {path} is not UTF-8: byte 0x{raw[error.start]:02x} at {error.start}",
                "convert it first",
            ) from error
        content = raw[: error.start].decode()
    if not content.strip():
        raise UsageError(f"{purpose} {path} is empty")
    return content


def read_whole(path: Path, limit_bytes: int, error: type[MimoEdgeError]) -> str:
    """A UTF-8 file of at most `limit_bytes`. Raises `error` for any other, or unreadable ones."""
    try:
        with path.open("rb") as file:
            raw = file.read(limit_bytes + 1)
    except OSError as reason:
        raise error(f"cannot read {path}: {reason.strerror}") from reason
    if len(raw) > limit_bytes:
        raise error(f"{path} is larger than {limit_bytes} bytes")
    try:
        return raw.decode()
    except UnicodeDecodeError as reason:
        raise error(
            f"{path} is not UTF-8: byte 0x{raw[reason.start]:02x} at {reason.start}"
        ) from reason


def read_json(
    path: Path,
    limit_bytes: int,
    error: type[MimoEdgeError],
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """The value of a JSON file of at most `limit_bytes`; `pairs` makes the objects of it, and may
    raise ValueError. Raises `error` as `read_whole` does, and when it is not JSON."""
    text = read_whole(path, limit_bytes, error)
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as reason:
        raise error(f"{path} is not valid JSON: {reason}") from reason
