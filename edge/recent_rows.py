"""The newest hidden states of a sequence in one array: runs of them are views of it."""

from __future__ import annotations

import numpy as np

from mimo_edge.runtimes.base import F32


class RecentRows:
    """Rows f32 [n, M], the newest last: at most `keep` of them, or all with None."""

    def __init__(self, width: int, keep: int | None) -> None:
        self._keep = keep
        # Twice what is kept: rows move to the front once in `keep` of them.
        self._rows: F32 = np.empty((64 if keep is None else 2 * keep, width), np.float32)
        self._start = self._end = 0

    def __len__(self) -> int:
        return self._end - self._start

    def extend(self, rows: F32) -> None:
        """Add `rows` [m, M] behind the others."""
        if self._keep is not None and len(rows) > self._keep:
            rows = rows[-self._keep :]
        if self._end + len(rows) > len(self._rows):
            self._make_room(len(rows))
        end = self._end + len(rows)
        self._rows[self._end : end] = rows
        self._end = end
        if self._keep is not None:
            self._start = max(self._start, end - self._keep)

    def _make_room(self, count: int) -> None:
        held = self._rows[self._start : self._end]
        if self._keep is not None:
            held = held[max(0, len(held) + count - self._keep) :]
        need = len(held) + count
        if self._keep is None and 2 * need > len(self._rows):
            self._rows = np.empty((2 * need, held.shape[1]), np.float32)
        self._rows[: len(held)] = held  # NumPy copies what overlaps in the right order
        self._start, self._end = 0, len(held)

    def part(self, start: int, end: int) -> F32:
        """Rows start..end-1 of those held, the oldest is 0; only lent, until the next `extend`."""
        return self._rows[self._start + start : self._start + end]

    def drop_newest(self, count: int) -> None:
        """Forget the newest `count`, or all where there are fewer."""
        self._end -= max(0, min(count, len(self)))

    def drop_oldest(self, count: int) -> None:
        """Forget the oldest `count`, or all where there are fewer."""
        self._start += max(0, min(count, len(self)))

    def clear(self) -> None:
        """Forget all."""
        self._start = self._end = 0
