"""Whose turn it is: the one queue of everybody who wants the model of a runtime.

A backend computes one step at a time. Turns are given in the order in which they were asked for, so
generations that ask for one turn per step go round robin, and nobody starves: between two turns of
one generation, every other that waits has one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from mimo_edge.cancel import CancelSignal, check_cancel

# How often somebody who waits looks whether he still wants his turn.
_POLL_S = 0.02


class _Ticket:
    """A place in the queue. `gate` is locked until its turn has come."""

    __slots__ = ("gate", "thread")

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.gate: threading.Lock | None = None


class TurnQueue:
    """Turns in order of arrival, from any thread. A thread that has the turn may ask again."""

    def __init__(self) -> None:
        # Re-entrant: the collector may run anything here, a signal handler too.
        self._mutex = threading.RLock()
        self._waiting: deque[_Ticket] = deque()
        self._holder: _Ticket | None = None

    @property
    def waiting(self) -> int:
        """How many wait for a turn."""
        return len(self._waiting)

    @property
    def held(self) -> bool:
        """Whether somebody has the turn now."""
        return self._holder is not None

    @contextmanager
    def turn(self, cancel: CancelSignal | None = None) -> Iterator[None]:
        """Wait for the turn and keep it in here. Raises Cancelled while waiting, once `cancel` is
        set."""
        holder = self._holder
        if holder is not None and holder.thread == threading.get_ident():
            yield  # ours already
            return
        # All of it inside `try`: an interrupt may come anywhere, and a turn that is never given
        # back would stop everybody.
        ticket = _Ticket()
        try:
            self._join(ticket)
            if ticket.gate is not None:
                while not ticket.gate.acquire(timeout=_POLL_S):
                    check_cancel(cancel)
            yield
        finally:
            self._leave(ticket)

    def _join(self, ticket: _Ticket) -> None:
        with self._mutex:
            if self._holder is None:
                self._holder = ticket
                return
            ticket.gate = threading.Lock()
            ticket.gate.acquire()
            self._waiting.append(ticket)

    def _leave(self, ticket: _Ticket) -> None:
        """Give up the turn or the place in the queue, whichever it is."""
        with self._mutex:
            if self._holder is not ticket:
                if ticket in self._waiting:
                    self._waiting.remove(ticket)
                return
            self._holder = self._waiting.popleft() if self._waiting else None
            if self._holder is not None and self._holder.gate is not None:
                self._holder.gate.release()
