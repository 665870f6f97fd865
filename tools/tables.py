"""Tables of measurements: Markdown, their place in docs/benchmarks.md, and a bound on the time.

Shared by the measuring tools. A measurement that takes minutes keeps every row as soon as it is
there (`Rows`), so that the next run goes on where this one stopped, and begins no row after its
time is over (`Deadline`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path

from mimo_edge.errors import MimoEdgeError, UsageError

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def write_section(
    name: str, text: str, heading: str | None = None, document: Path | None = None
) -> None:
    """Put `text` between the markers `name` of a document, docs/benchmarks.md by default. Where
    there are none, a section `heading` with them is added at its end. Raises UsageError when there
    are none, or too many."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    path = DOCUMENT if document is None else document
    old = path.read_text("utf-8")
    counts = old.count(begin), old.count(end)
    if counts == (0, 0) and heading is not None:
        old = f"{old.rstrip()}\n\n## {heading}\n{begin}\n{end}\n"
    elif counts != (1, 1):
        raise UsageError(f"{path} does not hold {begin} and {end} once each")
    before, _, rest = old.partition(begin)
    after = rest.partition(end)[2]
    path.write_text(f"{before}{begin}\n{text}{end}{after}", "utf-8")


def command(main: Callable[[list[str] | None], None]) -> Callable[..., int]:
    """A tool's `main` with an exit status: an error of ours is one line on standard error."""

    @wraps(main)
    def run(argv: list[str] | None = None) -> int:
        try:
            main(argv)
        except MimoEdgeError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        return 0

    return run


class Deadline:
    """Time for a table: rows begun in time are measured to their end, others are left out."""

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises UsageError for no time at all."""
        if minutes <= 0:
            raise UsageError(f"--minutes {minutes}", "give more than 0")
        self._clock, self._end = clock, clock() + 60 * minutes
        self._left_out: list[str] = []

    def allows(self, row: str) -> bool:
        """Whether there is time left to begin `row`; otherwise it is remembered as left out."""
        if self._clock() < self._end:
            return True
        self._left_out.append(row)
        return False

    def note(self) -> str:
        """What is missing, as a line below the table; nothing when nothing is."""
        return f"\nNot measured in time: {', '.join(self._left_out)}.\n" if self._left_out else ""


def add_minutes(parser: argparse.ArgumentParser, default: float) -> None:
    """The option `--minutes`."""
    parser.add_argument(
        "--minutes", type=float, default=default, help="begin no row of a table after this time"
    )


class Rows:
    """Rows of a table that outlive the run, in a JSON file: key to cells."""

    def __init__(self, path: Path) -> None:
        """Raises UsageError when the file is something else."""
        self._path = path
        self._rows: dict[str, list[str]] = {}
        try:
            found = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            return
        except ValueError as error:
            raise UsageError(f"{path} is no file of rows: {error}", "delete it") from error
        if not isinstance(found, dict):
            raise UsageError(f"{path} is no file of rows", "delete it")
        self._rows = {key: [str(cell) for cell in cells] for key, cells in found.items()}

    def get(self, key: str, deadline: Deadline, measure: Callable[[], list[str]]) -> list[str]:
        """The cells of row `key`: as they were measured before, or now; [] without time left."""
        if key not in self._rows:
            if not deadline.allows(key):
                return []
            self._rows[key] = measure()
            partial = self._path.with_name(self._path.name + ".partial")
            partial.write_text(json.dumps(self._rows, indent=1), "utf-8")
            os.replace(partial, self._path)
            show(self._rows[key])
        return self._rows[key]


def show(row: Sequence[str]) -> None:
    """A row on standard error, as soon as it is there."""
    print(" | ".join(row), file=sys.stderr, flush=True)
