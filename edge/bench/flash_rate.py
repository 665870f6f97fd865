"""How fast this disk delivers experts: the rate that bounds decoding when they are streamed."""

from __future__ import annotations

import ctypes
import mmap
import random
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import cycle

from mimo_edge import machine
from mimo_edge.bundle import Bundle
from mimo_edge.errors import DeviceError, UsageError
from mimo_edge.experts.reader import DEFAULT_LANES, PART_BYTES
from mimo_edge.experts.table import ExpertTable
from mimo_edge.flash_file import FlashFile
from mimo_edge.units import format_bytes, round_up

_MAX_S = 1.0
_TRIES = 3
_UNIT = 65536  # the largest alignment that direct reads ask for
_HUGE = 2 << 20
# Larger than the last caches of servers.
TARGET_BYTES = 256 << 20


class Targets:
    """Memory that reads land in, like that of the slots: private, because shared memory gets no
    huge pages (into small ones the same disk delivers half as much), and too large for the
    processor's caches: into a buffer that stays there the same disk delivered 3.0 GB/s, into
    memory 2.4. Close it, or use it as a context manager."""

    def __init__(self, nbytes: int) -> None:
        """Raises DeviceError without that much memory."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        try:
            self._memory = mmap.mmap(-1, round_up(nbytes, _HUGE) + _HUGE, flags=flags)
        except OSError as error:
            raise DeviceError(f"no {format_bytes(nbytes)} of memory to read into") from error
        anchor = ctypes.c_char.from_buffer(self._memory)
        start = -ctypes.addressof(anchor) % _HUGE
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without them
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        # That the kernel gives its pages now, and not while reads are timed.
        ctypes.memset(ctypes.addressof(anchor) + start, 0, nbytes)
        del anchor  # or the map could not be closed
        self._view = memoryview(self._memory)[start : start + nbytes]

    @property
    def nbytes(self) -> int:
        """Bytes that reads may land in."""
        return len(self._view)

    def of(self, lane: int, lanes: int, block: int) -> list[memoryview]:
        """Places for blocks of one of `lanes` lanes, to be taken by turns: then each has long left
        the caches. Raises UsageError when there is none for each."""
        count = self.nbytes // block
        if count < lanes:
            raise UsageError(f"{lanes} blocks of {block} bytes in {self.nbytes} to read into")
        return [self._view[at * block : (at + 1) * block] for at in range(lane, count, lanes)]

    def close(self) -> None:
        """Give it back. Twice is harmless."""
        self._view.release()
        self._memory.close()

    def __enter__(self) -> Targets:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _target_bytes(least: int) -> int:
    """Memory to read into: a quarter of what there is at most, or what reads need."""
    free = [n for n in (machine.available_bytes(), machine.cgroup_limit_bytes()) if n is not None]
    return max(least, min([TARGET_BYTES, *(n // 4 for n in free)]))


def flash_rate(model: str, *, lanes: int = DEFAULT_LANES, max_s: float = _MAX_S) -> float:
    """Bytes per second of `lanes` threads reading 1 MiB at random experts of `model`, past the page
    cache where the file system allows it: the best of a few tries of `max_s` in all, because others
    at work can only make a disk look slower.

    Raises BundleError, DeviceError without memory.
    """
    with Bundle.open(model) as bundle:
        table = ExpertTable.from_bundle(bundle)
    stacks = [stack for layer in table.layers for stack in layer.stacks]
    files = {stack.file: FlashFile(stack.file) for stack in stacks}
    places = [
        (files[stack.file], at // _UNIT * _UNIT)
        for stack in stacks
        for expert in range(table.experts)
        if (at := stack.offset + expert * stack.nbytes) // _UNIT * _UNIT + PART_BYTES
        <= files[stack.file].size
    ]
    try:
        if not places:
            return 0.0
        with Targets(_target_bytes(lanes * PART_BYTES)) as into:
            return max(
                measure_reads(places, PART_BYTES, lanes, into, max_s / _TRIES)
                for _ in range(_TRIES)
            )
    finally:
        for file in files.values():
            file.close()


def measure_reads(
    places: Sequence[tuple[FlashFile, int]],
    block: int,
    lanes: int,
    into: Targets,
    max_s: float,
    max_bytes: int | None = None,
) -> float:
    """Bytes per second of `lanes` threads that read `block` bytes at random ones of `places` (file,
    offset) into all of `into` for `max_s` seconds, or until about `max_bytes` were read. Block and
    offsets are multiples of 64 KiB. Raises BundleError, UsageError when `into` is too small."""
    done = [0] * lanes
    most = float("inf") if max_bytes is None else max_bytes / lanes
    errors: list[BaseException] = []
    targets = [into.of(lane, lanes, block) for lane in range(lanes)]
    began = time.perf_counter()

    def read(lane: int) -> None:
        order = random.Random(lane)
        try:
            # one read at least: a busy machine may start a lane when time is over
            for target in cycle(targets[lane]):
                file, offset = order.choice(places)
                done[lane] += file.read(offset, [target])
                if time.perf_counter() - began >= max_s or done[lane] >= most:
                    return
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(lane,)) for lane in range(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for target in (target for mine in targets for target in mine):
        target.release()
    if errors:
        raise errors[0]
    return sum(done) / (time.perf_counter() - began)
