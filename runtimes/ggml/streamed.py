"""Computing routed experts that live in slots: between two graphs of a pass.

The graph before leaves the residual stream h, the experts' input x and the weights of the chosen
experts in a `Carry`, and the host reads which experts were chosen. (token, expert) pairs are then
computed group by group as their experts arrive in slots; every pair writes a row of its own in
`Carry.y`, and the graph after sums the rows up. So the order in which experts arrive changes no
result, and the same code serves decode, verify and prefill.
"""

from __future__ import annotations

from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from mimo_edge.config import MimoConfig
from mimo_edge.errors import BackendError
from mimo_edge.runtimes.ggml import blocks
from mimo_edge.runtimes.ggml.bindings import TYPE_F32, TYPE_I32, TYPE_I64
from mimo_edge.runtimes.ggml.device import Device
from mimo_edge.runtimes.ggml.graph import Graph, Inputs, Tensor
from mimo_edge.runtimes.ggml.resident import SwiGlu
from mimo_edge.runtimes.ggml.slots import ExpertSource

# Pairs computed by one graph: bounds scratch memory. Exact up to EXACT_PAIRS, then in steps.
MAX_PAIRS = 1024
EXACT_PAIRS = 16


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
        """Leave h, x {M, rows} and weights {K, rows} for the next graph."""
        rows = h.ne[1]
        for target, value in ((self.h, h), (self.x, x), (self.weights, weights)):
            g.copy_to(_first(g, target, rows), value)

    def restore(self, g: Graph, rows: int) -> Tensor:
        """The residual stream {M, rows} after the experts."""
        chosen = self.weights.ne[0]
        stride = self.y.nb[1]
        y = g.view(self.y, (self.y.ne[0], chosen, rows), (stride, stride * chosen))
        mixed = blocks.weighted_sum(g, y, _first(g, self.weights, rows))
        return g.add(_first(g, self.h, rows), mixed)


def _first(g: Graph, a: Tensor, rows: int) -> Tensor:
    return g.view(a, (a.ne[0], rows), (a.nb[1],))


class _PairsGraph:
    """The graph of `count` pairs over one layer format."""

    def __init__(self, device: Device, carry: Carry, w: SwiGlu, count: int) -> None:
        self._inputs, self.graph = Inputs(device), Graph(device, 32)
        self.tokens = self._inputs.new(TYPE_I32, count)
        self.slots = self._inputs.new(TYPE_I32, 1, count)
        self.rows = self._inputs.new(TYPE_I64, count)
        self._inputs.allocate()
        g = self.graph
        x = g.get_rows(carry.x, self.tokens)
        y = blocks.expert_rows(g, w, g.reshape(x, x.ne[0], 1, count), self.slots)
        g.set_rows(carry.y, g.reshape(y, y.ne[0], count), self.rows)

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
        self._largest = _padded(min(MAX_PAIRS, total * config.num_experts_per_tok))
        self._graphs: dict[tuple[int, int], _PairsGraph] = {}

    def largest(self) -> list[Graph]:
        """The largest graph of every layer format: allocate scratch memory for them first, so
        that smaller ones made in the middle of a pass find room."""
        layers = self._source.slots.layouts
        graphs = [self._graph(layer, self._largest).graph for layer in layers]
        return list(dict.fromkeys(graphs))  # layers of one format share theirs

    def run(self, layer: int, ids: NDArray[np.int32]) -> None:
        """Compute every pair of ids i32 [rows, K] in `layer`. Raises BackendError when the source
        gives slots that do not exist or leaves an expert out, and whatever the source raises."""
        chosen = ids.reshape(-1)
        total = self._config.n_routed_experts
        if chosen.min() < 0 or chosen.max() >= total:
            raise BackendError(f"layer {layer} chose an expert outside 0..{total - 1}")
        experts, counts = np.unique(chosen, return_counts=True)
        left = chosen.size
        slot_of = np.full(total, -1, np.int64)
        # Closed whatever happens: a pass that fails in between must not keep slots reserved.
        with closing(self._source.groups(layer, experts.astype(np.int64), counts)) as groups:
            for group in groups:
                if group.slots.min() < 0 or group.slots.max() >= self._source.slots.count:
                    raise BackendError(f"slots {group.slots} of {self._source.slots.count}")
                slot_of[group.experts] = group.slots
                slots = slot_of[chosen]
                slot_of[group.experts] = -1
                pairs = np.flatnonzero(slots >= 0)
                pairs = pairs[np.argsort(slots[pairs], kind="stable")]
                for start in range(0, len(pairs), MAX_PAIRS):
                    part = pairs[start : start + MAX_PAIRS]
                    self._compute(layer, part, slots[part], ids.shape[1])
                left -= len(pairs)
        if left:
            raise BackendError(f"{left} pairs of layer {layer} were given no slot")

    def _compute(
        self, layer: int, pairs: NDArray[np.int64], slots: NDArray[np.int64], k: int
    ) -> None:
        count = _padded(len(pairs))
        found = self._graph(layer, count)
        if found.graph.epoch < 0:
            found.graph.finish()
        padding = np.arange(count - len(pairs))
        spare = self._carry.y.ne[1] - EXACT_PAIRS
        found.tokens.array()[...] = np.concatenate([pairs // k, 0 * padding])
        found.slots.array().reshape(-1)[...] = np.concatenate([slots, 0 * padding + slots[-1]])
        found.rows.array()[...] = np.concatenate([pairs, spare + padding])
        found.graph.compute()

    def _graph(self, layer: int, count: int) -> _PairsGraph:
        w = self._source.slots.tensors(layer)
        key = w.gate.pointer, count
        if key not in self._graphs:
            self._graphs[key] = _PairsGraph(self._device, self._carry, w, count)
        return self._graphs[key]

    @property
    def nbytes(self) -> int:
        """Bytes of all graphs' inputs and descriptions."""
        return sum(graph.nbytes for graph in self._graphs.values())

    def close(self) -> None:
        """Free all graphs."""
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()


def _padded(pairs: int) -> int:
    return pairs if pairs <= EXACT_PAIRS else -(-pairs // EXACT_PAIRS) * EXACT_PAIRS
