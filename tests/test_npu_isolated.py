"""A process of its own: results, typed errors and deaths come back, and the next call works."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mimo_edge.errors import BackendError, BundleError, ProviderError, UsageError
from mimo_edge.runtimes.onnx.isolated import Worker

JOBS = "isolated_jobs"
# An emulator has the last word where the program it runs crashes.
LAST_WORDS = "uncaught target signal 11" if "QEMU_CPU" in os.environ else "the library's last words"


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with Worker(timeout_s=20, package=JOBS) as made:
        yield made


def test_results_come_from_one_other_process(worker: Worker) -> None:
    assert worker.call(f"{JOBS}:add", a=2, b=3) == 5
    first = worker.call(f"{JOBS}:process_id")
    assert first != os.getpid()
    assert worker.call(f"{JOBS}:process_id") == first


def test_a_typed_error_arrives_as_itself(worker: Worker) -> None:
    with pytest.raises(BundleError, match="no such thing: look elsewhere") as caught:
        worker.call(f"{JOBS}:refuse")
    assert caught.value.hint == "look elsewhere"
    assert worker.call(f"{JOBS}:add", a=1, b=1) == 2


def test_any_other_error_brings_its_traceback(worker: Worker) -> None:
    with pytest.raises(BackendError, match="ZeroDivisionError"):
        worker.call(f"{JOBS}:divide")


@pytest.mark.parametrize(
    ("job", "how"), [("crash", f"SIGSEGV.*{LAST_WORDS}"), ("leave", "exit code 139")]
)
def test_a_death_is_a_typed_error_and_the_next_call_works(
    worker: Worker, job: str, how: str
) -> None:
    first = worker.call(f"{JOBS}:process_id")
    with pytest.raises(ProviderError, match=how):
        worker.call(f"{JOBS}:{job}")
    assert worker.call(f"{JOBS}:process_id") != first


def test_what_a_library_prints_blocks_nothing(worker: Worker) -> None:
    assert worker.call(f"{JOBS}:shout") == "said"


def test_what_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    slow = pytest.raises(ProviderError, match="longer than 1 s")
    with Worker(timeout_s=1, package=JOBS) as worker, slow:
        worker.call(f"{JOBS}:sleep")


def test_functions_of_others_are_refused(worker: Worker) -> None:
    with pytest.raises(UsageError, match="not a function"):
        worker.call("os:getpid")


def test_close_ends_the_process(worker: Worker) -> None:
    child = worker.call(f"{JOBS}:process_id")
    worker.close()
    worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
