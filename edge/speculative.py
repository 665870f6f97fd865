"""Self-speculation with MiMo's MTP blocks: draft, verify, accept, and how much to draft.

State between steps (spec section 3.3): the target has processed x_0..x_p, x_{p+1} is chosen
but not processed. Block k at row i takes the target's H_i and x_{i+1+k}; every block takes
the same H_i, only the token shifts. Output is what plain decoding gives: a proposal is kept
only if the sampler, fed the target's own logits, draws that very token.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, Protocol

import numpy as np

from mimo_edge.cancel import Cancel
from mimo_edge.config import MimoConfig
from mimo_edge.errors import UsageError
from mimo_edge.runtimes.base import F32, VERIFY_ROWS, Backend, Cache, ChainingBackend

DraftSetting = int | Literal["auto"]

MAX_DRAFT = VERIFY_ROWS - 1
# Rows that a block with a window starts with, after a prompt or many steps without drafts: newer ones
# join them. Filling a whole window can take longer than drafts save in a short answer.
FILL_ROWS = 32
# Rows of H kept behind those: a commit leaves up to MAX_DRAFT stale rows to write again, and a later
# turn may roll back as many.
_SPARE_ROWS = MAX_DRAFT + 1
# A block is run on so many rows or a power of two as many: backends keep what a number of rows needs,
# and writing a row again changes nothing.
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
        self._hidden: deque[F32] = deque(maxlen=self._keep)  # H rows, the newest last
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
        width = self._backend.config.hidden_size
        hidden = np.stack(self._hidden) if self._hidden else np.empty((0, width), np.float32)
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
        while self._length - len(self._hidden) < end - _SPARE_ROWS:
            self._hidden.popleft()

    def draft(
        self,
        tokens: Sequence[int],
        count: int,
        propose: Callable[[F32], int | None],
        cancel: Cancel | None = None,
    ) -> list[int]:
        """Up to `count` proposals for x_{p+2}.. given tokens x_0..x_{p+1}.

        `propose` picks from logits [V], or says None when nothing can follow. Fewer, down to none,
        come back then, and while hardly any H rows are at hand (after a cut deeper than is kept).
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
            drafts = self._draft_in_chain(tokens, first, count, propose, cancel)
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
        for _ in range(min(self._length - length, len(self._hidden))):
            self._hidden.pop()
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
        start = self._oldest
        return np.stack([self._hidden[row - start] for row in range(first, end)])


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
    size = _LEAST_ROWS
    while size < rows:
        size *= 2
    return size


class DraftPolicy(Protocol):
    """Decides how many tokens to draft before each verify."""

    def begin(self) -> None:
        """An answer begins."""
        ...

    def choose(self, cold: bool = False) -> int:
        """Tokens to draft now; `cold` says that the first draft costs extra (`Drafter.cold`)."""
        ...

    def record(
        self, drafted: int, hits: Sequence[bool], seconds: float | None, steady: bool
    ) -> None:
        """One step's outcome: `hits` per depth that was tested, cost of draft and verify.

        `steady` is False when it was the first draft after a prompt or after steps without any.
        `seconds` is None when they say nothing of the next such step.
        """
        ...

    def why(self) -> str:
        """The current choice and its reason, for people."""
        ...


class FixedPolicy:
    """Always the same draft length."""

    def __init__(self, count: int) -> None:
        self._count = count

    def begin(self) -> None:
        return None

    def choose(self, cold: bool = False) -> int:
        return self._count

    def record(
        self, drafted: int, hits: Sequence[bool], seconds: float | None, steady: bool
    ) -> None:
        return None

    def why(self) -> str:
        return f"draft {self._count}, as set"


