"""Whether an NPU computes what a graph says: its outputs against the CPU's on the same inputs.

A provider may compute other numbers than were written without saying so; what is compiled is run
once on rows of the calibration text and compared, output by output, before it is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimo_edge.errors import ProviderError

Arrays = Mapping[str, NDArray[Any]]

# Largest deviation of an output, as a share of its largest value. Measured on mimo-nano: below
# 0.006 where nothing is wrong (fp16 and u16 round otherwise than the CPU); a wrong scale, or
# products of the upper 8 bits alone, give 0.03 and more.
LIMIT = 0.02
CHOICE = "choice"
"""What experts are chosen by, f32 [T, E]: an output that only the CPU's run has."""


def deviations(found: Arrays, expected: Arrays, rows: int, experts: int) -> dict[str, float]:
    """How far each float output is off in its first `rows` rows, as a share of the expected one's
    largest value. Router weights are compared expert by expert, in rows that choose the same ones.
    "ids" says of the others how far apart, in what they are chosen by, the experts are that were
    taken for each other: next to nothing when they were nearly equal."""
    made: dict[str, float] = {}
    same = np.ones(rows, bool)
    if "ids" in expected:
        ours, theirs = (_chosen(x["ids"][:rows], experts) for x in (found, expected))
        same = (ours == theirs).all(axis=1)
        choice = expected[CHOICE][:rows]
        left_out = np.where(theirs & ~ours, choice, -np.inf).max(axis=1)[~same]
        taken = np.where(ours & ~theirs, choice, np.inf).min(axis=1)[~same]
        made["ids"] = float((left_out - taken).max(initial=0.0))
    for name, want in expected.items():
        if name in ("ids", CHOICE):
            continue
        have = found[name]
        if name == "weights":
            have, want = (
                _by_expert(x["ids"][:rows], x["weights"][:rows], experts)[same]
                for x in (found, expected)
            )
        elif name[:3] in ("kn_", "vn_"):
            have, want = have[:, :, :rows], want[:, :, :rows]
        else:
            have, want = have[:rows], want[:rows]
        if not np.isfinite(have).all():
            made[name] = float("inf")
        elif want.size:
            largest = float(np.abs(want).max())
            off = float(np.abs(have.astype(np.float64) - want).max())
            made[name] = off / largest if largest else off
    return made


def check(found: Arrays, expected: Arrays, rows: int, experts: int, what: str) -> dict[str, float]:
    """The deviations, none above its limit. Raises ProviderError naming the worst otherwise."""
    made = deviations(found, expected, rows, experts)
    bad = {n: d for n, d in made.items() if not d <= LIMIT}
    if bad:
        worst = max(bad, key=lambda name: bad[name])
        raise ProviderError(
            f"{what}: {worst} deviates by {bad[worst]:.1%} of its largest value from what the "
            "graph says"
            if worst != "ids"
            else f"{what}: experts are chosen that score {bad[worst]:.3f} less than others"
        )
    return made


def _chosen(ids: NDArray[Any], experts: int) -> NDArray[np.bool_]:
    made = np.zeros((len(ids), experts), bool)
    np.put_along_axis(made, ids.astype(np.int64), True, axis=1)
    return made


def _by_expert(ids: NDArray[Any], weights: NDArray[Any], experts: int) -> NDArray[np.float32]:
    made = np.zeros((len(ids), experts), np.float32)
    np.put_along_axis(made, ids.astype(np.int64), weights, axis=1)
    return made
