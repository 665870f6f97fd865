"""KV cache of the ONNX backend: NumPy arrays that graphs read and write in place.

Sliding layers and V2's MTP blocks: rings of R rows, the row of position p in slot p mod R. Global
layers: rows in order, in arrays as long as what is attended to, replaced by longer ones as the
sequence grows. Which position a slot holds is kept on the host; masks are made from it, so rows
that were undone are never seen. Keys and values are f32 [1, G, R, D].
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

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
from mimo_edge.runtimes.base import F32
from mimo_edge.runtimes.ggml.cache import FullIndex, RingIndex, begin_rows

# Passes of few tokens kept for reuse; of the long ones only the last.
_SMALL_PASSES = 12
FEW_TOKENS = 16


@dataclass
class Kv:
    """Keys [1, G, R, D] and values [1, G, R, Dv] of one layer or MTP block."""

    keys: F32
    values: F32

    @classmethod
    def empty(cls, config: MimoConfig, spec: LayerSpec, rows: int) -> Kv:
        """Zeroed: a slot that holds nothing is masked, but 0 times NaN would be NaN."""
        shape = (1, spec.num_key_value_heads, rows)
        return cls(
            np.zeros((*shape, config.head_dim), np.float32),
            np.zeros((*shape, config.v_head_dim), np.float32),
        )

    @property
    def rows(self) -> int:
        return int(self.keys.shape[2])

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def resized(self, rows: int, used: int) -> Kv:
        """One of `rows` rows with the first `used` of this."""

        def copied(old: F32) -> F32:
            new = np.zeros((*old.shape[:2], rows, old.shape[3]), np.float32)
            new[:, :, :used] = old[:, :, :used]
            return new

        return Kv(copied(self.keys), copied(self.values))


class Reusable(Protocol):
    """A pass kept for reuse."""

    @property
    def current(self) -> bool: ...

    @property
    def large(self) -> bool: ...

    def close(self) -> None: ...


class OnnxCache:
    """KV state of one sequence; made by `OnnxBackend.new_cache`."""

    def __init__(self, owner: object, config: MimoConfig, context: int, verify_rows: int) -> None:
        if context < 1 or verify_rows < 1:
            raise UsageError(
                f"a cache of {context} tokens and {verify_rows} verify rows", "both start at 1"
            )
        if context > config.max_position_embeddings:
            raise ContextLengthError(
                f"a context of {context} exceeds the model's {config.max_position_embeddings} "
                "positions"
            )
        self.owner = owner
        # Values are scaled in the output projection.
        self.layout = CacheLayout.of(config, "f32", scaled_values=False)
        self.config = config
        self.verify_rows = verify_rows
        self.generation = 0
        """Counts replaced arrays: a pass bound to older ones is void."""
        self._capacity = context
        self._length = 0
        self._passes: OrderedDict[object, Reusable] = OrderedDict()
        window = config.sliding_window
        # A ring as large as the context never wraps, so it needs no more than that.
        ring_rows = min(window - 1 + verify_rows, context)
        # Only the newest row of an MTP block queries, so its ring needs no rows beyond W.
        mtp_rows = min(window, context)
        specs = [config.layer(i) for i in range(config.num_hidden_layers + config.num_mtp_layers)]
        trunk = config.num_hidden_layers
        self.ring = RingIndex(window, ring_rows)
        self.full = FullIndex(context)
        self.mtp_index: list[RingIndex | FullIndex] = [
            RingIndex(window, mtp_rows) if spec.sliding else FullIndex(context)
            for spec in specs[trunk:]
        ]
        self.kv = [
            Kv.empty(
                config,
                spec,
                (ring_rows if spec.index < trunk else mtp_rows) if spec.sliding else 0,
            )
            for spec in specs
        ]

    @property
    def length(self) -> int:
        """Committed tokens."""
        return self._length

    @property
    def capacity(self) -> int:
        """Most tokens."""
        return self._capacity

    def require(self, tokens: int) -> None:
        """Raise ContextLengthError unless `tokens` more fit."""
        if self._length + tokens > self._capacity:
            raise ContextLengthError(
                f"{self._length} + {tokens} tokens exceed the context of {self._capacity}",
                "use a larger context or a shorter prompt",
            )

    def resize(self, first: int, last: int, rows: int, used: int) -> None:
        """Let global layers among blocks first..last - 1 have `rows` rows, `used` of them kept.
        Also fewer, after a rollback: a row attends to as many columns as it would have before."""
        for index in range(first, last):
            if not self.config.layer(index).sliding and self.kv[index].rows != rows:
                self.kv[index] = self.kv[index].resized(rows, used)
                self.generation += 1

    def commit(self, tokens: int) -> None:
        """Count `tokens` rows, written to every layer, as part of the sequence."""
        self._length += tokens

    def undo_write(self) -> None:
        """A pass failed half-way: rows past the committed length hold anything."""
        self.ring.truncate(self._length)
        self.full.truncate(self._length)

    def rollback(self, n: int) -> None:
        """Undo the last n rows of every layer, exactly, or raise CacheError and change nothing.

        MTP rows of undone positions go too: the hidden states they came from are void.
        """
        if n < 0 or n > self._length:
            raise CacheError(f"cannot undo {n} of {self._length} rows")
        length = self._length - n
        pattern = self.config.hybrid_layer_pattern
        self.full.check_rollback(length)
        if any(pattern):
            self.ring.check_rollback(length)
        for index in (self.ring, self.full, *self.mtp_index):
            index.truncate(length)
        self._length = length

    def begin_mtp(self, depth: int, position: int) -> None:
        """See `runtimes.base.Cache`. Raises CacheError when the block has no window."""
        begin_rows(self.mtp_index, depth, position)

    def rows(self) -> Iterable[LayerRows]:
        """See `runtimes.base.Cache`."""
        for index, kv in zip(self._indices(), self.kv, strict=True):
            first = 0
            if isinstance(index, RingIndex):
                first = min(index.oldest(), index.length)
            slots = np.arange(first, index.length)
            if isinstance(index, RingIndex):
                slots %= index.rows
            yield LayerRows(first, pack_rows(kv.keys[0], slots), pack_rows(kv.values[0], slots))

    def restore(self, length: int, rows: Iterable[LayerRows]) -> None:
        """See `runtimes.base.Cache`."""
        if self._length:
            raise CacheError(f"this cache holds {self._length} tokens")
        if length > self._capacity:
            raise ContextLengthError(
                f"{length} tokens exceed the context of {self._capacity}", "use a larger context"
            )
        placed: list[tuple[int, int]] = []
        starts: dict[int, int] = {}  # by index, of which layers share theirs
        indices = self._indices()
        for block, (index, one) in enumerate(zip(indices, checked(self.layout, rows), strict=True)):
            if one.end > length:
                raise CacheError(f"rows up to {one.end} of {length} tokens")
            first = one.first
            if isinstance(index, RingIndex):
                first = max(first, one.end - index.rows)
            else:
                self.kv[block] = self.kv[block].resized(one.end, 0)
            slots = np.arange(first, one.end)
            if isinstance(index, RingIndex):
                slots %= index.rows
            kv = self.kv[block]
            for target, source in ((kv.keys[0], one.keys), (kv.values[0], one.values)):
                target[:, slots] = unpack_rows(source[first - one.first :], target)
            placed.append((one.first, len(one.keys)))
            starts[id(index)] = max(first, starts.get(id(index), 0))
        check_rows(self.layout, length, placed)
        for index, (begin, count) in zip(indices, placed, strict=True):
            start = starts[id(index)]
            index.store(start, begin + count - start)
        for index in self.mtp_index:
            index.miss_none()
        self.generation += 1
        self._length = length

    def _indices(self) -> list[RingIndex | FullIndex]:
        """Which rows every layer holds, then every MTP block."""
        trunk: list[RingIndex | FullIndex] = [
            self.ring if self.config.layer(i).sliding else self.full
            for i in range(self.config.num_hidden_layers)
        ]
        return [*trunk, *self.mtp_index]

    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(kv.nbytes for kv in self.kv)

    def held_bytes(self) -> int:
        """See `runtimes.base.Cache`; what passes take is in the plan, and not known here."""
        return self.nbytes()

    # --- passes made for this cache ---

    def found(self, key: object) -> Reusable | None:
        """A pass kept under `key` that is still valid."""
        found = self._passes.get(key)
        if found is not None and not found.current:
            self._passes.pop(key).close()
            return None
        if found is not None:
            self._passes.move_to_end(key)
        return found

    def drop_large(self) -> None:
        """Free the pass of many tokens: before another one is made."""
        for key in [key for key, kept in self._passes.items() if kept.large]:
            self._passes.pop(key).close()

    def keep(self, key: object, made: Reusable) -> None:
        """Keep a pass; void ones go, and the least recently used when there are too many."""
        for old in [k for k, kept in self._passes.items() if not kept.current]:
            self._passes.pop(old).close()
        self._passes[key] = made
        small = [k for k, kept in self._passes.items() if not kept.large]
        while len(small) > _SMALL_PASSES:
            self._passes.pop(small.pop(0)).close()

    def close(self) -> None:
        """Free passes and rows. Twice is harmless; using it afterwards is an error."""
        while self._passes:
            self._passes.popitem()[1].close()
        self.kv, self._length = [], 0
