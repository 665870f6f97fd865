"""NpuBackend: the dense part of a model on an NPU, routed experts on the ggml slots.

Graphs have static shapes: a pass takes the smallest that holds it and pads behind. Caches are NumPy
arrays of those shapes; a graph reads them whole and gives the new rows, which are written when the
pass is whole. So a pass that fails, or drafts that are refused, cost nothing but themselves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimo_edge.bundle import Bundle
from mimo_edge.cancel import Cancel, check_cancel
from mimo_edge.config import LayerSpec, MimoConfig
from mimo_edge.errors import ContextLengthError, UsageError
from mimo_edge.npu_io import (
    DECODE_TOKENS,
    PREFILL_TOKENS,
    VERIFY_TOKENS,
    NpuComponent,
    Shape,
    mtp_ring_rows,
    ring_rows,
)
from mimo_edge.onnx_io import Kind, kind_of
from mimo_edge.runtimes.base import F32, VERIFY_ROWS, RouteSink, TokenIds
from mimo_edge.runtimes.checks import check_finite
from mimo_edge.runtimes.ggml.cache import FullIndex, RingIndex
from mimo_edge.runtimes.ggml.device import Device
from mimo_edge.runtimes.ggml.slots import ExpertSource
from mimo_edge.runtimes.onnx.backend import OnnxBackend
from mimo_edge.runtimes.onnx.cache import Kv, OnnxCache
from mimo_edge.runtimes.onnx.experts import HostExperts
from mimo_edge.runtimes.onnx.npu_feed import NpuInputs, padded, rows_by_kind
from mimo_edge.runtimes.onnx.npu_package import NpuPackage
from mimo_edge.runtimes.onnx.qnn import Qnn
from mimo_edge.runtimes.reference import rms_norm

Positions = NDArray[np.int64]
# Lengths of passes whose experts' buffers are kept: verifies, and a few of prefill.
_KEPT_EXPERTS = 8


class NpuCache(OnnxCache):
    """Rings and rows of the sizes the graphs were compiled for."""

    def __init__(
        self,
        owner: object,
        config: MimoConfig,
        context: int,
        verify_rows: int,
        buckets: tuple[int, ...],
    ) -> None:
        if verify_rows > VERIFY_TOKENS:
            raise UsageError(
                f"a cache that undoes {verify_rows - 1} rows",
                f"the graphs verify {VERIFY_TOKENS} tokens at a time",
            )
        if not all(config.hybrid_layer_pattern) and context > buckets[-1]:
            raise ContextLengthError(
                f"a context of {context} exceeds the {buckets[-1]} tokens the graphs were "
                "compiled for",
                "use a smaller context, or export with a larger --npu-context",
            )
        super().__init__(owner, config, context, verify_rows)
        window, trunk = config.sliding_window, config.num_hidden_layers
        self.ring = RingIndex(window, ring_rows(config))
        self.mtp_index = [
            RingIndex(window, mtp_ring_rows(config))
            if config.layer(trunk + depth).sliding
            else FullIndex(context)
            for depth in range(config.num_mtp_layers)
        ]
        for index in range(trunk + config.num_mtp_layers):
            spec = config.layer(index)
            if spec.sliding:
                rows = ring_rows(config) if index < trunk else mtp_ring_rows(config)
                self.kv[index] = Kv.empty(config, spec, rows)
        self._buckets = buckets

    def bucket(self, position: int) -> int:
        """Rows of global layers in a pass from `position` on."""
        return next(rows for rows in self._buckets if rows >= position)


class NpuBackend(OnnxBackend):
    """A `Backend` over the graphs compiled for an NPU in a bundle, which it owns and closes."""

    name = "onnx-npu"  # with the variant: saved conversations name what rounded them
    package: NpuPackage  # type: ignore[assignment]

    def __init__(
        self,
        bundle: Bundle,
        *,
        npu: str | None = None,
        qnn: Qnn | None = None,
        config: MimoConfig | None = None,
        threads: int | None = None,
        experts: Callable[[Device], ExpertSource] | None = None,
        routes: RouteSink | None = None,
    ) -> None:
        """`npu`: the target, when the bundle was made for several; `qnn`: the provider, by default
        the installed package's. Raises ProviderError when the
        provider, or a graph for it, is missing or refused; else as OnnxBackend."""
        self._npu = npu
        self._qnn = qnn or Qnn()
        self._inputs: dict[tuple[str, Shape], NpuInputs] = {}
        self._host_experts: OrderedDict[int, HostExperts] = OrderedDict()
        super().__init__(
            bundle,
            config=config,
            threads=threads,
            chunk=PREFILL_TOKENS,
            experts=experts,
            routes=routes,
        )

    def _load(self, bundle: Bundle, threads: int) -> None:
        self.package = NpuPackage(bundle, self.config, self._npu, threads, self._qnn)
        self.package.try_all()
        self.name = f"{NpuBackend.name}-{self.package.variant.name}"

    def _try_rows(self) -> list[int]:
        return []  # the exporter tried: NpuVariant.single

    def provider_stats(self) -> dict[str, object]:
        """JSON-ready: what runs on the NPU and what does not."""
        return self.package.stats()

    # --- Backend ---

    def new_cache(self, context: int, verify_rows: int = VERIFY_ROWS) -> NpuCache:
        """An empty cache. Raises ContextLengthError past what the graphs hold, UsageError."""
        self._check_open()
        return NpuCache(self, self.config, context, verify_rows, self.package.variant.buckets)

    def _part(self, position: int, left: int, exact: bool) -> int:
        """Tokens of the next pass."""
        if not exact:
            return min(left, PREFILL_TOKENS)
        if not self.package.variant.single:
            return 1  # rows of a verify have the bits of single tokens only one by one
        # Each row attends to as many columns as it would alone.
        rows = next(n for n in self.package.variant.buckets if n >= position)
        return min(left, max(1, rows - position))

    def _forward_chunk(
        self, cache: OnnxCache, ids: TokenIds, exact: bool, cancel: Cancel | None
    ) -> F32:
        assert isinstance(cache, NpuCache)
        c, position, total = self.config, cache.length, len(ids)
        held: dict[Kind, Positions] = {}
        if any(c.hybrid_layer_pattern):
            # Fails when rows that are still needed are gone.
            cache.ring.check(position, total, total)
            held["sliding"] = cache.ring.positions()
        rows = 0
        if not all(c.hybrid_layer_pattern):
            rows = cache.bucket(position)
            cache.resize(0, c.num_hidden_layers, cache.bucket(position + total), position)
            held["full"] = cache.full.positions(rows)
        tokens = self._tokens(total)
        inputs = self._filled("trunk", Shape(tokens, rows), c.layers, position, total, held)
        h = padded(self._embedding(ids), tokens)
        new: dict[int, tuple[F32, F32]] = {}
        following = self._following()
        for component in self.package.decoder:
            check_cancel(cancel)
            found = self._run(component, tokens, rows, cache, inputs, {"h": h})
            h = found["h_out"]
            for layer in component.layers:
                new[layer] = found[f"kn_{layer}"], found[f"vn_{layer}"]
            layer = component.layers[-1]
            if c.layer(layer).moe:
                h = np.ascontiguousarray(h)
                with self.device.cancelled_by(cancel):
                    self._add_experts(layer, found, h[:total], following.get(layer))
        check_finite(h[:total], "the residual stream", position)
        for layer, (keys, values) in new.items():
            self._write(cache.kv[layer], c.layer(layer).sliding, position, keys, values, total)
        if "sliding" in held:
            cache.ring.store(position, total)
        cache.full.store(position, total)
        cache.commit(total)
        return h[:total]

    def _mtp(
        self,
        cache: OnnxCache,
        depth: int,
        ids: TokenIds,
        hidden: F32,
        position: int,
        index: RingIndex | FullIndex,
    ) -> F32:
        assert isinstance(cache, NpuCache)
        c, component = self.config, self.package.mtp[depth]
        block = c.num_hidden_layers + depth
        spec, h = c.layer(block), np.empty((0, c.hidden_size), np.float32)
        try:
            for start in range(0, len(ids), PREFILL_TOKENS):
                part = ids[start : start + PREFILL_TOKENS]
                total, at, rows = len(part), position + start, 0
                if isinstance(index, FullIndex):
                    rows = cache.bucket(at)
                    cache.resize(block, block + 1, cache.bucket(at + total), at)
                    held = index.positions(rows)
                else:
                    held = index.positions()
                tokens = max(VERIFY_TOKENS, self._tokens(total))
                kinds: dict[Kind, Positions] = {kind_of(spec): held}
                inputs = self._filled("mtp", Shape(tokens, rows), [spec], at, total, kinds)
                feed = {
                    "e": padded(self._embedding(part), tokens),
                    "hidden": padded(hidden[start : start + total], tokens),
                }
                found = self._run(component, tokens, rows, cache, inputs, feed)
                keys, values = found[f"kn_{block}"], found[f"vn_{block}"]
                self._write(cache.kv[block], spec.sliding, at, keys, values, total)
                index.store(at, total)
                h = found["h_out"][total - 1 : total]
            logits: F32 = self._head(h, 1 + depth)[0]
            check_finite(logits[None], f"MTP block {depth}", position + len(ids) - 1)
        except BaseException:
            index.truncate(position)
            raise
        return logits

    def _head(self, rows: F32, norm: int) -> F32:
        """Logits f32 [n, V] of h [n, M], in passes of one shape: a row's bits never depend on its
        neighbours."""
        c = self.config
        x = rms_norm(rows, self.package.norms[norm], c.layernorm_epsilon)
        out = np.empty((len(rows), c.vocab_size), np.float32)
        graph = self.package.graph(self.package.head, Shape(VERIFY_TOKENS, 0))
        for start in range(0, len(rows), VERIFY_TOKENS):
            part = x[start : start + VERIFY_TOKENS]
            found = graph.run({"x": padded(part, VERIFY_TOKENS)})
            out[start : start + len(part)] = found["logits"][: len(part)]
        return out

    # --- parts of a pass ---

    def _tokens(self, total: int) -> int:
        """Tokens of the smallest graph that holds `total`; a single token runs where it has the
        bits it has in a verify."""
        least = max(total, self.package.variant.single)
        return next(t for t in (DECODE_TOKENS, VERIFY_TOKENS, PREFILL_TOKENS) if t >= least)

    def _filled(
        self,
        part: str,
        shape: Shape,
        specs: Iterable[LayerSpec],
        position: int,
        total: int,
        held: dict[Kind, Positions],
    ) -> NpuInputs:
        """Angles and masks for a pass, in arrays kept for its shape."""
        key = (part, shape)
        if key not in self._inputs:
            ring = ring_rows(self.config) if part == "trunk" else mtp_ring_rows(self.config)
            layers = list(specs)
            rows = rows_by_kind(self.config, layers, shape, ring)
            self._inputs[key] = NpuInputs(self.config, layers, shape.tokens, rows)
        found = self._inputs[key]
        found.fill(position, total, held)
        return found

    def _run(
        self,
        component: NpuComponent,
        tokens: int,
        rows: int,
        cache: NpuCache,
        inputs: NpuInputs,
        feed: dict[str, F32],
    ) -> dict[str, NDArray[Any]]:
        full = any(not self.config.layer(layer).sliding for layer in component.layers)
        graph = self.package.graph(component, Shape(tokens, rows if full else 0))
        given: dict[str, NDArray[Any]] = {**inputs.arrays, **feed}
        for layer in component.layers:
            kv = cache.kv[layer]
            keys, values = kv.keys, kv.values
            if not self.config.layer(layer).sliding and kv.rows > rows:  # at the end of a bucket
                keys, values = (np.ascontiguousarray(x[:, :, :rows]) for x in (keys, values))
            given |= {f"pk_{layer}": keys, f"pv_{layer}": values}
        return graph.run(given)

    @staticmethod
    def _write(kv: Kv, ring: bool, position: int, keys: F32, values: F32, total: int) -> None:
        """Put the rows of `total` new tokens [1, G, T, D] into a cache."""
        slots = np.arange(position, position + total)
        kept = slots[-kv.rows :] if ring else slots
        at = kept % kv.rows if ring else kept
        new = slice(total - len(kept), total)
        kv.keys[:, :, at] = keys[:, :, new]
        kv.values[:, :, at] = values[:, :, new]

    def _following(self) -> dict[int, int]:
        moe = [spec.index for spec in self.config.layers if spec.moe]
        return dict(pairwise(moe))

    def _add_experts(
        self, layer: int, found: dict[str, NDArray[Any]], h: F32, following: int | None
    ) -> None:
        total = len(h)
        kept = self._host_experts.get(total)
        if kept is None or not kept.current:
            if kept is not None:
                self._host_experts.pop(total).close()
            assert self._source is not None
            kept = HostExperts(self.device, self.config, self._source, total, self._routes)
            self._host_experts[total] = kept
            while len(self._host_experts) > _KEPT_EXPERTS:
                self._host_experts.popitem(last=False)[1].close()
        self._host_experts.move_to_end(total)
        kept.x[...] = found["x"][:total]
        kept.weights[...] = found["weights"][:total]
        kept.add(layer, np.ascontiguousarray(found["ids"][:total]), h, following)

    def close(self) -> None:
        """See OnnxBackend.close."""
        while self._host_experts:
            self._host_experts.popitem()[1].close()
        super().close()