class CostTable:
    """Seconds of one step per draft length, measured; shared by the sequences of an engine.

    Of the newest steps of a length the middle half counts: contexts grow, single steps are
    disturbed, and what experts cost that come from flash differs from step to step.
    """

    NEWEST = 24

    def __init__(self) -> None:
        self._samples: dict[int, deque[float]] = {}
        self._seconds: dict[int, float] = {}
        self._fast: dict[int, float] = {}

    def add(self, drafted: int, seconds: float) -> None:
        newest = self._samples.setdefault(drafted, deque(maxlen=self.NEWEST))
        newest.append(seconds)
        samples = sorted(newest)
        aside = (len(samples) + 1) // 4 if len(samples) > 2 else 0
        self._seconds[drafted] = fmean(samples[aside : len(samples) - aside])
        self._fast[drafted] = samples[len(samples) // 4]

    def count(self, drafted: int) -> int:
        """How many steps of that length are remembered."""
        return len(self._samples.get(drafted, ()))

    def seconds(self, drafted: int) -> float | None:
        """Mean of the middle half; None before the first step."""
        return self._seconds.get(drafted)

    def fast(self, drafted: int) -> float | None:
        """What all but a quarter of the steps take at least; None before the first step."""
        return self._fast.get(drafted)


@dataclass
class _Depth:
    """Acceptance at one depth, given that all shallower drafts were accepted."""

    hits: float = 1.5  # starts at 0.75, as published, which a few tries outweigh
    tries: float = 2.0

    def record(self, hit: bool) -> None:
        # Old outcomes fade: text changes its nature within an answer.
        self.hits = self.hits * 0.988 + hit
        self.tries = self.tries * 0.988 + 1

    def fade(self) -> None:
        """A step did not try this depth: the rate stays, the weight of what is known shrinks."""
        if self.tries > 12:
            self.hits *= 0.997
            self.tries *= 0.997

    @property
    def rate(self) -> float:
        return self.hits / self.tries


class AdaptivePolicy:
    """Draft as many tokens as maximise expected tokens per second, possibly none.

    Expected tokens of a step with K drafts: 1 + a_1 + a_1 a_2 + ..., a_k the running
    acceptance of depth k. Divided by the measured cost of a step of that width. Every width is
    measured at the start and looked at again now and then, when what that may lose is a small share
    of the time spent since: a width that is far off is tried rarely, a close one often.

    The first draft after a prompt also fills the MTP caches. Whether that pays depends on how long
    answers are: as long as those before, on average.

    One policy serves all answers of an engine: what it learnt need not be learnt again.
    """

    MEASURE = 3  # steps of a width before it is judged
    ADVANTAGE = 1.01  # a change must promise this much, or two equal widths would alternate
    REST = 12  # steps between two probes at least
    PROBE, FROM_REST = 2, 4  # steps of a probe, and of one while nothing is drafted
    PROBE_SHARE = 0.0075  # of the time, at most, that probes may lose; more of the first steps
    EARLY = 128
    FADE = 0.95  # of what answers before say about the length of the next

    def __init__(self, limit: int, costs: CostTable) -> None:
        self._limit = limit
        self._costs = costs
        self._depths = [_Depth() for _ in range(limit)]
        self._current = limit
        self._asked = [0] * (limit + 1)  # how often a width was asked for to measure it
        self._steps = 0
        self._last = 0  # width of the latest step
        self._rested = 0  # steps since the last probe
        self._unused = [0.0] * (limit + 1)  # seconds of steps since one had that width
        self._restart = 0.0  # seconds per draft that the first one costs on top: MTP caches fill
        self._answers = self._gained = 0.0  # begun, and their tokens; old ones fade
        self._start: int | None = None  # what the latest choice was, when the MTP caches were cold
        self._plan: deque[int] = deque()

    def begin(self) -> None:
        self._answers = self._answers * self.FADE + 1
        self._gained *= self.FADE

    def choose(self, cold: bool = False) -> int:
        if not self._limit:
            return 0
        if self._plan:
            return self._plan.popleft()
        for count in range(self._limit, -1, -1):
            # When something keeps a width from being drafted, that is not asked for ever.
            if self._costs.count(count) < self.MEASURE and self._asked[count] < 4 * self.MEASURE:
                self._asked[count] += 1
                return count
        self._settle()
        self._rested += 1
        if self._rested > self.REST:
            self._plan.extend(self._probe(cold))
            if self._plan:
                self._rested = 0
                return self._plan.popleft()
        self._start = self._started() if cold else None
        return self._current if self._start is None else self._start

    @property
    def _answer_tokens(self) -> float:
        """How long answers are, on average."""
        return max(1.0, self._gained / self._answers) if self._answers else math.inf

    def _started(self) -> int | None:
        """The best width for a whole answer, the first draft's extra cost included; None when it is
        not known how long answers are."""
        tokens = self._answer_tokens
        if math.isinf(tokens):
            return None
        speeds = [self._speed(count) for count in range(self._limit + 1)]
        costs = [
            self._restart * count + tokens / speed if speed else math.inf
            for count, speed in enumerate(speeds)
        ]
        return min(range(self._limit + 1), key=lambda count: (costs[count], count))

    def record(
        self, drafted: int, hits: Sequence[bool], seconds: float | None, steady: bool
    ) -> None:
        for depth, hit in zip(self._depths, hits, strict=False):
            depth.record(hit)
            if not hit:
                break
        for depth in self._depths[drafted:]:
            depth.fade()
        usual = self._costs.seconds(drafted)
        if seconds is None:
            seconds = usual or 0.0
        elif steady:
            # The first plain step after drafts finds nothing of its own in the processor's caches,
            # which a small model feels.
            if drafted or not self._last:
                self._costs.add(drafted, seconds)
        elif usual is not None:
            extra = max(0.0, seconds - usual) / max(1, drafted)
            self._restart = (self._restart + extra) / 2 if self._restart else extra
        self._gained += 1 + sum(hits)
        self._last = drafted
        self._steps += 1
        self._unused = [unused + seconds for unused in self._unused]
        if drafted <= self._limit:
            self._unused[drafted] = 0.0

    def expected_tokens(self, count: int) -> float:
        """Tokens a step with `count` drafts is expected to gain."""
        total = chance = 1.0
        for depth in self._depths[:count]:
            chance *= depth.rate
            total += chance
        return total

    def why(self) -> str:
        if not self._limit:
            return "draft 0: the model has no MTP block"
        plain, other = self._costs.seconds(0), self._current or self._limit
        cost = self._costs.seconds(other)
        if plain is None or cost is None:
            return f"draft {self._current}: not enough steps measured yet"
        facts = (
            f"drafting {other} gives {self.expected_tokens(other):.2f} tokens a step "
            f"for {cost / plain:.2f} times the time of a plain one"
        )
        if self._start is None or self._start == self._current:
            return f"draft {self._current}: {facts}"
        extra = f"{self._restart * other * 1e3:.1f} ms"
        return (
            f"draft {self._start}: {facts}, but the first takes {extra} more and answers have "
            f"{self._answer_tokens:.0f} tokens"
        )

    def _speed(self, count: int) -> float:
        """Expected tokens per second; 0 for a width that could not be measured."""
        seconds = self._costs.seconds(count)
        return 0.0 if seconds is None else self.expected_tokens(count) / max(seconds, 1e-9)

    def _settle(self) -> None:
        best = max(range(self._limit + 1), key=lambda count: (self._speed(count), -count))
        if self._speed(best) > self.ADVANTAGE * self._speed(self._current):
            self._current = best

    def _probe(self, cold: bool) -> list[int]:
        """Steps of the width that was not used for longest and may be now; none are due often."""
        speed = self._speed(self._current)
        steps = self.PROBE if self._current else self.FROM_REST
        share = self.PROBE_SHARE * (4 if self._steps < self.EARLY else 1)
        others = [k for k in range(self._limit + 1) if k != self._current]
        for width in sorted(others, key=lambda k: -self._unused[k]):
            # Few steps may have been disturbed ones: what they cost is not to keep a width away.
            few = self._costs.count(width) < 2 * self.MEASURE
            seconds = self._costs.fast(width) if few else self._costs.seconds(width)
            if seconds is None or not speed:
                continue
            loss = steps * max(0.0, seconds - self.expected_tokens(width) / speed)
            if cold or not self._current:
                loss += self._restart * width
            if loss <= share / self._limit * self._unused[width]:
                # The time of the first drafting step after others does not count.
                return [width] * (steps + (not self._current))
        return []
