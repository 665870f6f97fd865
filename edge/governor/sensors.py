"""What the governor reads: temperatures, battery, memory. On Linux from sysfs and procfs.

A host application that knows better, as an Android app that may not read them, passes an object of
its own with these methods, or a `SystemSensors` with some of them replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

from mimo_edge import machine
from mimo_edge.memory_cgroups import memory_cgroups

# A sensor that is switched off shows something outside these.
_PLAUSIBLE_C = (-30.0, 150.0)


@dataclass(frozen=True)
class Battery:
    """`charge` from 0 to 1, and whether it is getting less."""

    charge: float
    discharging: bool


@dataclass(frozen=True)
class Bound:
    """A bound on memory: `free_bytes` of `limit_bytes` are left or hold what can be dropped at
    once, as page cache. `hits` counts how often it was met. `machine`: all memory there is."""

    name: str
    limit_bytes: int
    free_bytes: int
    hits: int = 0
    machine: bool = False


@dataclass(frozen=True)
class MemoryReading:
    """`stalled_s` seconds, since some moment in the past, something waited for memory; None where
    the system does not count them."""

    stalled_s: float | None = None
    bounds: tuple[Bound, ...] = ()


class Sensors(Protocol):
    """Readings of the device; called between tokens, at most every second or so."""

    def temperatures(self) -> Mapping[str, float]:
        """Degrees Celsius by kind of sensor; none where there are none."""
        ...

    def battery(self) -> Battery | None:
        """The battery, if there is one."""
        ...

    def memory(self) -> MemoryReading:
        """How short memory is."""
        ...


class SystemSensors:
    """The sensors of this Linux system whose kind matches one of the patterns `zones`."""

    def __init__(
        self,
        zones: Sequence[str] = ("*",),
        *,
        sysfs: Path = Path("/sys"),
        procfs: Path = Path("/proc"),
    ) -> None:
        self._sysfs, self._procfs = sysfs, procfs
        found = machine.thermal_zone_folders(sysfs / "class" / "thermal")
        self._zones = {
            kind: folder
            for kind, folder in found.items()
            if any(fnmatchcase(kind.lower(), pattern.lower()) for pattern in zones)
        }

    def temperatures(self) -> dict[str, float]:
        """See `Sensors`."""
        found = {}
        for kind, folder in self._zones.items():
            celsius = machine.zone_celsius(folder)
            if celsius is not None and _PLAUSIBLE_C[0] < celsius < _PLAUSIBLE_C[1]:
                found[kind] = celsius
        return found

    def battery(self) -> Battery | None:
        """See `Sensors`. Of several batteries the fullest counts."""
        found: list[Battery] = []
        folder = self._sysfs / "class" / "power_supply"
        for supply in sorted(folder.glob("*")):
            if machine.first_line(supply / "type") != "Battery":
                continue
            # a mouse or pen reports its own battery, as one of scope Device
            if machine.first_line(supply / "scope") == "Device":
                continue
            percent = machine.number(supply / "capacity")
            if percent is not None and 0 <= percent <= 100:
                status = machine.first_line(supply / "status")
                found.append(Battery(percent / 100, status == "Discharging"))
        return max(found, key=lambda battery: battery.charge, default=None)

    def memory(self) -> MemoryReading:
        """See `Sensors`: the machine, and every cgroup above this process that has a limit."""
        bounds = []
        meminfo = self._procfs / "meminfo"
        total = machine.field(meminfo, "MemTotal")
        free = machine.field(meminfo, "MemAvailable")
        if total is not None and free is not None:
            bounds.append(Bound("this machine", total << 10, free << 10, machine=True))
        pressure = self._procfs / "pressure" / "memory"
        groups = memory_cgroups(self._sysfs / "fs" / "cgroup", self._procfs / "self" / "cgroup")
        for group in groups:
            limit = group.limit_bytes()
            used = group.usage_bytes()
            if limit is not None and used is not None:
                left = limit - used + group.droppable_bytes()
                bounds.append(Bound(f"cgroup {group.name}", limit, left, group.hits()))
        # Its own cgroup's stalls, where they are counted apart: others may wait for others' limits.
        if groups and (groups[0].folder / "memory.pressure").is_file():
            pressure = groups[0].folder / "memory.pressure"
        return MemoryReading(_stalled_s(pressure), tuple(bounds))


def _stalled_s(path: Path) -> float | None:
    """Seconds of the line "some avg10=.. avg60=.. avg300=.. total=<microseconds>"."""
    try:
        lines = path.read_text("ascii", "replace").splitlines()
    except OSError:
        return None
    for line in lines:
        words = line.split()
        if words[:1] == ["some"] and words[-1].startswith("total="):
            text = words[-1].removeprefix("total=")
            return int(text) / 1e6 if text.isdigit() else None
    return None
