"""Checks that take long: run some at a time, and not again after they passed.

What passed is kept in a file, with a digest of what it depends on. A run that was stopped, by hand
or by its own time, goes on where it was when it is called again; what changed since then is
checked anew.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from arm.paths import ProgramError, kill_running


@dataclass(frozen=True)
class Outcome:
    """Whether a check passed, and one line that tells more."""

    passed: bool
    told: str


@dataclass(frozen=True)
class Check:
    """Something to be checked: on which processor, what, and on which state of the sources."""

    where: str
    name: str
    state: str
    run: Callable[[], Outcome]


def digest(*parts: bytes) -> str:
    """A short name for the contents `parts`."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(hashlib.sha256(part).digest())
    return hashed.hexdigest()[:16]


class Progress:
    """The checks that passed, one JSON object per line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._passed: set[tuple[str, str, str]] = set()
        for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
            try:
                entry = json.loads(line)
                self._passed.add((entry["where"], entry["name"], entry["state"]))
            except (ValueError, KeyError, TypeError):  # cut off while it was written
                continue

    def has(self, check: Check) -> bool:
        """Whether the check passed before, on the same state."""
        return (check.where, check.name, check.state) in self._passed

    def add(self, check: Check, told: str, seconds: float) -> None:
        """Remember that the check passed."""
        entry = {"where": check.where, "name": check.name, "state": check.state,
                 "told": told, "seconds": round(seconds)}  # fmt: skip
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


@dataclass(frozen=True)
class Result:
    """How many checks passed now or before, failed, and were not begun."""

    passed: int
    failed: int
    left: int


def run_checks(
    checks: Iterable[Check], jobs: int, progress: Progress, seconds: float | None = None
) -> Result:
    """Run `checks` in their order, `jobs` at a time; after `seconds` none is begun any more."""
    wanted = list(checks)
    todo = [check for check in wanted if not progress.has(check)]
    if len(todo) < len(wanted):
        print(f"{len(wanted) - len(todo)} of {len(wanted)} checks passed before", flush=True)
    end = None if seconds is None else time.monotonic() + seconds

    def work(check: Check) -> bool | None:
        if end is not None and time.monotonic() > end:
            return None
        return _run(check, progress)

    with ThreadPoolExecutor(jobs) as pool:  # of processes: every check starts its own
        try:
            found: Sequence[bool | None] = list(pool.map(work, todo))
        except BaseException:  # interrupted
            pool.shutdown(wait=False, cancel_futures=True)
            kill_running()
            raise
    failed, left = found.count(False), found.count(None)
    return Result(len(wanted) - failed - left, failed, left)


def _run(check: Check, progress: Progress) -> bool:
    began = time.monotonic()
    try:
        outcome = check.run()
    except ProgramError as error:
        outcome = Outcome(False, str(error))
    took = time.monotonic() - began
    verdict = "" if outcome.passed else "FAILED: "
    line = f"{check.where}: {check.name}: {verdict}{outcome.told} ({took:.0f} s)"
    print(line, file=sys.stdout if outcome.passed else sys.stderr, flush=True)
    if outcome.passed:
        progress.add(check, outcome.told, took)
    return outcome.passed
