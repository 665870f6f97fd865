"""Heat and battery: fewer threads, then narrower drafts, one step at a time, and back.

Heat follows work by seconds to minutes, so a step is given time to show before the next, and a
step back waits until the device has been cool for a while. A step back that made it hot again
doubles that while: the device works at the highest step it can hold.
"""

from __future__ import annotations

from dataclasses import dataclass

SETTLE_S = 5.0
# As much above the limit is no slow drift any more: two steps at once.
FAR_C = 5.0
HYSTERESIS_C = 4.0
RECOVER_S = 30.0
_MOST_RECOVER_S = 16 * RECOVER_S
# A battery counts as low until it is this much above the limit again.
BATTERY_MARGIN = 0.05


@dataclass(frozen=True)
class Step:
    """What a run may use: threads (None: they cannot be changed) and drafts per verify."""

    threads: int | None
    drafts: int


def ladder(threads: int | None, drafts: int) -> tuple[tuple[Step, ...], int]:
    """Steps from everything down to the least, and the step for saving a battery.

    Threads go first, by quarters down to half: less power drawn at once, and what waits for memory
    or flash loses little. Then drafts, one by one: work that may be thrown away. Then the other
    threads. A low battery asks for the end of the second part.
    """
    steps = [Step(threads, drafts)]
    half, quarter = 0, 0
    if threads is not None:
        half, quarter = -(-threads // 2), max(1, round(threads / 4))
        while (now := steps[-1].threads or 0) > half:
            steps.append(Step(max(half, now - quarter), drafts))
    while steps[-1].drafts:
        steps.append(Step(steps[-1].threads, steps[-1].drafts - 1))
    saving = len(steps) - 1
    while (now := steps[-1].threads or 1) > 1:
        steps.append(Step(max(1, now - quarter), 0))
    return tuple(steps), saving


class Cooling:
    """The step heat demands, from 0 (everything) to `last`."""

    def __init__(self, limit_c: float, last: int) -> None:
        self._limit_c, self._last = limit_c, last
        self.level = 0
        self._changed = float("-inf")
        self._raised = float("-inf")
        self._cool_since: float | None = None
        self._recover_s = RECOVER_S

    def update(self, now: float, celsius: float) -> int:
        """The step for a reading at `now` seconds."""
        if celsius > self._limit_c:
            self._cool_since = None
            if self.level < self._last and now - self._changed >= SETTLE_S:
                if now - self._raised < self._recover_s:
                    self._recover_s = min(2 * self._recover_s, _MOST_RECOVER_S)
                steps = 2 if celsius > self._limit_c + FAR_C else 1
                self.level = min(self._last, self.level + steps)
                self._changed = now
        elif celsius > self._limit_c - HYSTERESIS_C:
            self._cool_since = None
        elif self.level:
            if self._cool_since is None:
                self._cool_since = now
            if now - max(self._cool_since, self._changed) >= self._recover_s:
                self.level -= 1
                self._changed = self._raised = now
        elif now - self._raised >= _MOST_RECOVER_S:
            self._recover_s = RECOVER_S
        return self.level


class Saving:
    """Whether a battery is to be saved."""

    def __init__(self, low: float) -> None:
        self._low = low
        self.on = False

    def update(self, charge: float, discharging: bool) -> bool:
        """From a reading: charge 0 to 1."""
        margin = BATTERY_MARGIN if self.on else 0.0
        self.on = discharging and charge < self._low + margin and self._low > 0
        return self.on
