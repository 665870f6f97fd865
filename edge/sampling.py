"""From logits to a token: what the distribution is, and how one token is drawn from it.

Logits are processed in one order: penalties, the mask of a constraint, temperature, top-k, top-p,
min-p, each on what the one before it left, as transformers' logits processors do. Plain steps and
the rows of a verify go the same way: a row is looked at only when all tokens before it are chosen,
so penalties and constraint stand where they would stand without drafts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mimo_edge.errors import GenerationError, UsageError
from mimo_edge.logprobs import TokenLogprob, token_logprob
from mimo_edge.penalties import Penalties
from mimo_edge.runtimes.base import F32

F64 = NDArray[np.float64]
Mask = NDArray[np.bool_]


_RANGES = (
    ("temperature", 0.0, math.inf),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.01, 100.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
)


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 are off,
    penalties as in `Penalties`.

    Raises UsageError on values outside their range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
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

    def penalties(self, prompt: Sequence[int]) -> Penalties | None:
        """The penalties of an answer to `prompt`; None when they change nothing."""
        wanted = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        return None if wanted == (1.0, 0.0, 0.0) else Penalties(prompt, *wanted)


class Constraint(Protocol):
    """What an answer may be, followed token by token."""

    def allows(self, token: int) -> bool:
        """Whether the answer may go on with `token`; cheaper than `mask`, and agrees with it."""
        ...

    def mask(self) -> Mask | None:
        """bool [V] of the tokens that may come next; None when every one may."""
        ...

    def advance(self, token: int) -> None:
        """The answer goes on with `token`, which is allowed."""
        ...

    def retract(self, count: int) -> None:
        """Take back the newest `count` tokens."""
        ...

    @property
    def ended(self) -> bool:
        """Whether the answer ended with the newest token."""
        ...


class Sampler:
    """Chooses the tokens of one generation, with its own random stream.

    `banned` bool [V] marks ids that are never drawn (vocabulary padding). `prompt` is what the
    repetition penalty counts beside the answer, `constraint` stands at the answer's beginning.
    `top_logprobs` asks for the log-probability of each token and of as many alternatives. Ties go
    to the lowest id. Exactly one random number is used per sampled token, none when greedy, so a
    generation with drafts consumes the same stream as one without.
    """

    def __init__(
        self,
        params: SamplingParams,
        banned: Mask | None = None,
        *,
        prompt: Sequence[int] = (),
        constraint: Constraint | None = None,
        top_logprobs: int | None = None,
    ) -> None:
        self.params = params
        self._banned = banned if banned is not None and bool(banned.any()) else None
        self._rng = np.random.default_rng(params.seed)
        self._penalties = params.penalties(prompt)
        self._constraint = constraint
        self._proposed: list[int] = []
        self._top_logprobs = top_logprobs
        self._logprobs: list[TokenLogprob] = []
        # Nothing is counted, followed or reported: the logits are all there is.
        self._plain = self._penalties is None and constraint is None and top_logprobs is None

    def state(self) -> dict[str, Any]:
        """Where the random stream is, JSON-ready."""
        return dict(self._rng.bit_generator.state)

    def resume(self, state: dict[str, Any], said: Sequence[int]) -> None:
        """Go on from `state`, after the answer's tokens `said`. Raises ValueError when it is no
        state of such a stream."""
        try:
            self._rng.bit_generator.state = state
        except (TypeError, KeyError, OverflowError) as error:
            raise ValueError(f"no state of a random stream: {error}") from None
        for token in said:
            self.advance(token)

    def sample(self, logits: F32) -> int:
        """The next token for logits [V]. Raises GenerationError on NaN, and when nothing that is
        allowed is left."""
        if self._plain and self.params.temperature == 0:
            return self._likeliest(logits)
        usable = self._usable(logits)
        if self.params.temperature == 0:
            token = self._best(self._penalised(usable))
        else:
            token = self.draw(self._probabilities(usable))
        if self._top_logprobs is not None:
            self._logprobs.append(token_logprob(usable, token, self._top_logprobs))
        self.advance(token)
        return token

    def advance(self, token: int) -> None:
        """The answer goes on with `token`; `sample` says so of its own."""
        if self._penalties is not None:
            self._penalties.add(token)
        if self._constraint is not None:
            self._constraint.advance(token)

    def propose(self, logits: F32) -> int | None:
        """A draft for the place after the newest token and the proposals so far: the likeliest
        token that may stand there, or None when the answer has ended."""
        if self._plain:
            return self._likeliest(logits)
        if self._constraint is not None and self._constraint.ended:
            return None
        token = self._best(self._penalised(self._usable(logits)))
        if self._penalties is not None or self._constraint is not None:
            self.advance(token)
            self._proposed.append(token)
        return token

    def propose_likeliest(self, tokens: list[int]) -> list[int] | None:
        """Of tokens with the largest logits of their places, those up to the first that `propose`
        would not take; None when more than the largest logit decides."""
        if not self._plain:
            return None
        if self._banned is not None:
            for place, token in enumerate(tokens):
                if self._banned[token]:
                    return tokens[:place]
        return tokens

    def retract(self) -> None:
        """Take back all proposals: what was only proposed is not said."""
        if not self._proposed:
            return
        if self._constraint is not None:
            self._constraint.retract(len(self._proposed))
        if self._penalties is not None:
            for token in self._proposed:
                self._penalties.remove(token)
        self._proposed.clear()

    def take_logprobs(self) -> tuple[TokenLogprob, ...]:
        """Log-probabilities of the tokens sampled since the last call."""
        taken, self._logprobs = tuple(self._logprobs), []
        return taken

    def draw(self, p: F64) -> int:
        """One id from a distribution [V], by inversion of its cumulative sum."""
        cumulative = np.cumsum(p)
        drawn = np.searchsorted(cumulative, self._rng.random() * cumulative[-1], side="right")
        # Rounding may land on the total itself: the last id with any mass is meant then.
        return int(drawn) if drawn < len(p) else int(np.flatnonzero(p)[-1])

    def distribution(self, logits: F32) -> F64:
        """The fully processed probabilities f64 [V] of logits [V] at the next place; greedy is
        one-hot.

        Raises GenerationError on NaN, on +inf, and when nothing is left to choose from.
        """
        return self._probabilities(self._usable(logits))

    def _probabilities(self, usable: F32) -> F64:
        allowed = self._masked(self._penalised(usable))
        params = self.params
        if params.temperature == 0:
            p = np.zeros(len(allowed), dtype=np.float64)
            p[int(np.argmax(allowed))] = 1.0
            return p
        scaled = allowed.astype(np.float64)
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

    def _likeliest(self, logits: F32) -> int:
        """The likeliest token that is not banned. Raises GenerationError on NaN."""
        # NaN wins every maximum. A finite one that is not banned is the answer, without a look at
        # the ids one by one; a small model's step is as short as ten of those.
        top = int(logits.argmax())
        banned = self._banned is not None and (
            len(self._banned) != len(logits) or bool(self._banned[top])
        )
        if banned or not math.isfinite(logits[top]):
            return int(np.argmax(self._usable(logits)))
        return top

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

    def _penalised(self, usable: F32) -> F32:
        return usable if self._penalties is None else self._penalties.apply(usable)

    def _masked(self, logits: F32) -> F32:
        """Logits with what the constraint forbids at -inf."""
        mask = None if self._constraint is None else self._constraint.mask()
        if mask is None:
            return logits
        masked = np.where(mask, logits, np.float32(-np.inf))
        if not np.isfinite(masked.max()):
            raise GenerationError("no token the answer may go on with has a probability")
        return masked

    def _best(self, logits: F32) -> int:
        """The likeliest allowed token. Most often the model wants what is allowed: then that one
        token is checked, and no mask made."""
        best = int(np.argmax(logits))
        if self._constraint is None or self._constraint.allows(best):
            return best
        return int(np.argmax(self._masked(logits)))


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
