"""KV caches in NumPy with one rollback contract: undo exactly n rows, or raise CacheError.

A row is the keys and values of one position in one layer. Three things are built here:

- `FullCache` for global layers: grows in blocks up to the context.
- `SlidingCache` for windowed layers and the MTP blocks: a ring of R rows, slot = position mod R,
  constant for any context. Reads are masked by absolute position, never by slot.
- `ModelCache`: one cache per decoder layer and MTP block, and the committed length.

Both caches share one operation, `write(position, keys, values, queries)`: rows from `position`
on are replaced, and the rows that the last `queries` of the new ones may see come back. A query
at position i sees max(0, i - W + 1)..i. A row a query should see but that is gone is an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mimo_edge.cache_rows import (
    CacheLayout,
    LayerRows,
    check_rows,
    checked,
    pack_rows,
    unpack_rows,
)
from mimo_edge.config import LayerSpec, MimoConfig
from mimo_edge.errors import CacheError, ContextLengthError, UsageError
from mimo_edge.runtimes.base import VERIFY_ROWS

F32 = NDArray[np.float32]
Positions = NDArray[np.int64]

# Position of an empty slot: so far back that no causal or window mask ever admits it.
EMPTY = -(1 << 60)
GROWTH_ROWS = 256


class Rows(NamedTuple):
    """Cached rows to attend to, in slot order: mask them by position.

    keys f32 [G, S, D], values f32 [G, S, Dv], positions i64 [S] (EMPTY where a slot holds
    nothing). Views of the cache: valid until its next write.
    """

    keys: F32
    values: F32
    positions: Positions


class LayerCache(Protocol):
    """KV rows of one layer."""

    @property
    def length(self) -> int:
        """Rows written: positions up to length - 1."""
        ...

    def write(self, position: int, keys: F32, values: F32, queries: int) -> Rows:
        """Replace rows position.. by keys [T, G, D] and values [T, G, Dv]; forget later rows.

        Returns what the last `queries` of the T rows may see. Raises CacheError, without
        changing anything, when one of those rows is no longer held.
        """
        ...

    def check_rollback(self, length: int) -> None:
        """Raise CacheError unless the token after `length` rows would see all it should."""
        ...

    def truncate(self, length: int) -> None:
        """Forget the rows from `length` on; nothing happens if there are none."""
        ...

    def rows(self) -> LayerRows:
        """All rows that are intact, as bytes."""
        ...

    def place(self, rows: LayerRows) -> None:
        """Take rows over, into a cache that is empty."""
        ...

    def nbytes(self) -> int:
        """Bytes held now."""
        ...


class FullCache:
    """Every row up to the context, in storage that grows `GROWTH_ROWS` at a time."""

    def __init__(self, kv_heads: int, head_dim: int, v_head_dim: int, context: int) -> None:
        self._context = context
        self._length = 0
        self._keys = np.zeros((kv_heads, 0, head_dim), np.float32)
        self._values = np.zeros((kv_heads, 0, v_head_dim), np.float32)
        self._positions = np.arange(0, dtype=np.int64)

    @property
    def length(self) -> int:
        return self._length

    def write(self, position: int, keys: F32, values: F32, queries: int) -> Rows:
        end = position + len(keys)
        if not 0 <= position <= self._length:
            raise CacheError(
                f"rows from position {position} would leave a hole: {self._length} are held",
                "full attention needs every row from position 0",
            )
        self._grow(end)
        self._keys[:, position:end] = keys.transpose(1, 0, 2)
        self._values[:, position:end] = values.transpose(1, 0, 2)
        self._length = end
        return Rows(self._keys[:, :end], self._values[:, :end], self._positions[:end])

    def check_rollback(self, length: int) -> None:
        if not 0 <= length <= self._length:
            raise CacheError(f"cannot go back to {length} rows: {self._length} are held")

    def truncate(self, length: int) -> None:
        self._length = min(self._length, length)

    def rows(self) -> LayerRows:
        held = np.arange(self._length)
        return LayerRows(0, pack_rows(self._keys, held), pack_rows(self._values, held))

    def place(self, rows: LayerRows) -> None:
        self._grow(rows.end)
        self._keys[:, : rows.end] = unpack_rows(rows.keys, self._keys)
        self._values[:, : rows.end] = unpack_rows(rows.values, self._values)
        self._length = rows.end

    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes + self._positions.nbytes

    def _grow(self, rows: int) -> None:
        if rows > self._context:
            raise ContextLengthError(f"{rows} rows exceed the context of {self._context}")
        if rows <= self._positions.size:
            return
        size = min(self._context, -(-rows // GROWTH_ROWS) * GROWTH_ROWS)

        def grown(old: F32) -> F32:
            new = np.zeros((old.shape[0], size, old.shape[2]), np.float32)
            new[:, : self._length] = old[:, : self._length]
            return new

        self._keys, self._values = grown(self._keys), grown(self._values)
        self._positions = np.arange(size, dtype=np.int64)


class SlidingCache:
    """A ring of `rows` rows for a window of W: row of position p lives in slot p mod rows.

    With rows = W - 1 + q, q rows can be written before it is known how many stay, and up to q
    undone: the oldest row the next token sees is still there. With rows = W only the newest
    row may query (MTP blocks). Chunks larger than that attend over a gathered copy of the last
    W - 1 rows plus the chunk, and the ring keeps the tail.
    """

    def __init__(
        self, kv_heads: int, head_dim: int, v_head_dim: int, window: int, rows: int
    ) -> None:
        self._window = window
        self._rows = rows
        self._length = 0
        self._start = 0  # lowest position written since the last hole
        self._high = 0  # one past the highest position ever written: it decides what is lost
        self._floor = 0  # nothing before it is missed
        self._keys = np.zeros((kv_heads, rows, head_dim), np.float32)
        self._values = np.zeros((kv_heads, rows, v_head_dim), np.float32)
        self._positions = np.full(rows, EMPTY, np.int64)

    @property
    def length(self) -> int:
        return self._length

    def write(self, position: int, keys: F32, values: F32, queries: int) -> Rows:
        count = len(keys)
        end = position + count
        if position < 0:
            raise CacheError(f"position {position} is negative")
        hole = position > self._length
        first = self._first_seen(end - queries)  # oldest row the first query sees
        if first < position and (hole or first < self._oldest()):
            raise CacheError(
                f"rows {first}..{position - 1} are needed by position {end - queries}, but "
                + (
                    f"only rows below {self._length} were written"
                    if hole
                    else f"rows below {self._oldest()} were overwritten"
                ),
                f"the window is {self._window} and the ring holds {self._rows} rows: "
                "write from an earlier position, or start again from position 0",
            )
        if hole or position <= self._oldest():  # nothing before `position` is left to keep
            self._empty(position)
        if first >= max(self._high, end) - self._rows:  # nothing a query sees gets overwritten
            self._store(position, keys, values)
            used = min(self._rows, self._high)
            return Rows(self._keys[:, :used], self._values[:, :used], self._positions[:used])
        old = np.arange(min(first, position), position) % self._rows
        skip = max(0, first - position)
        seen = Rows(
            np.concatenate([self._keys[:, old], keys[skip:].transpose(1, 0, 2)], axis=1),
            np.concatenate([self._values[:, old], values[skip:].transpose(1, 0, 2)], axis=1),
            np.arange(first, end, dtype=np.int64),
        )
        self._store(position, keys, values)
        return seen

    def begin(self, position: int) -> None:
        """Rows begin at `position`, the next one to be written: none before it is missed."""
        self._empty(position)
        self._length = self._floor = position

    def miss_none(self) -> None:
        """What is not here now is not missed."""
        self._floor = self._oldest()

    def _empty(self, position: int) -> None:
        self._positions[:] = EMPTY
        self._start = self._high = position
        self._floor = min(self._floor, position)

    def check_rollback(self, length: int) -> None:
        if not 0 <= length <= self._length:
            raise CacheError(f"cannot go back to {length} rows: {self._length} were written")
        first = self._first_seen(length)
        if first < length < self._length and first < self._oldest():
            raise CacheError(
                f"cannot go back from {self._length} rows to {length}: position {length} sees "
                f"rows from {first}, rows below {self._oldest()} are gone",
                f"a ring of {self._rows} rows for a window of {self._window} undoes at most "
                f"{self._rows - self._window + 1} rows",
            )

    def truncate(self, length: int) -> None:
        self._length = min(self._length, length)

    def rows(self) -> LayerRows:
        first = min(self._oldest(), self._length)
        slots = np.arange(first, self._length) % self._rows
        return LayerRows(first, pack_rows(self._keys, slots), pack_rows(self._values, slots))

    def place(self, rows: LayerRows) -> None:
        first = max(rows.first, rows.end - self._rows)
        kept = np.arange(first, rows.end, dtype=np.int64)
        slots = kept % self._rows
        self._keys[:, slots] = unpack_rows(rows.keys[first - rows.first :], self._keys)
        self._values[:, slots] = unpack_rows(rows.values[first - rows.first :], self._values)
        self._positions[slots] = kept
        self._start, self._length, self._high = first, rows.end, rows.end

    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes + self._positions.nbytes

    def _first_seen(self, position: int) -> int:
        """Oldest position a query sees: the window counts the query itself."""
        return max(self._floor, position - self._window + 1)

    def _oldest(self) -> int:
        """Lowest position still intact: writing p destroyed p - rows, rolled back or not."""
        return max(self._start, self._high - self._rows)

    def _store(self, position: int, keys: F32, values: F32) -> None:
        end = position + len(keys)
        tail = max(position, end - self._rows)
        kept = np.arange(tail, end, dtype=np.int64)
        slots = kept % self._rows
        self._keys[:, slots] = keys[tail - position :].transpose(1, 0, 2)
        self._values[:, slots] = values[tail - position :].transpose(1, 0, 2)
        self._positions[slots] = kept
        self._length = end
        self._high = max(self._high, end)


class ModelCache:
    """KV state of one sequence: `layers[i]` per decoder layer, `mtp[k]` per MTP block.

    The forward pass writes the layers and then commits the length once, so a pass that failed
    half-way leaves the length as it was; if it had already overwritten rows that are needed
    again, the next write raises CacheError. `verify_rows` = q: most rows written before it is
    known how many stay (drafts + 1); at least the last q - 1 can be undone. `scaled_values` says
    whether the backend scales values before it writes them.
    """

    def __init__(
        self,
        config: MimoConfig,
        context: int,
        verify_rows: int = VERIFY_ROWS,
        *,
        scaled_values: bool = True,
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
        self.verify_rows = verify_rows
        self.layout = CacheLayout.of(config, "f32", scaled_values)
        self._capacity = context
        self._length = 0
        specs = [config.layer(i) for i in range(config.num_hidden_layers + config.num_mtp_layers)]
        trunk = config.num_hidden_layers
        self.layers = [_layer_cache(config, s, context, verify_rows) for s in specs[:trunk]]
        # Only the newest row of an MTP block queries, so its ring needs no rows beyond W.
        self.mtp = [_layer_cache(config, s, context, 1) for s in specs[trunk:]]

    @property
    def length(self) -> int:
        return self._length

    @property
    def capacity(self) -> int:
        return self._capacity

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

    def rollback(self, n: int) -> None:
        """Undo the last n rows of every layer, exactly, or raise CacheError and change nothing.

        MTP rows of undone positions go too: the hidden states they came from are void.
        """
        if n < 0 or n > self._length:
            raise CacheError(f"cannot undo {n} of {self._length} rows")
        length = self._length - n
        for cache in self.layers:
            cache.check_rollback(length)
        for cache in (*self.layers, *self.mtp):
            cache.truncate(length)
        self._length = length

    def begin_mtp(self, depth: int, position: int) -> None:
        """See `runtimes.base.Cache`. Raises CacheError when the block has no window."""
        block = self.mtp[depth]
        if not isinstance(block, SlidingCache):
            raise CacheError(f"MTP block {depth} attends to everything: it needs every row")
        block.begin(position)

    def rows(self) -> Iterable[LayerRows]:
        """See `runtimes.base.Cache`."""
        return (cache.rows() for cache in (*self.layers, *self.mtp))

    def restore(self, length: int, rows: Iterable[LayerRows]) -> None:
        """See `runtimes.base.Cache`."""
        if self._length:
            raise CacheError(f"this cache holds {self._length} tokens", "use a new one")
        if length > self._capacity:
            raise ContextLengthError(
                f"{length} tokens exceed the context of {self._capacity}", "use a larger context"
            )
        placed = []
        for cache, one in zip((*self.layers, *self.mtp), checked(self.layout, rows), strict=True):
            cache.place(one)
            placed.append((one.first, len(one.keys)))
        check_rows(self.layout, length, placed)
        for block in self.mtp:
            if isinstance(block, SlidingCache):
                block.miss_none()
        self._length = length

    def nbytes(self) -> int:
        return sum(cache.nbytes() for cache in (*self.layers, *self.mtp))

    def held_bytes(self) -> int:
        """See `runtimes.base.Cache`."""
        return self.nbytes()

    def close(self) -> None:
        """Forget everything."""
        self.layers, self.mtp, self._length = [], [], 0


def _layer_cache(config: MimoConfig, spec: LayerSpec, context: int, verify_rows: int) -> LayerCache:
    shape = (spec.num_key_value_heads, config.head_dim, config.v_head_dim)
    if spec.window is None:
        return FullCache(*shape, context)
    # A ring as large as the context never wraps, so it needs no more than that.
    rows = min(spec.window - 1 + verify_rows, context)
    return SlidingCache(*shape, spec.window, rows)
