"""Passes over a cache: arrays bound to every graph once, and run for every step of that shape.

A pass is made for one cache and one shape (`TrunkShape`, MTP depth and rows) and reused; only its
inputs are filled anew. The host owns positions, masks and rings: graphs write new rows where they
are told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mimo_edge.cancel import Cancel, check_cancel
from mimo_edge.config import MimoConfig
from mimo_edge.onnx_io import MASKED, RUN_ROWS, Kind, Shard, kind_of
from mimo_edge.runtimes.base import F32
from mimo_edge.runtimes.onnx.cache import FEW_TOKENS, Kv, OnnxCache
from mimo_edge.runtimes.onnx.experts import HostExperts
from mimo_edge.runtimes.onnx.library import Array, Bound, Session
from mimo_edge.runtimes.reference import rotary_angles

Positions = NDArray[np.int64]
UNLIMITED = 1 << 40  # a window longer than any context, shorter than the way to EMPTY


@dataclass(frozen=True)
class TrunkShape:
    """What a trunk pass depends on. `full_rows`: rows of global layers (0: no such layer).
    `gathered`: 0 when sliding layers write their ring in place, else the columns of a pass longer
    than that: the rows still seen of the ring, then the new ones."""

    tokens: int
    full_rows: int
    gathered: int

    @property
    def large(self) -> bool:
        return self.tokens > FEW_TOKENS


class Angles:
    """Inputs of attention for T tokens, by kind: rotary angles, mask [T, C] and first slot."""

    def __init__(self, config: MimoConfig, total: int, columns: dict[Kind, int]) -> None:
        half = config.rotary_dim // 2
        self._config = config
        self._theta = {"full": config.rope_theta, "sliding": config.swa_rope_theta}
        self._windows: dict[Kind, int] = {"full": UNLIMITED, "sliding": config.sliding_window}
        self.arrays: dict[str, Array] = {}
        for kind, count in columns.items():
            self.arrays[f"cos_{kind}"] = np.empty((1, total, half), np.float32)
            self.arrays[f"sin_{kind}"] = np.empty((1, total, half), np.float32)
            self.arrays[f"mask_{kind}"] = np.empty((total, count), np.float32)
            # Of every row its own slot, for rows that run alone.
            self.arrays[f"at_{kind}"] = np.empty(total, np.int64)

    def fill(self, kind: Kind, queries: Positions, held: Positions, first_slot: int) -> None:
        """`held` is the position in every column once the new rows are written, the first of them
        in `first_slot`."""
        cos, sin = rotary_angles(queries, self._config.rotary_dim, self._theta[kind])
        self.arrays[f"cos_{kind}"][0], self.arrays[f"sin_{kind}"][0] = cos, sin
        behind = queries[:, None] - held
        visible = (behind >= 0) & (behind < self._windows[kind])
        mask = self.arrays[f"mask_{kind}"]
        mask[...] = MASKED
        np.copyto(mask, 0, where=visible)
        slots = (first_slot + np.arange(len(queries))) % max(1, len(held))
        self.arrays[f"at_{kind}"][...] = slots

    def rows(self, start: int, stop: int) -> dict[str, Array]:
        """What a graph takes for rows start..stop."""
        return {
            name: (
                array[:, start:stop]
                if name.startswith(("cos_", "sin_"))
                else array[start : start + 1]
                if name.startswith("at_")
                else array[start:stop]
            )
            for name, array in self.arrays.items()
        }


def kv_arrays(index: int, kv: Kv) -> dict[str, Array]:
    """A layer's cache as inputs, and as outputs in the same memory."""
    return {
        f"pk_{index}": kv.keys,
        f"pv_{index}": kv.values,
        f"ck_{index}": kv.keys,
        f"cv_{index}": kv.values,
    }


def bind_rows(
    session: Session, given: Callable[[int, int], dict[str, Array]], total: int, together: int
) -> list[Bound]:
    """A session bound for `total` rows, `together` of them in one run."""
    names = {io.name for io in (*session.inputs, *session.outputs)}
    made = []
    for start in range(0, total, together):
        arrays = given(start, min(start + together, total))
        made.append(session.bind({name: arrays[name] for name in names}))
    return made


