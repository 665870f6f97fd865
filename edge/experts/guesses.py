"""Whether reading experts ahead on a guess pays: by how many guesses come true, and by the time
passes take with and without them.

A right guess is read while flash would be idle, where there is such a time: with small experts on a
fast disk the guessing itself costs more than the waiting. A wrong guess has taken a slot from an
expert that may be needed, and the reads that lanes are in when the truth comes out delay the real
ones.
"""

from __future__ import annotations

from math import exp, log

# The share of guesses that must come true; below, one pass in so many tries again.
LEAST_RIGHT = 0.5
_WRONG_RETRY_EVERY = 32
_START = 0.75  # what is assumed before anything is known
_MEMORY = 64.0  # guesses
# Both ways are tried by turns in blocks of passes, until so many of each are timed. Then the faster
# one is taken, and the other gets one block in so many, as a device warms up or a disk is shared.
_BLOCK, _TRIAL, _RETRY_EVERY = 4, 16, 16
_TIMES_MEMORY = 32.0  # passes


class _Time:
    """The time of passes one way: the recent mean of the logarithm, which a few slow passes move
    little."""

    def __init__(self) -> None:
        self.count = 0
        self.log_mean = 0.0

    def note(self, seconds: float) -> None:
        self.count += 1
        weight = 1 / min(self.count, _TIMES_MEMORY)
        self.log_mean += weight * (log(max(seconds, 1e-9)) - self.log_mean)


class _Trial:
    """Passes of one number of rows, with guesses and without."""

    def __init__(self) -> None:
        self._times = {False: _Time(), True: _Time()}
        self._passes = 0

    def way(self) -> bool:
        """Whether to guess in the next pass."""
        block = self._passes // _BLOCK
        self._passes += 1
        if min(time.count for time in self._times.values()) < _TRIAL:
            return block % 2 == 0
        faster = self.gain() > 1
        return faster if block % _RETRY_EVERY else not faster

    def note(self, guessed: bool, seconds: float) -> None:
        self._times[guessed].note(seconds)

    def gain(self) -> float:
        """How many times faster passes with guesses are."""
        return exp(self._times[False].log_mean - self._times[True].log_mean)


class GuessRecord:
    """What guesses have brought so far, and whether to go on."""

    def __init__(self) -> None:
        self.guessed = 0
        self.right = 0
        self._share = _START
        self._skipped = 0
        self._trials: dict[int, _Trial] = {}  # by rows of a pass

    def note(self, right: bool) -> None:
        """An expert was read ahead on a guess; `right` says whether its layer then chose it."""
        self.guessed += 1
        self.right += right
        self._share += (right - self._share) / _MEMORY

    def worth(self, rows: int) -> bool:
        """Whether to guess in the pass of `rows` tokens that begins."""
        if self._share < LEAST_RIGHT:
            self._skipped = (self._skipped + 1) % _WRONG_RETRY_EVERY
            return self._skipped == 0
        return self._trials.setdefault(rows, _Trial()).way()

    def timed(self, rows: int, guessed: bool, seconds: float) -> None:
        """A pass of `rows` tokens with guesses or without took this long."""
        self._trials.setdefault(rows, _Trial()).note(guessed, seconds)
