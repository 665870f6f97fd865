"""What a cache is made of: K/V tensors, their memory and the graphs built on them.

Making it takes longer than a short answer: a graph for each shape of pass. So the memory of a
conversation that ended is kept, and the next one of the same size takes it over, graphs and all,
with every row zeroed. Idle memory never adds to the most that conversations had at the same time:
when none fits a new cache, all of it is freed first.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mimo_edge.config import LayerSpec, MimoConfig
from mimo_edge.kv_format import ring_slots, ring_type
from mimo_edge.runtimes.ggml.bindings import TYPE_F16, TYPE_F32, TYPE_Q8_0
from mimo_edge.runtimes.ggml.device import PAGE, Device, Region
from mimo_edge.runtimes.ggml.graph import Context, Tensor
from mimo_edge.runtimes.ggml.kept_graphs import KeptGraphs
from mimo_edge.units import round_up

KV_TYPES = {"f16": TYPE_F16, "f32": TYPE_F32, "q8_0": TYPE_Q8_0}
# Global layers attend to a multiple of this many rows, so that one graph serves that many tokens.
KV_BLOCK = 256
SMALL_KV_BLOCK = 64
# Idle memory of ended conversations: pieces, and their written rows and graphs together.
IDLE_MOST, IDLE_BYTES = 4, 32 << 20


def kv_rows(length: int) -> int:
    """Rows a global layer reads for `length` tokens: rounded up to a block."""
    block = SMALL_KV_BLOCK if length <= 4 * KV_BLOCK else KV_BLOCK
    return -(-length // block) * block


class KvTensors:
    """Keys {G * D, rows} and values {G * Dv, rows} of one layer or MTP block."""

    def __init__(self, key: Tensor, value: Tensor, rows: int) -> None:
        self.key = key
        self.value = value
        self.rows = rows
        self.row_bytes = key.nb[1] + value.nb[1]

    def data(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Keys u8 [rows, bytes of a row] and values, as they lie in memory, whatever their type."""
        keys, values = (
            np.ctypeslib.as_array(
                (ctypes.c_uint8 * (self.rows * tensor.nb[1])).from_address(tensor.address)
            ).reshape(self.rows, tensor.nb[1])
            for tensor in (self.key, self.value)
        )
        return keys, values

    def clear_nonfinite(self, rows: int) -> None:
        """Make zero what is NaN or Inf in the first `rows` rows, where these are f32."""
        for tensor in (self.key, self.value):
            if tensor.type == TYPE_F32:
                values = tensor.array().reshape(self.rows, -1)[:rows]
                values[~np.isfinite(values)] = 0

    def zero(self, rows: int) -> None:
        """Clear the first `rows` rows."""
        for tensor in (self.key, self.value):
            ctypes.memset(tensor.address, 0, rows * tensor.nb[1])


class AttentionKind(NamedTuple):
    """What the attention of a layer is like: two of one kind give the same bits."""

    heads: int
    groups: int
    dim: int
    v_dim: int
    sinks: bool
    ggml_type: int


class CacheShape(NamedTuple):
    """What decides the tensors of a cache of one model."""

    kv_type: str
    context: int
    verify_rows: int


