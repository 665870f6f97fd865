"""Penalties on what was said already: repetition, presence and frequency.

Source: repetition as in CTRL (Keskar et al. 2019) and transformers' processor of that name,
presence and frequency as in OpenAI's API.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mimo_edge.runtimes.base import F32


class Penalties:
    """Logits lowered for tokens that occur already, fed one token at a time.

    `repetition` divides positive logits and multiplies negative ones of every token of the prompt
    and the answer; of the answer's tokens alone `presence` is taken off once and `frequency` for
    each time. 1, 0 and 0 change nothing.
    """

    def __init__(
        self, prompt: Sequence[int], repetition: float, presence: float, frequency: float
    ) -> None:
        self._repetition = np.float32(repetition)
        self._presence = np.float32(presence)
        self._frequency = np.float32(frequency)
        self._prompt = frozenset(prompt) if repetition != 1 else frozenset()
        self._prompt_ids = np.fromiter(self._prompt, np.int64, len(self._prompt))
        self._counts: dict[int, int] = {}  # of the answer

    def apply(self, logits: F32) -> F32:
        """Penalised logits f32 [V] of logits f32 [V], which stay as they are."""
        out = logits.copy()
        said = np.fromiter(self._counts, np.int64, len(self._counts))
        if self._repetition != 1:
            new = [token for token in self._counts if token not in self._prompt]
            ids = np.concatenate([self._prompt_ids, np.array(new, np.int64)])
            values = out[ids]
            out[ids] = np.where(values > 0, values / self._repetition, values * self._repetition)
        if len(said) and (self._presence or self._frequency):
            times = np.fromiter(self._counts.values(), np.float32, len(said))
            out[said] -= self._presence + self._frequency * times
        return out

    def add(self, token: int) -> None:
        """The answer goes on with `token`."""
        self._counts[token] = self._counts.get(token, 0) + 1

    def remove(self, token: int) -> None:
        """Take back the newest `add` of `token`."""
        self._counts[token] -= 1
        if not self._counts[token]:
            del self._counts[token]
