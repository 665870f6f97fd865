"""Processed tokens that outlive their conversation, for servers.

A server gets the whole conversation with every request and keeps no session. The sequence that
answered one turn holds all tokens of the next turn's prompt but the newest: a pool keeps such
sequences, and the next session takes over the one that saves most.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence as Ids

from mimo_edge.engine import Engine, Sequence
from mimo_edge.errors import UsageError


class SequencePool:
    """At most `most` sequences, idle and in use together; from any thread.

    Only a sequence whose tokens are all the beginning of the new prompt is taken over: sliding
    layers cannot go back, so any other would start anew anyway, and is worth keeping for the
    conversation it belongs to. When there are too many, the one that was idle longest goes.
    """

    def __init__(self, engine: Engine, most: int) -> None:
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise UsageError(f"a pool of {most!r} sequences", "use 1 or more")
        self.most = most
        self._engine = engine
        self._idle: list[Sequence] = []  # the one idle longest comes first
        self._used = 0
        self._lock = threading.Lock()

    def take(self, prompt: Ids[int]) -> Sequence:
        """The idle sequence with the longest beginning of `prompt`, or a new one; the caller's
        alone until `give`."""
        with self._lock:
            # One token is left to process: a sequence as long as the prompt would have to go back.
            fitting = [s for s in self._idle if len(s.tokens) < len(prompt)]
            found = max(fitting, key=lambda s: _saved(s.tokens, prompt), default=None)
            if found is not None and _saved(found.tokens, prompt):
                self._idle.remove(found)
            else:
                found = self._engine.sequence()
            self._used += 1
            self._shrink()
            return found

    def give(self, sequence: Sequence) -> None:
        """Take a sequence back, between two of its steps."""
        with self._lock:
            self._used -= 1
            if sequence.tokens:
                self._idle.append(sequence)
            self._shrink()

    def clear(self) -> None:
        """Forget every idle sequence."""
        with self._lock:
            self._idle.clear()

    def release(self, share: float) -> int:
        """Forget that share (0 to 1, rounded up) of the idle sequences, those idle longest first.
        Returns the bytes of their caches."""
        with self._lock:
            count = math.ceil(share * len(self._idle))
            nbytes = sum(sequence.nbytes() for sequence in self._idle[:count])
            del self._idle[:count]
            return nbytes

    @property
    def idle(self) -> int:
        """How many sequences wait to be taken over."""
        return len(self._idle)

    def nbytes(self) -> int:
        """Bytes of the caches of idle sequences."""
        with self._lock:
            return sum(sequence.nbytes() for sequence in self._idle)

    def _shrink(self) -> None:
        del self._idle[: max(0, self._used + len(self._idle) - self.most)]


def _saved(tokens: list[int], prompt: Ids[int]) -> int:
    """Tokens that need not be processed: all of a sequence's, or none."""
    return len(tokens) if list(prompt[: len(tokens)]) == tokens else 0
