"""A process of its own for what a vendor's library may end: compiling and loading NPU contexts.

A bad context does not raise, it kills the interpreter. So a `Worker` runs functions of this package
in a child process, one at a time; when the child dies the caller gets a ProviderError with the
signal and the library's last words, and the next call starts a new child.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from multiprocessing.connection import Connection, Pipe
from typing import IO, Any

import mimo_edge.errors
from mimo_edge.errors import MimoEdgeError, ProviderError, UsageError

TIMEOUT_S = 1800.0
_TAIL_BYTES = 4096


class Worker:
    """Runs functions in a child process that is started when first needed. A context manager;
    `close` ends the child. Not thread-safe."""

    def __init__(self, timeout_s: float = TIMEOUT_S, package: str = "mimo_edge") -> None:
        """`package`: where functions may come from."""
        self._timeout_s = timeout_s
        self._package = package
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection[Any, Any] | None = None
        self._log: IO[bytes] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, function: str, /, **arguments: Any) -> Any:
        """`function` is "module:name" within the package; arguments and result are pickled.

        A typed error raised there is raised here. Raises ProviderError when the child dies or
        takes longer than the timeout, BackendError for other exceptions, with the traceback.
        """
        pipe = self._started()
        try:
            pipe.send((function, arguments))
            if not pipe.poll(self._timeout_s):
                self.close()
                raise ProviderError(
                    f"{function} took longer than {self._timeout_s:.0f} s and was ended"
                )
            kind, *rest = pipe.recv()
        except (EOFError, ConnectionError, BrokenPipeError) as error:
            raise self._died(function) from error
        except BaseException:
            self.close()  # an answer that is still to come must not meet the next question
            raise
        if kind == "done":
            return rest[0]
        if kind == "error":
            name, message, hint = rest
            raise getattr(mimo_edge.errors, name, ProviderError)(message, hint)
        raise mimo_edge.errors.BackendError(f"{function} failed in its process: {rest[0]}")

    def _started(self) -> Connection[Any, Any]:
        if self._pipe is not None:
            return self._pipe
        ours, theirs = Pipe()
        self._log = tempfile.TemporaryFile(prefix="mimo-edge-npu-")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), self._package],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(theirs.fileno(),),
            )
        except OSError as error:
            self.close()
            ours.close()
            raise ProviderError(f"no process could be started: {error.strerror}") from error
        finally:
            theirs.close()
        self._pipe = ours
        return ours

    def _died(self, function: str) -> ProviderError:
        assert self._process is not None
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        said = self._last_words()
        self.close()
        how = f"exit code {code}"
        if code < 0:
            with contextlib.suppress(ValueError):
                how = signal.Signals(-code).name
        return ProviderError(f"the process ended by {how} in {function}{said}")

    def _last_words(self) -> str:
        assert self._log is not None
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _TAIL_BYTES))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f", its last words: {lines[-1]}" if lines else ""

    def close(self) -> None:
        """End the child. Twice is harmless; a later call starts a new one."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._log is not None:
            self._log.close()
        self._pipe = self._process = self._log = None


def _serve(pipe: Connection[Any, Any], package: str) -> None:
    """Answer calls until the parent closes its end or is gone."""
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer: tuple[Any, ...] = ("done", _resolve(function, package)(**arguments))
        except MimoEdgeError as error:
            answer = ("error", type(error).__name__, error.message, error.hint)
        except Exception:
            answer = ("failed", traceback.format_exc())
        pipe.send(answer)


def _resolve(function: str, package: str) -> Any:
    module, found, name = function.partition(":")
    if not found or module.split(".")[0] != package:
        raise UsageError(f"{function!r} is not a function of {package}")
    return getattr(importlib.import_module(module), name)


def main() -> None:
    """The child: `python -m mimo_edge.runtimes.onnx.isolated FD PACKAGE`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle: it ends us
    with Connection(int(sys.argv[1])) as pipe:
        _serve(pipe, sys.argv[2])


if __name__ == "__main__":
    main()
