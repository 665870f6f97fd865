"""Self-speculation with MiMo's MTP blocks: draft, verify, accept. How much: draft_policy.py.

State between steps (spec section 3.3): the target has processed x_0..x_p, x_{p+1} is chosen
but not processed. Block k at row i takes the target's H_i and x_{i+1+k}; every block takes
the same H_i, only the token shifts. Output is what plain decoding gives: a proposal is kept
only if the sampler, fed the target's own logits, draws that very token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mimo_edge.cancel import Cancel
from mimo_edge.config import MimoConfig
from mimo_edge.errors import UsageError
from mimo_edge.recent_rows import RecentRows
from mimo_edge.runtimes.base import F32, VERIFY_ROWS, Backend, Cache, ChainingBackend

DraftSetting = int | Literal["auto"]

MAX_DRAFT = VERIFY_ROWS - 1
# Rows that a block with a window starts with, after a prompt or many steps without drafts: newer
# ones join them. Filling a whole window can take longer than drafts save in a short answer.
FILL_ROWS = 24
# Rows of H kept behind those: a commit leaves up to MAX_DRAFT stale rows to write again, and a
# later turn may roll back as many.
_SPARE_ROWS = MAX_DRAFT + 1
# A block is run on so many rows, twice as many (after a few steps without drafts) or FILL_ROWS:
# backends keep what a number of rows needs, and writing a row again changes nothing.
_LEAST_ROWS = MAX_DRAFT + 1
# A block that attends to everything needs every row; they are written in groups this large.
_FLUSH_ROWS = 64


def max_draft(config: MimoConfig) -> int:
    """Most tokens a model's MTP blocks can propose: one per block, one for MiMo-7B."""
    return min(config.num_mtp_layers, MAX_DRAFT if config.family == "mimo_v2" else 1)


def check_draft(draft: DraftSetting, config: MimoConfig) -> None:
    """Raises UsageError when `draft` is no setting, or more than the model can propose."""
    if draft == "auto":
        return
    if isinstance(draft, bool) or not isinstance(draft, int) or draft < 0:
        raise UsageError(f"draft = {draft!r}", "use 0, 1, 2, 3 or auto")
    limit = max_draft(config)
    if draft > limit:
        what = f"{config.num_mtp_layers} MTP blocks" if config.num_mtp_layers else "no MTP block"
        raise UsageError(
            f"draft = {draft}, but this model has {what} and can propose {limit}",
            f"use --draft {limit} or auto" if limit else "use --draft 0 or auto",
        )


@dataclass(frozen=True)
class DrafterState:
    """What a Drafter knows besides the rows of its blocks in the cache: positions observed, rows of
    every block that are final, and the H rows at hand, f32 [n, M], the newest last."""

    length: int
    final: tuple[int, ...]
    hidden: F32


