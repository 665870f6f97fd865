"""Short memory: how many expert slots to keep, from what the system says.

Three signs count: a bound (the machine's memory, or a cgroup's) with little left that is not
merely page cache, a bound that was met, and time in which something waited for memory (PSI). Then
as many slots go as bring the bound back to its upper mark, or an eighth of them. They return an
eighth at a time once it was calm for a while and there is room; when pressure comes back soon
after, the wait doubles.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from mimo_edge.governor.sensors import Bound, MemoryReading
from mimo_edge.units import format_bytes

# Marks: parts of a bound. A run in a cgroup of exactly its own --ram leaves 4 % and more of it.
_CGROUP_MARKS = (64, 32)
_MACHINE_MARKS = (32, 16)
_LEAST_MARK = 4 << 20
CALM_S = 10.0
_MOST_CALM_S = 320.0
GROW_EVERY_S = 2.0
_PART = 8
# Readings further apart say nothing about now.
_STALE_S = 10.0


def marks(bound: Bound) -> tuple[int, int]:
    """Free bytes below which memory is short, and with which it is not any more."""
    low, high = _MACHINE_MARKS if bound.machine else _CGROUP_MARKS
    lowest = min(_LEAST_MARK, bound.limit_bytes // 16)
    return max(bound.limit_bytes // low, lowest), max(bound.limit_bytes // high, 2 * lowest)


class Shortage(NamedTuple):
    """`need_bytes` are to be given back (None: it is not known how many)."""

    need_bytes: int | None
    reading: str


class Watch:
    """Compares readings with the ones before."""

    def __init__(self, stall_share: float) -> None:
        self._stall_share = stall_share
        self._at: float | None = None
        self._stalled_s: float | None = None
        self._hits: Mapping[str, int] = {}

    def shortage(self, now: float, reading: MemoryReading) -> Shortage | None:
        """Whether memory is short, by a reading at `now` seconds."""
        before, since = self._hits, None if self._at is None else now - self._at
        share = None
        if since and since < _STALE_S and None not in (reading.stalled_s, self._stalled_s):
            share = (reading.stalled_s - self._stalled_s) / since  # type: ignore[operator]
        self._at, self._stalled_s = now, reading.stalled_s
        self._hits = {bound.name: bound.hits for bound in reading.bounds}
        worst: Shortage | None = None
        for bound in reading.bounds:
            low, high = marks(bound)
            met = bound.hits > before.get(bound.name, bound.hits) and bound.free_bytes < high
            if bound.free_bytes < low or met:
                need = high - bound.free_bytes
                if worst is None or need > (worst.need_bytes or 0):
                    worst = Shortage(
                        need,
                        f"{format_bytes(max(0, bound.free_bytes))} of "
                        f"{format_bytes(bound.limit_bytes)} left in {bound.name}",
                    )
        if worst is None and share is not None and share > self._stall_share:
            worst = Shortage(None, f"{min(share, 1):.0%} of the time something waits for memory")
        return worst


class SlotPolicy:
    """How many of `planned` slots of `slot_bytes` to keep."""

    def __init__(self, planned: int, slot_bytes: int) -> None:
        self._planned, self._slot_bytes = planned, slot_bytes
        self._calm_s = CALM_S
        self._pressed = float("-inf")
        self._grown = float("-inf")

    def fewer(self, now: float, short: Shortage, slots: int, used: int) -> int:
        """Slots to keep of `slots`, `used` of which hold an expert."""
        if now - self._grown < 2 * self._calm_s:
            self._calm_s = min(2 * self._calm_s, _MOST_CALM_S)
            self._grown = float("-inf")  # once for every time
        self._pressed = now
        gone = max(1, self._planned // _PART)
        if short.need_bytes is not None:
            gone = -(-short.need_bytes // self._slot_bytes)
        # Slots nothing was read into take no memory, so none comes back from them.
        return max(0, slots - gone - (slots - used))

    def more(self, now: float, reading: MemoryReading, slots: int, used: int, allowed: int) -> int:
        """Slots to use when memory is not short: at most `allowed`, `slots` while it is too early,
        or there is no room."""
        if slots >= allowed:
            if now - self._pressed > _MOST_CALM_S:
                self._calm_s = CALM_S
            return slots
        if now - self._pressed < self._calm_s or now - self._grown < GROW_EVERY_S:
            return slots
        step = max(1, self._planned // _PART)
        for bound in reading.bounds:
            room = (bound.free_bytes - marks(bound)[1]) // self._slot_bytes
            step = min(step, room - (slots - used))
        if step <= 0:
            return slots
        self._grown = now
        return min(allowed, slots + step)
