"""OnnxBackend: the forward pass on ONNX Runtime, routed experts on the ggml slots.

`new_cache`, `forward`, `mtp_forward` follow runtimes/base.Backend, with the rows and errors of
runtimes/reference (read its top docstring on how to call `mtp_forward`). Long inputs are processed
in chunks of `chunk` tokens.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable

import numpy as np

from mimo_edge.bundle import Bundle
from mimo_edge.cancel import Cancel, check_cancel
from mimo_edge.config import MimoConfig
from mimo_edge.errors import BackendError, CacheError, UsageError
from mimo_edge.machine import usable_cores
from mimo_edge.onnx_io import CPU_VARIANT, RUN_ROWS
from mimo_edge.runtimes.base import (
    F32,
    VERIFY_ROWS,
    Cache,
    ForwardResult,
    RouteSink,
    TokenIds,
)
from mimo_edge.runtimes.checks import check_finite, check_ids, check_mtp_rows, check_wanted
from mimo_edge.runtimes.ggml.cache import FullIndex, RingIndex
from mimo_edge.runtimes.ggml.cache_memory import kv_rows
from mimo_edge.runtimes.ggml.device import Device
from mimo_edge.runtimes.ggml.slots import ExpertSource
from mimo_edge.runtimes.onnx.cache import FEW_TOKENS, OnnxCache
from mimo_edge.runtimes.onnx.experts import HostExperts
from mimo_edge.runtimes.onnx.library import Array
from mimo_edge.runtimes.onnx.package import Package
from mimo_edge.runtimes.onnx.passes import MtpPass, TrunkPass, TrunkShape
from mimo_edge.runtimes.onnx.plugin import Plugin
from mimo_edge.runtimes.onnx.rows import rows_together
from mimo_edge.units import even_part

DEFAULT_CHUNK = 512


class OnnxBackend:
    """A `Backend` over the ONNX form in a bundle, which it owns and closes.

    `experts` makes the source of routed experts for the device it is given; a model without them
    needs none. `routes` is told which experts every pass chose. One call at a time.
    """

    name = "onnx"

    def __init__(
        self,
        bundle: Bundle,
        *,
        config: MimoConfig | None = None,
        threads: int | None = None,
        chunk: int = DEFAULT_CHUNK,
        experts: Callable[[Device], ExpertSource] | None = None,
        routes: RouteSink | None = None,
        plugin: Plugin | None = None,
        reason: str = "",
    ) -> None:
        """`config`: the bundle's, or that without MTP blocks. `plugin`: the provider of all graphs
        but the embedding's, None: the CPU, and then `reason` why not another. Raises BackendError
        (onnxruntime, no such form), ProviderError (the plug-in, nodes it does not run), BundleError
        (graphs), UsageError (options)."""
        self.config: MimoConfig = bundle.config if config is None else config
        if chunk < 1:
            raise UsageError(f"chunk = {chunk}", "give 1 or more")
        moe = any(self.config.moe_layer_freq)
        if moe and experts is None:
            raise UsageError("this model has routed experts", "give a source of them")
        self._chunk = chunk
        self._routes = routes
        self._plugin = plugin
        self._reason = reason
        self.prepared = 0
        """Passes made so far: see `PreparingBackend`."""
        self._pid = os.getpid()
        self._caches: weakref.WeakSet[OnnxCache] = weakref.WeakSet()
        count = threads if threads is not None else usable_cores()
        self.device = Device(count)
        self._source: ExpertSource | None = None
        try:
            self._load(bundle, count)
            if moe and experts is not None:
                self._source = experts(self.device)
            self._together = self._try_rows()
        except BaseException:
            if self._source is not None:
                self._source.close()
            self.device.close()
            raise
        self._closed = False
        self._finalizer = weakref.finalize(
            self, _release, self._pid, self._source, self.device, bundle
        )

    def _load(self, bundle: Bundle, threads: int) -> None:
        """Open the graphs."""
        self.package = Package(bundle, self.config, CPU_VARIANT, threads, self._plugin)

    def provider_stats(self) -> dict[str, object]:
        """JSON-ready: which provider runs the graphs, and why no other."""
        name = "CPUExecutionProvider" if self._plugin is None else self._plugin.name
        return {"provider": name, "reason": self._reason}

    def _try_rows(self) -> list[int]:
        """For each shard, then the head, how many rows of a verify one run may compute."""
        found: dict[object, int] = {}
        counts = []
        config = self.config
        for shard, session in zip(self.package.shards, self.package.layers, strict=True):
            kinds = tuple(
                (spec.sliding, spec.sinks, spec.moe, spec.num_key_value_heads)
                for spec in (config.layer(layer) for layer in shard.layers)
            )
            key = (kinds, session.path.stat().st_size // 64)
            if key not in found:
                found[key] = rows_together(session)
            counts.append(found[key])
        return [*counts, rows_together(self.package.head)]

    @property
    def rows_together(self) -> tuple[int, ...]:
        """For each shard of layers, then the head: rows of a verify that one run computes."""
        return tuple(self._together)

    # --- Backend ---

    def new_cache(self, context: int, verify_rows: int = VERIFY_ROWS) -> OnnxCache:
        """An empty cache. Raises ContextLengthError past the model's positions, UsageError."""
        self._check_open()
        made = OnnxCache(self, self.config, context, verify_rows)
        self._caches.add(made)
        return made

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
        that failed. Raises UsageError, ContextLengthError (before anything is touched), CacheError,
        GenerationError (NaN or Inf), Cancelled, BundleError (a read), BackendError.
        """
        self._check_open()
        ids = check_ids(token_ids, self.config)
        total = len(ids)
        check_wanted(total, logits_rows, hidden_rows)
        ours = self._check_cache(cache)
        ours.require(total)
        exact = total <= ours.verify_rows
        logits = np.empty((logits_rows, self.config.vocab_size), np.float32)
        hidden = np.empty((hidden_rows, self.config.hidden_size), np.float32)
        start = 0
        while start < total:
            count = self._part(ours.length, total - start, exact)
            after = total - start - count
            stream = self._forward_chunk(ours, ids[start : start + count], exact, cancel)
            first = ours.length - count
            for out, rows in ((hidden, hidden_rows), (logits, logits_rows)):
                want = min(max(0, rows - after), count)
                if want:
                    end = rows - after
                    wanted = stream[count - want :]
                    out[end - want : end] = wanted if out is hidden else self._head(wanted, 0)
                    where = "the residual stream" if out is hidden else "the output head"
                    check_finite(out[end - want : end], where, first + count - want)
            start += count
        return ForwardResult(logits=logits, hidden=hidden)

    def _part(self, position: int, left: int, exact: bool) -> int:
        """Tokens of the next pass. Rows of a verify attend to as many columns as each would alone,
        so a pass ends where a growing cache does."""
        if not exact:
            return even_part(left, self._chunk)
        rows = kv_rows(position + 1)
        return min(left, rows - position)

    def _forward_chunk(
        self, cache: OnnxCache, ids: TokenIds, exact: bool, cancel: Cancel | None
    ) -> F32:
        c, position, total = self.config, cache.length, len(ids)
        sliding = any(c.hybrid_layer_pattern)
        gathered = 0
        if sliding:
            # Fails when an earlier pass was stopped while it overwrote the ring.
            cache.ring.check(position, total, total)
            if not cache.ring.in_place(position, total):
                gathered = total + position - cache.ring.first_seen(position)
        full_rows = 0
        if not all(c.hybrid_layer_pattern):
            full_rows = kv_rows(position + total)
            cache.resize(0, c.num_hidden_layers, full_rows, position)
        shape = TrunkShape(total, full_rows, gathered)
        trunk = self._trunk(cache, shape, exact)
        embedding = self._embedding(ids)
        try:
            if sliding and not gathered:
                cache.ring.store(position, total)
            cache.full.store(position, total)
            trunk.fill(embedding, position)
            with self.device.cancelled_by(cancel):
                trunk.compute(cancel)
            check_finite(trunk.h, "the residual stream", position)
            trunk.finish()
            if sliding and gathered:
                cache.ring.store(position, total)
        except BaseException:
            cache.undo_write()
            raise
        cache.commit(total)
        return trunk.h

    def _trunk(self, cache: OnnxCache, shape: TrunkShape, exact: bool) -> TrunkPass:
        key = (shape, exact)
        found = cache.found(key)
        if not isinstance(found, TrunkPass):
            if shape.large:
                self._drop_large()
            experts = None
            if self._source is not None:
                experts = HostExperts(
                    self.device, self.config, self._source, shape.tokens, self._routes
                )
            together = self._together[:-1] if exact else [RUN_ROWS] * len(self.package.layers)
            found = TrunkPass(
                cache, self.package.shards, self.package.layers, together, shape, experts
            )
            self.prepared += 1
            cache.keep(key, found)
        return found

    def _drop_large(self) -> None:
        """Free the passes of many tokens, of every cache: the plan has room for one."""
        for cache in list(self._caches):
            cache.drop_large()

    def _embedding(self, ids: TokenIds) -> F32:
        out = np.empty((len(ids), self.config.hidden_size), np.float32)
        tokens: Array = ids.astype(np.int64)
        self.package.embed.bind({"tokens": tokens, "h": out}).run()
        return out

    def _head(self, rows: F32, norm: int) -> F32:
        """Logits f32 [n, V] of h [n, M]. A verify's rows have the bits they have alone."""
        out = np.empty((len(rows), self.config.vocab_size), np.float32)
        together = self._together[-1] if len(rows) <= VERIFY_ROWS else len(rows)
        which = np.array([norm], np.int64)
        for start in range(0, len(rows), together):
            part = slice(start, start + together)
            given: dict[str, Array] = {
                "h": np.ascontiguousarray(rows[part]),
                "norm": which,
                "logits": out[part],
            }
            self.package.head.bind(given).run()
        return out

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
        self._check_open()
        check_cancel(cancel)
        ids = check_ids(token_ids, self.config)
        ours = self._check_cache(cache)
        rows = check_mtp_rows(self.config, depth, len(ids), hidden, position, ours.length)
        index = ours.mtp_index[depth]
        index.check(position, len(ids), 1)
        skip = index.unseen(len(ids))  # only the newest row queries
        ids, rows, position = ids[skip:], rows[skip:], position + skip
        return self._mtp(ours, depth, ids, rows, position, index)

    def _mtp(
        self,
        cache: OnnxCache,
        depth: int,
        ids: TokenIds,
        hidden: F32,
        position: int,
        index: RingIndex | FullIndex,
    ) -> F32:
        block, total = self.config.num_hidden_layers + depth, len(ids)
        if isinstance(index, FullIndex):
            cache.resize(block, block + 1, kv_rows(position + total), position)
        key = (depth, total)
        found = cache.found(key)
        if not isinstance(found, MtpPass):
            if total > FEW_TOKENS:
                self._drop_large()
            found = MtpPass(cache, depth, self.package.mtp[depth], total)
            self.prepared += 1
            cache.keep(key, found)
        try:
            index.store(position, total)
            if isinstance(index, RingIndex):
                held = index.positions()
            else:
                held = index.positions(cache.kv[block].rows)
            found.fill(self._embedding(ids), hidden, position, held)
            found.compute()
            logits: F32 = self._head(found.h[-1:], 1 + depth)[0]
            check_finite(logits[None], f"MTP block {depth}", position + total - 1)
        except BaseException:
            index.truncate(position)
            raise
        return logits

    def close(self) -> None:
        """Free slots and scratch, close the bundle. Twice is harmless. Sessions go with the last
        reference to this object or a cache of it."""
        self._closed = True
        self._finalizer()

    # --- checks ---

    def _check_open(self) -> None:
        if self._closed:
            raise BackendError("the backend is closed")
        if os.getpid() != self._pid:
            raise BackendError(
                "this process was forked from the one that opened the model",
                "threads do not survive fork: open the model after forking",
            )

    def _check_cache(self, cache: Cache) -> OnnxCache:
        if not isinstance(cache, OnnxCache) or cache.owner is not self:
            raise CacheError("this cache belongs to another backend or model")
        return cache


def _release(pid: int, experts: ExpertSource | None, device: Device, bundle: Bundle) -> None:
    if os.getpid() != pid:
        return  # locks of threads that do not exist here may be held; the memory ends with us
    if experts is not None:
        experts.close()
    device.close()
    bundle.close()
