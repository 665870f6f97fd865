"""Following an answer through a compiled grammar."""

from __future__ import annotations

from typing import Any

import numpy as np

from mimo_edge.errors import ConstraintError, GenerationError
from mimo_edge.sampling import Mask


class Follower:
    """A `sampling.Constraint`: llguidance's matcher, with every end-of-text token as an end.

    `matcher` stands at the beginning and belongs to this object.
    """

    def __init__(self, matcher: Any, vocab_size: int, eos_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether an end-of-text token was said."""
        return self._ended

    def allows(self, token: int) -> bool:
        """Whether `token` may come next."""
        if token in self._eos_ids:
            return bool(self._matcher.is_accepting())
        allowed: int = self._matcher.validate_tokens([token])
        self._check()
        return allowed == 1

    def mask(self) -> Mask:
        """bool [V] of what may come next."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        bits = np.unpackbits(packed, count=self._vocab_size, bitorder="little")
        mask: Mask = bits.view(np.bool_)
        mask[list(self._eos_ids)] = self._matcher.is_accepting()
        return mask

    def advance(self, token: int) -> None:
        """`token` was said."""
        if token in self._eos_ids:
            self._ended = True
        elif not self._matcher.consume_token(token):
            why = first_line(self._matcher.get_error())
            raise GenerationError(f"token {token} does not fit the grammar of the answer: {why}")

    def retract(self, count: int) -> None:
        """Take the newest `count` tokens back."""
        if self._ended and count:
            self._ended = False
            count -= 1
        if count and not self._matcher.rollback(count):
            raise GenerationError(f"the grammar cannot go back {count} tokens")

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConstraintError(
                f"the answer's grammar grew too complex: {first_line(self._matcher.get_error())}",
                "use a simpler schema or regular expression",
            )


def first_line(text: str, most: int = 300) -> str:
    """The first line of a library's message, shortened."""
    line = text.strip().partition("\n")[0]
    return line if len(line) <= most else f"{line[:most]}..."
