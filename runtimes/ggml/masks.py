"""What a query sees, as the f16 mask that ggml's attention takes.

A step of decoding fills masks of one to four rows, and of a small model it is so short that how
they are filled counts: those of steps are cut from what was made before.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from mimo_edge.runtimes.ggml.cache import Positions

Mask = NDArray[np.float16]

SEEN, HIDDEN = np.float16(0), np.float16(-np.inf)
UNLIMITED = 1 << 40  # a window longer than any context, shorter than the way to EMPTY
# Rings up to this size have their masks made once (2 MiB at most), passes of so few rows use them.
_TABLE_ROWS, _FEW = 512, 8


def fill_causal(mask: Mask, held: Positions, queries: Positions, window: int) -> None:
    """mask f16 [T, S]: 0 where a query sees the position a column holds, -inf elsewhere.

    Source: spec section 2 step 6, 0 <= i - j <= W - 1.
    """
    behind = queries[:, None] - held
    mask.fill(HIDDEN)
    # Seen as unsigned, what lies ahead is far behind.
    np.copyto(mask, SEEN, where=behind.view(np.uint64) < window)


def fill_full(mask: Mask, queries: Positions) -> None:
    """mask f16 [T, S] of a layer that sees everything: column j holds position j."""
    if len(queries) <= _FEW:
        mask.fill(SEEN)
        for row, query in enumerate(queries.tolist()):
            mask[row, query + 1 :] = HIDDEN
        return
    first = int(queries[0])
    mask[:, :first] = SEEN
    held = np.arange(first, mask.shape[1], dtype=np.int64)
    fill_causal(mask[:, first:], held, queries, UNLIMITED)


def fill_ring(mask: Mask, slots: Positions, queries: Positions, window: int) -> None:
    """mask f16 [T, R] of a ring that holds every row the queries see, and their own: the row of
    position p is in slot p mod R. `slots` are the positions they were written for."""
    rows, first = mask.shape[1], int(queries[0])
    if rows > _TABLE_ROWS or len(queries) > _FEW or first < rows < first + len(queries):
        fill_causal(mask, slots, queries, window)
    elif first >= rows:
        mask[...] = _wrapped(rows, window)[queries % rows]
    else:
        mask[...] = _unwrapped(rows, window)[first : first + len(queries)]


def fill_newest(mask: Mask, first: int, last: int) -> None:
    """mask f16 [R] of a ring: what the query at position `last` sees of the rows first..last, which
    are there, R of them at most."""
    rows = len(mask)
    start, end = first % rows, last % rows + 1
    mask.fill(HIDDEN)
    if start < end:
        mask[start:end] = SEEN
    else:
        mask[start:] = SEEN
        mask[:end] = SEEN


@functools.lru_cache(maxsize=4)
def _unwrapped(rows: int, window: int) -> Mask:
    """Row p: what position p sees of a ring that no position beyond its size was written to."""
    mask = np.empty((rows, rows), np.float16)
    positions = np.arange(rows, dtype=np.int64)
    fill_causal(mask, positions, positions, window)
    return mask


@functools.lru_cache(maxsize=4)
def _wrapped(rows: int, window: int) -> Mask:
    """Row s: what a position in slot s sees of a full ring: its own slot and window - 1 before."""
    slots = np.arange(rows, dtype=np.int64)
    behind = (slots[:, None] - slots) % rows
    return np.where(behind < window, SEEN, HIDDEN)
