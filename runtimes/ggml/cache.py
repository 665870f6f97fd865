"""KV cache in ggml tensors, with the contract of `mimo_edge.kv_cache`: undo n rows or raise.

Global layers: {heads * dim, rows} tensors over address space reserved for the whole context;
rows take memory when first written. Sliding layers and MTP blocks: rings of R rows, the row of
position p in slot p mod R. Which position a slot holds is kept here, on the host, once for all
sliding layers (they move in step); masks are made from it, so a stale slot is never seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mimo_edge.cache_rows import CacheLayout, LayerRows, check_rows, checked
from mimo_edge.config import MimoConfig
from mimo_edge.errors import CacheError, ContextLengthError, UsageError
from mimo_edge.runtimes.ggml.cache_memory import (
    CacheMemory,
    CacheShape,
    IdleMemory,
    KvTensors,
    kv_rows,
)
from mimo_edge.runtimes.ggml.device import Device

Positions = NDArray[np.int64]

EMPTY = -(1 << 60)  # position of a slot that holds nothing: no mask admits it


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

    def unseen(self, count: int) -> int:
        """Of `count` new rows how many at their start the newest one does not see: none."""
        del count
        return 0

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

    def miss_none(self) -> None:
        """Nothing is missing: all rows are always there."""

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
        self._floor = 0  # nothing before it is missed
        self._slots = np.full(rows, EMPTY, np.int64)

    def first_seen(self, position: int) -> int:
        """Oldest position a query sees; the window counts the query itself."""
        return max(self._floor, position - self.window + 1)

    def begin(self, position: int) -> None:
        """Rows begin at `position`, the next one to be written: none before it is missed."""
        self._empty(position)
        self.length = self._floor = position

    def _empty(self, position: int) -> None:
        self._slots[:] = EMPTY
        self._start = self.high = position
        self._floor = min(self._floor, position)

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

    def unseen(self, count: int) -> int:
        """Of `count` new rows how many at their start the newest one cannot see: the ring holds as
        many as it looks back."""
        return max(0, count - self.rows)

    def store(self, position: int, count: int) -> None:
        """Note that rows position.. were written (the last `rows` of them); later ones are
        forgotten."""
        end = position + count
        if position > self.length or position <= self.oldest():  # nothing before it is left
            self._empty(position)
        start, slot = max(position, end - self.rows), position % self.rows
        if start == position and slot + count <= self.rows:
            self._slots[slot : slot + count] = np.arange(start, end)
        else:
            kept = np.arange(start, end, dtype=np.int64)
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

    def miss_none(self) -> None:
        """What is not here now is not missed."""
        self._floor = self.oldest()

    def copy(self) -> RingIndex:
        """The same state, to go back to."""
        made = RingIndex(self.window, self.rows)
        made.length, made.high = self.length, self.high
        made._start, made._floor = self._start, self._floor
        made._slots[:] = self._slots
        return made

    @property
    def slots(self) -> Positions:
        """Position each slot was written for, only lent. Forgotten ones are still there: they lie
        past `length`, where no query that was written sees them."""
        return self._slots

    def positions(self) -> Positions:
        """Position held by each slot, EMPTY where none or a forgotten one."""
        return np.where(self._slots < self.length, self._slots, EMPTY)


Index = FullIndex | RingIndex


def begin_rows(blocks: Sequence[Index], depth: int, position: int) -> None:
    """Rows of block `depth` begin at `position`. Raises CacheError when it has no window."""
    block = blocks[depth]
    if not isinstance(block, RingIndex):
        raise CacheError(f"MTP block {depth} attends to everything: it needs every row")
    block.begin(position)


class RingCopy(NamedTuple):
    """The sliding layers of a cache: positions, and keys and values of one layer after the other
    as u8 [bytes]."""

    ring: RingIndex
    rows: list[NDArray[np.uint8]]


class GgmlCache:
    """KV state of one sequence; made by `GgmlBackend.new_cache`, freed by `close` or with it."""

    def __init__(
        self,
        device: Device,
        config: MimoConfig,
        kv_type: str,
        context: int,
        verify_rows: int,
        idle: IdleMemory,
    ) -> None:
        """`idle` has memory of ended conversations, and gets this one's when it ends."""
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
        # Values are scaled behind the output projection, as in llama.cpp.
        self.layout = CacheLayout.of(config, kv_type, scaled_values=False)
        self._capacity = context
        self._length = 0
        shape = CacheShape(kv_type, context, verify_rows)
        self.memory = memory = idle.take(shape) or CacheMemory(device, config, shape)
        self.layers, self.mtp, self.graphs = memory.layers, memory.mtp, memory.graphs
        window = config.sliding_window
        self.ring = RingIndex(window, memory.ring_rows)
        self.full = FullIndex(context)
        blocks = range(config.num_hidden_layers, config.num_hidden_layers + config.num_mtp_layers)
        self.mtp_index: list[Index] = [
            RingIndex(window, memory.mtp_rows) if config.layer(i).sliding else FullIndex(context)
            for i in blocks
        ]
        self._finalizer = weakref.finalize(
            self, _release, idle, memory, config, self.full, self.mtp_index
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

    def clear_nonfinite(self) -> None:
        """After a pass that gave NaN or Inf: attention over f32 rows multiplies those behind the
        length by 0, too, so they must be numbers."""
        for kv, rows in _written(self.memory, self.config, self.full, self.mtp_index):
            kv.clear_nonfinite(rows)

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

    def begin_mtp(self, depth: int, position: int) -> None:
        """See `runtimes.base.Cache`. Raises CacheError when the block has no window."""
        begin_rows(self.mtp_index, depth, position)

    def rows(self) -> Iterable[LayerRows]:
        """See `runtimes.base.Cache`: views of global layers, copies of rings."""
        for index, kv in self._places():
            keys, values = kv.data()
            if isinstance(index, FullIndex):
                yield LayerRows(0, keys[: index.length], values[: index.length])
            else:
                first = min(index.oldest(), index.length)
                slots = np.arange(first, index.length) % index.rows
                yield LayerRows(first, keys[slots], values[slots])

    def restore(self, length: int, rows: Iterable[LayerRows]) -> None:
        """See `runtimes.base.Cache`."""
        if self._length or self.closed:
            raise CacheError(f"this cache holds {self._length} tokens or is closed")
        if length > self._capacity:
            raise ContextLengthError(
                f"{length} tokens exceed the context of {self._capacity}", "use a larger context"
            )
        for index, _ in self._places():
            if isinstance(index, FullIndex):
                index.high = length  # should this fail, whoever gets the memory clears so many
        placed: list[tuple[int, int]] = []
        starts: dict[int, int] = {}  # by index, of which layers share theirs
        for (index, kv), one in zip(self._places(), checked(self.layout, rows), strict=True):
            if one.end > length:
                raise CacheError(f"rows up to {one.end} of {length} tokens")
            first = one.first if isinstance(index, FullIndex) else max(one.first, one.end - kv.rows)
            slots: Any = slice(first, one.end)
            if one.end > kv.rows:
                slots = np.arange(first, one.end) % kv.rows
            for target, source in zip(kv.data(), (one.keys, one.values), strict=True):
                target[slots] = source[first - one.first :]
            placed.append((one.first, len(one.keys)))
            starts[id(index)] = max(first, starts.get(id(index), 0))
        check_rows(self.layout, length, placed)
        for (index, _), (begin, count) in zip(self._places(), placed, strict=True):
            first = starts[id(index)]
            index.store(first, begin + count - first)
        for block in self.mtp_index:
            block.miss_none()
        self._length = length

    def _places(self) -> list[tuple[Index, KvTensors]]:
        """Which rows every layer holds, and where, then every MTP block."""
        trunk: list[tuple[Index, KvTensors]] = [
            (self.ring if self.config.layer(i).sliding else self.full, kv)
            for i, kv in enumerate(self.layers)
        ]
        return [*trunk, *zip(self.mtp_index, self.mtp, strict=True)]

    def nbytes(self) -> int:
        """Bytes of KV held now: rings whole, global rows as far as they were ever written."""
        written = _written(self.memory, self.config, self.full, self.mtp_index)
        return sum(kv.row_bytes * rows for kv, rows in written)

    def held_bytes(self) -> int:
        """See `runtimes.base.Cache`."""
        return self.nbytes() + self.graphs.nbytes

    def close(self) -> None:
        """End the conversation. Twice is harmless; using the cache afterwards is refused."""
        self._finalizer()


def _written(
    memory: CacheMemory, config: MimoConfig, full: FullIndex, mtp: Sequence[Index]
) -> list[tuple[KvTensors, int]]:
    """Every layer's tensors and how many of their rows count as written: of rings all, of global
    layers as many as ever were."""
    found = []
    for index, kv in enumerate([*memory.layers, *memory.mtp]):
        rows = kv.rows
        if not config.layer(index).sliding:
            block = index - len(memory.layers)
            rows = min(rows, kv_rows((full if block < 0 else mtp[block]).high))
        found.append((kv, rows))
    return found


def _release(
    idle: IdleMemory,
    memory: CacheMemory,
    config: MimoConfig,
    full: FullIndex,
    mtp: Sequence[Index],
) -> None:
    idle.give(memory, _written(memory, config, full, mtp))
