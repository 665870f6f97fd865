"""How fast this disk delivers experts: the rate that bounds decoding when they are streamed."""

from __future__ import annotations

import ctypes
import mmap
import random
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from mimo_edge.bundle import Bundle
from mimo_edge.experts.reader import DEFAULT_LANES
from mimo_edge.experts.table import ExpertTable
from mimo_edge.flash_file import FlashFile
from mimo_edge.units import round_up

_MAX_S = 1.0
_TRIES = 3
_LEAST_BLOCK = 1 << 20
_UNIT = 65536  # the largest alignment that direct reads ask for
_HUGE = 2 << 20


def flash_rate(model: str, *, lanes: int = DEFAULT_LANES, max_s: float = _MAX_S) -> float:
    """Bytes per second of `lanes` threads reading random whole expert matrices of `model` (at
    least 1 MiB at a time), past the page cache where the file system allows it: the best of a few
    tries of `max_s` in all, because others at work can only make a disk look slower.

    Raises BundleError.
    """
    with Bundle.open(model) as bundle:
        table = ExpertTable.from_bundle(bundle)
    stacks = [stack for layer in table.layers for stack in layer.stacks]
    files = {stack.file: FlashFile(stack.file) for stack in stacks}
    block = round_up(max(_LEAST_BLOCK, *(stack.nbytes for stack in stacks)), _UNIT)
    places = [
        (files[stack.file], at // _UNIT * _UNIT)
        for stack in stacks
        for expert in range(table.experts)
        if (at := stack.offset + expert * stack.nbytes) // _UNIT * _UNIT + block
        <= files[stack.file].size
    ]
    try:
        if not places:
            return 0.0
        return max(measure_reads(places, block, lanes, max_s / _TRIES) for _ in range(_TRIES))
    finally:
        for file in files.values():
            file.close()


def measure_reads(
    places: Sequence[tuple[FlashFile, int]],
    block: int,
    lanes: int,
    max_s: float,
    max_bytes: int | None = None,
) -> float:
    """Bytes per second of `lanes` threads that read `block` bytes at random ones of `places` (file,
    offset) for `max_s` seconds, or until about `max_bytes` were read. Block and offsets are
    multiples of 64 KiB. Raises BundleError."""
    done = [0] * lanes
    most = float("inf") if max_bytes is None else max_bytes / lanes
    errors: list[BaseException] = []
    began = time.perf_counter()

    def read(lane: int) -> None:
        order = random.Random(lane)
        try:
            # Memory like that of the slots (experts/slots.py): private, because shared memory gets
            # no huge pages, and on them; into small pages the same disk delivers half as much.
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            size = round_up(block, _HUGE) + _HUGE
            with mmap.mmap(-1, size, flags=flags) as memory, memoryview(memory) as view:
                anchor = ctypes.c_char.from_buffer(memory)
                start = -ctypes.addressof(anchor) % _HUGE
                del anchor  # or the map could not be closed
                if hasattr(mmap, "MADV_HUGEPAGE"):
                    with suppress(OSError):  # a kernel without them
                        memory.madvise(mmap.MADV_HUGEPAGE)
                with view[start : start + block] as target:
                    # one read at least: a busy machine may start a lane when time is over
                    while not done[lane] or (
                        time.perf_counter() - began < max_s and done[lane] < most
                    ):
                        file, offset = order.choice(places)
                        done[lane] += file.read(offset, [target])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(lane,)) for lane in range(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sum(done) / (time.perf_counter() - began)
