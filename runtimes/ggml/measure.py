"""How fast this processor multiplies: ggml's own kernels on matrices made for it.

Figures that a forecast needs apart: what one row's products draw from memory when weights lie
there, and how many multiply-adds per second the kernels do when weights are at hand in the caches.
What the engine costs besides is measured with the engine (edge/bench/engine_cost.py). Matrices lie
in the memory that resident weights would get (reordered where ggml has a kernel for it), because
most products of a pass are theirs.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from mimo_edge.errors import BackendError
from mimo_edge.quant.base import Format
from mimo_edge.runtimes.ggml import bindings as ggml
from mimo_edge.runtimes.ggml.cache_memory import KV_TYPES
from mimo_edge.runtimes.ggml.device import Device
from mimo_edge.runtimes.ggml.graph import Context, Graph, Inputs, Tensor, finish_together

U8 = NDArray[np.uint8]

# A matrix of 4-bit weights of this size, half a megabyte, stays in the caches of every core that
# works on it; its rows are whole blocks of every format.
_CACHED_COLS, _CACHED_ROWS = 1024, 1024
# One as models have them. Its size matters: of reordered weights two or three rows read a thread's
# part once each, which comes from memory again where it is larger than a core's own cache.
_MEMORY_COLS, _MEMORY_ROWS, _LEAST_ROWS = 4096, 8192, 1024
_PRODUCTS = 16  # per graph: starting one must not count
# Where memory costs less than so much more than the caches nothing says how large those are.
_CLEAR_STEP = 1.3


_CACHED_TOKENS = 256

Found = TypeVar("Found")


class Heads(NamedTuple):
    """Query heads, groups of them that share keys and values, and their widths."""

    queries: int
    groups: int
    dim: int
    v_dim: int


class _Matrices:
    """`count` equal matrices of a format, random, in the memory that suits them."""

    def __init__(
        self, device: Device, fmt: Format, cols: int, rows: int, count: int, reorder: bool = True
    ) -> None:
        g = device.ggml
        self._device = device
        self._buffer = 0
        self._context = Context(device, count)
        kind = device.plain
        if reorder:
            kind = device.best_buffer_type(fmt.ggml_type, (cols, rows), False)
        self.tensors = [self._context.new(fmt.ggml_type, (cols, rows)) for _ in range(count)]
        needed = int(g.ggml_backend_buft_get_alloc_size(kind.pointer, self.tensors[0].pointer))
        step = -(-needed // kind.alignment) * kind.alignment
        self._buffer = g.ggml_backend_buft_alloc_buffer(kind.pointer, step * count) or 0
        if not self._buffer:
            self.close()
            raise BackendError(f"{step * count} bytes to measure with could not be allocated")
        try:
            g.ggml_backend_buffer_set_usage(self._buffer, ggml.BUFFER_USAGE_WEIGHTS)
            base = int(g.ggml_backend_buffer_get_base(self._buffer))
            device.use_huge_pages(base, step * count)  # as resident weights and slots lie
            data = _bytes(fmt, cols, rows)
            for number, tensor in enumerate(self.tensors):
                place = base + number * step
                if g.ggml_backend_tensor_alloc(self._buffer, tensor.pointer, place) != 0:
                    raise BackendError("ggml could not place a matrix")
                g.ggml_backend_tensor_set(tensor.pointer, data.ctypes.data, 0, data.size)
        except BaseException:
            self.close()
            raise
        self.nbytes = data.size * count

    def close(self) -> None:
        """Free them. Twice is harmless."""
        if self._buffer:
            self._device.ggml.ggml_backend_buffer_free(self._buffer)
            self._buffer = 0
        self._context.close()


def _bytes(fmt: Format, cols: int, rows: int) -> U8:
    """Random weights of a format: one row, repeated, because packing takes longer than this."""
    rng = np.random.default_rng(0)
    row = rng.standard_normal((1, cols)).astype(np.float32)
    importance = np.ones(cols, np.float32) if fmt.requires_importance else None
    return np.ascontiguousarray(np.repeat(fmt.quantize(row, importance), rows, axis=0)).reshape(-1)


def memory_rates(
    device: Device,
    fmt: Format,
    rows: Sequence[int],
    pool_bytes: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    *,
    reorder: bool = True,
) -> list[float]:
    """Multiply-adds per second of products with each number of `rows` and about `pool_bytes` of
    weights, the best of several passes of `seconds` in all for each; without `reorder` in the order
    of the file. Raises BackendError when memory is short."""
    row_bytes = fmt.row_bytes(_MEMORY_COLS)
    half = pool_bytes // 2 // row_bytes // _LEAST_ROWS * _LEAST_ROWS
    tall = max(_LEAST_ROWS, min(_MEMORY_ROWS, half))
    count = max(2, pool_bytes // (row_bytes * tall))
    macs = count * _MEMORY_COLS * tall
    weights = _Matrices(device, fmt, _MEMORY_COLS, tall, count, reorder)
    try:
        return [n * macs / min(_passes(device, weights.tensors, n, seconds, clock)) for n in rows]
    finally:
        weights.close()


class Products:
    """Products of one row with about `pool_bytes` of weights that come from memory, in the order of
    the file as streamed experts are: what all threads do while something else is measured beside
    them. Close it, or use it as a context manager."""

    def __init__(self, device: Device, fmt: Format, pool_bytes: int) -> None:
        """Raises BackendError when memory is short."""
        tall = _LEAST_ROWS
        count = max(2, pool_bytes // (fmt.row_bytes(_MEMORY_COLS) * tall))
        self._macs = _MEMORY_COLS * tall * _PRODUCTS
        self._weights = _Matrices(device, fmt, _MEMORY_COLS, tall, count, reorder=False)
        self._inputs = Inputs(device)
        self._graphs: list[Graph] = []
        try:
            x = self._inputs.new(ggml.TYPE_F32, _MEMORY_COLS, 1)
            self._inputs.allocate()
            x.array()[:] = 1.0
            # Short graphs, by turns: where one ends beside nothing any more does not count.
            for start in range(0, max(1, count - _PRODUCTS + 1), _PRODUCTS):
                graph = Graph(device, 2 * _PRODUCTS + 8)
                self._graphs.append(graph)
                for number in range(_PRODUCTS):
                    weight = self._weights.tensors[(start + number) % count]
                    graph.output(graph.mul_mat(weight, x))
            finish_together(self._graphs)
        except BaseException:
            self.close()
            raise

    def beside(self, work: Callable[[], Found]) -> tuple[Found, float]:
        """Compute again and again until `work`, in a thread of its own, is done: what it returns,
        and multiply-adds per second meanwhile. Raises what it raises."""
        self._graphs[0].compute()  # starts threads
        with ThreadPoolExecutor(1) as other:
            began = last = time.perf_counter()
            future = other.submit(work)
            done = computed = 0
            while not (done and future.done()):
                self._graphs[computed % len(self._graphs)].compute()
                computed += 1
                if not (done and future.done()):
                    last, done = time.perf_counter(), computed
        return future.result(), done * self._macs / max(last - began, 1e-9)

    def close(self) -> None:
        """Free everything. Twice is harmless."""
        for graph in self._graphs:
            graph.close()
        self._graphs.clear()
        self._inputs.close()
        self._weights.close()

    def __enter__(self) -> Products:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def kernel_rates(
    device: Device,
    fmt: Format,
    rows: Sequence[int],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    *,
    reorder: bool = True,
) -> list[float]:
    """Multiply-adds per second of products with each number of `rows`, weights in the caches;
    without `reorder` in the order of the file."""
    weights = _Matrices(device, fmt, _CACHED_COLS, _CACHED_ROWS, 1, reorder)
    try:
        products = weights.tensors * _PRODUCTS
        macs = _CACHED_COLS * _CACHED_ROWS * _PRODUCTS
        return [n * macs / min(_passes(device, products, n, seconds, clock)) for n in rows]
    finally:
        weights.close()


def attention_rates(
    device: Device,
    kv_type: str,
    heads: Heads,
    queries: Sequence[int],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Multiply-adds per second of scores and values over cached rows of a format, for each number
    of `queries`."""
    return [
        _attention(device, KV_TYPES[kv_type], heads, count, seconds, clock) for count in queries
    ]


