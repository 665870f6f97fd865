"""Paths and text files as a user gives them: models, calibration and evaluation texts."""

from __future__ import annotations

from pathlib import Path

from mimo_edge.errors import UsageError


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
