"""Measuring this machine: memory and kernels through ggml, flash through our own reads.

Bounded on purpose: a file of `file_bytes` is written and removed again, reads stop at READ_BYTES
per figure, matrices take a share of the free memory, and nothing begins where there is no room.
What was measured becomes a profile (`DeviceProfile.to_toml`).
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimo_edge import machine
from mimo_edge.bench.flash_rate import measure_reads
from mimo_edge.devices.profile import ANY, DeviceProfile, build
from mimo_edge.devices.this_machine import known_figures, title
from mimo_edge.errors import DeviceError, UsageError
from mimo_edge.experts.reader import DEFAULT_LANES
from mimo_edge.flash_file import FlashFile
from mimo_edge.hwcap import hwcap_words
from mimo_edge.quant.base import FORMATS, Format
from mimo_edge.units import format_bytes, round_up

Progress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all)."""

LANES = (1, 2, 4, 8)
BLOCKS = (128 << 10, 512 << 10, 1 << 20, 4 << 20)
# One matrix of an expert of MiMo-V2-Flash at 4.5 bits, as it is read: whole pages.
RECORD_BYTES = 4_718_592
DEFAULT_FILE_BYTES = 256 << 20
READ_BYTES = 512 << 20  # at most, for one figure
DEFAULT_SECONDS = 30.0
KERNEL_ROWS = (1, 4, 32)
_POOL_BYTES = 256 << 20  # of matrices, larger than any processor's own caches should be
_POOL_SHARE = 8  # an eighth of the free memory at most
_LEAST_POOL_BYTES = 16 << 20
_UNIT = 64 << 10  # the largest alignment that direct reads ask for
_ROOM = 4  # times the file must be free: a full disk hurts others
_LEAST_FILE_BYTES = 1 << 20
_WRITE_BYTES = 1 << 20
# Between the times of reads of neighbouring sizes: more than rates lose when they are written down.
_STEP = 1.001
# Formats whose kernels are measured, and those whose products show the memory's rate.
KERNEL_FORMATS = tuple(name for name in FORMATS if name != "F32")
_MEMORY_FORMATS = ("Q8_0", "F16", "Q4_0")
# Shares of the time: reads, memory, kernels.
_READ_SHARE, _MEMORY_SHARE, _KERNEL_SHARE, _NODE_SHARE = 0.4, 0.1, 0.4, 0.02


@dataclass(frozen=True)
class Probe:
    """What was found. `direct` and `buffered` are bytes per second by (block, lanes); `memory` by
    format; without `direct_works` every read went through the page cache; `libggml` is the library
    that computed (`describe_library`), `hwcap` the kernel's words on an ARM processor; `seconds` is
    what it took."""

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
    from mimo_edge.runtimes.ggml.bindings import describe_library

    began = time.perf_counter()
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
    steps = _Steps(progress, len(_read_plan(record_bytes)) + len(_MEMORY_FORMATS) + len(kinds) + 1)
    with _scratch_file(folder, file_bytes) as path:
        direct, buffered, works = _reads(path, record_bytes, seconds * _READ_SHARE, steps)
    memory, kernels, node_s = _kernels(count, kinds, pool, seconds, steps)
    figures = known_figures(folder)
    note = f"mimo-edge probe, {time.strftime('%Y-%m-%d')}"

    def measured(value: Any, how: str) -> dict[str, Any]:
        return {"value": value, "evidence": "measured", "source": f"{note}: {how}"}

    rates = direct if works else buffered
    listed = sorted(block for block, lanes in rates if lanes == DEFAULT_LANES)
    figures |= {
        "memory.bandwidth": measured(
            f"{max(memory.values()) / 1e9:.4g} GB/s",
            f"weights of {format_bytes(pool)} by one row, {count} threads, the best of "
            f"{', '.join(memory)}",
        ),
        "cpu.threads": measured(count, "threads it measured with"),
        "cpu.kernels": measured(
            {
                name: {
                    key: f"{rate / 1e9:.4g} GMAC/s"
                    for key, rate in zip(("row", "rows4", "batch"), found, strict=True)
                }
                for name, found in {ANY: kernels["Q4_0"], **kernels}.items()
            },
            f"1, 4 and 32 rows, weights in the caches, {count} threads; any is Q4_0",
        ),
        "cpu.node_overhead": measured(
            f"{node_s * 1e6:.4g} us", f"a chain of additions of 32 numbers, {count} threads"
        ),
        "storage.lanes": measured(DEFAULT_LANES, "what the runtime reads with"),
        "storage.reads": measured(
            _rising(listed, rates),
            f"random {'O_DIRECT' if works else 'buffered'} reads of a file of "
            f"{format_bytes(file_bytes)}, {DEFAULT_LANES} lanes",
        ),
    }
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
    )


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


