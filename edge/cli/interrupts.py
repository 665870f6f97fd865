"""Ctrl-C while a model answers: the answer is cancelled, what was said stays."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """In here SIGTERM and SIGHUP end the process in order, as SystemExit: what is to be removed or
    given back is. Where they are ignored, as under nohup, they stay so."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals do not arrive here
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    names = ("SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) == signal.SIG_DFL}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Interrupts:
    """How often Ctrl-C was pressed."""

    def __init__(self) -> None:
        self.count = 0

    def __bool__(self) -> bool:
        return self.count > 0


@contextmanager
def cancelled_by_interrupts(cancel: Callable[[], None]) -> Iterator[Interrupts]:
    """In here the first Ctrl-C calls `cancel`, which must be safe in any thread and signal handler;
    a second one raises KeyboardInterrupt as usual.

    Python runs signal handlers between two of its own instructions, so not while the main thread
    is inside a long computation. The byte that the C part of the handler writes to a pipe arrives
    at once, and a thread that waits for it cancels.
    """
    seen = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield seen  # signals do not arrive here
        return

    def handler(number: int, frame: FrameType | None) -> None:
        seen.count += 1
        if seen.count > 1:
            raise KeyboardInterrupt
        cancel()

    def watch() -> None:
        with suppress(OSError):
            while data := os.read(receiving, 64):
                if signal.SIGINT in data:
                    cancel()

    receiving, sending = os.pipe()
    os.set_blocking(sending, False)
    watcher = threading.Thread(target=watch, name="mimo-interrupts", daemon=True)
    watcher.start()
    before = signal.signal(signal.SIGINT, handler)
    old = signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
    try:
        yield seen
    finally:
        signal.set_wakeup_fd(old)
        signal.signal(signal.SIGINT, before)
        os.close(sending)  # ends the watcher
        watcher.join()
        os.close(receiving)
