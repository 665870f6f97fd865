"""The checks of `make test-arm`: kept when they pass, begun again after a change or a failure."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest
from arm.checks import Check, Outcome, Progress, Result, digest, run_checks
from arm.paths import ProgramError, kill_running, outcome, run


def check(name: str, calls: list[str], passed: bool = True, state: str = "1") -> Check:
    def run_it() -> Outcome:
        calls.append(name)
        return Outcome(passed, "told")

    return Check("cortex-a53", name, state, run_it)


def test_what_passed_is_not_run_again(tmp_path: Path) -> None:
    path, calls = tmp_path / "progress.jsonl", list[str]()
    first = [check("a", calls), check("b", calls, passed=False), check("c", calls)]
    assert run_checks(first, 1, Progress(path)) == Result(2, 1, 0)
    assert calls == ["a", "b", "c"]
    changed = check("c", calls, state="2")
    assert run_checks([*first[:2], changed], 1, Progress(path)) == Result(2, 1, 0)
    assert calls[3:] == ["b", "c"]


def test_a_line_cut_off_by_a_power_failure(tmp_path: Path) -> None:
    path, calls = tmp_path / "progress.jsonl", list[str]()
    run_checks([check("a", calls), check("b", calls)], 1, Progress(path))
    path.write_bytes(path.read_bytes()[:-20])
    run_checks([check("a", calls), check("b", calls)], 1, Progress(path))
    assert calls == ["a", "b", "b"]


def test_no_check_is_begun_after_the_time_is_over(tmp_path: Path) -> None:
    calls: list[str] = []
    progress = Progress(tmp_path / "progress.jsonl")
    assert run_checks([check("a", calls)], 1, progress, seconds=-1) == Result(0, 0, 1)
    assert calls == []


def test_a_program_that_fails_is_a_check_that_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_it() -> Outcome:
        run([sys.executable, "-c", "print('why'); raise SystemExit(7)"], capture=True)
        return Outcome(True, "never")

    found = run_checks([Check("max", "x", "1", run_it)], 2, Progress(tmp_path / "p"))
    assert found == Result(0, 1, 0)
    assert "max: x: FAILED: why" in capsys.readouterr().err


def test_a_program_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    # The grandchild holds the pipe's other end: reading ends when it is gone.
    code = f"exec 3>{pipe}; sleep 100 & echo begun; wait"
    reader = threading.Thread(target=lambda: pipe.read_bytes())
    reader.start()
    with pytest.raises(ProgramError, match=r"begun\n.*did not end within 2 s"):
        outcome(["sh", "-c", code], timeout_s=2)
    reader.join(10)
    assert not reader.is_alive()


def test_an_interrupt_ends_what_other_threads_wait_for() -> None:
    found: list[int] = []
    waiting = threading.Thread(target=lambda: found.append(outcome(["sleep", "100"])[0]))
    waiting.start()
    while not found and waiting.is_alive():
        kill_running()
        waiting.join(0.01)
    assert found == [-9]


def test_digests_know_where_a_part_ends() -> None:
    assert digest(b"ab", b"c") != digest(b"a", b"bc")
    assert digest(b"ab") == digest(b"ab")
