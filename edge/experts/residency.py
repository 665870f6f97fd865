"""Which expert is in which slot: the bookkeeping shared by the cache and the simulator.

No file, no memory and no thread here. An expert is claimed (its slot is reserved and safe), then
settled (its bytes are good and it may be given up when nobody holds it), or dropped.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mimo_edge.errors import DeviceError, UsageError
from mimo_edge.experts.policy import Ids, Mask, Policy

Slots = NDArray[np.int32]


class Residency:
    """`slots` slots over `rows` layers of `experts` experts.

    `slot_of` i32 [R, E] is the slot of an expert or -1; `settled` and `pinned` bool [R, E].
    """

    def __init__(self, rows: int, experts: int, slots: int, policy: Policy) -> None:
        if slots < 1:
            raise UsageError(f"{slots} expert slots")
        self.policy = policy
        self.slot_of: Slots = np.full((rows, experts), -1, np.int32)
        self.settled: Mask = np.zeros((rows, experts), np.bool_)
        self.pinned: Mask = np.zeros((rows, experts), np.bool_)
        self.evictions = np.zeros(rows, np.int64)
        self.held = np.zeros(rows, np.int64)  # experts of each layer that have a slot
        self._evictable: Mask = np.zeros((rows, experts), np.bool_)
        self._holds = np.zeros((rows, experts), np.int32)
        self._owner: list[tuple[int, int] | None] = [None] * slots
        self._free = list(range(slots - 1, -1, -1))
        self.limit = slots

    @property
    def used(self) -> int:
        """Slots that hold or await an expert."""
        return self.limit - len(self._free)

    def owner(self, slot: int) -> tuple[int, int] | None:
        """(row, expert) of a slot, None when it is free."""
        return self._owner[slot]

    @property
    def free(self) -> int:
        """Slots that hold nothing."""
        return len(self._free)

    def available(self) -> int:
        """Slots that could be claimed now: free ones and those that may be given up."""
        return len(self._free) + int(np.count_nonzero(self._evictable))

    def hold(self, row: int, ids: Ids) -> None:
        """Keep experts, which all have a slot, until `unhold`."""
        self._holds[row, ids] += 1
        self._evictable[row, ids] = False

    def unhold(self, row: int, ids: Ids) -> None:
        """Undo one `hold`."""
        self._holds[row, ids] -= 1
        self._refresh(row, ids)

    def _refresh(self, row: int, ids: Ids) -> None:
        self._evictable[row, ids] = (
            self.settled[row, ids] & (self._holds[row, ids] == 0) & ~self.pinned[row, ids]
        )

    def claim(self, row: int, ids: Ids) -> Slots:
        """Slots i32 [n] for experts that have none, giving up others where needed.

        Raises DeviceError, and changes nothing, when too few slots can be given up.
        """
        wanted, free = len(ids), len(self._free)
        if wanted > free:
            room = self.available()
            if wanted > room:
                raise DeviceError(
                    f"{wanted} experts are needed at once and {room} of {self.limit} slots are "
                    "free or can be given up",
                    "allow more slots, or process the layer in smaller groups",
                )
            self.held[row] += wanted
            pairs = self.policy.victims(row, wanted - free, self._evictable, self.held)
            self.held[row] -= wanted
            for r, e in pairs.tolist():
                self.drop(r, e)
                self.evictions[r] += 1
        self.held[row] += wanted
        slots = np.array([self._free.pop() for _ in range(wanted)], np.int32)
        self.slot_of[row, ids] = slots
        for slot, expert in zip(slots.tolist(), ids.tolist(), strict=True):
            self._owner[slot] = (row, expert)
        return slots

    def held_by_anyone(self, row: int, expert: int) -> bool:
        """Whether an expert is held."""
        return bool(self._holds[row, expert])

    def movable(self, row: int, expert: int) -> bool:
        """Whether nobody holds a settled expert."""
        return bool(self.settled[row, expert]) and not self._holds[row, expert]

    def settle(self, row: int, ids: Ids) -> None:
        """The bytes of claimed experts are there."""
        self.settled[row, ids] = True
        self._refresh(row, ids)

    def drop(self, row: int, expert: int) -> None:
        """Forget an expert; its slot is free."""
        slot = int(self.slot_of[row, expert])
        self.slot_of[row, expert] = -1
        self.held[row] -= 1
        self.settled[row, expert] = False
        self._evictable[row, expert] = False
        self._holds[row, expert] = 0
        self._owner[slot] = None
        self._free.append(slot)

    def pin(self, row: int, ids: Ids) -> None:
        """Never give up these experts, once they are there."""
        self.pinned[row, ids] = True
        self._evictable[row, ids] = False

    def shrink(self, count: int) -> tuple[int, list[tuple[int, int]]]:
        """Give up `count` slots, the highest ones, keeping the most valuable experts.

        Returns how many were given up (fewer when experts in use or on their way are in the way)
        and the moves (from slot, to slot) the owner of the memory has to copy.
        """
        lowest, floor = max(self.limit - count, 1), self.limit
        # The end must be free or movable, and enough of the rest free or given up to move it.
        room = self.limit - self.available()
        while floor > max(lowest, room):
            owner = self._owner[floor - 1]
            if owner is not None and not self.movable(*owner):
                break
            floor -= 1
        given = self.limit - floor
        tail_free = sum(slot >= floor for slot in self._free)
        head_free = len(self._free) - tail_free
        surplus = (given - tail_free) - head_free
        if surplus > 0:  # more experts than places left
            for r, e in self.policy.victims(0, surplus, self._evictable, self.held).tolist():
                self.drop(r, e)
                self.evictions[r] += 1
        places = sorted((slot for slot in self._free if slot < floor), reverse=True)
        moves = []
        for slot in range(floor, self.limit):
            owner = self._owner[slot]
            if owner is not None:
                target = places.pop()
                moves.append((slot, target))
                self._owner[target], self._owner[slot] = owner, None
                self.slot_of[owner] = target
        self._free = places
        self.limit = floor
        return given, moves

    def grow(self, count: int) -> int:
        """Take back up to `count` slots given up before; returns how many."""
        top = min(self.limit + count, len(self._owner))
        self._free[:0] = range(top - 1, self.limit - 1, -1)
        taken, self.limit = top - self.limit, top
        return taken
