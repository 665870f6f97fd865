"""The tokens of one conversation that were processed, their cache and the drafter that follows it.

Between two steps a sequence is whole: cache rows == tokens. It may then be put away, its cache
given up for others (edge/idle.py), and is brought back before its next step.
"""

from __future__ import annotations

from collections.abc import Sequence as Ids
from contextlib import suppress
from typing import TYPE_CHECKING

from mimo_edge.cancel import Cancel
from mimo_edge.errors import CacheError, Cancelled, GenerationError, MimoEdgeError
from mimo_edge.experts.trace import Phase
from mimo_edge.runtimes.base import F32, Cache
from mimo_edge.speculative import MAX_DRAFT, Drafter
from mimo_edge.units import even_part

if TYPE_CHECKING:
    from mimo_edge.engine import Engine
    from mimo_edge.idle import Away


class Sequence:
    """Tokens processed so far, their cache and the drafter that follows it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.tokens: list[int] = []
        self.cache: Cache | None = None
        self.drafter: Drafter | None = None
        # --- kept by edge/idle.py ---
        self.away: Away | None = None  # where cache and drafter are while they are not here
        self._drafted = False  # whether there is a drafter among them
        self.used = 0  # when it was, by a clock of its own
        self.held_bytes = 0  # bytes of the cache after the newest step

    def reset(self) -> None:
        """Forget everything; the next prompt is processed from its start."""
        if self.away is not None:
            self.away.discard()
        self.tokens, self.cache, self.drafter, self.away = [], None, None, None
        self.held_bytes = 0

    def shared(self, prompt: Ids[int]) -> int:
        """How many tokens of `prompt` are processed already, if it goes on from all of them; a
        prompt that leaves them earlier may have to start over, and counts as new."""
        known = len(self.tokens)
        return known if known < len(prompt) and list(prompt[:known]) == self.tokens else 0

    def take_over(self, other: Sequence) -> None:
        """Become what `other` is, which is used no more."""
        if self.away is not None:
            self.away.discard()
        self.tokens, self.cache, self.drafter = other.tokens, other.cache, other.drafter
        self.away = None
        other.tokens, other.cache, other.drafter = [], None, None

    def put_away(self, away: Away) -> None:
        """Give the cache up; `away` can bring it back."""
        self._drafted = self.drafter is not None
        if self.cache is not None:
            self.cache.close()
        self.cache, self.drafter, self.away, self.held_bytes = None, None, away, 0

    def recompute(self, cancel: Cancel | None = None) -> None:
        """Process the tokens again after they were put away and cannot be brought back. Raises what
        the backend raises, and Cancelled; as many tokens as are processed then stand."""
        tokens = self.tokens
        self.reset()
        self._start(self._drafted)
        while len(self.tokens) < len(tokens):
            at = len(self.tokens)
            chunk = tokens[at : at + even_part(len(tokens) - at, self._engine.prefill_chunk)]
            following = len(tokens) - at - len(chunk)
            _, hidden = self.advance(chunk, 0, cancel=cancel, following=following)
            self.commit(chunk, hidden, len(chunk), cancel)

    def nbytes(self) -> int:
        """Bytes of the cache."""
        cache = self.cache  # another thread may put it away
        return cache.nbytes() if cache is not None else 0

    def settle(self) -> None:
        """After a step: note what is held."""
        self.held_bytes = self.cache.held_bytes() if self.cache is not None else 0

    def recover(self, error: BaseException) -> None:
        """After `error` came up in a step: back to the tokens that stand. When rows that the next
        token needs are gone, or nobody knows what happened, everything is forgotten."""
        if isinstance(error, GenerationError) or not isinstance(error, MimoEdgeError):
            # NaN in rows nobody should see still spreads from there; and on a bug, or an interrupt
            # in the middle of anything, nothing may be built.
            self.reset()
            return
        if self.cache is None:
            return
        try:
            self.cache.rollback(self.cache.length - len(self.tokens))
        except CacheError:
            self.reset()
            return
        if self.drafter is not None and self.drafter.length != len(self.tokens):
            self.reset()

    def adopt(
        self, prompt: Ids[int], drafting: bool, border: int = 0, cancel: Cancel | None = None
    ) -> int:
        """Keep what `prompt` shares with the processed tokens; how many tokens that is. When that
        is nothing, its first `border` tokens come from a snapshot if there is one.

        At least the last token of the prompt is left to process: its logits are needed.
        """
        engine = self._engine
        if self.away is not None:
            shared = _common_prefix(self.tokens, prompt)
            if not shared or not engine.idle.bring_back(self):
                engine.idle.count_recomputed(shared)
                self.reset()  # the prompt holds the tokens: they are processed as a part of it
        if self.cache is not None:
            shared = _common_prefix(self.tokens, prompt)
            keep = min(shared, len(prompt) - 1)
            whole = keep == len(self.tokens)
            if drafting and self.drafter is None:
                whole, keep = False, 0  # H rows were not kept: drafting must see them
            elif not whole and engine.backend.config.family == "mimo":
                # A block that sees everything continues from H of the last shared token.
                keep = max(0, keep - 1)
            if keep and not whole:
                try:
                    self.cache.rollback(len(self.tokens) - keep)
                except CacheError:
                    keep = 0  # sliding rows that far back are gone: start over
            if keep:
                if self.drafter is not None and not whole:
                    self.drafter.truncate(keep, shared)
                del self.tokens[keep:]
                return keep
            self.reset()
        prefixes = engine.prefixes
        if border and prefixes is not None:
            prefix = prompt[:border]
            if prefixes.load(engine, self, prefix, drafting, cancel):
                return border
        self._start(drafting)
        return 0

    def _start(self, drafting: bool) -> None:
        self.cache = self._engine.backend.new_cache(self._engine.context, MAX_DRAFT + 1)
        if drafting:
            self.drafter = Drafter(self._engine.backend, self.cache)

    def advance(
        self,
        token_ids: Ids[int],
        logits_rows: int,
        phase: Phase = Phase.PREFILL,
        cancel: Cancel | None = None,
        following: int = 0,
    ) -> tuple[F32, F32]:
        """Process tokens; logits of the last rows and the H rows the drafter wants, given that
        `following` more tokens are sure to come.

        The caller says with `commit` how many of them stand.
        """
        assert self.cache is not None
        wanted = 0
        if self.drafter is not None:
            wanted = self.drafter.wanted_rows(len(token_ids), following)
        result = self._engine.forward(
            token_ids,
            self.cache,
            phase,
            logits_rows=logits_rows,
            hidden_rows=wanted,
            cancel=cancel,
        )
        return result.logits, result.hidden

    def commit(
        self, token_ids: Ids[int], hidden: F32, rows: int, cancel: Cancel | None = None
    ) -> None:
        """Keep the first `rows` of the tokens just processed and undo the rest."""
        assert self.cache is not None
        if rows < len(token_ids):
            self.cache.rollback(len(token_ids) - rows)
            hidden = hidden[:rows]
        self.tokens.extend(token_ids[:rows])
        if self.drafter is not None:
            self.drafter.observe(hidden, rows)
            with suppress(Cancelled):  # the tokens stand; the next step will notice
                self.drafter.flush(self.tokens, cancel=cancel)


def _common_prefix(a: Ids[int], b: Ids[int]) -> int:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
