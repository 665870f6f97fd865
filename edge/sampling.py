"""From logits to a token: what the distribution is, and how one token is drawn from it.

The two are separate because lossless speculative decoding needs the distribution itself.
Filters apply in the order temperature, top-k, top-p, min-p, each on what the one before it
left, as transformers' logits processors do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mimo_edge.errors import GenerationError, UsageError
from mimo_edge.runtimes.base import F32

F64 = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 are off.

    Raises UsageError on values outside their range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, math.inf),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise UsageError(f"{name} = {value!r} is not a number")
            if not math.isfinite(value) or not low <= value <= high:
                raise UsageError(f"{name} = {value} is outside {low:g}..{high:g}")
        if self.top_p == 0:
            raise UsageError("top_p = 0 keeps no token", "use temperature 0 for greedy decoding")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise UsageError(f"top_k = {self.top_k!r} is not a count")
        if self.seed is not None and (
            isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0
        ):
            raise UsageError(f"seed = {self.seed!r} is not a non-negative integer")


class Sampler:
    """Draws tokens for one generation, with its own random stream.

    `banned` bool [V] marks ids that are never drawn (vocabulary padding). Ties go to the
    lowest id. Exactly one random number is used per sampled token, none when greedy, so a
    generation with drafts consumes the same stream as one without.
    """

    def __init__(self, params: SamplingParams, banned: Mask | None = None) -> None:
        self.params = params
        self._banned = banned if banned is not None and bool(banned.any()) else None
        self._rng = np.random.default_rng(params.seed)

    def sample(self, logits: F32) -> int:
        """The next token for logits [V]. Raises GenerationError on NaN."""
        if self.params.temperature == 0:
            return self.best(logits)
        return self.draw(self.distribution(logits))

    def best(self, logits: F32) -> int:
        """The most likely token that is not banned: what a draft block proposes, and what greedy
        decoding takes. Raises GenerationError on NaN."""
        # NaN wins every maximum. A finite one that is not banned is the answer, without a look at
        # the ids one by one; a small model's step is as short as ten of those.
        top = int(logits.argmax())
        banned = self._banned is not None and (
            len(self._banned) != len(logits) or bool(self._banned[top])
        )
        if banned or not math.isfinite(logits[top]):
            return int(np.argmax(self._usable(logits)))
        return top

    def draw(self, p: F64) -> int:
        """One id from a distribution [V], by inversion of its cumulative sum."""
        cumulative = np.cumsum(p)
        drawn = np.searchsorted(cumulative, self._rng.random() * cumulative[-1], side="right")
        # Rounding may land on the total itself: the last id with any mass is meant then.
        return int(drawn) if drawn < len(p) else int(np.flatnonzero(p)[-1])

    def distribution(self, logits: F32) -> F64:
        """The fully processed probabilities f64 [V] of logits [V]; greedy is one-hot.

        Raises GenerationError on NaN, on +inf, and when nothing is left to choose from.
        """
        usable = self._usable(logits)
        params = self.params
        if params.temperature == 0:
            p = np.zeros(len(usable), dtype=np.float64)
            p[int(np.argmax(usable))] = 1.0
            return p
        scaled = usable.astype(np.float64)
        scaled -= scaled.max()
        with np.errstate(over="ignore"):  # a tiny temperature leaves the best alone: the rest -inf
            scaled /= params.temperature
        if 0 < params.top_k < len(scaled):
            scaled[~_top_k(scaled, params.top_k)] = -np.inf
        p = np.exp(scaled)
        p /= p.sum()
        if params.top_p < 1:
            p[~_nucleus(p, params.top_p)] = 0.0
            p /= p.sum()
        if params.min_p > 0:
            p[p < params.min_p * p.max()] = 0.0
            p /= p.sum()
        return p

    def _usable(self, logits: F32) -> F32:
        """Logits with banned ids at -inf. NaN and +inf mean the model's numbers are broken."""
        if self._banned is not None:
            if len(self._banned) != len(logits):
                raise GenerationError(f"{len(logits)} logits, mask of {len(self._banned)} ids")
            logits = np.where(self._banned, np.float32(-np.inf), logits)
        top = logits.max()  # NaN wins every maximum
        if not np.isfinite(top):
            kind = "NaN" if np.isnan(top) else "infinite" if top > 0 else "no usable"
            raise GenerationError(
                f"the model returned {kind} logits", "the weights may be damaged: verify the bundle"
            )
        return logits


def _top_k(values: F64, k: int) -> Mask:
    """Mask of exactly k largest values; among equals at the border the lowest ids stay."""
    border = np.partition(values, len(values) - k)[len(values) - k]
    keep: Mask = values > border
    keep[np.flatnonzero(values == border)[: k - int(keep.sum())]] = True
    return keep


def _nucleus(p: F64, top_p: float) -> Mask:
    """Mask of the smallest set of most likely ids whose mass reaches top_p."""
    # Ids below this threshold weigh less than 1 - top_p together, so none is in the nucleus:
    # sorting the few others instead of the vocabulary gives the same set.
    candidates = np.flatnonzero(p >= (1 - top_p) / len(p))
    order = candidates[np.argsort(-p[candidates], kind="stable")]
    size = int(np.searchsorted(np.cumsum(p[order]), top_p, side="left")) + 1
    keep = np.zeros(len(p), dtype=np.bool_)
    keep[order[:size]] = True
    return keep
