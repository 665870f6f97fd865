"""Facts about this machine and this process, as far as the system tells them."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path

from mimo_edge.hwcap import arm_extensions, hwcap_words

# Kernels without a limit write a number near 2^63.
_NO_LIMIT = 1 << 60
# Names of device profiles, and how /proc/cpuinfo of an x86 processor spells them.
_ISA_FLAGS = {
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "avx512": "avx512f",
    "avx512-vnni": "avx512_vnni",
    "avx-vnni": "avx_vnni",
    "amx-int8": "amx_int8",
}


def usable_cores() -> int:
    """Cores this process may run on, which a container or taskset can make fewer than exist."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_rss_bytes() -> int:
    """Most memory this process has had resident, pages of mapped files included."""
    # Not ru_maxrss on Linux: a new process starts there with what its parent had resident.
    high = _field("/proc/self/status", "VmHWM")
    if high is not None:
        return high * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int | None:
    """Memory this process has resident now; None where the system does not say."""
    now = _field("/proc/self/status", "VmRSS")
    return None if now is None else now * 1024


def storage_read_bytes() -> int | None:
    """Bytes this process made the disks deliver so far, by read or through a mapped file; None
    where the system does not count them."""
    return _field("/proc/self/io", "read_bytes")


def memory_bytes() -> int | None:
    """RAM of the machine."""
    total = _field("/proc/meminfo", "MemTotal")
    return None if total is None else total * 1024


def available_bytes() -> int | None:
    """What the system says could be allocated now; None where it does not tell."""
    free = _field("/proc/meminfo", "MemAvailable")
    return None if free is None else free * 1024


def cgroup_limit_bytes(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> int | None:
    """The tightest memory limit of the cgroups this process is in, less what they hold already;
    None when there is none. Versions 1 and 2."""
    try:
        lines = membership.read_text("ascii", "replace").splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        names = ("memory.max", "memory.current")
        base = root
        if "memory" in controllers.split(","):
            names, base = ("memory.limit_in_bytes", "memory.usage_in_bytes"), root / "memory"
        elif controllers:
            continue
        folder = base / path.lstrip("/")
        # A limit anywhere above binds as well; a container may not see all of the path.
        for place in (folder, *folder.parents):
            limit, used = (_number(place / name) for name in names)
            if limit is not None and limit < _NO_LIMIT:
                found.append(max(0, limit - (used or 0)))
            if place == base:
                break
    return min(found, default=None)


def isa_flags() -> tuple[str, ...]:
    """Vector extensions our kernels use, as device profiles name them."""
    words = hwcap_words()
    if words is not None:
        return arm_extensions(words)
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return ()
    flags: set[str] = set()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "flags":
            flags |= set(value.split())
    return tuple(name for name, flag in _ISA_FLAGS.items() if flag in flags)


def clock_hz() -> float | None:
    """The fastest clock the system names for a core."""
    folder = Path("/sys/devices/system/cpu")
    limits = (_number(path) for path in folder.glob("cpu[0-9]*/cpufreq/cpuinfo_max_freq"))
    if known := [limit * 1e3 for limit in limits if limit]:
        return max(known)
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return None
    shown = [line.partition(":")[2] for line in lines if line.startswith("cpu MHz")]
    clocks = [float(text) for text in shown if text.strip().replace(".", "", 1).isdigit()]
    return max(clocks) * 1e6 if clocks else None


def thermal_zones(root: Path = Path("/sys/class/thermal")) -> dict[str, float]:
    """Temperature in degrees Celsius of every sensor the system shows, by its kind."""
    found: dict[str, float] = {}
    for zone in sorted(root.glob("thermal_zone*")):
        value = _number(zone / "temp")
        try:
            kind = (zone / "type").read_text("utf-8", "replace").strip()
        except OSError:
            kind = zone.name
        if value is not None:
            found[kind if kind not in found else f"{kind} ({zone.name})"] = value / 1000
    return found


def describe() -> dict[str, object]:
    """JSON-ready: processor, cores, RAM, system, load."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "memory_bytes": memory_bytes(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load_average": None if load is None else round(load, 2),
    }


def cpu_name() -> str:
    """The processor, as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Hardware", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()


def _number(path: Path) -> int | None:
    """The whole number a file of the kernel's holds; None when it holds none."""
    try:
        return int(path.read_text("ascii", "replace"))
    except (OSError, ValueError):
        return None


def _field(path: str, name: str) -> int | None:
    """The number after "name:" in a file of /proc; None when there is none."""
    try:
        lines = Path(path).read_text("ascii", "replace").splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition(":")
        if key == name and value.split():
            number = value.split()[0]
            return int(number) if number.isdigit() else None
    return None