@contextmanager
def _scratch_file(folder: Path, nbytes: int) -> Iterator[Path]:
    """A file of random bytes in `folder`, on disk and out of the page cache; removed at the end.

    Raises DeviceError without room for several of it, or when it cannot be written.
    """
    path = folder / f".mimo-edge-probe-{os.getpid()}"
    made = False
    try:
        free = shutil.disk_usage(folder).free
        if free < _ROOM * nbytes:
            raise DeviceError(
                f"{format_bytes(free)} are free in {folder}, a file of {format_bytes(nbytes)} "
                f"wants {format_bytes(_ROOM * nbytes)}",
                "name another --dir, or a smaller --file-size",
            )
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        made = True
        try:
            left = nbytes
            while left:
                # not the same bytes again: some disks store those once
                left -= os.write(fd, os.urandom(min(_WRITE_BYTES, left)))
            os.fsync(fd)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
        yield path
    except OSError as error:
        raise DeviceError(
            f"{folder} cannot be measured: {error.strerror}", "name another --dir"
        ) from error
    finally:
        if made:
            with suppress(OSError):
                path.unlink()


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


def _reads(
    path: Path, record_bytes: int, seconds: float, steps: _Steps
) -> tuple[dict[tuple[int, int], float], dict[tuple[int, int], float], bool]:
    """Rates of direct and buffered reads, and whether direct ones are to be had."""
    plan = _read_plan(record_bytes)
    found: tuple[dict[tuple[int, int], float], ...] = ({}, {})
    files = [FlashFile(path, announce=False), FlashFile(path, direct=False, announce=False)]
    works = files[0].alignment > 0
    try:
        for direct, block, lanes in plan:
            steps.next()
            if direct and not works:
                direct = False  # then other sizes are of interest that way
            if block > files[0].size or (block, lanes) in found[not direct]:
                continue
            file = files[not direct]
            places = [(file, at) for at in range(0, file.size - block + 1, _UNIT)]
            found[not direct][block, lanes] = measure_reads(
                places, block, lanes, seconds / len(plan), READ_BYTES
            )
    finally:
        for file in files:
            file.close()
    return found[0], found[1], works


def _rising(blocks: Sequence[int], rates: dict[tuple[int, int], float]) -> list[dict[str, str]]:
    """The read rates of a profile: where noise made a larger read take less time than a smaller
    one, as if it had taken as long."""
    listed, longest = [], 0.0
    for block in blocks:
        longest = max(longest * _STEP, block / rates[block, DEFAULT_LANES])
        listed.append({"block": f"{block} B", "rate": f"{block / longest / 1e6:.6g} MB/s"})
    return listed


# --- memory and processor ----------------------------------------------------------------------


def _kernels(
    threads: int, kinds: Sequence[Format], pool: int, seconds: float, steps: _Steps
) -> tuple[dict[str, float], dict[str, list[float]], float]:
    """Memory rate by format, multiply-adds per second with 1, 4 and 32 rows by format, and the
    seconds an operation of a graph takes to start."""
    from mimo_edge.runtimes.ggml.device import Device
    from mimo_edge.runtimes.ggml.measure import kernel_rates, memory_rate, node_seconds

    device = Device(threads)
    try:
        memory = {}
        for name in _MEMORY_FORMATS:
            steps.next()
            each = seconds * _MEMORY_SHARE / len(_MEMORY_FORMATS)
            memory[name] = memory_rate(device, FORMATS[name], pool, each)
        kernels = {}
        for fmt in kinds:
            steps.next()
            each = seconds * _KERNEL_SHARE / len(kinds) / len(KERNEL_ROWS)
            kernels[fmt.name] = kernel_rates(device, fmt, KERNEL_ROWS, each)
        steps.next()
        return memory, kernels, node_seconds(device, seconds * _NODE_SHARE)
    finally:
        device.close()