class CacheMemory:
    """Tensors of the decoder layers and MTP blocks, zeroed, and graphs that use them."""

    def __init__(self, device: Device, config: MimoConfig, shape: CacheShape) -> None:
        """Raises BackendError when there is no memory."""
        self.device = device
        self.shape = shape
        self.graphs = KeptGraphs()
        self._config = config
        # A ring as large as the context never wraps, so it needs no more than that.
        window = config.sliding_window
        rows = ring_slots(window - 1 + shape.verify_rows, shape.kv_type)
        self.ring_rows = min(rows, shape.context)
        # Only the newest row of an MTP block queries: its ring needs no rows beyond W.
        self.mtp_rows = min(ring_slots(window, shape.kv_type, mtp=True), shape.context)
        trunk, blocks = config.num_hidden_layers, config.num_mtp_layers
        specs = [config.layer(i) for i in range(trunk + blocks)]
        self._context = Context(device, 2 * len(specs) + 1)
        try:
            made = [
                self._describe(spec, self.ring_rows if spec.index < trunk else self.mtp_rows)
                for spec in specs
            ]
            self._region = _place(device, made)
        except BaseException:
            self._context.close()
            raise
        self.layers, self.mtp = made[:trunk], made[trunk:]
        self.attention_kinds = {
            sliding: {self._kind(spec) for spec in specs[:trunk] if spec.sliding == sliding}
            for sliding in (False, True)
        }
        self.attends_together: dict[tuple[bool, int], bool] = {}  # `RowCheck`'s answers

    def _describe(self, spec: LayerSpec, ring: int) -> KvTensors:
        c, shape = self._config, self.shape
        rows = ring if spec.sliding else kv_rows(shape.context)
        kind = self._type(spec)
        groups = spec.num_key_value_heads
        key = self._context.new(kind, (groups * c.head_dim, rows))
        value = self._context.new(kind, (groups * c.v_head_dim, rows))
        return KvTensors(key, value, rows)

    def _type(self, spec: LayerSpec) -> int:
        kv_type = self.shape.kv_type
        return KV_TYPES[ring_type(kv_type) if spec.sliding else kv_type]

    def _kind(self, spec: LayerSpec) -> AttentionKind:
        c = self._config
        return AttentionKind(
            c.num_attention_heads,
            spec.num_key_value_heads,
            c.head_dim,
            c.v_head_dim,
            spec.sinks,
            self._type(spec),
        )

    def close(self) -> None:
        """Free everything."""
        self.graphs.close()
        self._context.close()
        self._region.close()


def _place(device: Device, tensors: Sequence[KvTensors]) -> Region:
    """Reserve memory for all tensors, each on pages of its own."""
    parts = [tensor.pointer for kv in tensors for tensor in (kv.key, kv.value)]
    offsets, size = page_offsets([int(device.ggml.ggml_nbytes(part)) for part in parts])
    region = Region(device, size)
    for part, offset in zip(parts, offsets, strict=True):
        device.ggml.ggml_backend_tensor_alloc(region.buffer, part, region.address + offset)
    return region


def page_offsets(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where parts of these sizes begin that lie one after the other on pages of the system, and
    the size of all."""
    starts, at = [], 0
    for size in sizes:
        starts.append(at)
        at += round_up(size, PAGE)
    return starts, at


Written = Sequence[tuple[KvTensors, int]]
"""Tensors with the number of their first rows that were ever written."""


class IdleMemory:
    """Memory of ended conversations, for the next ones; finalizers of any thread give it."""

    def __init__(self) -> None:
        # Re-entrant: the collector may run a finalizer while the lock is held.
        self._lock = threading.RLock()
        self._idle: list[tuple[CacheMemory, Written]] = []
        self._closed = False

    def __len__(self) -> int:
        return len(self._idle)

    @property
    def nbytes(self) -> int:
        """Bytes of written rows and of graphs."""
        with self._lock:
            return sum(_nbytes(memory, written) for memory, written in self._idle)

    def take(self, shape: CacheShape) -> CacheMemory | None:
        """Memory of a shape, zeroed, the latest given. Without any all idle memory is freed."""
        with self._lock:
            for index in reversed(range(len(self._idle))):
                memory, written = self._idle[index]
                if memory.shape == shape:
                    del self._idle[index]
                    break
            else:
                self._free()
                return None
        for kv, rows in written:
            kv.zero(rows)
        return memory

    def give(self, memory: CacheMemory, written: Written) -> None:
        """Take over memory nobody uses any more, or free it when there is enough."""
        if memory.device.forked:
            return  # the parent's; what it says of threads and locks is not true here
        with self._lock:
            room = not self._closed and len(self._idle) < IDLE_MOST
            if room and self.nbytes + _nbytes(memory, written) > IDLE_BYTES:
                memory.graphs.drop_large()
                room = self.nbytes + _nbytes(memory, written) <= IDLE_BYTES
            if room:
                self._idle.append((memory, written))
                return
        memory.close()

    def free(self) -> int:
        """Free all there is; its bytes."""
        with self._lock:
            nbytes = self.nbytes
            self._free()
            return nbytes

    def close(self) -> None:
        """Free all, and whatever is given from now on."""
        with self._lock:
            self._closed = True
            self._free()

    def _free(self) -> None:
        while self._idle:  # one by one: a finalizer may add to the list at any time
            self._idle.pop()[0].close()


def _nbytes(memory: CacheMemory, written: Written) -> int:
    return memory.graphs.nbytes + sum(kv.row_bytes * rows for kv, rows in written)
