"""Measuring this machine: memory and kernels through ggml, flash through our own reads.

Bounded on purpose: a file of `file_bytes` is written and removed again, reads stop at READ_BYTES
per figure, matrices take a share of the free memory, and nothing begins where there is no room.
What was measured becomes a profile (`DeviceProfile.to_toml`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mimo_edge import machine
from mimo_edge.bench.engine_cost import engine_cost
from mimo_edge.bench.flash_rate import TARGET_BYTES, Targets, measure_reads
from mimo_edge.devices.profile import (
    ANY,
    DeviceProfile,
    KernelRate,
    build,
    plain_seconds,
)
from mimo_edge.devices.scratch import ScratchFile, scratch_file, scratch_folder
from mimo_edge.devices.this_machine import known_figures, title
from mimo_edge.errors import DeviceError, UsageError
from mimo_edge.experts.reader import DEFAULT_LANES, part_bytes
from mimo_edge.flash_file import FlashFile
from mimo_edge.hwcap import hwcap_words
from mimo_edge.quant.base import FORMATS
from mimo_edge.units import format_bytes, round_up

Progress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all)."""

LANES = (1, 2, 4, 8)
BLOCKS = (128 << 10, 512 << 10, 1 << 20, 4 << 20)
# A part of a matrix of an expert of MiMo-V2-Flash at 4.5 bits, as it is read.
RECORD_BYTES = part_bytes(4_718_592)
DEFAULT_FILE_BYTES = 256 << 20
READ_BYTES = 512 << 20  # at most, for one figure
DEFAULT_SECONDS = 18.0
BUSY_CORES = 0.15  # used by others: figures are no longer those of the machine
_POOL_BYTES = 384 << 20  # of matrices, larger than the caches of servers
_POOL_SHARE = 8  # an eighth of the free memory at most
_LEAST_POOL_BYTES = 16 << 20
_UNIT = 64 << 10  # the largest alignment that direct reads ask for
_LEAST_FILE_BYTES = 1 << 20
# Between the times of reads of neighbouring sizes: more than rates lose when they are written down.
_STEP = 1.001
# Formats whose kernels are measured.
KERNEL_FORMATS = tuple(name for name in FORMATS if name != "F32")
# Shares of the time.
_READ_SHARE, _BESIDE_SHARE, _PROCESSOR_SHARE, _ENGINE_SHARE = 0.22, 0.1, 0.48, 0.2


@dataclass(frozen=True)
class Probe:
    """What was found. `direct` and `buffered` are bytes per second by (block, lanes); `memory` by
    format; without `direct_works` every read went through the page cache; `libggml` is the library
    that computed (`describe_library`), `hwcap` the kernel's words on an ARM processor; `seconds` is
    what it took; `others_cores` how many cores others used meanwhile, None where the system does
    not say."""

    profile: DeviceProfile
    threads: int
    direct: dict[tuple[int, int], float]
    buffered: dict[tuple[int, int], float]
    direct_works: bool
    memory: dict[str, float]
    sensors: dict[str, float]
    libggml: dict[str, Any]
    hwcap: tuple[int, int] | None
    available_bytes: int | None
    cgroup_bytes: int | None
    seconds: float
    others_cores: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""

        def rows(found: dict[tuple[int, int], float]) -> list[dict[str, float]]:
            return [
                {"block": block, "lanes": lanes, "bytes_per_s": rate}
                for (block, lanes), rate in found.items()
            ]

        return {
            "profile": self.profile.to_dict(),
            "threads": self.threads,
            "direct": rows(self.direct),
            "buffered": rows(self.buffered),
            "direct_works": self.direct_works,
            "memory_bytes_per_s": self.memory,
            "thermal_zones": self.sensors,
            "libggml": self.libggml,
            "hwcap": None if self.hwcap is None else [hex(word) for word in self.hwcap],
            "available_bytes": self.available_bytes,
            "cgroup_bytes": self.cgroup_bytes,
            "seconds": self.seconds,
            "others_cores": self.others_cores,
        }


