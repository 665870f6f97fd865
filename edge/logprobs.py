"""Log-probabilities of chosen tokens, for whoever asks how sure the model was."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mimo_edge.runtimes.base import F32

MAX_TOP = 20
"""Most alternatives reported for a token, as in OpenAI's API."""


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token, the natural logarithm of its probability, and the likeliest tokens of its
    place as (id, logprob), best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprob(logits: F32, token: int, count: int) -> TokenLogprob:
    """Of logits f32 [V]: what the model itself says, before temperature, penalties and grammar.

    `count` likeliest tokens are listed, equal ones by their ids; impossible ones never.
    """
    wide = logits.astype(np.float64)
    wide -= wide.max()
    wide -= np.log(np.exp(wide).sum())
    top: list[tuple[int, float]] = []
    if count:
        border = np.partition(wide, max(0, len(wide) - count))[max(0, len(wide) - count)]
        ids = np.flatnonzero(wide >= border)
        best = ids[np.argsort(-wide[ids], kind="stable")][:count]
        top = [(int(id_), float(wide[id_])) for id_ in best if np.isfinite(wide[id_])]
    return TokenLogprob(token, float(wide[token]), tuple(top))
