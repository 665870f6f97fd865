"""What calibration sees of a forward pass: every matmul input and every routing decision."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mimo_edge.runtimes.base import F32


class Observer(Protocol):
    """Called by ReferenceBackend as it computes. The arrays are only lent: copy what you keep.

    Names are canonical (`blk.3.attn_q.weight`, `blk.3.ffn_gate_exps.weight`, `output.weight`);
    MTP block k is `blk.{layers + k}`.
    """

    def matmul(self, name: str, x: F32) -> None:
        """x f32 [T, in] is about to be multiplied by the weight `name` [out, in]."""
        ...

    def expert_matmul(self, name: str, expert: int, x: F32) -> None:
        """x f32 [T', in], the rows routed to `expert`, meets slice `expert` of the stack `name`."""
        ...

    def route(self, layer: int, ids: NDArray[np.int64], weights: F32) -> None:
        """Experts ids i64 [T, K] chosen in `layer` and their weights f32 [T, K]."""
        ...