class Drafter:
    """Proposes tokens for one sequence and keeps its MTP rows in step with the target.

    Feed it every H row of the target in order (`observe`); call `truncate` after the
    sequence was cut back between turns. Rejected drafts need no call: their H rows are
    simply never observed.
    """

    def __init__(self, backend: Backend, cache: Cache) -> None:
        config = backend.config
        self._backend = backend
        self._chain = backend if isinstance(backend, ChainingBackend) and backend.chains else None
        self._cache = cache
        self.limit = max_draft(config)
        self._window = config.layer(config.num_hidden_layers).window if self.limit else 1
        self._fill = min(FILL_ROWS, self._window or FILL_ROWS)
        self._keep = None if self._window is None else self._fill + _SPARE_ROWS
        self._hidden = RecentRows(config.hidden_size, self._keep)  # H rows
        self._length = 0  # positions observed
        # Rows of block k below this are in its cache, computed from tokens that stand.
        self._final = [0] * self.limit
        self._proposed: tuple[int, list[int]] = (0, [])  # the latest drafts, from this position on
        self.steady = True  # whether the last draft only did its regular work

    @property
    def length(self) -> int:
        """Positions observed."""
        return self._length

    def state(self) -> DrafterState:
        """What `resume` needs, with the cache of now."""
        hidden = self._hidden.part(0, len(self._hidden)).copy()
        return DrafterState(self._length, tuple(self._final), hidden)

    @property
    def windowed(self) -> bool:
        """Whether all blocks see a window, so that rows left behind stop to matter."""
        return self.limit > 0 and self._window is not None

    def skip(self, length: int) -> None:
        """Begin behind `length` positions that were not observed: windowed blocks propose again
        after a few rows."""
        self._hidden.clear()
        self._length, self._final = length, [0] * self.limit
        self._proposed = (0, [])

    def resume(self, state: DrafterState) -> None:
        """Go on from `state`, over a cache that holds what it held then. Raises ValueError when the
        state is not one of such a drafter."""
        enough = (
            self._window is not None
            or not self.limit
            or (len(state.hidden) >= state.length - min(state.final, default=0))
        )
        if (
            len(state.final) != self.limit
            or not all(0 <= final <= state.length for final in state.final)
            or len(state.hidden) > state.length
            or not enough
        ):
            raise ValueError("the state of a drafter does not fit")
        self._hidden.clear()
        self._hidden.extend(np.asarray(state.hidden, np.float32))
        self._length = state.length
        self._final = list(state.final)
        self._proposed = (0, [])

    def wanted_rows(self, rows: int, following: int = 0) -> int:
        """How many H rows, the last ones, to ask of a pass of `rows` tokens when `following` more
        are sure to come: rows that will be too old by then are never looked at."""
        if not self.limit:
            return 0
        return rows if self._keep is None else max(0, min(rows, self._keep - following))

    def observe(self, hidden: F32, rows: int) -> None:
        """Note that the target processed `rows` tokens, `hidden` [m <= rows, M] their last H."""
        if self._keep is None and len(hidden) < rows:
            raise ValueError(f"{len(hidden)} H rows of {rows}: a block that sees all needs all")
        if len(hidden) < rows:
            self._hidden.clear()  # what came before is no longer adjacent
        self._hidden.extend(hidden)
        self._length += rows

    def flush(
        self, tokens: Sequence[int], *, force: bool = False, cancel: Cancel | None = None
    ) -> None:
        """Write the rows of a block that attends to everything, so that H rows can go.

        `tokens` is x_0 .. x_p at least. Nothing to do for windowed blocks, whose old rows
        are never seen. `force` writes however few there are. When it fails, the next call
        writes them.
        """
        if self._window is not None or not self.limit:
            return
        end = min(self._length, len(tokens) - 1)  # row i needs x_{i+1}
        count = end - self._final[0]
        if count <= 0 or (count < _FLUSH_ROWS and not force):
            return
        self._run(0, tokens, self._final[0], end, cancel=cancel)
        self._final[0] = end
        self._hidden.drop_oldest(end - _SPARE_ROWS - self._oldest)

    def draft(
        self,
        tokens: Sequence[int],
        count: int,
        propose: Callable[[F32], int | None],
        cancel: Cancel | None = None,
        likeliest: Callable[[list[int]], list[int] | None] | None = None,
    ) -> list[int]:
        """Up to `count` proposals for x_{p+2}.. given tokens x_0..x_{p+1}.

        `propose` picks from logits [V], or says None when nothing can follow. Fewer, down to none,
        come back then, and while hardly any H rows are at hand (after a cut deeper than is kept).
        `likeliest`, given tokens of the largest logits, says which of them `propose` would go on
        with, or None when it has to look at the logits.
        """
        p = self._length - 1
        if len(tokens) != p + 2:
            raise ValueError(f"{len(tokens)} tokens known, {p + 1} processed")
        self._settle(tokens)
        self.steady = True
        count = min(count, self.limit)
        chain = self._chain is not None and count > 1
        first = self._first(min(self._final[:count])) if chain else None
        if first is not None and first < p:
            drafts = self._draft_in_chain(tokens, first, count, propose, cancel, likeliest)
        else:
            drafts = self._draft_one_by_one(tokens, count, propose, cancel)
        self._proposed = (p + 2, drafts)
        return drafts

    @property
    def cold(self) -> bool:
        """Whether a draft would have more to write than what a verify leaves: it comes after a
        prompt, or after many steps without drafts."""
        return self.limit > 0 and not self._regular(max(self._final[0], self._reach))

    def _regular(self, first: int) -> bool:
        # One verify commits up to MAX_DRAFT + 1 rows; as many more may be stale.
        return self._length - first <= 2 * (MAX_DRAFT + 1)

    @property
    def _oldest(self) -> int:
        """Position of the oldest H row at hand."""
        return self._length - len(self._hidden)

    @property
    def _reach(self) -> int:
        """The oldest row that the newest one sees."""
        return 0 if self._window is None else max(0, self._length - self._window)

    def _first(self, final: int) -> int | None:
        """Where to begin so that the newest row sees the rows before it, when those below `final`
        are there: all of them, or where that is much to write, the newest. None when H rows are
        missing for that."""
        missing = self._length - max(final, self._reach)
        self.steady = self.steady and self._regular(self._length - missing)
        at_hand = self._length - max(self._reach, self._oldest)
        if self._window is None:
            return None if missing > at_hand else self._length - min(at_hand, _rounded(missing))
        if missing > at_hand < _LEAST_ROWS:
            return None
        return self._length - min(at_hand, _rounded(min(missing, self._fill)))

    def _begin(self, depth: int, first: int) -> None:
        """Rows of a block are about to be written from `first` on."""
        if first > max(self._final[depth], self._reach):
            self._cache.begin_mtp(depth, first)
        self._final[depth] = min(self._final[depth], first)

    def _draft_one_by_one(
        self,
        tokens: Sequence[int],
        count: int,
        propose: Callable[[F32], int | None],
        cancel: Cancel | None,
    ) -> list[int]:
        p = self._length - 1
        known = list(tokens[max(0, p + 2 - len(self._hidden) - MAX_DRAFT) :])
        offset = len(tokens) - len(known)
        drafts: list[int] = []
        for depth in range(count):
            first = self._first(self._final[depth])
            if first is None:
                break
            # Rows up to p - depth take tokens that stand; the newer ones take drafts. A pass that
            # fails leaves none of its rows.
            final = max(self._final[depth], p - depth + 1)
            self._begin(depth, first)
            logits = self._run(depth, known, first, p + 1, offset, cancel)
            self._final[depth] = final
            token = propose(logits)
            if token is None:
                break
            drafts.append(token)
            known.append(token)
        return drafts

    def _draft_in_chain(
        self,
        tokens: Sequence[int],
        first: int,
        count: int,
        propose: Callable[[F32], int | None],
        cancel: Cancel | None,
        likeliest: Callable[[list[int]], list[int] | None] | None,
    ) -> list[int]:
        """Rows first..p of all blocks at once."""
        assert self._chain is not None
        p = self._length - 1
        final = [max(self._final[depth], p - depth + 1) for depth in range(count)]
        for depth in range(count):
            self._begin(depth, first)
        hidden = self._rows(first, p + 1)
        ids = np.asarray(tokens[first + 1 : p + 2], dtype=np.int32)
        chosen, logits = self._chain.mtp_chain(
            count, ids, hidden, first, self._cache, cancel=cancel
        )
        self._final[:count] = final
        taken = None if likeliest is None else likeliest(chosen)
        if taken is not None:
            return taken
        drafts: list[int] = []
        for token, row in zip(chosen, logits, strict=True):
            wanted = propose(row)
            if wanted is None:
                break
            drafts.append(wanted)
            if wanted != token:  # one that cannot come: what follows is not its continuation
                break
        return drafts

    def _settle(self, tokens: Sequence[int]) -> None:
        """Rows that took drafts which were accepted are final as well."""
        (start, drafts), self._proposed = self._proposed, (0, [])
        stands = 0
        for token, draft in zip(tokens[start : start + len(drafts)], drafts, strict=False):
            if token != draft:
                break
            stands += 1
        for depth in range(1, len(drafts)):
            final = start - 1 - depth + min(depth, stands)
            self._final[depth] = max(self._final[depth], final)

    def truncate(self, length: int, known: int) -> None:
        """The target was cut back to `length` processed tokens, of which and after which
        `known` tokens in all are the same as before."""
        self._hidden.drop_newest(self._length - length)
        self._length = length
        self._proposed = (0, [])
        for depth in range(self.limit):
            # Rings hold rows by position modulo their size: after a cut some older rows may
            # be gone, so windowed blocks are written anew from the window's start.
            stands = 0 if self._window is not None else max(0, min(length, known - 1 - depth))
            self._final[depth] = min(self._final[depth], stands)

    def _run(
        self,
        depth: int,
        known: Sequence[int],
        first: int,
        end: int,
        offset: int = 0,
        cancel: Cancel | None = None,
    ) -> F32:
        """Rows first..end-1 of block `depth`; `known` starts at x_offset."""
        shift = 1 + depth - offset
        ids = np.asarray(known[first + shift : end + shift], dtype=np.int32)
        hidden = self._rows(first, end)
        return self._backend.mtp_forward(depth, ids, hidden, first, self._cache, cancel=cancel)

    def _rows(self, first: int, end: int) -> F32:
        """H rows of positions first..end-1."""
        return self._hidden.part(first - self._oldest, end - self._oldest)


def accept(
    logits: F32,
    drafts: Sequence[int],
    sample: Callable[[F32], int],
    is_last: Callable[[int], bool],
    limit: int,
) -> list[int]:
    """Tokens that a verify of [x_{p+1}, *drafts] gains, in order: 1 to len(drafts) + 1.

    Row j of `logits` f32 [K + 1, V] is the target after draft j. Each row is sampled as in
    plain decoding; going on is allowed while the sample is the draft, because only then the
    next row saw the right tokens. For argmax drafts this is the lossless accept rule
    (accept with probability p(d), else draw from the rest): draw y ~ p, keep it either way.
    Stops after `limit` tokens, and after a token for which `is_last` says so.
    """
    gained: list[int] = []
    for row in range(len(drafts) + 1):
        token = sample(logits[row])
        gained.append(token)
        if is_last(token) or len(gained) == limit:
            break
        if row == len(drafts) or token != drafts[row]:
            break
    return gained


def _rounded(rows: int) -> int:
    """`rows` or more, of few different numbers."""
    sizes = (_LEAST_ROWS, 2 * _LEAST_ROWS, FILL_ROWS)
    return next((size for size in sizes if size >= rows), rows)
