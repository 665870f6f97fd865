"""What every test may rely on."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile

_caches = tempfile.mkdtemp(prefix="mimo-edge-tests-")


def pytest_unconfigure() -> None:
    shutil.rmtree(_caches, ignore_errors=True)


def pytest_configure() -> None:
    # Commands keep what they processed there: nothing of a test belongs to whoever runs it.
    os.environ["XDG_CACHE_HOME"] = _caches
    # A shell that starts tests in the background has them, and all they start, ignore Ctrl-C;
    # nohup the end of the terminal.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
