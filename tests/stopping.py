"""Helpers that stop work at a chosen point: in the middle of a ggml graph, or in a read."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from mimo_edge.cancel import Cancel
from mimo_edge.flash_file import FlashFile
from mimo_edge.runtimes.ggml.backend import GgmlBackend


@contextmanager
def stopped_after(
    backend: GgmlBackend, operations: int, cancel: Cancel
) -> Iterator[Callable[[], int]]:
    """In here `cancel` is set after that many of ggml's operations, counted over all passes it is
    given to. What comes back tells how many there were."""
    count = 0

    def answer(_: int | None) -> bool:
        nonlocal count
        count += 1
        if count >= operations:
            cancel.set()
        return cancel.is_set()

    function = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(answer)
    device = backend.device
    whole = device._flag_function
    device._flag_function = ctypes.cast(function, ctypes.c_void_p).value or 0
    try:
        yield lambda: count
    finally:
        device._flag_function = whole


class SlowDisk:
    """Reads of every FlashFile block while `blocked` is set; `reached` says that one does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.blocked = False
        self.reached = threading.Event()
        self._go = threading.Event()
        whole = FlashFile._preadv

        def preadv(file: FlashFile, targets: Sequence[memoryview], offset: int) -> int:
            if self.blocked:
                self.reached.set()
                assert self._go.wait(60)
            return whole(file, targets, offset)

        monkeypatch.setattr(FlashFile, "_preadv", preadv)

    def block(self) -> None:
        """From now on reads hang."""
        self.reached.clear()
        self._go.clear()
        self.blocked = True

    def release(self) -> None:
        """Let them go on."""
        self.blocked = False
        self._go.set()
