"""One expert over many rows, as matrix products.

ggml's mul_mat_id, the operation for stacked experts, takes a block-quantised matrix row by row of
the input: twice the rows, twice the time. Its mul_mat has kernels that use every weight for
several rows. A long pass gives each expert many rows, so its experts are computed one after the
other with mul_mat on 2-D tensors that are moved over the experts in memory (docs/decisions.md has
the measurement).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mimo_edge.errors import BackendError
from mimo_edge.runtimes.ggml import bindings as ggml
from mimo_edge.runtimes.ggml import blocks
from mimo_edge.runtimes.ggml.bindings import TYPE_F32, TYPE_I32, TYPE_I64
from mimo_edge.runtimes.ggml.device import Device
from mimo_edge.runtimes.ggml.graph import Context, Graph, Inputs, Tensor
from mimo_edge.runtimes.ggml.resident import SwiGlu

# Weights of a gate matrix below which starting a graph per expert costs more than it saves.
LEAST_ELEMENTS = 1 << 19
# Rows one graph computes: bounds scratch memory. Exact up to EXACT_ROWS, then in steps.
MOST_ROWS = 512
EXACT_ROWS, ROW_STEP = 64, 8


def worthwhile(w: SwiGlu) -> bool:
    """Whether experts of this size are computed faster one by one in a long pass."""
    return w.gate.ne[0] * w.gate.ne[1] >= LEAST_ELEMENTS


def padded_rows(rows: int) -> int:
    """Rows of the graph that computes `rows` rows."""
    return rows if rows <= EXACT_ROWS else -(-rows // ROW_STEP) * ROW_STEP


def _parts(w: SwiGlu) -> tuple[Tensor, Tensor, Tensor]:
    return w.gate, w.up, w.down


class _Window:
    """gate, up {M, F} and down {F, M} of one expert among those stacked in tensors of one format
    and one buffer each."""

    def __init__(self, device: Device, stacks: SwiGlu) -> None:
        self._context = Context(device, 3)
        gate, up, down = (self._first(device, stack) for stack in _parts(stacks))
        self.weights = SwiGlu(gate, up, down)

    def _first(self, device: Device, stack: Tensor) -> Tensor:
        g, struct = device.ggml, ggml.TensorStruct.from_address(stack.pointer)
        made = self._context.new(stack.type, stack.ne[:2])
        # Placed like any weight, so that a buffer that reorders its weights knows this one too.
        if g.ggml_backend_tensor_alloc(struct.buffer, made.pointer, struct.data) != 0:
            raise BackendError("ggml could not place an expert")
        return Tensor(made.pointer)

    @staticmethod
    def key(stacks: SwiGlu) -> tuple[object, ...]:
        """What stacks must share to be seen through one window."""
        return tuple(
            (s.type, s.ne[:2], ggml.TensorStruct.from_address(s.pointer).buffer)
            for s in _parts(stacks)
        )

    def show(self, stacks: SwiGlu, index: int) -> None:
        """Be expert `index` of the stacks."""
        for tensor, stack in zip(_parts(self.weights), _parts(stacks), strict=True):
            if not 0 <= index < stack.ne[2]:
                raise BackendError(f"expert {index} of {stack.ne[2]} in {stack}")
            base: int = ggml.TensorStruct.from_address(stack.pointer).data
            ggml.TensorStruct.from_address(tensor.pointer).data = base + index * stack.nb[2]

    def close(self) -> None:
        self._context.close()


class _RowsGraph:
    """`count` rows of x through one expert, weighted, into rows of y."""

    def __init__(self, device: Device, x: Tensor, y: Tensor, w: SwiGlu, count: int) -> None:
        self._inputs, self.graph = Inputs(device), Graph(device, 16)
        self.tokens = self._inputs.new(TYPE_I32, count)
        self.weights = self._inputs.new(TYPE_F32, 1, count)
        self.rows = self._inputs.new(TYPE_I64, count)
        self._inputs.allocate()
        g = self.graph
        found = blocks.dense(g, w, g.get_rows(x, self.tokens))
        g.set_rows(y, g.mul(found, self.weights), self.rows)

    @property
    def nbytes(self) -> int:
        return self._inputs.nbytes + self.graph.context_bytes

    def close(self) -> None:
        self.graph.close()
        self._inputs.close()


class MatrixExperts:
    """Computes experts one at a time: rows of x {M, T} into rows of y {M, R}.

    y has ROW_STEP rows behind the first `rows`, for what padding computes.
    """

    def __init__(self, device: Device, x: Tensor, y: Tensor, rows: int) -> None:
        self._device = device
        self._x, self._y = x, y
        self._spare = rows
        self._windows: dict[tuple[object, ...], _Window] = {}
        self._graphs: dict[tuple[int, int], _RowsGraph] = {}

    def graph(self, stacks: SwiGlu, rows: int) -> Graph:
        """The graph for `rows` rows of an expert in `stacks`, to be finished by the caller."""
        return self._made(stacks, padded_rows(rows))[1].graph

    def run(
        self,
        stacks: SwiGlu,
        index: int,
        tokens: NDArray[np.int64],
        weights: NDArray[np.float32],
        rows: NDArray[np.int64],
    ) -> None:
        """Expert `index` of `stacks`: row rows[i] of y becomes weights[i] times the expert of row
        tokens[i] of x, all [n]. The scratch memory of other graphs is overwritten."""
        for start in range(0, len(tokens), MOST_ROWS):
            part = slice(start, start + MOST_ROWS)
            self._piece(stacks, index, tokens[part], weights[part], rows[part])

    def _piece(
        self,
        stacks: SwiGlu,
        index: int,
        tokens: NDArray[np.int64],
        weights: NDArray[np.float32],
        rows: NDArray[np.int64],
    ) -> None:
        count = len(tokens)
        window, found = self._made(stacks, padded_rows(count))
        if found.graph.epoch < 0:
            found.graph.finish()
        window.show(stacks, index)
        ids, factors, targets = (
            tensor.array().reshape(-1) for tensor in (found.tokens, found.weights, found.rows)
        )
        ids[:count], factors[:count], targets[:count] = tokens, weights, rows
        ids[count:], factors[count:] = 0, 0
        targets[count:] = self._spare + np.arange(len(targets) - count)
        found.graph.compute()

    def _made(self, stacks: SwiGlu, count: int) -> tuple[_Window, _RowsGraph]:
        key = _Window.key(stacks)
        window = self._windows.get(key)
        if window is None:
            window = self._windows[key] = _Window(self._device, stacks)
        at = window.weights.gate.pointer, count
        if at not in self._graphs:
            self._graphs[at] = _RowsGraph(self._device, self._x, self._y, window.weights, count)
        return window, self._graphs[at]

    @property
    def nbytes(self) -> int:
        """Bytes of all graphs' inputs and descriptions."""
        return sum(graph.nbytes for graph in self._graphs.values())

    def close(self) -> None:
        """Free all graphs. Twice is harmless."""
        for graph in self._graphs.values():
            graph.close()
        for window in self._windows.values():
            window.close()
        self._graphs.clear()
        self._windows.clear()
