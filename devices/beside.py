"""The part of a probe that streaming depends on: reads and products at the same time.

While experts are read all threads compute, and both want memory, interrupts and cores. What is left
of either is measured with the kernel and the size of reads that streamed experts have.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial

from mimo_edge.bench.flash_rate import Targets, measure_reads
from mimo_edge.devices.profile import Beside
from mimo_edge.flash_file import FlashFile
from mimo_edge.quant.base import FORMATS
from mimo_edge.runtimes.ggml.device import Device
from mimo_edge.runtimes.ggml.measure import Products

ROUNDS = 3
_FORMAT = "Q4_0"
_LEAST = 0.01  # a share that a profile may hold


def measure_beside(
    places: Sequence[tuple[FlashFile, int]],
    block: int,
    lanes: int,
    into: Targets,
    threads: int,
    pool: int,
    seconds: float,
    max_bytes: int,
) -> Beside:
    """Measure it in about `seconds`: reads of `block` bytes at `places`, `max_bytes` at most each
    time, and products with about `pool` bytes of weights. Raises BackendError when ggml refuses,
    BundleError when a read fails."""
    each = seconds / ROUNDS / 3
    rounds: list[tuple[float, float]] = []
    device = Device(threads)
    try:
        with Products(device, FORMATS[_FORMAT], pool) as products:
            reads = partial(measure_reads, places, block, lanes, into, each, max_bytes)
            for _ in range(ROUNDS):
                # Neighbours in time: a disk's rate drifts.
                alone = reads()
                _, whole = products.beside(partial(time.sleep, each))
                beside, slowed = products.beside(reads)
                rounds.append((beside / alone, slowed / whole))
    finally:
        device.close()
    usual = (statistics.median(shares) for shares in zip(*rounds, strict=True))
    return Beside(*(min(1.0, max(_LEAST, share)) for share in usual))
