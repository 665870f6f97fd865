"""KV cache in ggml tensors, with the contract of `mimo_edge.kv_cache`: undo n rows or raise.

Global layers: {heads * dim, rows} tensors over address space reserved for the whole context;
rows take memory when first written. Sliding layers and MTP blocks: rings of R rows, the row of
position p in slot p mod R. Which position a slot holds is kept here, on the host, once for all
sliding layers (they move in step); masks are made from it, so a stale slot is never seen.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mimo_edge.config import LayerSpec, MimoConfig
from mimo_edge.errors import CacheError, ContextLengthError, UsageError
from mimo_edge.kv_format import ring_type
from mimo_edge.runtimes.ggml.bindings import TYPE_F16, TYPE_F32, TYPE_Q8_0
from mimo_edge.runtimes.ggml.device import PAGE, Device, Region
from mimo_edge.runtimes.ggml.graph import Context, Tensor
from mimo_edge.units import round_up

Positions = NDArray[np.int64]

KV_TYPES = {"f16": TYPE_F16, "f32": TYPE_F32, "q8_0": TYPE_Q8_0}
EMPTY = -(1 << 60)  # position of a slot that holds nothing: no mask admits it
# Global layers attend to a multiple of this many rows, so that one graph serves that many tokens.
KV_BLOCK = 256
SMALL_KV_BLOCK = 64
# Graphs of few tokens kept for reuse; of those of many, whose inputs are large, only the last is.
SMALL_GRAPHS, SMALL_GRAPH_BYTES = 16, 24 << 20


def kv_rows(length: int) -> int:
    """Rows a global layer reads for `length` tokens: rounded up to a block."""
    block = SMALL_KV_BLOCK if length <= 4 * KV_BLOCK else KV_BLOCK
    return -(-length // block) * block


class FullIndex:
    """Rows 0..length-1, without holes."""

    def __init__(self, context: int) -> None:
        self.context = context
        self.length = 0
        self.high = 0  # most rows ever written: what takes memory

    def check(self, position: int, count: int, queries: int) -> None:
        """Raise CacheError unless the last `queries` of these rows would see all they should."""
        del count, queries
        if not 0 <= position <= self.length:
            raise CacheError(
                f"rows from position {position} would leave a hole: {self.length} are held",
                "full attention needs every row from position 0",
            )

    def store(self, position: int, count: int) -> None:
        """Note that rows position.. were written; later ones are forgotten."""
        self.length = position + count
        self.high = max(self.high, self.length)

    def check_rollback(self, length: int) -> None:
        """Raise CacheError unless the cache can go back to `length` rows."""
        if not 0 <= length <= self.length:
            raise CacheError(f"cannot go back to {length} rows: {self.length} are held")

    def truncate(self, length: int) -> None:
        """Forget the rows from `length` on."""
        self.length = min(self.length, length)

    def positions(self, rows: int) -> Positions:
        """Position held by each of the first `rows` rows."""
        found = np.arange(rows, dtype=np.int64)
        found[self.length :] = EMPTY
        return found


class RingIndex:
    """Which position each slot of a ring of `rows` slots holds, for a window of W tokens.

    With rows = W - 1 + q, q rows can be written before they are attended to, and up to q undone:
    the oldest row the next token sees is still there.
    """

    def __init__(self, window: int, rows: int) -> None:
        self.window = window
        self.rows = rows
        self.length = 0
        self.high = 0  # one past the highest position written since the last hole
        self._start = 0  # lowest position written since the last hole
        self._slots = np.full(rows, EMPTY, np.int64)

    def first_seen(self, position: int) -> int:
        """Oldest position a query sees; the window counts the query itself."""
        return max(0, position - self.window + 1)

    def oldest(self) -> int:
        """Lowest position still intact: writing p destroyed p - rows, rolled back or not."""
        return max(self._start, self.high - self.rows)

    def in_place(self, position: int, count: int) -> bool:
        """Whether these rows can be written before the first of them attends."""
        return self.first_seen(position) >= max(self.high, position + count) - self.rows

    def check(self, position: int, count: int, queries: int) -> None:
        """Raise CacheError unless the last `queries` of these rows would see all they should."""
        if position < 0:
            raise CacheError(f"position {position} is negative")
        query = position + count - queries
        first = self.first_seen(query)
        if first >= position:
            return
        if position > self.length:
            raise CacheError(
                f"rows {first}..{position - 1} are needed by position {query}, but only rows "
                f"below {self.length} were written",
                f"the window is {self.window}: write from an earlier position",
            )
        if first < self.oldest():
            raise CacheError(
                f"rows {first}..{position - 1} are needed by position {query}, but rows below "
                f"{self.oldest()} were overwritten",
                f"the window is {self.window} and the ring holds {self.rows} rows: "
                "write from an earlier position, or start again from position 0",
            )

    def store(self, position: int, count: int) -> None:
        """Note that rows position.. were written (the last `rows` of them); later ones are
        forgotten."""
        end = position + count
        if position > self.length or position <= self.oldest():  # nothing before it is left
            self._slots[:] = EMPTY
            self._start = self.high = position
        kept = np.arange(max(position, end - self.rows), end, dtype=np.int64)
        self._slots[kept % self.rows] = kept
        self.length = end
        self.high = max(self.high, end)

    def check_rollback(self, length: int) -> None:
        """Raise CacheError unless the token after `length` rows would see all it should."""
        if not 0 <= length <= self.length:
            raise CacheError(f"cannot go back to {length} rows: {self.length} were written")
        first = self.first_seen(length)
        if first < length and first < self.oldest():
            raise CacheError(
                f"cannot go back from {self.length} rows to {length}: position {length} sees "
                f"rows from {first}, rows below {self.oldest()} are gone",
                f"a ring of {self.rows} rows for a window of {self.window} undoes at most "
                f"{self.rows - self.window + 1} rows",
            )

    def truncate(self, length: int) -> None:
        """Forget the rows from `length` on."""
        self.length = min(self.length, length)

    def copy(self) -> RingIndex:
        """The same state, to go back to."""
        made = RingIndex(self.window, self.rows)
        made.length, made.high, made._start = self.length, self.high, self._start
        made._slots[:] = self._slots
        return made

    def positions(self, rows: int | None = None) -> Positions:
        """Position held by each slot, EMPTY where none or a forgotten one."""
        found: Positions = self._slots[:rows]
        return np.where(found < self.length, found, EMPTY)


Index = FullIndex | RingIndex


class Reusable(Protocol):
    """A graph kept for reuse."""

    @property
    def current(self) -> bool: ...

    @property
    def nbytes(self) -> int: ...

    def close(self) -> None: ...


class KvTensors:
    """Keys {G * D, rows} and values {G * Dv, rows} of one layer or MTP block."""

    def __init__(self, key: Tensor, value: Tensor, rows: int) -> None:
        self.key = key
        self.value = value
        self.rows = rows
        self.row_bytes = key.nb[1] + value.nb[1]


class RingCopy(NamedTuple):
    """The sliding layers of a cache: positions, and keys and values of one layer after the other
    as u8 [bytes]."""

    ring: RingIndex
    rows: list[NDArray[np.uint8]]


class GgmlCache:
    """KV state of one sequence; made by `GgmlBackend.new_cache`, freed by `close` or with it."""

    def __init__(
        self, device: Device, config: MimoConfig, kv_type: str, context: int, verify_rows: int
    ) -> None:
        if context < 1 or verify_rows < 1:
            raise UsageError(
                f"a cache of {context} tokens and {verify_rows} verify rows", "both start at 1"
            )
        if context > config.max_position_embeddings:
            raise ContextLengthError(
                f"a context of {context} exceeds the model's {config.max_position_embeddings} "
                "positions"
            )
        self.config = config
        self.device = device
        self.verify_rows = verify_rows
        self._capacity = context
        self._length = 0
        window = config.sliding_window
        # A ring as large as the context never wraps, so it needs no more than that.
        ring_rows = min(window - 1 + verify_rows, context)
        trunk = range(config.num_hidden_layers)
        mtp = range(config.num_hidden_layers, config.num_hidden_layers + config.num_mtp_layers)
        self.ring = RingIndex(window, ring_rows)
        self.full = FullIndex(context)
        # Only the newest row of an MTP block queries, so its ring needs no rows beyond W.
        mtp_rows = min(window, context)
        self.mtp_index: list[Index] = [
            RingIndex(window, mtp_rows) if config.layer(i).sliding else FullIndex(context)
            for i in mtp
        ]
        self._context = Context(device, 2 * (len(trunk) + len(mtp)) + 1)

        def describe(spec: LayerSpec, ring: int) -> KvTensors:
            rows = ring if spec.sliding else kv_rows(context)
            kind = KV_TYPES[ring_type(kv_type) if spec.sliding else kv_type]
            g = spec.num_key_value_heads
            key = self._context.new(kind, (g * config.head_dim, rows))
            value = self._context.new(kind, (g * config.v_head_dim, rows))
            return KvTensors(key, value, rows)

        try:
            self.layers = [describe(config.layer(i), ring_rows) for i in trunk]
            self.mtp = [describe(config.layer(i), mtp_rows) for i in mtp]
            self._region = _place(device, [*self.layers, *self.mtp])
        except BaseException:
            self._context.close()
            raise
        self._graphs: OrderedDict[object, Reusable] = OrderedDict()
        self._finalizer = weakref.finalize(
            self, _release, device, self._graphs, self._region, self._context
        )

    @property
    def length(self) -> int:
        return self._length

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive

    def require(self, tokens: int) -> None:
        """Raise ContextLengthError unless `tokens` more fit."""
        if self._length + tokens > self._capacity:
            raise ContextLengthError(
                f"{self._length} + {tokens} tokens exceed the context of {self._capacity}",
                "use a larger context or a shorter prompt",
            )

    def commit(self, tokens: int) -> None:
        """Count `tokens` rows, already written to every layer, as part of the sequence."""
        self._length += tokens

    def save_rings(self) -> RingCopy:
        """What a pass that overwrites rows of the sliding layers destroys, to undo it."""
        sliding = [kv for i, kv in enumerate(self.layers) if self.config.layer(i).sliding]
        rows = [tensor.bytes().copy() for kv in sliding for tensor in (kv.key, kv.value)]
        return RingCopy(self.ring.copy(), rows)

    def undo_write(self, saved: RingCopy | None) -> None:
        """A pass failed half-way: rows past the committed length hold anything, and if it was one
        that overwrote rows, `saved` is what was there."""
        if saved is not None:
            self.ring = saved.ring
            sliding = [kv for i, kv in enumerate(self.layers) if self.config.layer(i).sliding]
            tensors = [tensor for kv in sliding for tensor in (kv.key, kv.value)]
            for tensor, rows in zip(tensors, saved.rows, strict=True):
                tensor.bytes()[...] = rows
        self.ring.truncate(self._length)
        self.full.truncate(self._length)

    def rollback(self, n: int) -> None:
        """Undo the last n rows of every layer, exactly, or raise CacheError and change nothing.

        MTP rows of undone positions go too: the hidden states they came from are void.
        """
        if n < 0 or n > self._length:
            raise CacheError(f"cannot undo {n} of {self._length} rows")
        length = self._length - n
        trunk: list[Index] = [self.full]
        if any(self.config.hybrid_layer_pattern):
            trunk.append(self.ring)
        for index in trunk:
            index.check_rollback(length)
        for index in (self.ring, self.full, *self.mtp_index):
            index.truncate(length)
        self._length = length

    def nbytes(self) -> int:
        """Bytes of KV held now: rings whole, global rows as far as they were ever written."""
        total = 0
        specs = [self.config.layer(i) for i in range(len(self.layers) + len(self.mtp))]
        for spec, kv in zip(specs, [*self.layers, *self.mtp], strict=True):
            if spec.sliding:
                rows = kv.rows
            else:
                mtp = spec.index - len(self.layers)
                index = self.full if mtp < 0 else self.mtp_index[mtp]
                rows = min(kv.rows, kv_rows(index.high))
            total += rows * kv.row_bytes
        return total

    # --- graphs built for this cache ---

    def graph_bytes(self) -> int:
        """Bytes of the graphs kept for reuse, inputs included."""
        return sum(graph.nbytes for graph in self._graphs.values())

    def graph(self, key: object) -> Reusable | None:
        """A graph kept under `key` that is still valid."""
        found = self._graphs.get(key)
        if found is None:
            return None
        if not found.current:
            self._graphs.pop(key).close()
            return None
        self._graphs.move_to_end(key)
        return found

    def drop_large(self) -> None:
        """Free the graph of many tokens: before another one is built, or to have its memory."""
        for key in [k for k in self._graphs if _is_large(k)]:
            self._graphs.pop(key).close()

    def keep(self, key: object, graph: Reusable) -> None:
        """Keep `graph`; the least recently used go when there are too many."""
        if _is_large(key):
            self.drop_large()
        self._graphs[key] = graph
        small = [k for k in self._graphs if not _is_large(k)]
        nbytes = sum(self._graphs[k].nbytes for k in small)
        while len(small) > SMALL_GRAPHS or (len(small) > 1 and nbytes > SMALL_GRAPH_BYTES):
            old = self._graphs.pop(small.pop(0))
            nbytes -= old.nbytes
            old.close()

    def close(self) -> None:
        """Free everything. Twice is harmless; using it afterwards is refused."""
        self._finalizer()


def _is_large(key: object) -> bool:
    return bool(getattr(key, "large", False))


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


def _release(
    device: Device, graphs: OrderedDict[object, Reusable], region: Region, context: Context
) -> None:
    if device.forked:
        return
    for graph in graphs.values():
        graph.close()
    graphs.clear()
    context.close()
    region.close()
