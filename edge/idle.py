"""Caches of conversations that nobody computes, within a bound on their memory.

When there are too many, those used longest ago are put away: written to disk if there is a place
for it, and freed. The next step of such a sequence brings it back as it was; where that fails (no
place, a full disk, a damaged file), its tokens are processed again. No conversation is lost.
"""

from __future__ import annotations

import logging
import threading
import weakref
from dataclasses import dataclass
from typing import Protocol

from mimo_edge.cancel import Cancel
from mimo_edge.sequence import Sequence

_log = logging.getLogger(__name__)


class Away(Protocol):
    """A sequence that was put away."""

    def restore(self, sequence: Sequence) -> bool:
        """Bring it back, with cache and drafter; whether that was possible. Once only."""
        ...

    def discard(self) -> None:
        """It is not needed any more. Twice is harmless."""
        ...


class Spill(Protocol):
    """Where sequences are put."""

    def put(self, sequence: Sequence) -> Away | None:
        """Write a sequence; None when that is not possible."""
        ...


@dataclass
class IdleStats:
    """What happened to idle sequences."""

    put_away: int = 0
    dropped: int = 0  # of those, without a file
    restored: int = 0
    recomputed: int = 0
    recomputed_tokens: int = 0


class IdleCaches:
    """The caches of all sequences of one engine. Used by whoever has the turn of the engine.

    `limit_bytes` bounds what the caches hold of sequences that are not being computed; None sets no
    bound. `spill` is where they are put (None: nowhere, their tokens are processed again).
    """

    def __init__(self, limit_bytes: int | None = None, spill: Spill | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.stats = IdleStats()
        self._spill = spill
        self._clock = 0
        self._mutex = threading.Lock()
        self._all: weakref.WeakSet[Sequence] = weakref.WeakSet()

    def add(self, sequence: Sequence) -> None:
        """A new sequence; from any thread."""
        with self._mutex:
            self._all.add(sequence)

    def prepare(self, sequence: Sequence, cancel: Cancel | None = None) -> None:
        """Before a step of `sequence`: it is in memory, and the others keep their bound. Raises
        what computing its tokens again raises."""
        self.make_room(sequence)
        if not self.bring_back(sequence):
            self.count_recomputed(len(sequence.tokens))
            sequence.recompute(cancel)

    def bring_back(self, sequence: Sequence) -> bool:
        """Bring `sequence` back if it was put away; whether it is there now. If not, its tokens are
        left, and it counts as put away until somebody processes them."""
        away = sequence.away
        if away is None:
            return True
        sequence.away = DROPPED
        if not away.restore(sequence):
            return False
        self.stats.restored += 1
        return True

    def count_recomputed(self, tokens: int) -> None:
        """Note that so many tokens of a sequence are processed again because it is gone."""
        self.stats.recomputed += tokens > 0
        self.stats.recomputed_tokens += tokens

    def make_room(self, sequence: Sequence) -> None:
        """Put others away until they keep their bound; `sequence` is used now."""
        self._clock += 1
        sequence.used = self._clock
        if self.limit_bytes is None:
            return
        others = [one for one in self._sequences() if one is not sequence and one.cache is not None]
        total = sum(one.held_bytes for one in others)
        for one in sorted(others, key=lambda one: one.used):
            if total <= self.limit_bytes:
                break
            total -= one.held_bytes
            self._put_away(one)

    def put_all_away(self) -> int:
        """Put away every sequence but the one used last; bytes of their caches."""
        freed = 0
        for one in self._sequences():
            if one.cache is not None and one.used != self._clock:
                freed += one.nbytes()
                self._put_away(one)
        return freed

    def settle(self, sequence: Sequence) -> None:
        """After a step of `sequence`: what it holds now."""
        if self.limit_bytes is not None:
            sequence.settle()

    @property
    def count(self) -> int:
        """Sequences that hold a cache."""
        return sum(one.cache is not None for one in self._sequences())

    @property
    def away(self) -> int:
        """Sequences that were put away and not needed since."""
        return sum(one.away is not None for one in self._sequences())

    def nbytes(self) -> int:
        """Bytes of all caches."""
        return sum(one.nbytes() for one in self._sequences())

    def _sequences(self) -> list[Sequence]:
        with self._mutex:
            return list(self._all)

    def _put_away(self, sequence: Sequence) -> None:
        away = None if self._spill is None else self._spill.put(sequence)
        self.stats.put_away += 1
        if away is None:
            self.stats.dropped += 1
            if self._spill is not None:
                _log.warning(
                    "an idle conversation of %d tokens was dropped from memory, they will be "
                    "processed again",
                    len(sequence.tokens),
                )
        sequence.put_away(away or DROPPED)


class Dropped:
    """A sequence of which only the tokens are left."""

    def restore(self, sequence: Sequence) -> bool:
        """Nothing is there to bring back."""
        return False

    def discard(self) -> None:
        """Nothing is held."""


DROPPED = Dropped()
