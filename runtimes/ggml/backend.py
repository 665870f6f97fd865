"""GgmlBackend: the forward pass on ggml.

`GgmlBackend(RawTensors)` loads the weights; `new_cache`, `forward`, `mtp_forward` follow
runtimes/base.Backend, with the rows and errors of runtimes/reference (read its top docstring on
how to call `mtp_forward`). Long inputs are processed in chunks of `chunk` tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np

from mimo_edge.cancel import Cancel
from mimo_edge.config import MimoConfig
from mimo_edge.errors import BackendError, CacheError, GenerationError, UsageError
from mimo_edge.kv_format import DEFAULT_KV_TYPE, check_kv_type
from mimo_edge.machine import usable_cores
from mimo_edge.runtimes.base import (
    F32,
    VERIFY_ROWS,
    Cache,
    ForwardResult,
    RouteSink,
    TokenIds,
)
from mimo_edge.runtimes.checks import check_finite, check_ids, check_mtp_rows, check_wanted
from mimo_edge.runtimes.ggml.cache import FullIndex, GgmlCache, RingIndex
from mimo_edge.runtimes.ggml.cache_memory import IdleMemory
from mimo_edge.runtimes.ggml.device import Device
from mimo_edge.runtimes.ggml.graph import Tensor
from mimo_edge.runtimes.ggml.mtp_passes import ChainPass, MtpPass, chain_shape, mtp_shape
from mimo_edge.runtimes.ggml.passes import TrunkPass, TrunkShape, trunk_shape
from mimo_edge.runtimes.ggml.raw import RawTensors
from mimo_edge.runtimes.ggml.resident import ResidentWeights
from mimo_edge.runtimes.ggml.resident_experts import ResidentExperts
from mimo_edge.runtimes.ggml.rows import RowCheck
from mimo_edge.runtimes.ggml.slots import ExpertSource
from mimo_edge.units import even_part

DEFAULT_CHUNK = 512


class GgmlBackend:
    """A `Backend` with every weight in RAM, or with routed experts in slots. Owns `source` and
    closes it.

    `experts` makes the source of streamed experts for the device it is given: the layers of its
    slots are streamed, all others resident. The backend owns it and closes it.

    `kv_type` is the format of global layers' rows (see `kv_format`). `repack=False` keeps weights
    in file order: slower prefill, same results within rounding. `routes` is told which experts
    every pass chose. One call at a time.
    """

    name = "ggml"

    def __init__(
        self,
        source: RawTensors,
        *,
        threads: int | None = None,
        kv_type: str = DEFAULT_KV_TYPE,
        repack: bool = True,
        chunk: int = DEFAULT_CHUNK,
        experts: Callable[[Device], ExpertSource] | None = None,
        routes: RouteSink | None = None,
    ) -> None:
        """Raises BackendError (library missing or of another version, memory), BundleError
        (weights), UsageError (options)."""
        self.config: MimoConfig = source.config
        check_kv_type(kv_type, self.config)
        if chunk < 1:
            raise UsageError(f"chunk = {chunk}", "give 1 or more")
        self._kv_type = kv_type
        self._chunk = chunk
        self._source = source
        self._routes = routes
        self.device = Device(threads if threads is not None else usable_cores())
        self._experts: ExpertSource | None = None
        try:
            if experts is not None:
                self._experts = experts(self.device)
            streamed = self._experts.slots.layouts if self._experts is not None else ()
            self._rows = RowCheck(self.device)
            self._weights = ResidentWeights(
                self.device, source, self._rows, repack=repack, streamed=streamed
            )
            self._resident = ResidentExperts.of_model(self.config, self._weights.model)
        except BaseException:
            if self._experts is not None:
                self._experts.close()
            self.device.close()
            raise
        self._idle = IdleMemory()
        self.prepared = 0  # graphs built
        self._finalizer = weakref.finalize(
            self, _release, self._idle, self._weights, self._experts, self.device, source
        )

    # --- threads ---

    @property
    def threads(self) -> int:
        """Threads that compute."""
        return self.device.threads

    def set_threads(self, count: int) -> None:
        """Compute with `count` threads from the next pass on. Raises UsageError, BackendError when
        closed."""
        self._check_open()
        self.device.set_threads(count)

    # --- memory ---

    def free_idle(self) -> int:
        """Free what ended conversations left for the next ones; its bytes. From any thread."""
        return self._idle.free()

    @property
    def weight_bytes(self) -> dict[str, int]:
        """Bytes of resident weights by kind of memory."""
        return dict(self._weights.nbytes)

    @property
    def scratch_bytes(self) -> int:
        """Bytes of intermediate results, shared by all graphs."""
        return self.device.scratch_bytes

    # --- Backend ---

    def new_cache(self, context: int, verify_rows: int = VERIFY_ROWS) -> GgmlCache:
        """An empty cache. Raises ContextLengthError past the model's positions, UsageError."""
        self._check_open()
        return GgmlCache(self.device, self.config, self._kv_type, context, verify_rows, self._idle)

    def forward(
        self,
        token_ids: TokenIds,
        cache: Cache,
        *,
        logits_rows: int = 1,
        hidden_rows: int = 0,
        cancel: Cancel | None = None,
    ) -> ForwardResult:
        """Append token_ids [T] to `cache`; logits f32 [logits_rows, V] and residual rows before
        the final norm f32 [hidden_rows, M] of the last rows come back.

        When it fails, `cache.length` says how many tokens are complete: those before the chunk
        that failed. They can be built on, unless they themselves hold NaN or Inf.
        Raises UsageError, ContextLengthError (before anything is touched), CacheError,
        GenerationError (NaN or Inf), Cancelled, BundleError (a read), BackendError.
        """
        self._check_open()
        ids = check_ids(token_ids, self.config)
        total = len(ids)
        check_wanted(total, logits_rows, hidden_rows)
        ours = self._check_cache(cache)
        ours.require(total)
        if total <= self._chunk:
            with self.device.cancelled_by(cancel):
                return ForwardResult(*self._forward_chunk(ours, ids, logits_rows, hidden_rows))
        logits = np.empty((logits_rows, self.config.vocab_size), np.float32)
        hidden = np.empty((hidden_rows, self.config.hidden_size), np.float32)
        after = total  # rows behind this chunk
        while after:
            start = total - after
            chunk = ids[start : start + even_part(after, self._chunk)]
            after -= len(chunk)
            want = [min(max(0, n - after), len(chunk)) for n in (logits_rows, hidden_rows)]
            with self.device.cancelled_by(cancel):
                found = self._forward_chunk(ours, chunk, *want)
            for out, part in zip((logits, hidden), found, strict=True):
                if len(part):
                    end = len(out) - after
                    out[end - len(part) : end] = part
        return ForwardResult(logits=logits, hidden=hidden)

    def _forward_chunk(
        self, cache: GgmlCache, ids: TokenIds, logits_rows: int, hidden_rows: int
    ) -> tuple[F32, F32]:
        position, total = cache.length, len(ids)
        if any(self.config.hybrid_layer_pattern):
            # Fails when an earlier pass was stopped while it overwrote the ring.
            cache.ring.check(position, total, total)
        shape = trunk_shape(cache, self._rows, total, logits_rows, hidden_rows)
        trunk = self._trunk(cache, shape)
        trunk.tokens.fill(ids, self._embedding)  # may read a file: before anything is touched
        before = cache.ring.positions() if shape.ring == "append" else None
        # So that a pass that fails half-way costs no more than itself.
        saved = cache.save_rings() if shape.ring == "append" else None
        try:
            cache.ring.store(position, total)
            cache.full.store(position, total)
            trunk.fill(position, before, cache.ring.slots)
            trunk.compute()
            hidden = _copy(trunk.hidden_tensor, self.config.hidden_size)
            logits = _copy(trunk.logits_tensor, self.config.vocab_size)
            check_finite(hidden, "the residual stream", position + total - len(hidden))
            check_finite(logits, "the output head", position + total - len(logits))
        except BaseException as error:
            cache.undo_write(saved)
            _clean(cache, error)
            raise
        cache.commit(total)
        return logits, hidden

    def _embedding(self, ids: TokenIds) -> F32:
        return self._source.embedding(ids, self.device.cancel)

    def _trunk(self, cache: GgmlCache, shape: TrunkShape) -> TrunkPass:
        found = cache.graphs.find(shape)
        if not isinstance(found, TrunkPass):
            if shape.large:
                cache.graphs.drop_large()
            source = self._experts
            if source is None and shape.large and self._resident.slots.layouts:
                source = self._resident
            found = TrunkPass(self.device, self._weights.model, cache, shape, source, self._routes)
            self.prepared += 1
            cache.graphs.keep(shape, found)
        return found

    def mtp_forward(
        self,
        depth: int,
        token_ids: TokenIds,
        hidden: F32,
        position: int,
        cache: Cache,
        *,
        cancel: Cancel | None = None,
    ) -> F32:
        """Run MTP block `depth` on rows position..position+n-1.

        token_ids [n] = x_{i+1+depth}, hidden f32 [n, M] = H_i -> logits f32 [V] of the last row,
        which predicts x_{i+2+depth}. Earlier rows only leave their key and value.
        Raises UsageError (depth, shapes, ids), CacheError (rows missing or not yet processed),
        GenerationError (NaN or Inf), Cancelled.
        """
        ids, hidden, ours = self._check_mtp(depth, token_ids, hidden, position, cache)
        index = ours.mtp_index[depth]
        index.check(position, len(ids), 1)
        skip = index.unseen(len(ids))  # only the newest row queries
        ids, hidden, position = ids[skip:], hidden[skip:], position + skip
        with self.device.cancelled_by(cancel):
            return self._mtp(ours, depth, ids, hidden, position, index)

    def _mtp(
        self,
        cache: GgmlCache,
        depth: int,
        ids: TokenIds,
        hidden: F32,
        position: int,
        index: RingIndex | FullIndex,
    ) -> F32:
        shape = mtp_shape(cache, depth, len(ids), position)
        found = cache.graphs.find(shape)
        if not isinstance(found, MtpPass):
            if shape.large:
                cache.graphs.drop_large()
            found = MtpPass(self.device, self._weights.model, cache, shape)
            self.prepared += 1
            cache.graphs.keep(shape, found)
        found.tokens.fill(ids, self._embedding)
        try:
            index.store(position, len(ids))
            found.rows.fill(hidden, position, index if isinstance(index, RingIndex) else None)
            found.compute()
            logits = found.logits()
            check_finite(logits[None], f"MTP block {depth}", position + len(ids) - 1)
        except BaseException as error:
            index.truncate(position)
            _clean(cache, error)
            raise
        return logits

    @property
    def chains(self) -> bool:
        """Whether `mtp_chain` works: of small models with several MTP blocks."""
        return self._weights.model.table is not None and self.config.num_mtp_layers > 1

    def mtp_chain(
        self,
        count: int,
        token_ids: TokenIds,
        hidden: F32,
        position: int,
        cache: Cache,
        *,
        cancel: Cancel | None = None,
    ) -> tuple[list[int], list[F32]]:
        """As `mtp_forward` of blocks 0..count-1 on the same rows position..position+n-1, n > 1.

        token_ids [n] = x_{i+1}: each further block gets them shifted by one, and behind them the
        token that the block before it chose. Returns those `count` tokens, and logits f32 [V] of
        each block, only lent until the next pass. Raises as `mtp_forward`.
        """
        if not self.chains or not 1 <= count <= self.config.num_mtp_layers:
            raise UsageError(f"a chain of {count} MTP blocks", "see `chains`")
        ids, hidden, ours = self._check_mtp(0, token_ids, hidden, position, cache)
        if not 1 < len(ids) <= ours.memory.mtp_rows:
            raise UsageError(f"a chain on {len(ids)} rows", f"use 2 to {ours.memory.mtp_rows}")
        rings = [index for index in ours.mtp_index[:count] if isinstance(index, RingIndex)]
        assert len(rings) == count  # models with several blocks have windows
        for ring in rings:
            ring.check(position, len(ids), 1)
        with self.device.cancelled_by(cancel):
            return self._chain(ours, ids, hidden, position, rings)

    def _chain(
        self,
        cache: GgmlCache,
        ids: TokenIds,
        hidden: F32,
        position: int,
        rings: list[RingIndex],
    ) -> tuple[list[int], list[F32]]:
        shape = chain_shape(cache, len(rings), len(ids))
        found = cache.graphs.find(shape)
        if not isinstance(found, ChainPass):
            if shape.large:
                cache.graphs.drop_large()
            found = ChainPass(self.device, self._weights.model, cache, shape)
            self.prepared += 1
            cache.graphs.keep(shape, found)
        try:
            for ring in rings:
                ring.store(position, len(ids))
            found.tokens.fill(ids, self._embedding)
            # One mask for all: of the rows the newest one may see, those that every ring has.
            found.rows.fill(hidden, position, max(rings, key=RingIndex.oldest))
            found.compute()
            logits = found.logits()
            for depth, row in enumerate(logits):
                check_finite(row[None], f"MTP block {depth}", position + len(ids) - 1)
        except BaseException as error:
            for ring in rings:
                ring.truncate(position)
            _clean(cache, error)
            raise
        return found.chosen(), logits

    def _check_mtp(
        self, depth: int, token_ids: TokenIds, hidden: F32, position: int, cache: Cache
    ) -> tuple[TokenIds, F32, GgmlCache]:
        self._check_open()
        ids = check_ids(token_ids, self.config)
        ours = self._check_cache(cache)
        rows = check_mtp_rows(self.config, depth, len(ids), hidden, position, ours.length)
        return ids, rows, ours

    def close(self) -> None:
        """Free weights and scratch, close the source. Twice is harmless. Caches keep their own
        memory until they are closed or collected, but no longer compute."""
        self._finalizer()

    # --- checks ---

    def _check_open(self) -> None:
        if self.device.closed:
            raise BackendError("the backend is closed")

    def _check_cache(self, cache: Cache) -> GgmlCache:
        if not isinstance(cache, GgmlCache) or (
            cache.config is not self.config and cache.config != self.config
        ):
            raise CacheError("this cache belongs to another backend or model")
        if cache.device is not self.device:
            raise CacheError("this cache belongs to another backend")
        if cache.closed:
            raise CacheError("this cache is closed")
        return cache


def _clean(cache: GgmlCache, error: BaseException) -> None:
    """After a pass that failed and was undone."""
    if isinstance(error, GenerationError):
        cache.clear_nonfinite()


def _copy(tensor: Tensor | None, width: int) -> F32:
    """Rows [n, width] of a result, none where there is none."""
    if tensor is None:
        return np.empty((0, width), np.float32)
    found: F32 = tensor.array().reshape(-1, width).copy()
    return found


def _release(
    idle: IdleMemory,
    weights: ResidentWeights,
    experts: ExpertSource | None,
    device: Device,
    source: RawTensors,
) -> None:
    if device.forked:
        return  # locks of threads that do not exist here may be held; the memory ends with us
    idle.close()
    weights.close()
    if experts is not None:
        experts.close()
    device.close()
    source.close()
