"""Runs pytest again and again, each time in a process forked from this one.

An emulated Python is slow to start, because all that it executes has to be translated first: 8 of
the 10 s of a small test file. What is forked has the translation of what ran before.

Reads lines of JSON from standard input, {"words": pytest's arguments, "out": a file for what it
prints}, and answers each with a line, the exit status.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

# Imported for the forks.
from mimo_edge.runtimes.ggml.bindings import bindings

_TRIAL = """
import numpy, pytest

@pytest.mark.parametrize("side", [1, 8])
def test_product(tmp_path, side):
    assert (numpy.ones((side, side)) @ numpy.ones(side)).tolist() == [side] * side
"""


def main() -> None:
    """Serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 1)
    sys.path[0] = ""  # as `python -m pytest` has it, and not this folder
    bindings()
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / "test_trial.py"
        trial.write_text(_TRIAL, "utf-8")
        pytest.main(["-q", "-c", os.devnull, "--rootdir", folder, "-p", "no:cacheprovider", folder])
    for line in sys.stdin:
        wanted = json.loads(line)
        child = os.fork()
        if not child:
            os.dup2(nothing, 0)
            _run(wanted["words"], wanted["out"])
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def _run(words: list[str], out: str) -> None:
    """pytest in this process, which ends with it."""
    told = os.open(out, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
    os.dup2(told, 1)
    os.dup2(told, 2)
    status = 1
    try:
        status = int(pytest.main(words))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