def _attention(
    device: Device,
    kv_type: int,
    heads: Heads,
    queries: int,
    seconds: float,
    clock: Callable[[], float],
) -> float:
    count = max(1, _PRODUCTS // queries)
    inputs, graph = Inputs(device), Graph(device, 16 * count + 8)
    try:
        q = inputs.new(ggml.TYPE_F32, heads.dim, heads.queries, queries)
        key = inputs.new(kv_type, heads.dim, _CACHED_TOKENS, heads.groups)
        value = inputs.new(kv_type, heads.v_dim, _CACHED_TOKENS, heads.groups)
        mask = inputs.new(ggml.TYPE_F16, _CACHED_TOKENS, queries)
        inputs.allocate()
        for tensor in (q, key, value, mask):  # zeros take as long as anything else
            ctypes.memset(tensor.address, 0, tensor.ne[3] * tensor.nb[3])
        for _ in range(count):
            graph.output(graph.attention(q, key, value, mask, heads.dim**-0.5, None))
        graph.finish()
        macs = count * queries * heads.queries * (heads.dim + heads.v_dim) * _CACHED_TOKENS
        return macs / min(_runs(graph, seconds, clock))
    finally:
        graph.close()
        inputs.close()


def cache_bytes(
    device: Device,
    fmt: Format,
    pool_bytes: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> int | None:
    """Bytes of weights whose products with one row take as much longer than those of few as they
    are faster than those of many, up to `pool_bytes`, that is, of which the caches keep half from
    one pass to the next; None where memory is about as fast as they are."""
    each = fmt.row_bytes(_CACHED_COLS) * _CACHED_ROWS
    total = max(2, pool_bytes // each)
    counts = [1 << bits for bits in range(1, total.bit_length())]
    weights = _Matrices(device, fmt, _CACHED_COLS, _CACHED_ROWS, counts[-1])
    try:
        times = [
            min(_passes(device, weights.tensors[:count], 1, seconds / len(counts), clock)) / count
            for count in counts
        ]
    finally:
        weights.close()
    near, far = min(times), times[-1]
    if far < _CLEAR_STEP * near:
        return None
    middle = (near + far) / 2
    # The last step up counts: a disturbance only ever makes a time longer.
    at = max(i for i, seconds in enumerate(times) if seconds <= middle)
    part = (middle - times[at]) / (times[at + 1] - times[at])
    return round(counts[at] * 2**part * each)


def _passes(
    device: Device,
    weights: Sequence[Tensor],
    rows: int,
    seconds: float,
    clock: Callable[[], float],
) -> list[float]:
    """Seconds of each of the passes that fit into `seconds`, one at least."""
    inputs, graph = Inputs(device), Graph(device, 2 * len(weights) + 8)
    try:
        x = inputs.new(ggml.TYPE_F32, weights[0].ne[0], rows)
        inputs.allocate()
        for weight in weights:
            graph.output(graph.mul_mat(weight, x))
        graph.finish()
        rng = np.random.default_rng(1)
        values = x.array()
        values[:] = rng.standard_normal(values.shape)
        return _runs(graph, seconds, clock)
    finally:
        graph.close()
        inputs.close()


def _runs(graph: Graph, seconds: float, clock: Callable[[], float]) -> list[float]:
    """Seconds of each run, after one that starts threads and fills pages and caches."""
    graph.compute()
    taken: list[float] = []
    began = clock()
    while not taken or clock() - began < seconds:
        start = clock()
        graph.compute()
        taken.append(max(clock() - start, 1e-9))
    return taken
