"""What every test may rely on."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    # A shell that starts tests in the background has them, and all they start, ignore Ctrl-C.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
