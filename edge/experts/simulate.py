"""Replaying traces against policies: hit rates without a model, a disk or a clock.

The bookkeeping is the cache's own (`Residency`), so that what the simulator says about a policy
is what the cache would do, apart from timing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimo_edge.errors import UsageError
from mimo_edge.experts.baselines import BeladyPolicy, LfuPolicy, LruPolicy
from mimo_edge.experts.policy import F64, FrequencyPolicy, Ids, Policy
from mimo_edge.experts.residency import Residency
from mimo_edge.experts.trace import Phase, Route, Trace, TraceHeader

PolicyMaker = Callable[[Trace], Policy]


@dataclass(frozen=True)
class Replay:
    """What a policy did on a trace: experts asked for (distinct per layer and pass), found in a
    slot, and given up; the shares by layer. `ahead` experts were read before they were asked for,
    on a guess."""

    policy: str
    slots: int
    requests: int
    hits: int
    evictions: int
    layer_hit_rate: tuple[float, ...]
    ahead: int = 0

    @property
    def hit_rate(self) -> float:
        """hits / requests."""
        return self.hits / self.requests if self.requests else 0.0

    @property
    def reads(self) -> int:
        """Experts read, asked for or on a guess."""
        return self.requests - self.hits + self.ahead

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {**asdict(self), "hit_rate": self.hit_rate}


def distinct(ids: NDArray[Any]) -> tuple[Ids, Ids]:
    """Distinct experts of ids [T, K] in rising order and how many tokens use each, i64 [U]."""
    values, counts = np.unique(ids, return_counts=True)
    return values.astype(np.int64), counts.astype(np.int64)


def frequency_maker(heat: Mapping[int, F64] | None = None) -> PolicyMaker:
    """Our policy, started from the heat `heat[layer]` f64 [E] of model layers when given."""

    def make(trace: Trace) -> Policy:
        h = trace.header
        rows = {h.layers.index(n): f for n, f in (heat or {}).items() if n in h.layers}
        return FrequencyPolicy(len(h.layers), h.experts, h.chosen, heat=rows)

    return make


def _belady(trace: Trace) -> Policy:
    steps = [(route.row, distinct(route.ids)[0]) for route in trace.routes]
    return BeladyPolicy(len(trace.header.layers), trace.header.experts, steps)


POLICIES: dict[str, PolicyMaker] = {
    "lru": lambda t: LruPolicy(len(t.header.layers), t.header.experts),
    "lfu": lambda t: LfuPolicy(len(t.header.layers), t.header.experts),
    "ours": frequency_maker(),
    "belady": _belady,
}


def replay(
    trace: Trace,
    slots: int,
    policy: str,
    makers: Mapping[str, PolicyMaker] = POLICIES,
    *,
    skip: int = 0,
    group: int = 8,
    warm: bool = False,
    ahead: int = 0,
) -> Replay:
    """Run `trace` through `slots` slots. The first `skip` records fill them and are not counted.

    A pass that wants more experts than there are slots goes in groups of `group`, as the cache
    streams it. With `warm` the slots hold the most valuable experts before the first record.
    `ahead` > 0 is speculative prefetch: while a layer runs, up to `ahead` experts are read that
    the next layer used in its last pass and that are gone. Raises UsageError for a trace that
    needs more slots per token than there are.
    """
    if policy not in makers:
        raise UsageError(f"there is no policy {policy!r}", f"known: {', '.join(makers)}")
    h = trace.header
    if slots < h.chosen:
        raise UsageError(f"{slots} slots for {h.chosen} experts per token")
    made = makers[policy](trace)
    residency = Residency(len(h.layers), h.experts, slots, made)
    requests = np.zeros(len(h.layers), np.int64)
    hits = np.zeros(len(h.layers), np.int64)
    guessed = 0
    last: dict[int, Ids] = {}
    if warm:
        best = np.argsort(-made.value(), axis=None, kind="stable")[:slots]
        for row, expert in zip(*np.divmod(best, h.experts), strict=True):
            residency.claim(int(row), np.array([expert]))
            residency.settle(int(row), np.array([expert]))
    for index, route in enumerate(trace.routes):
        if index == skip:
            residency.evictions[:] = 0
            guessed = 0
        ids, counts = distinct(route.ids)
        made.touch(route.row, ids, counts, len(route.ids))
        found = residency.slot_of[route.row, ids] >= 0
        if index >= skip:
            requests[route.row] += len(ids)
            hits[route.row] += int(found.sum())
        missing = ids[~found]
        whole = len(ids) <= slots
        if whole:
            residency.hold(route.row, ids[found])
        step = len(missing) if whole else max(1, min(group, slots // 2))
        for start in range(0, len(missing), max(step, 1)):
            part = missing[start : start + step]
            residency.claim(route.row, part)
            residency.settle(route.row, part)
        if ahead and whole:
            residency.hold(route.row, missing)
            next_row = (route.row + 1) % len(h.layers)
            guess = last.get(next_row, missing[:0])
            guess = guess[residency.slot_of[next_row, guess] < 0][:ahead]
            guess = guess[: residency.available()]
            residency.claim(next_row, guess)
            residency.settle(next_row, guess)
            guessed += len(guess)
            residency.unhold(route.row, missing)
        last[route.row] = ids
        if whole:
            residency.unhold(route.row, ids[found])
    rates = np.divide(hits, requests, out=np.zeros(len(h.layers)), where=requests > 0)
    return Replay(
        policy,
        slots,
        int(requests.sum()),
        int(hits.sum()),
        int(residency.evictions.sum()),
        tuple(round(float(rate), 6) for rate in rates),
        guessed,
    )


def synthetic_trace(
    layers: int,
    experts: int,
    chosen: int,
    tokens: int,
    *,
    skew: float = 0.0,
    repeat: float = 0.0,
    drift: float = 0.0,
    seed: int = 0,
) -> Trace:
    """A decode trace with known statistics.

    Every layer draws `chosen` distinct experts per token, expert of rank r with weight
    (r + 1)^-skew (0 is uniform); ranks are shuffled per layer. Each choice of the token before is
    kept with probability `repeat`. `drift` is the share of experts per 100 tokens whose ranks are
    exchanged with others', as a text changes its subject.
    """
    if not (0 <= repeat <= 1 and drift >= 0 and np.isfinite(skew) and tokens >= 1):
        raise UsageError(f"skew {skew}, repeat {repeat}, drift {drift}, {tokens} tokens")
    header = TraceHeader(
        tuple(range(layers)),
        experts,
        chosen,
        f"synthetic skew={skew} repeat={repeat} drift={drift} seed={seed}",
    )
    rng = np.random.default_rng(seed)
    weights = -skew * np.log(np.arange(1, experts + 1))
    log_weight = np.stack([rng.permutation(weights) for _ in range(layers)])
    last = np.full((layers, chosen), -1)
    routes = []
    swaps = drift * experts / 100 / 2
    for _ in range(tokens):
        for row in range(layers):
            for _ in range(rng.poisson(swaps)):
                a, b = rng.integers(experts, size=2)
                log_weight[row, [a, b]] = log_weight[row, [b, a]]
            keys = log_weight[row] + rng.gumbel(size=experts)
            kept = last[row][(last[row] >= 0) & (rng.random(chosen) < repeat)]
            keys[kept] = np.inf
            ids = np.argpartition(-keys, chosen - 1)[:chosen]
            last[row] = ids
            routes.append(Route(Phase.DECODE, row, np.sort(ids)[None].astype(np.int64)))
    return Trace(header, tuple(routes))


def cyclic_trace(layers: int, chosen: int, tokens: int, experts: int) -> Trace:
    """Every token uses the same experts: the case in which LRU hits nothing."""
    header = TraceHeader(tuple(range(layers)), experts, chosen, "cyclic")
    ids = np.arange(chosen, dtype=np.int64)[None]
    return Trace(
        header,
        tuple(Route(Phase.DECODE, row, ids) for _ in range(tokens) for row in range(layers)),
    )


def slots_of_shares(trace: Trace, shares: Sequence[float]) -> list[int]:
    """Slot counts for shares of all experts, rising, each enough for a token."""
    h = trace.header
    total = len(h.layers) * h.experts
    if not shares or not all(0 < share <= 1 for share in shares):
        raise UsageError(f"shares {list(shares)}", "give numbers above 0, at most 1")
    return sorted({max(h.chosen, round(share * total)) for share in shares})


def compare(
    trace: Trace,
    slots: Sequence[int],
    policies: Sequence[str],
    makers: Mapping[str, PolicyMaker] = POLICIES,
    *,
    skip: int = 0,
) -> list[list[Replay]]:
    """Every policy at every slot count: a list per slot count."""
    return [[replay(trace, n, policy, makers, skip=skip) for policy in policies] for n in slots]
