"""Which expert to give up when a slot is needed: our policy, and the contract every policy meets.

A policy sees routes and answers questions; it knows no file, no slot and no thread. `row` is the
position of a layer among the layers with experts (0..R-1), visited in a cycle, one after the
other, pass after pass. That cycle is why plain LRU is useless here: with fewer slots than a token
touches, the least recently used expert is always one the very next layers need.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mimo_edge.errors import UsageError

Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]
F64 = NDArray[np.float64]


class Policy(Protocol):
    """Chooses victims among the experts of all layers."""

    def touch(self, row: int, ids: Ids, counts: Ids, tokens: int) -> None:
        """Layer `row` is about to use distinct experts `ids` i64 [U]; `counts` i64 [U] says for how
        many of the pass's `tokens` tokens."""
        ...

    def victims(self, row: int, count: int, evictable: Mask, held: Ids) -> Ids:
        """`count` >= 1 distinct experts to give up while layer `row` runs, worst first.

        `evictable` bool [R, E] marks those that may be chosen, at least `count` of them; `held`
        i64 [R] says how many experts each layer has, those about to be read counted.
        Returns i64 [count, 2]: (row, expert).
        """
        ...

    def value(self) -> F64:
        """f64 [R, E]: the larger, the sooner an expert is expected to be needed."""
        ...


def worst(badness: F64, count: int, evictable: Mask) -> Ids:
    """The `count` evictable entries of largest `badness` [R, E], worst first, as i64 [count, 2].

    Ties go to the lowest row and expert, so that a run repeats exactly.
    """
    candidates = np.flatnonzero(evictable)
    if len(candidates) < count:
        raise UsageError(f"{count} victims wanted of {len(candidates)} evictable experts")
    scores = badness.ravel()[candidates]
    if count < len(candidates):
        cut = np.partition(scores, len(scores) - count)[len(scores) - count]
        keep = scores >= cut
        candidates, scores = candidates[keep], scores[keep]
    order = np.argsort(-scores, kind="stable")[:count]
    chosen: Ids = np.stack(np.divmod(candidates[order], badness.shape[1]), axis=1)
    return chosen


# Memory of the estimates of use, in passes; the last one is a plain mean until it is that old.
MEMORY_PASSES = (1.0, 4.0, 24.0, 256.0)
# The heat of the bundle counts like this many passes already seen.
HEAT_PASSES = 64.0
DISTANCE_WEIGHT = 3.0
# A pass of more tokens is a prefill: it tells how often experts are used, not what comes next.
MOST_ROWS_OF_A_STEP = 16
_PRIOR_WEIGHTS = (0.1, 0.1, 0.3, 0.5)
_PRIOR_STRENGTH = 4.0
_LEARNING_PASSES = 128.0