@dataclass
class _Step:
    """One shard: its runs, the residual stream behind it, and the layer whose experts follow."""

    runs: list[Bound]
    layer: int | None
    h: F32
    ids: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 0), np.int64))
    following: int | None = None
    sliding: tuple[int, ...] = ()


class TrunkPass:
    """The decoder layers over T tokens. `h_in` takes embeddings, `h` has the residual stream after
    the last layer."""

    def __init__(
        self,
        cache: OnnxCache,
        shards: Sequence[Shard],
        sessions: Sequence[Session],
        together: Sequence[int],
        shape: TrunkShape,
        experts: HostExperts | None,
    ) -> None:
        """`together`: rows of each session that one run may compute: few where every row must have
        the bits it has alone, RUN_ROWS where memory is the bound."""
        self.shape = shape
        self._config = c = cache.config
        self._cache = cache
        self._generation = cache.generation
        self._experts = experts
        total = shape.tokens
        columns: dict[Kind, int] = {}
        if shape.full_rows:
            columns["full"] = shape.full_rows
        if any(c.hybrid_layer_pattern):
            columns["sliding"] = shape.gathered or cache.ring.rows
        self.angles = Angles(c, total, columns)
        # Two, by turns: a graph may write its output while it still needs its input.
        streams = [np.empty((total, c.hidden_size), np.float32) for _ in range(2)]
        self.h_in = streams[0]
        # by number of KV heads, and which of the sliding layers of its graph it is
        self._gathered: dict[tuple[int, int], Kv] = {}
        self._rank = {
            layer: rank
            for shard in shards
            for rank, layer in enumerate(n for n in shard.layers if c.layer(n).sliding)
        }
        self._tails: dict[int, Kv] = {}  # by layer: rows the ring gets when the pass is whole
        self._steps: list[_Step] = []
        for number, (shard, session, rows) in enumerate(
            zip(shards, sessions, together, strict=True)
        ):
            h, h_out = streams[number % 2], streams[(number + 1) % 2]
            step = _Step([], shard.layers[-1] if shard.cut else None, h_out)
            shared: dict[str, Array] = {}
            for layer in shard.layers:
                shared |= kv_arrays(layer, self._kv(layer))
            if shard.cut:
                step.ids = np.zeros((total, c.num_experts_per_tok), np.int64)
            step.sliding = tuple(n for n in shard.layers if c.layer(n).sliding)

            def given(
                start: int,
                stop: int,
                h: F32 = h,
                h_out: F32 = h_out,
                step: _Step = step,
                shared: dict[str, Array] = shared,
            ) -> dict[str, Array]:
                arrays = shared | self.angles.rows(start, stop)
                arrays |= {"h": h[start:stop], "h_out": h_out[start:stop]}
                if step.layer is not None and experts is not None:
                    arrays["x"] = experts.x[start:stop]
                    arrays["weights"] = experts.weights[start:stop]
                    arrays["ids"] = step.ids[start:stop]
                return arrays

            step.runs = bind_rows(session, given, total, min(total, rows))
            self._steps.append(step)
        cut = [step for step in self._steps if step.layer is not None]
        for step, after in pairwise(cut):
            step.following = after.layer
        self.h = self._steps[-1].h

    def _kv(self, layer: int) -> Kv:
        """Where a layer's rows go: its cache, or for long passes of sliding layers memory that
        those of different graphs share, one after the other."""
        spec, shape = self._config.layer(layer), self.shape
        if not spec.sliding or not shape.gathered:
            return self._cache.kv[layer]
        key = spec.num_key_value_heads, self._rank[layer]
        if key not in self._gathered:
            self._gathered[key] = Kv.empty(self._config, spec, shape.gathered)
        return self._gathered[key]

    @property
    def current(self) -> bool:
        """Whether what it is bound to is still the cache's."""
        fresh = self._experts is None or self._experts.current
        return fresh and self._generation == self._cache.generation

    @property
    def large(self) -> bool:
        return self.shape.large

    def fill(self, embedding: F32, position: int) -> None:
        """Set the inputs for tokens at `position`...; the cache's indices already have them."""
        cache, total = self._cache, self.shape.tokens
        queries = np.arange(position, position + total, dtype=np.int64)
        self.h_in[...] = embedding
        if self.shape.full_rows:
            held = np.arange(self.shape.full_rows, dtype=np.int64)
            self.angles.fill("full", queries, held, position)
        if not any(self._config.hybrid_layer_pattern):
            return
        if self.shape.gathered:
            first = position + total - self.shape.gathered
            held = np.arange(first, position + total, dtype=np.int64)
            self._old = np.arange(first, position) % cache.ring.rows
            self._kept = queries[max(0, total - cache.ring.rows) :] % cache.ring.rows
            self.angles.fill("sliding", queries, held, position - first)
        else:
            self.angles.fill("sliding", queries, cache.ring.positions(), position % cache.ring.rows)

    def compute(self, cancel: Cancel | None) -> None:
        """Run with the inputs filled before. Rings of a long pass are written by `finish`."""
        for step in self._steps:
            check_cancel(cancel)
            if self.shape.gathered:
                for layer in step.sliding:
                    self._gather(layer)
            for run in step.runs:
                run.run()
            if self.shape.gathered:
                for layer in step.sliding:
                    self._keep_tail(layer)
            if step.layer is not None and self._experts is not None:
                self._experts.add(step.layer, step.ids, step.h, step.following)

    def _gather(self, layer: int) -> None:
        ring, columns = self._cache.kv[layer], self._kv(layer)
        count = len(self._old)
        columns.keys[:, :, :count] = ring.keys[:, :, self._old]
        columns.values[:, :, :count] = ring.values[:, :, self._old]

    def _keep_tail(self, layer: int) -> None:
        columns, count = self._kv(layer), len(self._kept)
        self._tails[layer] = Kv(
            columns.keys[:, :, -count:].copy(), columns.values[:, :, -count:].copy()
        )

    def finish(self) -> None:
        """The pass is whole: its last rows replace what the rings held."""
        for layer, tail in self._tails.items():
            ring = self._cache.kv[layer]
            ring.keys[:, :, self._kept] = tail.keys
            ring.values[:, :, self._kept] = tail.values
        self._tails.clear()

    def close(self) -> None:
        """Free what is bound."""
        self._steps.clear()
        if self._experts is not None:
            self._experts.close()


