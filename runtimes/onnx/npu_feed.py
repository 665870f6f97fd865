"""Inputs of an NPU graph for n of its T tokens: angles, masks and caches of static shapes.

Columns of keys are [cache | new]. Rows behind the n real ones are padding: they see themselves
alone, nothing real sees them, and what they give is not used.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from mimo_edge.config import LayerSpec, MimoConfig
from mimo_edge.npu_io import MASKED, Shape
from mimo_edge.onnx_io import Kind, kind_of
from mimo_edge.runtimes.base import F32
from mimo_edge.runtimes.reference import rotary_angles

Positions = NDArray[np.int64]
Arrays = dict[str, NDArray[np.generic]]


class NpuInputs:
    """Rotary angles and masks of one graph, by input name, made once and filled for every pass."""

    def __init__(
        self, config: MimoConfig, specs: Iterable[LayerSpec], tokens: int, rows: dict[Kind, int]
    ) -> None:
        """`specs`: the layers of the graph; `rows`: those of their caches, by kind."""
        self._config = config
        self._tokens = tokens
        self._of = {kind_of(spec): spec for spec in specs}
        half = config.rotary_dim // 2
        self.arrays: dict[str, F32] = {}
        for kind in self._of:
            self.arrays[f"cos_{kind}"] = np.zeros((1, tokens, half), np.float32)
            self.arrays[f"sin_{kind}"] = np.zeros((1, tokens, half), np.float32)
            self.arrays[f"mask_{kind}"] = np.empty((tokens, rows[kind] + tokens), np.float32)

    def fill(self, position: int, count: int, held: dict[Kind, Positions]) -> None:
        """For `count` tokens from `position` on; `held`: the position in every row of the caches,
        by kind, before the new rows are written."""
        queries = np.arange(position, position + count, dtype=np.int64)
        for kind, spec in self._of.items():
            cos, sin = rotary_angles(queries, self._config.rotary_dim, spec.rope_theta)
            self.arrays[f"cos_{kind}"][0, :count] = cos
            self.arrays[f"sin_{kind}"][0, :count] = sin
            mask, rows = self.arrays[f"mask_{kind}"], len(held[kind])
            mask[...] = MASKED
            behind = queries[:, None] - np.concatenate([held[kind], queries])
            visible = behind >= 0
            if spec.window is not None:
                visible &= behind < spec.window
            # Slots that hold nothing have negative positions; what a rollback left behind is void.
            visible[:, :rows] &= (held[kind] >= 0) & (held[kind] < position)
            np.copyto(mask[:count, : rows + count], 0, where=visible)
            padding = np.arange(count, self._tokens)
            mask[padding, rows + padding] = 0


def rows_by_kind(
    config: MimoConfig, specs: Iterable[LayerSpec], shape: Shape, ring: int
) -> dict[Kind, int]:
    """Rows of the caches of a graph: the shape's of global layers, `ring` of sliding ones."""
    kinds = {kind_of(spec) for spec in specs}
    rows: dict[Kind, int] = {"full": shape.rows, "sliding": ring}
    return {kind: rows[kind] for kind in sorted(kinds)}


def padded(x: F32, tokens: int) -> F32:
    """x [n, ...] with zeros behind, [tokens, ...]."""
    if len(x) == tokens:
        return np.ascontiguousarray(x)
    made = np.zeros((tokens, *x.shape[1:]), np.float32)
    made[: len(x)] = x
    return made
