"""How reading experts runs beside computing: what the engine overlaps, in one place.

A layer's missing experts are known when its router is done. They are read while the experts at hand
compute, and what comes last is computed behind its read. From then until the next router is done
flash would be idle: experts of the next layer are read on a guess (runtimes/ggml/look_ahead.py), in
a prompt the next groups (experts/cache.py). A pass is walked layer by layer, because a layer with
little before its router has little time to read ahead in, and over every number of experts that may
be missing, because one too many is waited for and one too few gains nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, lgamma, log
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]

# Share of a layer's experts that its router names rightly a layer earlier, and of the first such
# layer's from the embedding: 71 to 77 % and 51 % on random weights of real geometry
# (runtimes/ggml/look_ahead.py).
RIGHT_GUESSES, FIRST_RIGHT_GUESSES = 0.74, 0.51
# Experts of the next layer read ahead while a long pass computes this one's last: two groups
# (runtimes/ggml/expert_source.py).
PROMPT_AHEAD = 16


@dataclass(frozen=True)
class Streamed:
    """A pass through layers whose experts are streamed, in seconds: each wants `wanted` experts, of
    which the share `missing` is on flash; one computes in `compute_s`, is read in `read_s`, and
    costs the engine `arrival_s` besides. Computing takes `slowed` times longer while something is
    read, and a wrong guess holds the lanes for `late_s`, until the parts they are in have come.
    `before` is what every layer computes before its router is done."""

    before: Sequence[float]
    wanted: float
    missing: float
    compute_s: float
    read_s: float
    arrival_s: float
    slowed: float
    late_s: float


class Walked(NamedTuple):
    """Seconds of all layers besides `before`: waited for flash, computing experts, lost to
    reading, and of the engine; and how many experts were read."""

    flash: float
    computing: float
    lost: float
    host: float
    experts: float

    @property
    def seconds(self) -> float:
        """All of them."""
        return self.flash + self.computing + self.lost + self.host


def few_tokens(pass_: Streamed) -> Walked:
    """A step: with guesses or without, as the engine takes what is faster (experts/guesses.py)."""
    counts, chances = _missing(pass_.wanted, pass_.missing)
    guessed = _walk(pass_, counts, chances, FIRST_RIGHT_GUESSES, RIGHT_GUESSES, np.inf)
    return min(guessed, _walk(pass_, counts, chances, 0.0, 0.0, 0.0), key=lambda w: w.seconds)


def many_tokens(pass_: Streamed) -> Walked:
    """A chunk of a prompt, in which every layer wants nearly all experts."""
    counts = np.array([pass_.missing * pass_.wanted])
    return _walk(pass_, counts, np.ones(1), 0.0, 1.0, PROMPT_AHEAD)


def _missing(wanted: float, share: float) -> tuple[F64, F64]:
    """How many of a layer's experts may be missing, and the chance of each: as if each of them were
    missing by itself. The counts are scaled so that their mean is that of `wanted`."""
    if share >= 1:
        return np.array([wanted]), np.ones(1)
    n = max(1, round(wanted))
    ways = [lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) for k in range(n + 1)]
    there, not_there = log(1 - share), log(share)
    chances = [exp(way + k * not_there + (n - k) * there) for k, way in enumerate(ways)]
    counts = [k * wanted / n for k in range(n + 1)]
    return np.array(counts, np.float64), np.array(chances, np.float64)


def _walk(
    p: Streamed, counts: F64, chances: F64, first: float, right: float, most: float
) -> Walked:
    """The expectation over all numbers of missing experts `counts` [N] in every layer. Of the
    guesses the share `first` is right in the first layer, `right` in the others; at most `most`
    experts are read ahead of a layer."""
    busy = p.wanted * p.compute_s
    total = np.zeros(5)
    # Experts for which there was time before this layer's router was done, [M], by chance.
    time, likely = np.array([p.before[0] / p.read_s]), np.ones(1)
    for index, before in enumerate(p.before):
        share = right if index else first
        ahead = np.minimum(np.minimum(time[:, None], counts), most if share else 0.0)  # [M, N]
        left = counts - share * ahead
        wrong = (1 - share) * np.minimum(ahead, 1.0) * (time[:, None] < counts)
        reading = left * p.read_s + wrong * p.late_s
        host = (left + ahead) * p.arrival_s
        lost = p.slowed * np.minimum(reading, busy)
        computing = busy + lost + host
        last = np.minimum(left, 1.0) * p.compute_s
        waiting = reading + last > computing
        weight = likely[:, None] * chances
        seconds = np.maximum(computing, reading + last)
        beside = p.slowed * np.minimum(before, ahead * p.read_s)
        parts = (
            np.where(waiting, reading, 0.0),
            np.where(waiting, last, busy),
            np.where(waiting, 0.0, lost) + beside,
            np.where(waiting, 0.0, host),
            left + ahead,
        )
        total += [float((weight * part).sum()) for part in parts]
        if index + 1 < len(p.before):
            idle = seconds - reading + p.before[index + 1]
            time, likely = (likely[:, None] * idle).sum(0) / p.read_s, chances
    return Walked(*total.tolist())
