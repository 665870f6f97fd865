"""Masks of the ggml backend against the definition, whichever way they are filled."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mimo_edge.runtimes.ggml import masks
from mimo_edge.runtimes.ggml.cache import RingIndex
from mimo_edge.runtimes.ggml.masks import HIDDEN, SEEN, fill_full, fill_newest, fill_ring


def defined(held: list[int], queries: list[int], window: int) -> NDArray[np.bool_]:
    """What each query sees, one pair at a time."""
    return np.array([[0 <= q - p < window for p in held] for q in queries])


def garbage(*shape: int) -> NDArray[np.float16]:
    return np.full(shape, 7, np.float16)


def seen(mask: NDArray[np.float16]) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = mask == 0
    assert (found | np.isneginf(mask)).all()
    return found


@pytest.mark.parametrize("total", [1, 4, 8, 9, 40])
@pytest.mark.parametrize("first", [0, 1, 17])
def test_layers_that_see_everything(first: int, total: int) -> None:
    mask = garbage(total, 64)
    queries = np.arange(first, first + total, dtype=np.int64)
    fill_full(mask, queries)
    assert (seen(mask) == defined(list(range(64)), queries.tolist(), 1 << 40)).all()


@settings(max_examples=150, deadline=None)
@given(
    window=st.integers(1, 12),
    verify=st.integers(1, 4),
    steps=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=25),
    table=st.booleans(),
)
def test_rings_through_verifies_and_rejections(
    window: int, verify: int, steps: list[tuple[int, int]], table: bool
) -> None:
    """Also where rows that were rejected still lie in the ring, and where it begins to wrap."""
    index = RingIndex(window, window - 1 + verify)
    most = masks._TABLE_ROWS
    try:
        masks._TABLE_ROWS = most if table else 0
        for count, rejected in steps:
            count = min(count, verify)
            assert index.in_place(index.length, count)
            queries = np.arange(index.length, index.length + count, dtype=np.int64)
            index.store(index.length, count)
            mask = garbage(count, index.rows)
            fill_ring(mask, index.slots, queries, window)
            assert (
                seen(mask) == defined(index.positions().tolist(), queries.tolist(), window)
            ).all()
            index.truncate(index.length - min(rejected, count - 1))
    finally:
        masks._TABLE_ROWS = most


@pytest.mark.parametrize("last", [0, 3, 8, 9, 25])
def test_the_newest_row_of_a_block(last: int) -> None:
    """Its ring has no row to spare."""
    index = RingIndex(9, 9)
    first = max(0, last - 8)
    index.store(first, last - first + 1)
    mask, query = garbage(1, 9), np.array([last], np.int64)
    fill_ring(mask, index.slots, query, 9)
    assert (seen(mask) == defined(index.positions().tolist(), [last], 9)).all()


@pytest.mark.parametrize("rows", [1, 7, 16])
def test_the_newest_query_sees_the_rows_that_are_there(rows: int) -> None:
    mask = np.empty(rows, np.float16)
    for last in range(3 * rows):
        for first in range(max(0, last - rows + 1), last + 1):
            fill_newest(mask, first, last)
            seen = {position % rows for position in range(first, last + 1)}
            assert mask.tolist() == [SEEN if slot in seen else HIDDEN for slot in range(rows)]
