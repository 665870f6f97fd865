"""The processor's part of a probe: memory, caches and kernels, through ggml.

Everything is measured in two rounds, seconds apart, and the better figure counts:
what disturbs a machine for a moment (other programs, or other guests of a host) is then unlikely to
hit both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from mimo_edge.bench.random_model import tiny_config
from mimo_edge.devices.profile import ATTENTION, KernelRate
from mimo_edge.known_models import known_model
from mimo_edge.kv_format import KV_FORMATS
from mimo_edge.quant.base import FORMATS, Format
from mimo_edge.runtimes.base import VERIFY_ROWS
from mimo_edge.runtimes.ggml.device import Device
from mimo_edge.runtimes.ggml.measure import (
    Heads,
    attention_rates,
    cache_bytes,
    kernel_rates,
    memory_rates,
)

ROUNDS = 2
KERNEL_ROWS = (1, 4, 32)
# ggml has other code for attention of many queries, from 64 on.
ATTENTION_QUERIES = (1, 4, 128)
# Few multiply-adds for its bytes: where its rate falls the caches end.
_CACHE_FORMAT = "Q8_0"
# Shares of the time.
_MEMORY_SHARE, _KERNEL_SHARE, _CACHE_SHARE = 0.5, 0.44, 0.06


class Processor(NamedTuple):
    """Bytes per second that one row draws from memory and kernel rates, by format; bytes of the
    caches, where they can be told from memory."""

    memory: dict[str, float]
    kernels: dict[str, KernelRate]
    cache_bytes: int | None


def measure_processor(
    threads: int, kinds: Sequence[Format], pool: int, seconds: float, step: Callable[[], None]
) -> Processor:
    """Measure it in about `seconds`, with matrices of `pool` bytes at most; `step` is called before
    every format of every round and once more. Raises BackendError when ggml refuses."""
    device = Device(threads)
    memory: dict[str, float] = {}
    kernels: dict[str, KernelRate] = {}
    part = seconds / ROUNDS
    try:
        step()
        cache = cache_bytes(device, FORMATS[_CACHE_FORMAT], pool, seconds * _CACHE_SHARE)
        for _ in range(ROUNDS):
            for fmt in kinds:
                step()
                rate = _kernel(device, fmt, pool, part / len(kinds))
                kernels[fmt.name] = rate = _better(rate, kernels.get(fmt.name, rate))
                memory[fmt.name] = max(rate.cold[0], rate.cold_stored) * fmt.bits_per_weight / 8
            for name, rate in _attention(device, part * _KERNEL_SHARE / len(kinds)).items():
                kernels[name] = _better(rate, kernels.get(name, rate))
        return Processor(memory, kernels, cache)
    finally:
        device.close()


def _kernel(device: Device, fmt: Format, pool: int, seconds: float) -> KernelRate:
    """One round of one format."""
    each = seconds * _KERNEL_SHARE / (len(KERNEL_ROWS) + 1)
    cold_each = seconds * _MEMORY_SHARE / (VERIFY_ROWS + 1)
    row, rows4, batch = kernel_rates(device, fmt, KERNEL_ROWS, each)
    [stored] = kernel_rates(device, fmt, KERNEL_ROWS[-1:], each, reorder=False)
    cold = memory_rates(device, fmt, range(1, VERIFY_ROWS + 1), pool, cold_each)
    [cold_stored] = memory_rates(device, fmt, (1,), pool, cold_each, reorder=False)
    return KernelRate(row, rows4, batch, stored, tuple(cold), cold_stored)


def _attention(device: Device, seconds: float) -> dict[str, KernelRate]:
    """One round of attention. f32 rows are those of small models, whose heads are narrow
    (budget.usual_kv_type)."""
    wide, narrow = known_model("MiMo-V2-Flash"), tiny_config("MiMo-V2-Flash", 0)
    found = {}
    for name in KV_FORMATS:
        c = narrow if name == "f32" else wide
        heads = Heads(c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.v_head_dim)
        row, rows4, batch = attention_rates(
            device, name, heads, ATTENTION_QUERIES, seconds / len(ATTENTION_QUERIES)
        )
        found[ATTENTION + name.upper()] = KernelRate(row, rows4, batch, batch)
    return found


def _better(a: KernelRate, b: KernelRate) -> KernelRate:
    """The higher of every two rates."""
    return KernelRate(
        max(a.row, b.row),
        max(a.rows4, b.rows4),
        max(a.batch, b.batch),
        max(a.stored, b.stored),
        tuple(map(max, a.cold, b.cold)),
        max(a.cold_stored, b.cold_stored),
    )
