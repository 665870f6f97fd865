"""The only printer of the command line.

Results go to stdout, everything else to stderr; with --json exactly one object is printed to
stdout and nothing decorates it. Progress is drawn only on a terminal.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from mimo_edge.errors import MimoEdgeError
from mimo_edge.units import format_bytes

_BAR_WIDTH = 24
_REDRAW_S = 0.1


class Output:
    """Where one command prints. `json` selects the one-object form, `verbose` shows details."""

    def __init__(self, *, json: bool = False, verbose: bool = False) -> None:
        self.json = json
        self.verbose = verbose
        self._bar_drawn = False
        self._drawn_at = 0.0
        self._stage = ""
        self._began = 0.0
        self._began_at = 0  # what was done already when the stage began: a resumed export

    def text(self, text: str, end: str = "\n") -> None:
        """A result for people, on stdout; nothing with --json."""
        if not self.json:
            self._clear_bar()
            sys.stdout.write(_printable(text, sys.stdout) + end)
            sys.stdout.flush()

    def result(self, value: Any) -> None:
        """The one object of --json; nothing otherwise."""
        if self.json:
            self._clear_bar()
            line = json.dumps(value, ensure_ascii=False, allow_nan=False)
            if _printable(line, sys.stdout) != line:  # JSON has an escape of its own for those
                line = json.dumps(value, allow_nan=False)
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    def table(self, rows: Iterable[Sequence[object]], header: Sequence[str] = ()) -> None:
        """Aligned columns on stdout; numbers to the right. Nothing with --json."""
        cells = [[str(cell) for cell in row] for row in rows]
        numeric = [
            all(_is_number(row[i]) for row in cells if i < len(row))
            for i in range(max(map(len, cells), default=0))
        ]
        if header:
            cells.insert(0, list(header))
        widths = [
            max(_width(row[i]) for row in cells if i < len(row))
            for i in range(max(map(len, cells), default=0))
        ]
        for row in cells:
            padded = []
            for i, cell in enumerate(row):
                space = " " * (widths[i] - _width(cell))
                padded.append(space + cell if i < len(numeric) and numeric[i] else cell + space)
            self.text("  ".join(padded).rstrip())

    def note(self, text: str) -> None:
        """A remark on stderr."""
        self._clear_bar()
        sys.stderr.write(_printable(text, sys.stderr) + "\n")
        sys.stderr.flush()

    def detail(self, text: str) -> None:
        """A remark shown with -v."""
        if self.verbose:
            self.note(text)

    def progress(
        self, stage: str, done: int, total: int, *, unit: Literal["bytes", "count"] = "bytes"
    ) -> None:
        """What is done of one stage, as a bar with time left; on a terminal only."""
        if self.json or not sys.stderr.isatty():
            return
        now = time.monotonic()
        if stage != self._stage:
            self._clear_bar()
            self._stage, self._began, self._drawn_at = stage, now, 0.0
            self._began_at = done
        if now - self._drawn_at < _REDRAW_S and done < total:
            return
        self._drawn_at = now
        share = done / total if total else 1.0
        full = int(share * _BAR_WIDTH)
        bar = "#" * full + "-" * (_BAR_WIDTH - full)
        left = "done"
        if done < total:
            left = time_left(now - self._began, done - self._began_at, total - done)
        a, b = (format_bytes(n) if unit == "bytes" else str(n) for n in (done, total))
        sys.stderr.write(f"\r\x1b[K{stage} [{bar}] {a} of {b}, {left}")
        sys.stderr.flush()
        self._bar_drawn = True
        if done >= total:
            self._finish_bar()

    def _clear_bar(self) -> None:
        if self._bar_drawn:
            sys.stderr.write("\r\x1b[K")
            self._bar_drawn = False

    def _finish_bar(self) -> None:
        sys.stderr.write("\n")
        self._bar_drawn = False
        self._stage = ""


def time_left(seconds: float, done: int, rest: int) -> str:
    """How long `rest` will take when `done` took `seconds`, for a progress bar."""
    if done <= 0:
        return "-:-- left"
    whole = int(seconds * rest / done)
    minutes = f"{whole // 60}:{whole % 60:02d}"
    if whole >= 3600:
        minutes = f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
    return f"{minutes} left"


def print_error(error: MimoEdgeError) -> None:
    """A typed error as one line on stderr."""
    line = " ".join(str(error).split())
    sys.stderr.write(_printable(f"error: {line}", sys.stderr) + "\n")


def _printable(text: str, stream: Any) -> str:
    """Text the stream's encoding can carry; what it cannot is escaped, not an exception."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _is_number(cell: str) -> bool:
    return cell in ("", "-") or cell.lstrip("-+")[:1].isdigit()


def _width(cell: str) -> int:
    """Columns on a terminal: East Asian wide characters take two."""
    from unicodedata import east_asian_width

    return sum(2 if east_asian_width(c) in "WF" else 1 for c in cell)
