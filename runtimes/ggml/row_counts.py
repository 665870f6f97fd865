"""How many rows to compute for a few of them, by time.

Where ggml reorders a matrix it has a kernel for four rows that is another one than that for one
row: with AVX-512 it reads the weights of four rows in less time than the other those of one, and
two rows are two products of one. Which is faster differs between processors and formats, so it is
measured when a model is loaded, on as many of its weights as caches do not keep. Only weights are
asked about of which a row has the same bits whatever number is computed (rows.py): a wrong answer
costs time and changes nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from mimo_edge.runtimes.base import VERIFY_ROWS
from mimo_edge.runtimes.ggml import bindings as ggml
from mimo_edge.runtimes.ggml.device import Device
from mimo_edge.runtimes.ggml.graph import Graph, Inputs, Tensor, finish_together

# Weights that are measured: fewer lie in caches or take no time worth saving, and of more the first
# ones will do.
LEAST_BYTES, MOST_BYTES = 64 << 20, 512 << 20
# Rounds in which numbers of rows take turns, and the share of time that more rows must save.
_ROUNDS, _LEAST_GAIN = 2, 0.05


def computed_rows(
    device: Device,
    weights: Sequence[Tensor],
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[int, ...]:
    """How many rows to compute for 1, 2, .. VERIFY_ROWS of them with matrices {in, out} such as
    `weights`, which lie where they will be used; empty when as many as there are do in any case.
    Raises BackendError without memory for the rows."""
    measured: list[Tensor] = []
    nbytes = 0
    for weight in weights:
        if nbytes < MOST_BYTES:
            measured.append(weight)
            nbytes += int(device.ggml.ggml_nbytes(weight.pointer))
    if nbytes < LEAST_BYTES:
        return ()
    found = fastest(_times(device, measured, clock))
    return () if found == tuple(range(1, VERIFY_ROWS + 1)) else found


def fastest(seconds: Sequence[float]) -> tuple[int, ...]:
    """For 1, 2, .. rows the number that takes least time, `seconds` for each: more than there are
    only where that saves enough."""
    found = []
    for rows, own in enumerate(seconds, 1):
        best = min(range(rows, len(seconds) + 1), key=lambda count: seconds[count - 1])
        found.append(best if seconds[best - 1] < (1 - _LEAST_GAIN) * own else rows)
    return tuple(found)


def _times(
    device: Device, weights: Sequence[Tensor], clock: Callable[[], float]
) -> tuple[float, ...]:
    """Seconds that all products take with 1, 2, .. VERIFY_ROWS rows."""
    counts = range(1, VERIFY_ROWS + 1)
    best = [float("inf")] * VERIFY_ROWS
    inputs = Inputs(device)
    graphs = [Graph(device, 2 * len(weights) + 8) for _ in counts]
    try:
        xs = [
            {width: inputs.new(ggml.TYPE_F32, width, count) for width in {w.ne[0] for w in weights}}
            for count in counts
        ]
        inputs.allocate()
        rng = np.random.default_rng(0)
        for of_width, graph in zip(xs, graphs, strict=True):
            for x in of_width.values():
                x.array()[...] = rng.standard_normal(x.array().shape)
            for weight in weights:
                graph.run_now(graph.mul_mat(weight, of_width[weight.ne[0]]))
        finish_together(graphs)
        for _ in range(_ROUNDS):
            for index, graph in enumerate(graphs):
                began = clock()
                graph.compute()
                best[index] = min(best[index], clock() - began)
    finally:
        for graph in graphs:
            graph.close()
        inputs.close()
    return tuple(best)
