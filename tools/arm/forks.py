"""Emulated Pythons that have pytest started already and fork for every run of it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from arm.paths import REPOSITORY, TIMEOUT_S, ProgramError, forget, kill, started

_SCRIPT = REPOSITORY / "tools" / "arm" / "fork_tests.py"


class Forks:
    """As many Pythons as there are runs at the same time, started when they are needed; those that
    wait have the variables of the latest run. Used by several threads."""

    def __init__(self, python: Path) -> None:
        self._python = python
        self._env: Mapping[str, str] = {}
        self._idle: list[_Forking] = []
        self._lock = threading.Lock()

    def pytest(
        self, words: Sequence[str], env: Mapping[str, str], timeout_s: float = TIMEOUT_S
    ) -> tuple[int, str]:
        """pytest's exit status and what it printed. Raises ProgramError when it does not end."""
        with self._lock:
            if self._env != env:
                self._close_idle()
                self._env = dict(env)
            forking = self._idle.pop() if self._idle else None
        if forking is None:
            forking = _Forking(self._python, env)
        try:
            found = forking.pytest(words, timeout_s)
        except BaseException:
            forking.close()
            raise
        with self._lock:
            if self._env == env:
                self._idle.append(forking)
                return found
        forking.close()
        return found

    def close(self) -> None:
        """End those that wait."""
        with self._lock:
            self._close_idle()

    def _close_idle(self) -> None:
        while self._idle:
            self._idle.pop().close()


class _Forking:
    def __init__(self, python: Path, env: Mapping[str, str]) -> None:
        self._words = [str(python), str(_SCRIPT)]
        self._process = started(self._words, REPOSITORY, env, subprocess.PIPE, subprocess.PIPE)

    def pytest(self, words: Sequence[str], timeout_s: float) -> tuple[int, str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.NamedTemporaryFile("r", suffix=".txt", errors="replace") as told:
            over = threading.Timer(timeout_s, kill, [self._process])
            over.start()
            try:
                with contextlib.suppress(BrokenPipeError):  # it died: there is no answer
                    line = json.dumps({"words": list(words), "out": told.name})
                    print(line, file=self._process.stdin, flush=True)
                answer = self._process.stdout.readline()
            finally:
                over.cancel()
            if not answer:
                name = " ".join((*self._words, *words))
                raise ProgramError(f"{told.read()}{name} ended, or took {timeout_s:.0f} s")
            return int(answer), told.read()

    def close(self) -> None:
        kill(self._process)
        self._process.communicate()
        forget(self._process)
