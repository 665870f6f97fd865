"""Facts about this machine and this process, as far as the system tells them."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path


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


def storage_read_bytes() -> int | None:
    """Bytes this process made the disks deliver so far, by read or through a mapped file; None
    where the system does not count them."""
    return _field("/proc/self/io", "read_bytes")


def memory_bytes() -> int | None:
    """RAM of the machine."""
    total = _field("/proc/meminfo", "MemTotal")
    return None if total is None else total * 1024


def describe() -> dict[str, object]:
    """JSON-ready: processor, cores, RAM, system, load."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "memory_bytes": memory_bytes(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load_average": None if load is None else round(load, 2),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Hardware", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()


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
