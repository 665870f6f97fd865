"""A time after which work is cancelled."""

from __future__ import annotations

import math
import threading
import time

from mimo_edge.cancel import Cancel
from mimo_edge.errors import UsageError


class Deadline:
    """Sets `cancel` once `timeout_s` seconds have passed since this was made, while it is entered
    as a context. `passed` says afterwards whether it did. None never ends.

    Raises UsageError for a timeout that is not a time.
    """

    def __init__(self, cancel: Cancel, timeout_s: float | None) -> None:
        if timeout_s is not None and (
            isinstance(timeout_s, bool)
            or not isinstance(timeout_s, (int, float))
            or not 0 < timeout_s < math.inf
        ):
            raise UsageError(f"timeout_s = {timeout_s!r}", "use more than 0 seconds, or None")
        self.passed = False
        self._cancel = cancel
        self._end = None if timeout_s is None else time.monotonic() + timeout_s
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()
        self._left = False

    def __enter__(self) -> Deadline:
        if self._end is not None:
            rest = self._end - time.monotonic()
            if rest <= 0:
                self._pass()
            else:
                self._timer = threading.Timer(min(rest, threading.TIMEOUT_MAX), self._pass)
                self._timer.daemon = True
                self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
            with self._lock:  # a timer that fires now must not cancel the next work
                self._left = True

    def _pass(self) -> None:
        with self._lock:
            if not self._left:
                self.passed = True
                self._cancel.set()
