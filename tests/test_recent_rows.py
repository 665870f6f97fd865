"""The newest rows in one array against a deque of rows."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from mimo_edge.recent_rows import RecentRows


@pytest.mark.parametrize("keep", [None, 1, 5, 28])
def test_it_holds_what_a_deque_of_rows_holds(keep: int | None) -> None:
    rng = np.random.default_rng(keep or 0)
    ours, rows = RecentRows(3, keep), deque[list[float]](maxlen=keep)
    most = 0
    for _ in range(2000):
        kind = rng.random()
        if kind < 0.7:
            new = rng.standard_normal(
                (int(rng.integers(0, 40 if kind < 0.1 else 5)), 3), np.float32
            )
            ours.extend(new)
            rows.extend(new.tolist())
        elif kind < 0.97:
            count = int(rng.integers(-2, 8))
            oldest = kind < 0.83
            (ours.drop_oldest if oldest else ours.drop_newest)(count)
            for _ in range(min(count, len(rows))):
                rows.popleft() if oldest else rows.pop()
        else:
            ours.clear()
            rows.clear()
        assert len(ours) == len(rows)
        assert ours.part(0, len(ours)).tolist() == list(rows)
        start, end = sorted(rng.integers(0, len(rows) + 1, 2).tolist())
        assert ours.part(start, end).tolist() == list(rows)[start:end]
        most = max(most, len(rows))
    assert most == keep if keep is not None else most > 64
