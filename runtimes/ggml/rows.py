"""Whether ggml gives rows computed together the bits each gets alone; asked of ggml itself.

Drafting may not change an answer, so a verify of several tokens has to give, to the bit, what
passes of one token give. Kernels for several rows need not: some sum in another order (F32
weights times more than one row, one query over more than 511 rows of a cache), and which do
differs between processors and builds. So each kind of product is tried once, on the weights as
they lie in memory, and computed row by row where it has to be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from mimo_edge.runtimes.base import F32, VERIFY_ROWS
from mimo_edge.runtimes.ggml import bindings as ggml
from mimo_edge.runtimes.ggml.cache_memory import SMALL_KV_BLOCK, AttentionKind, CacheMemory
from mimo_edge.runtimes.ggml.device import Device
from mimo_edge.runtimes.ggml.graph import ExactRows, Graph, Inputs, Tensor

# Trying attention over more rows would cost as much as the steps it serves, and ggml splits
# longer caches among threads when there is one query only.
_MOST_ATTENTION_ROWS = 511


class RowCheck:
    """Answers for one device, each found once and kept."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._weights: dict[tuple[object, ...], ExactRows] = {}
        self._attention: dict[tuple[AttentionKind, int, int], bool] = {}

    def weight(self, weight: Tensor) -> ExactRows:
        """How a loaded matrix {in, out} multiplies up to VERIFY_ROWS rows exactly."""
        buffer = ggml.TensorStruct.from_address(weight.pointer).buffer
        key = (buffer, weight.type, weight.ne)  # one buffer for each kind of memory
        if key not in self._weights:
            self._weights[key] = self._try_weight(weight)
        return self._weights[key]

    def attention_together(self, memory: CacheMemory, sliding: bool, rows: int) -> bool:
        """Whether a few queries may attend to `rows` rows of a cache in one operation, in every
        layer of that kind."""
        if rows > _MOST_ATTENTION_ROWS:
            return False
        known = memory.attends_together.get((sliding, rows))
        if known is None:
            # A ring is read whole, of a global layer a token alone may read a block less.
            spare = 0 if sliding else SMALL_KV_BLOCK
            kinds = memory.attention_kinds[sliding]
            known = all(self._together(kind, rows, spare) for kind in kinds)
            memory.attends_together[sliding, rows] = known
        return known

    def _together(self, kind: AttentionKind, rows: int, spare: int) -> bool:
        key = kind, rows, spare
        if key not in self._attention:
            self._attention[key] = self._try_attention(kind, rows, spare)
        return self._attention[key]

    # --- trying ---

    def _try_weight(self, weight: Tensor) -> ExactRows:
        width, out = weight.ne[:2]
        values = np.random.default_rng(0).standard_normal((VERIFY_ROWS, width), dtype=np.float32)

        def rows(g: Graph, x: Tensor, start: int, count: int) -> Tensor:
            return g.mul_mat(weight, g.view(x, (width, count), (x.nb[1],), start * x.nb[1]))

        def first(g: Graph, inputs: Sequence[Tensor], count: int) -> Tensor:
            return rows(g, inputs[0], 0, count)

        def each(g: Graph, inputs: Sequence[Tensor]) -> Tensor:
            return g.concat_all([rows(g, inputs[0], r, 1) for r in range(VERIFY_ROWS)], 1)

        def planes_of(g: Graph, inputs: Sequence[Tensor]) -> Tensor:
            x = inputs[0]
            product = g.mul_mat(weight, g.view(x, (width, 1, VERIFY_ROWS), (x.nb[1], x.nb[1])))
            return g.reshape(product, out, VERIFY_ROWS)

        # A graph for each, so that they need no more scratch memory than the passes to come.
        alone = self._run([values], each)
        together = 1
        while together < VERIFY_ROWS:
            batch = self._run([values], partial(first, count=together + 1))
            if not _same(batch, alone[: len(batch)]):
                break
            together += 1
        # Of two products and one of planes, the two read the weight less often.
        planes = together == 1 and _same(self._run([values], planes_of), alone)
        return ExactRows(together, planes)

    def _try_attention(self, kind: AttentionKind, rows: int, spare: int) -> bool:
        """The queries of a verify over rows of which the last ones are hidden from the first, and
        each alone over the rows it would read then: `spare` less, for those that need no more."""
        heads, groups, dim, v_dim, sinks, ggml_type = kind
        rng = np.random.default_rng(0)
        total = min(VERIFY_ROWS, rows)
        shapes = [(total, heads, dim), (rows, groups * dim), (rows, groups * v_dim), (heads,)]
        values = [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
        hidden = max(1, total // 2)  # queries that do not see the last rows
        seen = [
            max(1, rows - spare) if row < hidden else rows - total + 1 + row for row in range(total)
        ]
        mask = np.where(np.arange(rows) < np.array(seen)[:, None], 0, -np.inf).astype(np.float16)

        def attend(g: Graph, inputs: Sequence[Tensor], together: bool) -> Tensor:
            q, key, value, sink, sees = inputs
            key, value = g.cast(key, ggml_type), g.cast(value, ggml_type)

            def part(start: int, count: int, reads: int) -> Tensor:
                queries = g.view(q, (dim, heads, count), q.nb[1:3], start * q.nb[2])
                k, v = (
                    g.view(a, (n, reads, groups), (a.nb[1], a.nb[1] // groups))
                    for a, n in ((key, dim), (value, v_dim))
                )
                hides = g.view(sees, (reads, count), (sees.nb[1],), start * sees.nb[1])
                return g.attention(queries, k, v, hides, dim**-0.5, sink if sinks else None)

            if together:
                return part(0, total, rows)
            alone = [part(row, 1, seen[row] if row < hidden else rows) for row in range(total)]
            return g.concat_all(alone, 2)

        found = [
            self._run([*values, mask], partial(attend, together=together))
            for together in (False, True)
        ]
        return _same(*found)

    def _run(
        self,
        values: Sequence[NDArray[np.float32] | NDArray[np.float16]],
        build: Callable[[Graph, Sequence[Tensor]], Tensor],
    ) -> F32:
        """Result of a graph over `values`, as rows along its first axis."""
        inputs, g = Inputs(self._device), Graph(self._device, 64 + 16 * VERIFY_ROWS)
        try:
            types = {np.dtype(np.float32): ggml.TYPE_F32, np.dtype(np.float16): ggml.TYPE_F16}
            tensors = [inputs.new(types[v.dtype], *reversed(v.shape)) for v in values]
            inputs.allocate()
            for tensor, value in zip(tensors, values, strict=True):
                tensor.array().reshape(value.shape)[...] = value
            result = g.output(build(g, tensors))
            g.finish()
            g.compute()
            return result.array().reshape(result.ne[1] * result.ne[2], -1).copy()
        finally:
            g.close()
            inputs.close()


def _same(a: F32, b: F32) -> bool:
    """Whether two arrays hold the same bits."""
    return bool(np.array_equal(a.view(np.int32), b.view(np.int32)))
