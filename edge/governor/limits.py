"""From which readings on the governor acts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mimo_edge.devices.profile import DeviceProfile


@dataclass(frozen=True)
class Limits:
    """`temperature_c` is the most a sensor whose kind matches one of `zones` (shell patterns) may
    show; a battery that discharges below the share `battery_low` (0: never) is saved; from the
    share `memory_stall` of the time on that something waits for memory, memory is given back.
    `source` says whose limits these are."""

    temperature_c: float
    zones: tuple[str, ...]
    battery_low: float
    memory_stall: float
    source: str = ""

    @classmethod
    def of(cls, profile: DeviceProfile) -> Limits:
        """The limits a profile states."""
        return cls(
            profile.thermal_limit_c,
            profile.thermal_zones,
            profile.battery_low,
            profile.memory_stall,
            profile.name,
        )
