"""Policies to compare with: LRU, LFU, and Belady's, which knows the future."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mimo_edge.errors import UsageError
from mimo_edge.experts.policy import F64, Ids, Mask, worst

NEVER = np.inf


class LruPolicy:
    """Gives up what was used longest ago."""

    def __init__(self, rows: int, experts: int) -> None:
        self._clock = 0
        self._used = np.full((rows, experts), -1.0)

    def touch(self, row: int, ids: Ids, counts: Ids, tokens: int) -> None:
        """See `Policy.touch`."""
        self._clock += 1
        self._used[row, ids] = self._clock

    def victims(self, row: int, count: int, evictable: Mask, held: Ids) -> Ids:
        """See `Policy.victims`."""
        return worst(-self._used, count, evictable)

    def value(self) -> F64:
        """See `Policy.value`."""
        return self._used.copy()


class LfuPolicy:
    """Gives up what was used least often since the start."""

    def __init__(self, rows: int, experts: int) -> None:
        self._uses = np.zeros((rows, experts))

    def touch(self, row: int, ids: Ids, counts: Ids, tokens: int) -> None:
        """See `Policy.touch`."""
        self._uses[row, ids] += counts

    def victims(self, row: int, count: int, evictable: Mask, held: Ids) -> Ids:
        """See `Policy.victims`."""
        return worst(-self._uses, count, evictable)

    def value(self) -> F64:
        """See `Policy.value`."""
        return self._uses.copy()


class BeladyPolicy:
    """Gives up what is needed again last: the bound no policy without foresight can pass.

    Made for one run over `steps`, the (row, distinct experts) of every touch to come, in order.
    """

    def __init__(self, rows: int, experts: int, steps: Sequence[tuple[int, Ids]]) -> None:
        coming = np.full((rows, experts), NEVER)
        self._next: list[tuple[int, Ids, NDArray[np.float64]]] = []
        for at in range(len(steps) - 1, -1, -1):
            row, ids = steps[at]
            self._next.append((row, ids, coming[row, ids]))
            coming[row, ids] = at
        self._coming: F64 = coming

    def touch(self, row: int, ids: Ids, counts: Ids, tokens: int) -> None:
        """See `Policy.touch`. Raises UsageError when the run leaves the steps it was made for."""
        expected = self._next.pop() if self._next else None
        if expected is None or expected[0] != row or not np.array_equal(expected[1], ids):
            raise UsageError("Belady's policy was made for another run")
        self._coming[row, ids] = expected[2]

    def victims(self, row: int, count: int, evictable: Mask, held: Ids) -> Ids:
        """See `Policy.victims`."""
        return worst(self._coming, count, evictable)

    def value(self) -> F64:
        """See `Policy.value`."""
        return -self._coming
