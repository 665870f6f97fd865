"""The governor: reads sensors between tokens and turns what a run uses up and down.

The engine calls `between_tokens` in a step's turn, the expert cache `between_layers`, so a long
prompt gives memory back too. Until a reading is due each costs a look at the clock. Nothing it does
changes a token that memory or drafts could change; with other threads than before ggml may sum
attention over long contexts in another order, as with another --threads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from mimo_edge.governor.cooling import Cooling, Saving, Step, ladder
from mimo_edge.governor.events import Cause, EventLog
from mimo_edge.governor.limits import Limits
from mimo_edge.governor.pressure import SlotPolicy, Watch
from mimo_edge.governor.sensors import Battery, Sensors
from mimo_edge.governor.slots import SlotShares

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

READ_EVERY_S = 1.0
# Charge moves slowly.
BATTERY_EVERY_S = 15.0


class Threads(Protocol):
    """A backend whose number of threads can change between two passes."""

    @property
    def threads(self) -> int: ...

    def set_threads(self, count: int) -> None: ...


class Governor:
    """`threads`: what computes, if its threads can change. `drafts`: the most per verify.
    `limit_drafts` is told how many are left, `slots` are the expert slots of a streamed model,
    `drop_idle` gives caches nobody uses back and returns their bytes."""

    def __init__(
        self,
        limits: Limits,
        sensors: Sensors,
        events: EventLog,
        *,
        threads: Threads | None,
        drafts: int,
        limit_drafts: Callable[[int], None],
        slots: SlotShares | None,
        drop_idle: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self._sensors = sensors
        self._events = events
        self._threads, self._limit_drafts = threads, limit_drafts
        self._slots, self._drop_idle = slots, drop_idle
        self._clock = clock
        self._steps, self._saving_level = ladder(threads.threads if threads else None, drafts)
        self._cooling = Cooling(limits.temperature_c, len(self._steps) - 1)
        self._saving = Saving(limits.battery_low)
        self._watch = Watch(limits.memory_stall)
        self._policy: SlotPolicy | None = None
        if slots is not None:
            self._policy = SlotPolicy(slots.planned, slots.slot_bytes)
        self._level = 0
        self._cause: Cause = "temperature"  # of the newest step down
        self._hottest: tuple[str, float] | None = None
        self._battery: Battery | None = None
        self._broken: set[str] = set()  # sensors that failed, which are not asked again
        self._next = self._next_memory = self._next_battery = clock()

    # --- called by the engine ---

    def between_tokens(self) -> None:
        """Look at every sensor that is due, and act."""
        now = self._clock()
        if now < self._next:
            return
        self._next = now + READ_EVERY_S
        self._look_at_heat(now)
        self._look_at_memory(now)

    def between_layers(self) -> None:
        """Look at memory, if that is due, and act."""
        now = self._clock()
        if now >= self._next_memory:
            self._look_at_memory(now)

    # --- heat and battery ---

    def _look_at_heat(self, now: float) -> None:
        found = self._read("temperatures", self._sensors.temperatures)
        if found:
            self._hottest = max(found.items(), key=lambda item: item[1])
            self._cooling.update(now, self._hottest[1])
        if now >= self._next_battery:
            self._next_battery = now + BATTERY_EVERY_S
            self._battery = self._read("battery", self._sensors.battery)
            if self._battery is not None:
                self._saving.update(self._battery.charge, self._battery.discharging)
        level = max(self._cooling.level, self._saving_level if self._saving.on else 0)
        if level != self._level:
            self._go_to(level)

    def _go_to(self, level: int) -> None:
        before, after = self._steps[self._level], self._steps[level]
        relief = level < self._level
        if not relief:
            self._cause = "temperature" if level == self._cooling.level else "battery"
        self._level = level
        if self._threads is not None and after.threads is not None:
            self._threads.set_threads(after.threads)
        self._limit_drafts(after.drafts)
        if self._cause == "battery" and self._battery is not None:
            way = "discharging" if self._battery.discharging else "not discharging"
            low = self.limits.battery_low
            reading = f"battery at {self._battery.charge:.0%}, {way}, low below {low:.0%}"
        else:
            kind, celsius = self._hottest or ("no sensor", 0.0)
            reading = f"{kind} {celsius:.1f} C, limit {self.limits.temperature_c:g} C"
        self._events.add(self._cause, _change(before, after), reading, relief=relief)

    # --- memory ---

    def _look_at_memory(self, now: float) -> None:
        self._next_memory = now + READ_EVERY_S
        reading = self._read("memory", self._sensors.memory)
        if reading is None:
            return
        short = self._watch.shortage(now, reading)
        if short is not None and (dropped := self._drop_idle()):
            self._events.add("memory", f"{dropped} bytes of idle caches given back", short.reading)
        if self._slots is None or self._policy is None:
            return
        with self._slots.changing() as mine:
            if not mine:
                return  # the application is about it: look again later
            slots, used = self._slots.count, self._slots.used
            allowed = self._slots.allowed_besides("pressure")
            if short is not None:
                target, why = self._policy.fewer(now, short, slots, used), short.reading
            else:
                target = self._policy.more(now, reading, slots, used, allowed)
                why = "memory is not short any more"
            if target == slots:
                return
            self._slots.set("pressure", self._slots.planned - target if target < allowed else 0)
            after = self._slots.count
        if after != slots:
            action = f"expert slots {slots} -> {after} of {self._slots.planned}"
            self._events.add("memory", action, why, relief=after > slots)

    # --- inside ---

    def _read(self, name: str, read: Callable[[], _T]) -> _T | None:
        """A reading; None, once and for all, when the sensor fails: it must not end an answer."""
        if name in self._broken:
            return None
        try:
            return read()
        except Exception as error:
            self._broken.add(name)
            _log.debug("reading %s failed", name, exc_info=True)
            self._events.add("sensor", f"{name} not read any more", repr(error))
            return None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: what may be used now, and the last readings."""
        step, full = self._steps[self._level], self._steps[0]
        return {
            "limits": self.limits.source,
            "threads": step.threads,
            "threads_full": full.threads,
            "drafts": step.drafts,
            "drafts_full": full.drafts,
            "hottest": None if self._hottest is None else self._hottest[0],
            "temperature_c": None if self._hottest is None else self._hottest[1],
            "temperature_limit_c": self.limits.temperature_c,
            "battery": None if self._battery is None else self._battery.charge,
            "sensors_failed": sorted(self._broken),
        }


def _change(before: Step, after: Step) -> str:
    parts = []
    if before.threads != after.threads:
        parts.append(f"threads {before.threads} -> {after.threads}")
    if before.drafts != after.drafts:
        parts.append(f"drafts {before.drafts} -> {after.drafts}")
    return ", ".join(parts)
