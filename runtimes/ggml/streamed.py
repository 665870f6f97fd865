"""Computing routed experts that live in slots: between two graphs of a pass.

The graph before leaves the residual stream h, the experts' input x and the weights of the chosen
experts in a `Carry`, and the host reads which experts were chosen. (token, expert) pairs are then
computed group by group as their experts arrive in slots; every pair writes a weighted row of its
own in `Carry.y`, and the graph after sums the rows up. So the order in which experts arrive changes
no result. A few tokens are computed a group at a time with mul_mat_id, in which a row does not
depend on its neighbours; a long pass expert by expert (expert_matrix.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from mimo_edge.config import MimoConfig
from mimo_edge.errors import BackendError
from mimo_edge.runtimes.ggml import blocks
from mimo_edge.runtimes.ggml.bindings import TYPE_F32, TYPE_I32, TYPE_I64
from mimo_edge.runtimes.ggml.device import Device
from mimo_edge.runtimes.ggml.expert_matrix import MOST_ROWS, MatrixExperts, worthwhile
from mimo_edge.runtimes.ggml.graph import Graph, Inputs, Tensor
from mimo_edge.runtimes.ggml.resident import SwiGlu
from mimo_edge.runtimes.ggml.slots import ExpertSource

# Pairs computed by one graph: bounds scratch memory. Exact up to EXACT_PAIRS, then in steps.
MAX_PAIRS = 1024
EXACT_PAIRS = 16
# Passes of more tokens compute large experts one by one.
FEW_TOKENS = 16


class Carry:
    """What passes from a graph to the next, for T tokens: h, x {M, T}, weights {K, T}, and a row of
    y per (token, expert) pair. The rows of y past K * T take what padding computes."""

    def __init__(self, inputs: Inputs, config: MimoConfig, total: int) -> None:
        width, chosen = config.hidden_size, config.num_experts_per_tok
        self.h = inputs.new(TYPE_F32, width, total)
        self.x = inputs.new(TYPE_F32, width, total)
        self.weights = inputs.new(TYPE_F32, chosen, total)
        self.y = inputs.new(TYPE_F32, width, chosen * total + EXACT_PAIRS)

    def save(self, g: Graph, h: Tensor, x: Tensor, weights: Tensor) -> None:
        """Leave x {M, rows}, weights {K, rows} and h {M, rows or more} for the next graph."""
        for target, value in ((self.h, h), (self.x, x), (self.weights, weights)):
            g.copy_to(_first(g, target, value.ne[1]), value)

    def restore(self, g: Graph, rows: int) -> Tensor:
        """The residual stream {M, rows} after the experts."""
        chosen = self.weights.ne[0]
        stride = self.y.nb[1]
        y = g.view(self.y, (self.y.ne[0], chosen, rows), (stride, stride * chosen))
        return g.add(_first(g, self.h, rows), blocks.sum_chosen(g, y))


def _first(g: Graph, a: Tensor, rows: int) -> Tensor:
    return g.view(a, (a.ne[0], rows), (a.nb[1],))


class _PairsGraph:
    """The graph of `count` pairs over one layer format."""

    def __init__(self, device: Device, carry: Carry, w: SwiGlu, count: int) -> None:
        self._inputs, self.graph = Inputs(device), Graph(device, 32)
        self.tokens = self._inputs.new(TYPE_I32, count)
        self.slots = self._inputs.new(TYPE_I32, 1, count)
        self.weights = self._inputs.new(TYPE_F32, 1, count)
        self.rows = self._inputs.new(TYPE_I64, count)
        self._inputs.allocate()
        g = self.graph
        x = g.get_rows(carry.x, self.tokens)
        y = blocks.expert_rows(g, w, g.reshape(x, x.ne[0], 1, count), self.slots)
        y = g.mul(g.reshape(y, y.ne[0], count), self.weights)
        g.set_rows(carry.y, y, self.rows)

    @property
    def nbytes(self) -> int:
        return self._inputs.nbytes + self.graph.context_bytes

    def close(self) -> None:
        self.graph.close()
        self._inputs.close()


class SlotExperts:
    """Runs the chosen experts of a layer over one pass's `Carry`."""

    def __init__(
        self, device: Device, config: MimoConfig, source: ExpertSource, carry: Carry, total: int
    ) -> None:
        self._device = device
        self._config = config
        self._source = source
        self._carry = carry
        self._total = total
        self._graphs: dict[tuple[int, int], _PairsGraph] = {}
        self._matrix = MatrixExperts(device, carry.x, carry.y, carry.y.ne[1] - EXACT_PAIRS)

    def largest(self) -> list[Graph]:
        """The largest graph of every layer format: allocate scratch memory for them first, so
        that smaller ones made in the middle of a pass find room."""
        graphs: list[Graph] = []
        for layer in self._source.slots.layouts:
            stacks = self._source.slots.tensors(layer)
            few = self._total
            if self._total > FEW_TOKENS and worthwhile(stacks):
                graphs.append(self._matrix.graph(stacks, min(MOST_ROWS, self._total)))
                few = FEW_TOKENS  # the last layer may be asked for a few rows
            pairs = few * self._config.num_experts_per_tok
            graphs.append(self._graph(stacks, _padded(min(MAX_PAIRS, pairs))).graph)
        return list(dict.fromkeys(graphs))  # layers of one format share theirs

    def run(
        self,
        layer: int,
        ids: NDArray[np.int32],
        few: int = 0,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """Compute every pair of ids i32 [rows, K] in `layer`, those of the first `few` rows in the
        way of a short pass; `meanwhile` is called once the source knows what it is to read. Raises
        BackendError when the source gives slots that do not exist or leaves an expert out, and
        whatever the source raises."""
        chosen = ids.reshape(-1)
        total = self._config.n_routed_experts
        if chosen.min() < 0 or chosen.max() >= total:
            raise BackendError(f"layer {layer} chose an expert outside 0..{total - 1}")
        experts, counts = np.unique(chosen, return_counts=True)
        left = chosen.size
        slot_of = np.full(total, -1, np.int64)
        stacks = self._source.slots.tensors(layer)
        compute = self._in_pairs
        if len(ids) - few > FEW_TOKENS and worthwhile(stacks):
            compute = self._one_by_one
        first = few * ids.shape[1]  # pair of the rows after
        # Closed whatever happens: a pass that fails in between must not keep slots reserved.
        with closing(self._source.groups(layer, experts.astype(np.int64), counts)) as groups:
            for group in groups:
                if meanwhile is not None:
                    meanwhile()
                    meanwhile = None
                if not len(group.slots):
                    continue
                if group.slots.min() < 0 or group.slots.max() >= self._source.slots.count:
                    raise BackendError(f"slots {group.slots} of {self._source.slots.count}")
                slot_of[group.experts] = group.slots
                slots = slot_of[chosen]
                slot_of[group.experts] = -1
                pairs = np.flatnonzero(slots >= 0)
                pairs = pairs[np.argsort(slots[pairs], kind="stable")]
                for part, way in ((pairs < first, self._in_pairs), (pairs >= first, compute)):
                    if part.any():
                        way(stacks, pairs[part], slots[pairs[part]])
                left -= len(pairs)
        if left:
            raise BackendError(f"{left} pairs of layer {layer} were given no slot")

    def _one_by_one(
        self, stacks: SwiGlu, pairs: NDArray[np.int64], slots: NDArray[np.int64]
    ) -> None:
        """Compute pairs, sorted by their slots, a slot at a time."""
        k = self._config.num_experts_per_tok
        weights = self._weights(pairs)
        cuts = np.flatnonzero(np.diff(slots)) + 1
        for start, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(pairs)], strict=True):
            mine = pairs[start:end]
            slot = int(slots[start])
            self._matrix.run(stacks, slot, mine // k, weights[start:end], mine)

    def _in_pairs(self, stacks: SwiGlu, pairs: NDArray[np.int64], slots: NDArray[np.int64]) -> None:
        """Compute pairs, sorted by their slots, all slots at once."""
        for start in range(0, len(pairs), MAX_PAIRS):
            part = slice(start, start + MAX_PAIRS)
            self._compute(stacks, pairs[part], slots[part])

    def _compute(self, stacks: SwiGlu, pairs: NDArray[np.int64], slots: NDArray[np.int64]) -> None:
        count, total = len(pairs), _padded(len(pairs))
        found = self._graph(stacks, total)
        if found.graph.epoch < 0:
            found.graph.finish()
        tokens, ids, weights, rows = (
            tensor.array().reshape(-1)
            for tensor in (found.tokens, found.slots, found.weights, found.rows)
        )
        tokens[:count], ids[:count] = pairs // self._config.num_experts_per_tok, slots
        weights[:count], rows[:count] = self._weights(pairs), pairs
        tokens[count:], ids[count:], weights[count:] = 0, slots[-1], 0
        rows[count:] = self._carry.y.ne[1] - EXACT_PAIRS + np.arange(total - count)
        found.graph.compute()

    def _weights(self, pairs: NDArray[np.int64]) -> NDArray[np.float32]:
        """The weight of each pair in the sum of its token."""
        weights: NDArray[np.float32] = self._carry.weights.array().reshape(-1)[pairs]
        return weights

    def _graph(self, stacks: SwiGlu, count: int) -> _PairsGraph:
        key = stacks.gate.pointer, count
        if key not in self._graphs:
            self._graphs[key] = _PairsGraph(self._device, self._carry, stacks, count)
        return self._graphs[key]

    @property
    def nbytes(self) -> int:
        """Bytes of all graphs' inputs and descriptions."""
        return sum(graph.nbytes for graph in self._graphs.values()) + self._matrix.nbytes

    def close(self) -> None:
        """Free all graphs."""
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        self._matrix.close()


def _padded(pairs: int) -> int:
    return pairs if pairs <= EXACT_PAIRS else -(-pairs // EXACT_PAIRS) * EXACT_PAIRS
