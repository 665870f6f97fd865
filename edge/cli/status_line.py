"""A line of live figures at the bottom of a terminal, below text that scrolls."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable

_REDRAW_S = 0.1
_SAVE, _RESTORE = "\x1b7", "\x1b8"


def is_possible() -> bool:
    """Whether both streams are a terminal that understands cursor movements."""
    return sys.stdout.isatty() and sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class StatusLine:
    """While entered, the last line of the terminal is kept out of scrolling; `show` writes there.

    One that is not `enabled` does nothing.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._rows = 0
        self._shown_at = 0.0

    def __enter__(self) -> StatusLine:
        if self._enabled:
            self._rows = 0
            self._reserve()
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            # The whole screen scrolls again; the cursor stays where the text ended.
            self._write(f"{_SAVE}\x1b[{self._rows};1H\x1b[K\x1b[r{_RESTORE}")

    def show(self, text: Callable[[], str]) -> None:
        """Write a text, cut to the width; it is asked for at most ten times a second."""
        if not self._enabled or time.monotonic() - self._shown_at < _REDRAW_S:
            return
        self._shown_at = time.monotonic()
        columns, rows = shutil.get_terminal_size()
        if rows != self._rows:
            self._reserve()
        line = text()[: columns - 1]
        self._write(f"{_SAVE}\x1b[{self._rows};1H\x1b[7m{line}\x1b[0m\x1b[K{_RESTORE}")

    def _reserve(self) -> None:
        self._rows = max(2, shutil.get_terminal_size().lines)
        # A line feed makes room when the cursor is on the last line; setting the region moves the
        # cursor, so it is put back.
        self._write(f"\n\x1b[A{_SAVE}\x1b[1;{self._rows - 1}r{_RESTORE}")

    @staticmethod
    def _write(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()
