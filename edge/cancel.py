"""Asking work to stop: one flag that Python and C look at."""

from __future__ import annotations

from typing import Protocol

from mimo_edge.errors import Cancelled


class CancelSignal(Protocol):
    """What long work asks now and then: a `Cancel`, a threading.Event."""

    def is_set(self) -> bool:
        """Whether the work should stop."""
        ...


class Cancel:
    """A request to stop. `set` takes no lock, so it may be called from any thread and from a
    signal handler, whatever they interrupt.

    `flag` is one byte and a zero: not empty as a C string once the request was made. Compute
    libraries are given its address, because they cannot wait for the interpreter.
    """

    def __init__(self) -> None:
        self.flag = bytearray(2)

    def set(self) -> None:
        """Ask for the stop."""
        self.flag[0] = 1

    def clear(self) -> None:
        """Take the request back, for the next work."""
        self.flag[0] = 0

    def is_set(self) -> bool:
        """Whether the work should stop."""
        return self.flag[0] != 0


def check_cancel(cancel: CancelSignal | None) -> None:
    """Raise Cancelled if the work should stop."""
    if cancel is not None and cancel.is_set():
        raise Cancelled("cancelled")