class MtpPass:
    """One MTP block on n rows: every row leaves its key and value, `h` has the residual stream."""

    def __init__(self, cache: OnnxCache, depth: int, session: Session, total: int) -> None:
        c = cache.config
        self._cache = cache
        self._generation = cache.generation
        self._total = total
        spec = c.layer(c.num_hidden_layers + depth)
        self._kind = kind_of(spec)
        kv = cache.kv[spec.index]
        self.angles = Angles(c, total, {self._kind: kv.rows})
        shape = (total, c.hidden_size)
        self.embedding, self.hidden, self.h = (np.empty(shape, np.float32) for _ in range(3))
        shared = kv_arrays(spec.index, kv)

        def given(start: int, stop: int) -> dict[str, Array]:
            return (
                shared
                | self.angles.rows(start, stop)
                | {
                    "e": self.embedding[start:stop],
                    "hidden": self.hidden[start:stop],
                    "h_out": self.h[start:stop],
                }
            )

        # Only the last row's output counts: that those before see less of a ring than one run of
        # all would show them (rows they overwrite are masked) changes nothing.
        self._runs = bind_rows(session, given, total, min(total, RUN_ROWS))

    @property
    def current(self) -> bool:
        """Whether what it is bound to is still the cache's."""
        return self._generation == self._cache.generation

    @property
    def large(self) -> bool:
        return self._total > FEW_TOKENS

    def fill(self, embedding: F32, hidden: F32, position: int, held: Positions) -> None:
        """Set the inputs; `held` is what the block's rows hold once these are written."""
        self.embedding[...], self.hidden[...] = embedding, hidden
        queries = np.arange(position, position + self._total, dtype=np.int64)
        self.angles.fill(self._kind, queries, held, position % len(held))

    def compute(self) -> None:
        """Run with the inputs filled before."""
        for run in self._runs:
            run.run()

    def close(self) -> None:
        """Nothing is held that is not memory."""
