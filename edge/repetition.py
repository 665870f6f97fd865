"""The guard against answers that repeat themselves without end.

Small models, and large ones that were cut down, can fall into a loop that only the token limit
ends. Whether a repetition is meant is not for a runtime to know, so the guard is off unless asked.
"""

from __future__ import annotations

import numpy as np

from mimo_edge.errors import UsageError

MAX_PERIOD = 256
"""Longest cycle that is looked for, in tokens: a long paragraph."""
_NEVER = 1 << 40


def check_stop_repeats(repeats: int) -> None:
    """Raises UsageError when `repeats` is neither 0 (off) nor a count from 2 on."""
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 0 or repeats == 1:
        raise UsageError(
            f"stop_repeats = {repeats!r}",
            "give how often the same tokens may follow each other, from 2 on, or 0 for any number",
        )


class RepeatGuard:
    """Notices when the newest tokens are one sequence of 1 to MAX_PERIOD tokens, `repeats` times
    in a row. Fed one token at a time, so drafting changes nothing."""

    def __init__(self, repeats: int) -> None:
        periods = np.arange(1, MAX_PERIOD + 1)
        # More than any answer is long; whole numbers beyond have no place in the array.
        self._enough = periods * (min(repeats, _NEVER) - 1)
        self._recent = np.full(MAX_PERIOD, -1)  # index p - 1: the token p before the next one
        self._same = np.zeros(MAX_PERIOD, np.int64)  # how many in a row equal the one p before

    def add(self, token: int) -> bool:
        """Note a token; whether the repetition is complete with it."""
        self._same = np.where(self._recent == token, self._same + 1, 0)
        self._recent[1:] = self._recent[:-1]
        self._recent[0] = token
        return bool((self._same >= self._enough).any())
