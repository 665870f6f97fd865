"""The profile `auto`: this machine, from what it says about itself and what `probe` measured.

`mimo-edge probe` leaves its profile where `measured_path` says; it is used as long as it is of
this processor. What changes from minute to minute (free memory, limits of the cgroup) is read anew
each time. Without a probe, rates are assumed from the processor's kind, and say so.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from mimo_edge import machine
from mimo_edge.devices.profile import AUTO, DeviceProfile, build, raw_profile
from mimo_edge.errors import ConfigError, DeviceError
from mimo_edge.kv_format import DEFAULT_KV_TYPE

_log = logging.getLogger(__name__)

# Left to the system and to what else starts while we run.
_RESERVE = 16  # a sixteenth
_CLOCK_HZ = 2e9
_FRESH = frozenset({"memory.ram", "memory.process", "storage.size"})
# Sooner than the system slows itself down, which costs more than fewer threads.
_BELOW_TRIP_C = 3.0
# Multiply-adds per cycle and core in a prefill: the first extension that is there decides. The
# values for avx512-vnni (measured) and i8mm (published) are those of the shipped profiles.
_PER_CYCLE = {
    "avx512-vnni": 20.0,
    "i8mm": 20.0,
    "avx512": 14.0,
    "avx-vnni": 12.0,
    "avx2": 10.0,
    "dotprod": 8.0,
    "neon": 2.0,
}
_ROW_SHARE, _ROWS4_SHARE, _STORED_SHARE = 0.5, 0.65, 0.6
_ENGINE_US = {
    "step": 56.7,
    "layer": 49.7,
    "layer4": 79.1,
    "streamed": 250,
    "streamed4": 250,
    "drafting": 41.8,
    "draft": 58.5,
    "logits": 1.41,
    "row": 5.39,
    "arrival": 322,
}
_BESIDE = {"reads": 0.96, "kernels": 0.99}
_CACHE_BYTES = 2 << 20
# Bytes per second a thread draws, and all of them together at most.
_THREAD_BYTES_PER_S, _MOST_BYTES_PER_S = 8e9, 50e9
_READS = (("128 KiB", "300 MB/s"), ("1 MiB", "900 MB/s"), ("4 MiB", "1000 MB/s"))


def measured_path() -> Path:
    """Where `probe` leaves the profile of this machine for `auto`."""
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "mimo-edge" / "this-machine.toml"


def title() -> str:
    """What the profile of this machine is called; another processor gives another title."""
    return f"This machine: {machine.cpu_name()}, {machine.usable_cores()} cores"


def this_machine(folder: Path | None = None) -> DeviceProfile:
    """The profile of this machine; flash space is that of `folder` (default: the working one).

    Raises DeviceError when the system does not tell its memory, ConfigError when the probed
    profile is malformed.
    """
    figures = known_figures(folder)
    path = measured_path()
    if path.is_file():
        probed, raw, _ = raw_profile(str(path))
        if probed == title():
            # What an older probe did not know yet is assumed.
            figures |= {key: figure for key, figure in raw.items() if key not in _FRESH}
            try:
                return build(AUTO, title(), figures, ())
            except ConfigError as error:
                raise ConfigError(
                    f"{path}: {error.message}", "run mimo-edge probe again, or delete the file"
                ) from error
        else:
            _log.warning(
                "%s is of another machine (%s) and is not used: run mimo-edge probe",
                path,
                probed,
            )
    return build(AUTO, title(), figures, ())


def known_figures(folder: Path | None = None) -> dict[str, Any]:
    """Every figure of this machine that is known or assumed without measuring."""
    ram = machine.memory_bytes()
    if ram is None:
        raise DeviceError(
            "this system does not say how much memory it has", "name a profile instead of auto"
        )
    free = [n for n in (machine.available_bytes(), machine.cgroup_limit_bytes()) if n is not None]
    room = min([ram, *free])
    cores, isa, clock = machine.usable_cores(), machine.isa_flags(), machine.clock_hz()
    key = next((name for name in _PER_CYCLE if name in isa), "")
    per_cycle = _PER_CYCLE.get(key, 1.0)
    batch = cores * (clock or _CLOCK_HZ) * per_cycle
    share = {
        "row": batch * _ROW_SHARE,
        "rows4": batch * _ROWS4_SHARE,
        "batch": batch,
        "stored": batch * _STORED_SHARE,
    }
    disk = shutil.disk_usage(folder or Path.cwd()).free
    cache = machine.cache_bytes()
    sensors, trip = machine.thermal_zones(), machine.thermal_limit_celsius()

    def figure(value: Any, evidence: str, source: str) -> dict[str, Any]:
        return {"value": value, "evidence": evidence, "source": source}

    def measured(value: Any, source: str) -> dict[str, Any]:
        return figure(value, "measured", source)

    def assumed(value: Any, source: str) -> dict[str, Any]:
        return figure(value, "assumed", f"{source}; mimo-edge probe measures it")

    return {
        "memory.ram": measured(f"{ram} B", "/proc/meminfo"),
        "memory.process": measured(
            f"{room - room // _RESERVE} B", "available memory and cgroup limit, less a sixteenth"
        ),
        "memory.bandwidth": assumed(
            f"{min(_MOST_BYTES_PER_S, cores * _THREAD_BYTES_PER_S) / 1e9:g} GB/s",
            f"{_THREAD_BYTES_PER_S / 1e9:g} GB/s per core",
        ),
        "memory.stall": figure(
            0.1, "assumed", "well before the 60 % of the time from which systemd-oomd kills"
        ),
        "cpu.cores": figure(
            [
                {
                    "kind": machine.cpu_name() or "core",
                    "count": cores,
                    "clock": f"{(clock or _CLOCK_HZ) / 1e9:.4g} GHz",
                }
            ],
            "measured" if clock else "assumed",
            "/proc/cpuinfo and cpufreq" if clock else "the system names no clock",
        ),
        "cpu.threads": measured(cores, "cores this process may run on"),
        "cpu.isa": measured(list(isa), "/proc/cpuinfo"),
        "cpu.kernels": assumed(
            {"any": {name: f"{value / 1e9:.4g} GMAC/s" for name, value in share.items()}},
            f"{per_cycle:g} multiply-adds per cycle and core with {key or 'no vector extension'}",
        ),
        "cpu.cache": assumed(
            f"{cache or _CACHE_BYTES} B",
            "the last caches as the system tells them" if cache else "the system tells no caches",
        ),
        "cpu.engine": assumed(
            {name: f"{value:g} us" for name, value in _ENGINE_US.items()},
            "as measured on the development machine, not on this one",
        ),
        "storage.size": measured(f"{disk} B", f"free space of {folder or 'the working folder'}"),
        "storage.lanes": figure(4, "assumed", "2 to 4 lanes saturate every disk measured"),
        "storage.reads": assumed(
            [{"block": block, "rate": rate} for block, rate in _READS], "a common SSD"
        ),
        "storage.beside": assumed(
            _BESIDE, "as measured on the development machine, not on this one"
        ),
        "storage.hot": figure(0.9, "assumed", "not known"),
        "thermal.limit": (
            figure(
                "85 C", "assumed", f"sensors here: {', '.join(sensors) or 'none'}; none is known"
            )
            if trip is None
            else figure(
                f"{trip - _BELOW_TRIP_C:g} C", "measured", f"the system slows at {trip:g} C"
            )
        ),
        "thermal.zones": figure(["*"], "assumed", "the hottest of all sensors"),
        "thermal.hot": figure(0.9, "assumed", "not known"),
        "power.battery_low": figure(0.2, "assumed", "where laptops begin to warn"),
        "npu.route": figure("not looked for", "assumed", "only the processor is described"),
        "npu.limits": figure("not known", "assumed", "only the processor is described"),
        "npu.targets": figure([], "assumed", "only the processor is described"),
        "npu.options": figure({}, "assumed", "only the processor is described"),
        "system.os": measured(str(machine.describe()["system"]), "uname"),
        "system.traps": measured([], "none known"),
        "run.context": figure(4096, "assumed", "the default of run"),
        "run.kv_type": figure(DEFAULT_KV_TYPE, "assumed", "the default of run"),
        "run.recipe": figure(
            "q4_0" if "neon" in isa else "q4_k", "derived", "as on devices with such a processor"
        ),
        "run.draft": figure("auto", "derived", "decided while running"),
    }
