"""The memory cgroups a process is in, versions 1 and 2: limits, use, and how often a limit was met.

Only read here; edge/bench/cgroup.py makes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mimo_edge.machine import number

# Kernels without a limit write a number near 2^63.
_NO_LIMIT = 1 << 60


@dataclass(frozen=True)
class CgroupMemory:
    """One memory cgroup: its folder, version, and path as the process sees it."""

    folder: Path
    version: int
    name: str

    def limit_bytes(self) -> int | None:
        """What it may hold: in version 2 also where the kernel begins to slow it down. None when
        it has no limit."""
        names = ("memory.limit_in_bytes",) if self.version == 1 else ("memory.max", "memory.high")
        limits = (number(self.folder / name) for name in names)
        return min((n for n in limits if n is not None and n < _NO_LIMIT), default=None)

    def usage_bytes(self) -> int | None:
        """What it holds, page cache included."""
        name = "memory.usage_in_bytes" if self.version == 1 else "memory.current"
        return number(self.folder / name)

    def droppable_bytes(self) -> int:
        """Page cache that nobody misses: what was not looked at lately, and half of the rest."""
        prefix = "total_" if self.version == 1 else ""
        idle, active = (
            _counts(self.folder / "memory.stat").get(f"{prefix}{kind}_file", 0)
            for kind in ("inactive", "active")
        )
        return idle + active // 2

    def hits(self) -> int:
        """How often its limit was met so far."""
        if self.version == 1:
            return number(self.folder / "memory.failcnt") or 0
        events = _counts(self.folder / "memory.events")
        return events.get("high", 0) + events.get("max", 0)


def memory_cgroups(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> list[CgroupMemory]:
    """The memory cgroups of a process, its own first, then those above; none where there are no
    cgroups."""
    try:
        lines = membership.read_text("ascii", "replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version, base = 2, root
        if "memory" in controllers.split(","):
            version, base = 1, root / "memory"
        elif controllers:
            continue
        folder = base / path.lstrip("/")
        # A limit anywhere above binds as well; a container may not see all of the path.
        for place in (folder, *folder.parents):
            if place.is_dir():
                name = "/" if place == base else f"/{place.relative_to(base)}"
                found.append(CgroupMemory(place, version, name))
            if place == base:
                break
    return found


def _counts(path: Path) -> dict[str, int]:
    """Lines of "name number"."""
    try:
        lines = path.read_text("ascii", "replace").splitlines()
    except OSError:
        return {}
    words = (line.split() for line in lines)
    return {pair[0]: int(pair[1]) for pair in words if len(pair) == 2 and pair[1].isdigit()}
