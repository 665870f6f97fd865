"""Expert slots that several parties may want back: the application and the governor.

Each says how many of the planned slots it wants released, and the most of these counts. So the
governor never takes into use again what the application asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class ResizableSlots(Protocol):
    """Slots whose number can change while they are used."""

    @property
    def planned(self) -> int: ...

    @property
    def count(self) -> int: ...

    @property
    def used(self) -> int: ...

    @property
    def slot_bytes(self) -> int: ...

    def resize(self, count: int, timeout_s: float) -> int:
        """Use `count` slots; the bytes given back. Fewer than asked for may go: what a token needs
        at least stays, and a layer in use is waited for `timeout_s` at most."""
        ...


class SlotShares:
    """The slots of one model; from any thread."""

    def __init__(self, slots: ResizableSlots) -> None:
        self._slots = slots
        self._released: dict[str, int] = {}
        self._lock = threading.RLock()

    @property
    def planned(self) -> int:
        """Slots of the memory plan."""
        return self._slots.planned

    @property
    def count(self) -> int:
        """Slots that may be used now."""
        return self._slots.count

    @property
    def used(self) -> int:
        """Slots that hold an expert, or await one."""
        return self._slots.used

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return self._slots.slot_bytes

    def allowed_besides(self, who: str) -> int:
        """Slots that everybody but `who` leaves."""
        others = (count for name, count in self._released.items() if name != who)
        return self.planned - max(others, default=0)

    def set(self, who: str, released: int, timeout_s: float = 1.0) -> int:
        """`who` wants that many slots released, no longer the number said before. Returns the
        bytes given back by this."""
        with self._lock:
            self._released[who] = max(0, min(released, self.planned))
            target = self.planned - max(self._released.values())
            return self._slots.resize(target, timeout_s) if target != self.count else 0

    @contextmanager
    def changing(self) -> Iterator[bool]:
        """Nobody else changes the number in here; False when somebody is about it."""
        mine = self._lock.acquire(blocking=False)
        try:
            yield mine
        finally:
            if mine:
                self._lock.release()
