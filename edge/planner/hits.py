"""How many of the experts a token needs are in memory already: from heat, or from stated curves.

Nobody has published hit rates against cache size on correct MiMo-V2 routes, so without a bundle's
heat a curve is assumed and named. Points are (share of all experts that have a slot, hit rate):
- `uniform`: no expert is more likely than another, the worst case, and what models of random
  weights show.
- `typical`: at 1/32, which is one token's worth of MiMo-V2-Flash, the low end of what the last
  route of a layer recalls on corrected MiMo-V2.5 routes (25 to 38 %, x3haloed/mimo-prismwing
  PW-0212); beyond it what our cache hits on routes of Zipf exponent 1 (docs/benchmarks.md).
- `skewed`: at 1/32 the high end of those; at a quarter 77 %, as measured on Qwen3-30B-A3B
  (Helldez/BigMoeOnEdge docs/android-memory.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from mimo_edge.errors import UsageError
from mimo_edge.heat import Heat

CURVES: Mapping[str, tuple[tuple[float, float], ...]] = MappingProxyType(
    {
        "uniform": ((0.0, 0.0), (1.0, 1.0)),
        "typical": (
            (0.0, 0.0),
            (1 / 32, 0.25),
            (1 / 16, 0.30),
            (1 / 8, 0.45),
            (1 / 4, 0.62),
            (1 / 2, 0.80),
            (1.0, 1.0),
        ),
        "skewed": (
            (0.0, 0.0),
            (1 / 32, 0.38),
            (1 / 16, 0.46),
            (1 / 8, 0.60),
            (1 / 4, 0.77),
            (1 / 2, 0.90),
            (1.0, 1.0),
        ),
    }
)
DEFAULT_CURVE, EVEN = "typical", "uniform"
HEAT = "heat"
# Calibration saw a finite text: this share of the uses is spread over all experts.
_UNSEEN = 0.02


class Hits(NamedTuple):
    """A hit rate and where it comes from. `independent`: neighbouring tokens choose their experts
    without regard to each other, as with random weights."""

    rate: float
    source: str
    independent: bool = False


def expected_hits(slots: int, total: int, routes: str | None, heat: Heat | None) -> Hits:
    """Hit rate of `slots` slots for `total` experts.

    `routes` is a curve's name or "heat"; None takes the heat when there is one, else "typical".
    Raises UsageError on another name, or when there is no heat.
    """
    if slots >= total:
        return Hits(1.0, "every expert is in memory", routes == EVEN)
    if routes is None:
        routes = DEFAULT_CURVE if heat is None else HEAT
    if routes == HEAT:
        if heat is None:
            raise UsageError(
                "this model has no heat to take hits from",
                f"calibrate it (export --calibrate), or use {', '.join(CURVES)}",
            )
        return Hits(
            _of_heat(slots, heat),
            f"heat of {heat.tokens} calibration tokens: the hottest {slots} of {total} experts",
        )
    if routes not in CURVES:
        raise UsageError(f"routes {routes!r}", f"known: {', '.join((*CURVES, HEAT))}")
    rate = _interpolate(CURVES[routes], slots / total)
    return Hits(rate, f"assumed curve {routes!r}", routes == EVEN)


def _of_heat(slots: int, heat: Heat) -> float:
    """The share of uses that falls on the `slots` experts of largest share of their layer's."""
    use = []
    for counts in heat.counts.values():
        total = float(counts.sum())
        even = np.full(len(counts), 1.0 / len(counts))
        use.append((1 - _UNSEEN) * counts / total + _UNSEEN * even if total else even)
    ranked = np.sort(np.concatenate(use))[::-1]
    return float(ranked[:slots].sum() / ranked.sum())


def _interpolate(points: tuple[tuple[float, float], ...], share: float) -> float:
    for (low, a), (high, b) in pairwise(points):
        if share <= high:
            return a + (b - a) * (share - low) / (high - low)
    return points[-1][1]


def distinct_experts(experts: int, chosen: int, tokens: float, independent: bool = False) -> float:
    """Experts of a layer that `tokens` neighbouring tokens use together.

    Neighbours share: MiMo-V2.5 touches 21 to 24 of 256 with 4 tokens and 34 to 39 with 8
    (x3haloed/mimo-prismwing PW-0208, 0211, 0215, 0216), which is chosen * tokens^0.75; never more
    than `independent` tokens would.
    """
    if not experts:
        return 0.0
    most = experts * (1.0 - (1.0 - chosen / experts) ** tokens)
    return float(most if independent else min(most, chosen * tokens**0.75))
