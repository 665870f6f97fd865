"""The Python that forks for every run of pytest; here it is not an emulated one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from arm.forks import Forks
from arm.paths import ProgramError, kill_running


@pytest.fixture
def forks() -> Iterator[Forks]:
    made = Forks(Path(sys.executable))
    yield made
    made.close()


def words(folder: Path, code: str) -> list[str]:
    file = folder / "test_it.py"
    file.write_text(code, "utf-8")
    return ["-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(folder), str(file)]


def test_every_run_has_a_process_and_a_verdict_of_its_own(forks: Forks, tmp_path: Path) -> None:
    code = "import os, sys\nsys.began = 1\ndef test_a(): print(os.getpid()); assert {}\n"
    status, told = forks.pytest(words(tmp_path, code.format("'began' in vars(sys)")), {})
    assert (status, "1 passed" in told) == (0, True)
    found = []
    for _ in range(2):
        status, told = forks.pytest(words(tmp_path, code.format("not sys.began")), {})
        assert (status, "1 failed" in told) == (1, True)
        found.append(told.partition("Captured stdout call")[2].split()[1])
    assert found[0] != found[1]
    # Nothing of a run is left for the next.
    code = "import sys\ndef test_a(): assert not hasattr(sys, 'began')\n"
    assert forks.pytest(words(tmp_path, code), {})[0] == 0


def test_other_variables_are_another_python(forks: Forks, tmp_path: Path) -> None:
    code = "import os\ndef test_a(): assert os.environ['MIMO_TRIED'] == '{}'\n"
    for value in ("a", "b"):
        status, told = forks.pytest(words(tmp_path, code.format(value)), {"MIMO_TRIED": value})
        assert status == 0, told


def test_a_crash_is_a_status_and_the_next_run_works(forks: Forks, tmp_path: Path) -> None:
    code = "import os, signal\ndef test_a(): os.kill(os.getpid(), signal.SIGKILL)\n"
    assert forks.pytest(words(tmp_path, code), {})[0] == -9
    assert forks.pytest(words(tmp_path, "def test_a(): pass\n"), {})[0] == 0


def test_a_run_that_hangs_is_ended(forks: Forks, tmp_path: Path) -> None:
    forks.pytest(words(tmp_path, "def test_a(): pass\n"), {})  # started, and not part of the time
    code = "import time\nprint('begun', flush=True)\ndef test_a(): time.sleep(100)\n"
    with pytest.raises(ProgramError, match="or took 2 s"):
        forks.pytest(words(tmp_path, code), {}, timeout_s=2)
    assert forks.pytest(words(tmp_path, "def test_a(): pass\n"), {})[0] == 0


def test_an_interrupt_ends_those_that_wait(forks: Forks, tmp_path: Path) -> None:
    forks.pytest(words(tmp_path, "def test_a(): pass\n"), {})
    kill_running()
    with pytest.raises(ProgramError, match="ended"):
        forks.pytest(words(tmp_path, "def test_a(): pass\n"), {})