def probe(
    folder: Path,
    *,
    threads: int | None = None,
    record_bytes: int = RECORD_BYTES,
    file_bytes: int = DEFAULT_FILE_BYTES,
    seconds: float = DEFAULT_SECONDS,
    progress: Progress | None = None,
) -> Probe:
    """Measure this machine; flash is that under `folder`.

    `record_bytes` is the size of one read of an expert, `seconds` about the time that measuring
    takes besides writing the file. Raises UsageError on values out of range, DeviceError where
    there is no room on disk or in memory, BackendError when ggml refuses.
    """
    from mimo_edge.devices.beside import measure_beside
    from mimo_edge.devices.processor import ROUNDS, measure_processor
    from mimo_edge.runtimes.ggml.bindings import describe_library

    began, watch = time.perf_counter(), _Others()
    cores = machine.usable_cores()
    count = cores if threads is None else threads
    if not 1 <= count <= cores:
        raise UsageError(f"threads = {count}", f"use 1 to {cores}, the cores of this machine")
    if not 0 < seconds <= 600:
        raise UsageError(f"seconds = {seconds}", "use more than 0, at most 600")
    if record_bytes < _UNIT or file_bytes < max(
        _LEAST_FILE_BYTES, 2 * round_up(record_bytes, _UNIT)
    ):
        raise UsageError(
            f"records of {record_bytes} bytes in a file of {file_bytes}",
            f"use records from {_UNIT} bytes, and a file of at least two of them and 1 MiB",
        )
    pool = _pool_bytes()
    kinds = [FORMATS[name] for name in KERNEL_FORMATS]
    steps = _Steps(progress, len(_read_plan(record_bytes)) + ROUNDS * len(kinds) + 3)
    record = round_up(record_bytes, _UNIT)
    target = max(LANES[-1] * record, min(TARGET_BYTES, pool // 2))
    with scratch_file(folder, file_bytes) as scratch, Targets(target) as into:
        works = scratch.direct_works
        direct, buffered = _reads(scratch, record_bytes, into, seconds * _READ_SHARE, steps)
        steps.next()
        beside = measure_beside(
            _places(scratch.direct if works else scratch.buffered, record),
            record,
            DEFAULT_LANES,
            into,
            count,
            pool // 2,
            seconds * _BESIDE_SHARE,
            READ_BYTES,
        )
    memory, kernels, cache = measure_processor(
        count, kinds, pool, seconds * _PROCESSOR_SHARE, steps.next
    )
    figures = known_figures(folder)
    note = f"mimo-edge probe, {time.strftime('%Y-%m-%d')}"

    def measured(value: Any, how: str) -> dict[str, Any]:
        return {"value": value, "evidence": "measured", "source": f"{note}: {how}"}

    rates = direct if works else buffered
    listed = sorted(block for block, lanes in rates if lanes == DEFAULT_LANES)
    figures |= {
        "memory.bandwidth": measured(
            f"{max(memory.values()) / 1e9:.4g} GB/s",
            f"weights of {format_bytes(pool)} by one row, {count} threads, the best format",
        ),
        "cpu.threads": measured(count, "threads it measured with"),
        "cpu.kernels": measured(
            {name: _plain(found) for name, found in {ANY: kernels["Q4_0"], **kernels}.items()},
            f"1, 4 and 32 rows, weights in the caches, {count} threads; stored: 32 rows, weights "
            f"in the order of the file; cold: 1 to 4 rows, weights of {format_bytes(pool)}; any is "
            "Q4_0; attention: 1, 4 and 128 queries over 256 cached rows of a format, heads of "
            "MiMo-V2-Flash, with f32 those of mimo-nano",
        ),
        "storage.lanes": measured(DEFAULT_LANES, "what the runtime reads with"),
        "storage.reads": measured(
            _rising(listed, rates),
            f"random {'O_DIRECT' if works else 'buffered'} reads of a file of "
            f"{format_bytes(file_bytes)} into {format_bytes(target)}, {DEFAULT_LANES} lanes",
        ),
        "storage.beside": measured(
            {name: float(f"{share:.3g}") for name, share in asdict(beside).items()},
            f"reads of {format_bytes(record)} by {DEFAULT_LANES} lanes while {count} threads "
            f"multiply one row with weights of {format_bytes(pool // 2)}",
        ),
    }
    if cache is not None:
        figures["cpu.cache"] = measured(
            f"{cache} B", "where one row's products with more and more weights become slow"
        )
    # The engine's own cost is what its steps take beyond what a forecast by these figures says.
    device = build("this-machine", title(), figures, ())
    steps.next()
    with scratch_folder(folder) as place:
        engine = engine_cost(place, count, seconds * _ENGINE_SHARE, device)
    figures["cpu.engine"] = measured(
        {name: plain_seconds(cost) for name, cost in asdict(engine).items()},
        f"decoding with models of next to no weights, {count} threads",
    )
    return Probe(
        build("this-machine", title(), figures, ()),
        count,
        direct,
        buffered,
        works,
        memory,
        machine.thermal_zones(),
        describe_library(),
        hwcap_words(),
        machine.available_bytes(),
        machine.cgroup_limit_bytes(),
        time.perf_counter() - began,
        watch.cores(),
    )


class _Others:
    """What other processes compute while we measure: it makes our figures too low."""

    def __init__(self) -> None:
        self._began, self._busy, self._own = self._now()

    @staticmethod
    def _now() -> tuple[float, float | None, float]:
        return time.perf_counter(), machine.busy_seconds(), time.process_time()

    def cores(self) -> float | None:
        """How many cores they used since the beginning, on average."""
        now, busy, own = self._now()
        if busy is None or self._busy is None:
            return None
        return max(0.0, (busy - self._busy - (own - self._own)) / (now - self._began))


class _Steps:
    """Counts measurements for a progress bar."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def next(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress("probe", min(self._done, self._total), self._total)


def _pool_bytes() -> int:
    """How much memory the matrices may take. Raises DeviceError when that is too little."""
    free = [n for n in (machine.available_bytes(), machine.cgroup_limit_bytes()) if n is not None]
    pool = min(_POOL_BYTES, min(free, default=_POOL_BYTES) // _POOL_SHARE)
    if pool < _LEAST_POOL_BYTES:
        raise DeviceError(
            f"{format_bytes(min(free))} of memory are free: too little to measure with",
            f"at least {format_bytes(_LEAST_POOL_BYTES * _POOL_SHARE)} must be",
        )
    return pool


# --- flash -------------------------------------------------------------------------------------


def _read_plan(record_bytes: int) -> list[tuple[bool, int, int]]:
    """(direct, block, lanes) of every measurement: the record with all lanes, by both ways, and
    other sizes with the lanes the runtime uses."""
    record = round_up(record_bytes, _UNIT)
    blocks = sorted({*BLOCKS, record})
    return [
        *((True, record, lanes) for lanes in LANES),
        *((True, block, DEFAULT_LANES) for block in blocks if block != record),
        *((False, record, lanes) for lanes in LANES),
    ]


def _places(file: FlashFile, block: int) -> list[tuple[FlashFile, int]]:
    """Where blocks may be read."""
    return [(file, at) for at in range(0, file.size - block + 1, _UNIT)]


def _reads(
    scratch: ScratchFile, record_bytes: int, into: Targets, seconds: float, steps: _Steps
) -> tuple[dict[tuple[int, int], float], dict[tuple[int, int], float]]:
    """Rates of direct and buffered reads."""
    plan = _read_plan(record_bytes)
    found: tuple[dict[tuple[int, int], float], ...] = ({}, {})
    for direct, block, lanes in plan:
        steps.next()
        # Where direct reads are not to be had, other sizes are of interest the other way.
        direct = direct and scratch.direct_works
        file = scratch.direct if direct else scratch.buffered
        if block > min(file.size, into.nbytes // lanes) or (block, lanes) in found[not direct]:
            continue
        found[not direct][block, lanes] = measure_reads(
            _places(file, block), block, lanes, into, seconds / len(plan), READ_BYTES
        )
    return found[0], found[1]


def _rising(blocks: Sequence[int], rates: dict[tuple[int, int], float]) -> list[dict[str, str]]:
    """The read rates of a profile: where noise made a larger read take less time than a smaller
    one, as if it had taken as long."""
    listed, longest = [], 0.0
    for block in blocks:
        longest = max(longest * _STEP, block / rates[block, DEFAULT_LANES])
        listed.append({"block": f"{block} B", "rate": f"{block / longest / 1e6:.6g} MB/s"})
    return listed


def _plain(rate: KernelRate) -> dict[str, Any]:
    """As it stands in a file."""

    def text(value: float) -> str:
        return f"{value / 1e9:.4g} GMAC/s"

    names = ("row", "rows4", "batch", "stored")
    found: dict[str, Any] = {name: text(getattr(rate, name)) for name in names}
    if not rate.cold:
        return found
    return found | {"cold": [text(n) for n in rate.cold], "cold_stored": text(rate.cold_stored)}
