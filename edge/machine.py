"""Facts about this machine and this process, as far as the system tells them."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path

from mimo_edge.hwcap import arm_extensions, hwcap_words

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
    high = field("/proc/self/status", "VmHWM")
    if high is not None:
        return high * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int | None:
    """Memory this process has resident now; None where the system does not say."""
    now = field("/proc/self/status", "VmRSS")
    return None if now is None else now * 1024


def storage_read_bytes() -> int | None:
    """Bytes this process made the disks deliver so far, by read or through a mapped file; None
    where the system does not count them."""
    return field("/proc/self/io", "read_bytes")


def busy_seconds(path: Path = Path("/proc/stat")) -> float | None:
    """Seconds all cores together have worked since the start, for whomever, and those a host took
    from them; None where the system does not say."""
    words = first_line(path).split()
    if len(words) < 9 or words[0] != "cpu" or not all(word.isdigit() for word in words[1:9]):
        return None
    user, nice, system, _idle, _iowait, irq, softirq, stolen = map(int, words[1:9])
    ticks = user + nice + system + irq + softirq + stolen
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_bytes() -> int | None:
    """RAM of the machine."""
    total = field("/proc/meminfo", "MemTotal")
    return None if total is None else total * 1024


def available_bytes() -> int | None:
    """What the system says could be allocated now; None where it does not tell."""
    free = field("/proc/meminfo", "MemAvailable")
    return None if free is None else free * 1024


def cgroup_limit_bytes(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> int | None:
    """The tightest memory limit of the cgroups this process is in, less what they hold already;
    None when there is none. Versions 1 and 2."""
    from mimo_edge.memory_cgroups import memory_cgroups

    found = []
    for group in memory_cgroups(root, membership):
        limit = group.limit_bytes()
        if limit is not None:
            found.append(max(0, limit - (group.usage_bytes() or 0)))
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


def cache_bytes(root: Path = Path("/sys/devices/system/cpu")) -> int | None:
    """Bytes of the processor's last caches, those of all cores together; None where the system does
    not tell."""
    found: dict[tuple[int, str], int] = {}
    for cache in root.glob("cpu[0-9]*/cache/index[0-9]*"):
        level, size = number(cache / "level"), first_line(cache / "size")
        shared = first_line(cache / "shared_cpu_list")
        if level and shared and size and size.endswith("K") and size[:-1].isdigit():
            found[int(level), shared] = int(size[:-1]) << 10
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last) or None


def clock_hz() -> float | None:
    """The fastest clock the system names for a core."""
    folder = Path("/sys/devices/system/cpu")
    limits = (number(path) for path in folder.glob("cpu[0-9]*/cpufreq/cpuinfo_max_freq"))
    if known := [limit * 1e3 for limit in limits if limit]:
        return max(known)
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return None
    shown = [line.partition(":")[2] for line in lines if line.startswith("cpu MHz")]
    clocks = [float(text) for text in shown if text.strip().replace(".", "", 1).isdigit()]
    return max(clocks) * 1e6 if clocks else None


def thermal_zone_folders(root: Path = Path("/sys/class/thermal")) -> dict[str, Path]:
    """Folder of every temperature sensor the system shows, by its kind."""
    found: dict[str, Path] = {}
    for zone in sorted(root.glob("thermal_zone*")):
        kind = first_line(zone / "type") or zone.name
        found[kind if kind not in found else f"{kind} ({zone.name})"] = zone
    return found


def zone_celsius(zone: Path) -> float | None:
    """Temperature of the sensor in a folder; None when it cannot be read."""
    value = number(zone / "temp")
    return None if value is None else value / 1000


def thermal_zones(root: Path = Path("/sys/class/thermal")) -> dict[str, float]:
    """Temperature in degrees Celsius of every sensor the system shows, by its kind."""
    found = {kind: zone_celsius(zone) for kind, zone in thermal_zone_folders(root).items()}
    return {kind: celsius for kind, celsius in found.items() if celsius is not None}


def thermal_limit_celsius(root: Path = Path("/sys/class/thermal")) -> float | None:
    """The lowest temperature at which this system slows itself down; None where it names none."""
    found = []
    for zone in root.glob("thermal_zone*"):
        for kind in zone.glob("trip_point_*_type"):
            value = number(kind.with_name(kind.name.removesuffix("type") + "temp"))
            # unset trip points are zero, or below
            if first_line(kind) == "passive" and value is not None and value >= 40_000:
                found.append(value / 1000)
    return min(found, default=None)


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


def number(path: Path) -> int | None:
    """The whole number a file of the kernel's holds; None when it holds none."""
    try:
        return int(path.read_text("ascii", "replace"))
    except (OSError, ValueError):
        return None


def first_line(path: Path) -> str:
    """The first line of a file of the kernel's; empty when it cannot be read."""
    try:
        return path.read_text("utf-8", "replace").partition("\n")[0].strip()
    except OSError:
        return ""


def field(path: str | Path, name: str) -> int | None:
    """The number after "name:" in a file of /proc; None when there is none."""
    try:
        lines = Path(path).read_text("ascii", "replace").splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition(":")
        if key == name and value.split():
            text = value.split()[0]
            return int(text) if text.isdigit() else None
    return None
