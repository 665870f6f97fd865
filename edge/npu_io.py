"""What a writer of NPU graphs and a runtime that feeds them agree on, beyond mimo_edge.onnx_io.

NPU graphs have static shapes and the "append" form of caches: rows of the cache go in, only new
rows come out, and the host owns rings, masks and rollback. A graph is named by its tokens T and the
rows of its global layers' caches; passes of other lengths are padded behind, longer ones cut.

`npu.json` in the ONNX folder lists, per target, every component with its compiled graphs: what it
was compiled as, and why not as asked where that is so.
"""

from __future__ import annotations

from typing import NamedTuple

from mimo_edge.config import MimoConfig
from mimo_edge.runtimes.base import VERIFY_ROWS

INDEX_NAME = "npu.json"
DECODE_TOKENS, VERIFY_TOKENS, PREFILL_TOKENS = 1, VERIFY_ROWS, 64
MASKED = -100.0
"""What an NPU's mask says of a column that is not seen: exp(-100) is 0 next to any score, and a
larger number would coarsen the u16 scale of the scores it is added to."""


class Shape(NamedTuple):
    """New tokens of a graph, and rows of its global layers' caches (0: it has no such layer)."""

    tokens: int
    rows: int

    @property
    def label(self) -> str:
        """As in file names."""
        return f"t{self.tokens}_k{self.rows}" if self.rows else f"t{self.tokens}"


def ring_rows(config: MimoConfig) -> int:
    """Rows of a sliding layer's ring: what a verify can undo, and the window before it."""
    return config.sliding_window - 1 + VERIFY_ROWS


def mtp_ring_rows(config: MimoConfig) -> int:
    """Rows of an MTP block's ring: only its newest row queries."""
    return config.sliding_window


def buckets(context: int, least: int = 1024) -> tuple[int, ...]:
    """Cache lengths of global layers for contexts up to `context`: each four times the last."""
    found, rows = [], min(least, context)
    while rows < context:
        found.append(rows)
        rows *= 4
    return (*found, context)