class FrequencyPolicy:
    """Gives up the expert whose next use is expected last.

    For an expert used with probability p in a pass of its layer, the next use is expected after
    (1/p - 1) further passes plus the part of a cycle until its layer runs again, which is longest
    for the layers just executed. (That part counts DISTANCE_WEIGHT times: p is only estimated,
    the distance is known.) p is a weighted sum of decayed frequencies with short and long
    memory: the routes of a layer repeat from token to token, and favourites last; how much of
    each is fitted, by least squares, to what the routes of this run turn out to be. The longest
    memory starts from the bundle's heat.

    Each layer keeps at least `floor` experts as long as another layer has more, so that none
    starves because its use is spread evenly. A quarter of the top-k is enough; a floor of the
    whole top-k is an equal share when slots are few, which costs a third of the hits where
    layers differ (tools/simulate_policies.py).
    """

    def __init__(
        self,
        rows: int,
        experts: int,
        chosen: int,
        *,
        heat: Mapping[int, F64] | None = None,
        floor: int | None = None,
    ) -> None:
        """`heat[row]` f64 [E]: how often each expert was used, in any unit."""
        if rows < 1 or not 1 <= chosen <= experts:
            raise UsageError(f"a policy for {rows} layers, {chosen} of {experts} experts")
        self._rows, self._experts = rows, experts
        self.floor = max(1, chosen // 4) if floor is None else floor
        self._use = np.full((rows, experts, len(MEMORY_PASSES)), chosen / experts)
        self._seen = np.zeros(rows)  # passes the longest memory stands on
        for row, share in (heat or {}).items():
            if not 0 <= row < rows or share.shape != (experts,):
                raise UsageError(f"heat of layer {row}: {list(share.shape)} of {experts} experts")
            if share.sum() > 0:
                # never zero: calibration saw a finite text
                blend = 0.98 * share / share.sum() + 0.02 / experts
                self._use[row] = np.minimum(chosen * blend, 1.0)[:, None]
                self._seen[row] = HEAT_PASSES
        self._weights = np.array(_PRIOR_WEIGHTS)
        # normal equations of the fit, the prior standing for a few passes of a layer
        unit = _PRIOR_STRENGTH * chosen * chosen / experts
        self._moments = unit * np.eye(len(MEMORY_PASSES))
        self._target = self._moments @ self._weights
        self._untold = 0
        self._passes = np.empty((rows, experts))  # 1/p: expected passes until the next use
        self._refresh(slice(None))
        distance = DISTANCE_WEIGHT * np.arange(1, rows + 1) / rows
        # until[row][r]: the (weighted) part of a cycle from layer `row` to layer r's next run
        self._until = np.stack([np.roll(distance, row + 1) for row in range(rows)])

    def touch(self, row: int, ids: Ids, counts: Ids, tokens: int) -> None:
        """See `Policy.touch`. A prefill of many tokens counts as that many passes."""
        use = self._use[row]
        if tokens <= MOST_ROWS_OF_A_STEP:
            passes, share = 1, np.ones(len(ids))
            self._learn(use, ids)
        else:
            passes, share = tokens, counts / tokens
        seen = min(self._seen[row] + passes, max(MEMORY_PASSES[-1], passes + 1.0))
        self._seen[row] = min(seen, MEMORY_PASSES[-1])
        keep = (1.0 - 1.0 / np.array(MEMORY_PASSES)) ** passes
        keep[-1] = 1.0 - passes / max(seen, passes + 1.0)
        use *= keep
        use[ids] += (1.0 - keep) * share[:, None]
        self._refresh(row)

    def _learn(self, use: F64, ids: Ids) -> None:
        """One more observation: what the estimates said, and what was used."""
        self._moments += use.T @ use
        self._target += use[ids].sum(axis=0)
        self._untold += 1
        if self._untold >= self._rows:
            self._untold = 0
            ridge = 1e-9 * np.trace(self._moments) * np.eye(len(self._target))
            self._weights = np.linalg.solve(self._moments + ridge, self._target)
            self._refresh(slice(None))
            forget = 1.0 - 1.0 / _LEARNING_PASSES
            self._moments *= forget
            self._target *= forget

    def _refresh(self, row: int | slice) -> None:
        p = np.clip(self._use[row] @ self._weights, 1e-4, 1.0)
        np.divide(1.0, p, out=self._passes[row])

    def victims(self, row: int, count: int, evictable: Mask, held: Ids) -> Ids:
        """See `Policy.victims`."""
        spare = np.maximum(held - self.floor, 0)
        badness = self._passes + self._until[row][:, None]
        open_rows = evictable & (spare > 0)[:, None]
        chosen: list[Ids] = []
        while count:
            room = np.count_nonzero(open_rows)
            if not room:  # every layer is at its floor: some layer must go below
                rest = evictable.copy()
                for r, e in chosen:
                    rest[r, e] = False
                return np.concatenate([*(c[None] for c in chosen), worst(badness, count, rest)])
            for pair in worst(badness, min(count, int(room)), open_rows):
                r = int(pair[0])
                if spare[r]:
                    spare[r] -= 1
                    count -= 1
                    chosen.append(pair)
                    open_rows[r, pair[1]] = False
                else:
                    open_rows[r] = False
        return np.stack(chosen)

    def value(self) -> F64:
        """See `Policy.value`: the expected share of passes that use each expert."""
        return 1.0 / self._passes
