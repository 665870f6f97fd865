"""Whether reading experts ahead on a guess pays, by how many guesses came true lately.

A right guess is read while flash would be idle. A wrong one has taken a slot from an expert that
may be needed, and the reads that lanes are in when the truth comes out delay the real ones.
"""

from __future__ import annotations

# The share of guesses that must come true. Wrong ones cost less than right ones gain: their reads
# are stopped as soon as the layer's route is known.
LEAST_RIGHT = 0.5
_START = 0.75  # what is assumed before anything is known
_MEMORY = 64.0  # guesses
# While guessing does not pay, one pass of a layer in this many tries it again.
_RETRY_EVERY = 32


class GuessRecord:
    """The recent share of guesses that came true."""

    def __init__(self) -> None:
        self.guessed = 0
        self.right = 0
        self._share = _START
        self._skipped = 0

    def note(self, right: bool) -> None:
        """An expert was read ahead on a guess; `right` says whether its layer then chose it."""
        self.guessed += 1
        self.right += right
        self._share += (right - self._share) / _MEMORY

    def worth(self) -> bool:
        """Whether to guess now. Asked once per layer and pass."""
        if self._share >= LEAST_RIGHT:
            return True
        self._skipped = (self._skipped + 1) % _RETRY_EVERY
        return self._skipped == 0
