"""Python packages with machine code in them, tried in another process before they are imported.

Wheels for aarch64 are made for one baseline, and what a library detects of the processor when it
is loaded can be wrong: onnxruntime is reported to die of an illegal instruction on cores that
others of its users have. That ends a process without any exception, so where it can happen the
import is tried in a child first, once per process.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from functools import cache

from mimo_edge.errors import BackendError
from mimo_edge.hwcap import hwcap_words

_log = logging.getLogger(__name__)
_TIMEOUT_S = 120  # first imports from slow flash


def check_import(module: str) -> None:
    """On ARM, import `module` in a child process and see it survive; elsewhere do nothing.

    Raises BackendError when the child is ended by a signal, or the module is not there or broken.
    """
    if hwcap_words() is not None:
        try_import(module)


@cache
def try_import(module: str) -> None:
    """As `check_import`, on every machine."""
    if not sys.executable:  # Python inside an app
        _log.warning("%s is imported untried: there is no Python program to try it with", module)
        return
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BackendError(
            f"importing {module} did not end within {_TIMEOUT_S} s", "use another backend"
        ) from None
    except OSError as error:
        raise BackendError(f"{module} could not be tried in a process: {error}") from error
    if done.returncode < 0:
        raise BackendError(
            f"importing {module} ends the process ({_signal_name(-done.returncode)}) on this "
            "processor",
            "use --backend ggml, or another build of the package",
        )
    if done.returncode:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise BackendError(f"importing {module} fails: {' '.join(last)}", f"pip install {module}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
