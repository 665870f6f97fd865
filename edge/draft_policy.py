"""How many tokens to draft before each verify: as set, or what is measured to be the fastest.

Drafting pays where its tokens save more passes than drafts and the wider verify cost. That depends
on model, device, memory and text, so it is measured while tokens are made.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple, Protocol


class DraftPolicy(Protocol):
    """Decides how many tokens to draft before each verify."""

    def begin(self) -> None:
        """An answer begins."""
        ...

    def choose(self, cold: bool = False) -> int:
        """Tokens to draft now; `cold` says that the first draft costs extra (`Drafter.cold`)."""
        ...

    def record(
        self,
        drafted: int,
        hits: Sequence[bool],
        seconds: float,
        steady: bool,
        prepared: bool = False,
    ) -> None:
        """One step's outcome: `hits` per depth that was tested, cost of draft and verify.

        `steady` is False when it was the first draft after a prompt or after steps without any.
        `prepared`: something was made that later steps of that kind find (a graph).
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
        self,
        drafted: int,
        hits: Sequence[bool],
        seconds: float,
        steady: bool,
        prepared: bool = False,
    ) -> None:
        return None

    def why(self) -> str:
        return f"draft {self._count}, as set"


class CostTable:
    """Seconds of one step per draft length, measured; shared by the sequences of an engine.

    Of the newest steps of a length the middle half counts: contexts grow, single steps are
    disturbed, and what experts cost that come from flash differs from step to step.
    """

    NEWEST, FEW = 24, 3

    def __init__(self) -> None:
        self._samples: dict[int, deque[float]] = {}
        self._sorted: dict[int, list[float]] = {}
        self._means: dict[int, float] = {}

    def add(self, drafted: int, seconds: float) -> None:
        self._samples.setdefault(drafted, deque(maxlen=self.NEWEST)).append(seconds)
        self._forget(drafted)

    def age(self, drafted: int) -> None:
        """Forget all but the newest few: those that come are of another time."""
        samples = self._samples.get(drafted)
        while samples and len(samples) > self.FEW:
            samples.popleft()
        self._forget(drafted)

    def _forget(self, drafted: int) -> None:
        self._sorted.pop(drafted, None)
        self._means.pop(drafted, None)

    def count(self, drafted: int) -> int:
        """How many steps of that length are remembered."""
        return len(self._samples.get(drafted, ()))

    def seconds(self, drafted: int) -> float | None:
        """Mean of the middle half; None before the first step."""
        known = self._means.get(drafted)
        if known is not None:
            return known
        samples = self._in_order(drafted)
        if not samples:
            return None
        aside = (len(samples) + 1) // 4 if len(samples) > 2 else 0
        middle = samples[aside : len(samples) - aside]
        mean = self._means[drafted] = sum(middle) / len(middle)
        return mean

    def fast(self, drafted: int) -> float | None:
        """What all but a quarter of the steps take at least; None before the first step."""
        samples = self._in_order(drafted)
        return samples[len(samples) // 4] if samples else None

    def _in_order(self, drafted: int) -> list[float]:
        if drafted not in self._sorted:
            self._sorted[drafted] = sorted(self._samples.get(drafted, ()))
        return self._sorted[drafted]


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


class _Starts:
    """Seconds that the first step of an answer takes on top of a usual one, by width: MTP blocks
    start, and nothing is in the processor's caches after a prompt, which plain steps feel too."""

    NEWEST = 9

    def __init__(self) -> None:
        self._samples: dict[int, deque[float]] = {}
        self._usual: dict[int, float] = {}

    def add(self, drafted: int, seconds: float) -> None:
        samples = self._samples.setdefault(drafted, deque(maxlen=self.NEWEST))
        samples.append(seconds)
        self._usual[drafted] = median(samples)

    @property
    def plain(self) -> float:
        """What starting without drafts takes."""
        return self._usual.get(0, 0.0)

    def extra(self, drafted: int) -> float:
        """What starting with that many drafts takes more than starting without any; what is not
        known yet is in proportion to what is."""
        if not drafted:
            return 0.0
        if drafted in self._usual:
            return max(0.0, self._usual[drafted] - self.plain)
        known = [k for k in self._usual if k]
        if not known:
            return 0.0
        near = min(known, key=lambda k: abs(k - drafted))
        return max(0.0, self._usual[near] - self.plain) * drafted / near


class _Step(NamedTuple):
    """What one step did."""

    drafted: int
    hits: tuple[bool, ...]
    seconds: float
    steady: bool
    prepared: bool
    first: bool  # of an answer


class AdaptivePolicy:
    """Draft as many tokens as maximise expected tokens per second, possibly none.

    Expected tokens of a step with K drafts: 1 + a_1 + a_1 a_2 + ..., a_k the running
    acceptance of depth k. Divided by the measured cost of a step of that width. Every width is
    measured at the start and looked at again now and then, when what that may lose is a small share
    of the time spent since: a width that is far off is tried rarely, a close one often. What a
    probe may lose includes what rare widths meet anew: graphs to build, MTP blocks to start.

    The first draft after a prompt also starts the MTP blocks. Whether that pays depends on how long
    answers are: as long as those before, on average.

    One policy serves all answers of an engine: what it learnt need not be learnt again. Steps of a
    small model are as short as all this, so it is worked out once in `REVIEW` steps, and where an
    answer begins.
    """

    MEASURE = 3  # steps of a width before it is judged
    REVIEW = 8  # steps that go by one decision
    ADVANTAGE = 1.01  # a change must promise this much, or two equal widths would alternate
    REST = 12  # steps between two probes at least
    # The first steps after others find nothing of their own in the processor's caches, which a
    # small model feels by a third of a step: they say nothing of a width that is kept to.
    SETTLING = 2
    PROBE = 5  # steps of a probe
    STALE = 64  # steps after which only a few of a width's samples still count
    PROBE_SHARE = 0.005  # of the time, at most, that probes may lose; more of the first steps
    EARLY, EARLY_SHARE = 128, 2
    FADE = 0.95  # of what answers before say about the length of the next

    def __init__(self, limit: int, costs: CostTable) -> None:
        self._limit = limit
        self._costs = costs
        self._depths = [_Depth() for _ in range(limit)]
        self._starts = _Starts()
        self._building = [0.0] * (limit + 1)  # seconds a step spends on what is prepared
        self._current = limit
        self._asked = [0] * (limit + 1)  # how often a width was asked for to measure it
        self._measured = not limit
        self._steps = 0
        self._last = 0  # width of the latest step
        self._run = 0  # how many had that width in a row
        self._used = [0] * (limit + 1)  # the latest step of every width
        self._rested = 0  # steps since the last probe
        self._spent = 0.0  # seconds of all steps
        self._spent_before = [0.0] * (limit + 1)  # until the latest step of every width
        self._answers = self._gained = 0.0  # begun, and their tokens; old ones fade
        self._said = 0  # tokens of the latest answer
        self._start: int | None = None  # what the latest choice was, when it was a cold one
        self._plan: deque[int] = deque()
        self._first = False  # whether the next step is the first of an answer
        # What was not looked at yet: steps, and where answers begin.
        self._news: list[_Step | None] = []
        self._speeds = [0.0] * (limit + 1)  # expected of every width, as of the latest decision
        self._chosen: int | None = None  # what the coming steps go by
        self._was_cold = False

    def begin(self) -> None:
        self._news.append(None)
        self._first = True
        self._plan.clear()
        self._chosen = None

    def choose(self, cold: bool = False) -> int:
        if not self._limit:
            return 0
        if self._plan:
            return self._plan.popleft()
        if self._chosen is None or len(self._news) >= self.REVIEW:
            self._look()
            width = self._to_measure()
            if width is not None:
                return width
            self._was_cold, self._chosen = cold, self._decide(cold)
            if self._plan:
                return self._plan.popleft()
        elif cold != self._was_cold:
            self._was_cold, self._chosen = cold, self._kept_to(cold)
        return self._chosen

    def record(
        self,
        drafted: int,
        hits: Sequence[bool],
        seconds: float,
        steady: bool,
        prepared: bool = False,
    ) -> None:
        step = _Step(drafted, tuple(hits), seconds, steady, prepared, self._first)
        self._first = False
        self._news.append(step)
        if not self._measured:
            self._chosen = None  # every step counts

    # --- deciding ---

    def _to_measure(self) -> int | None:
        """A width of which hardly anything is known yet."""
        if self._measured:
            return None
        for count in range(self._limit, -1, -1):
            # When something keeps a width from being drafted, that is not asked for ever.
            if self._costs.count(count) < self.MEASURE and self._asked[count] < 4 * self.MEASURE:
                self._asked[count] += 1
                return count
        self._measured = True
        return None

    def _decide(self, cold: bool) -> int:
        """The width of the coming steps. Plans a probe before them when one is due."""
        self._speeds = [self._speed(count) for count in range(self._limit + 1)]
        self._settle()
        kept = self._kept_to(cold)
        if self._rested > self.REST and (self._first or not self._short):
            self._plan.extend(self._probe(cold, kept))
            if self._plan:
                self._rested = 0
        return kept

    def _kept_to(self, cold: bool) -> int:
        """The width of steps that are no probe."""
        self._start = self._started() if cold else None
        return self._current if self._start is None else self._start

    @property
    def _answer_tokens(self) -> float:
        """How long answers are, on average."""
        return max(1.0, self._gained / self._answers) if self._answers else math.inf

    @property
    def _short(self) -> bool:
        """Whether answers are so short that changes inside them cost too much: a probe is then how
        an answer starts."""
        return self._answer_tokens < 8 * self.PROBE

    def _started(self) -> int | None:
        """The best width for the rest of an answer, what its start costs included; None when it is
        not known how long answers are."""
        tokens = self._answer_tokens
        if math.isinf(tokens):
            return None
        # One that is longer than usual already may go on for as long again.
        left = tokens - self._said if self._said < tokens else self._said
        costs = []
        for count, speed in enumerate(self._speeds):
            costs.append(self._starts.extra(count) + left / speed if speed else math.inf)
        return costs.index(min(costs))

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
        self._look()
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
        extra = f"{self._starts.extra(other) * 1e3:.1f} ms"
        return (
            f"draft {self._start}: {facts}, but the first takes {extra} more and answers have "
            f"{self._answer_tokens:.0f} tokens"
        )

    def _speed(self, count: int) -> float:
        """Expected tokens per second; 0 for a width that could not be measured."""
        seconds = self._costs.seconds(count)
        if seconds is None:
            return 0.0
        tokens = self.expected_tokens(count)
        # Of the last step of an answer about half of what it gains is not wanted any more.
        used = 1 / (1 + (tokens - 1) / 2 / self._answer_tokens)
        return used * tokens / max(seconds, 1e-9)

    def _settle(self) -> None:
        fastest = max(self._speeds)
        if fastest > self.ADVANTAGE * self._speeds[self._current]:
            self._current = self._speeds.index(fastest)

    def _probe(self, cold: bool, kept: int) -> list[int]:
        """Steps of the width that was not used for longest and may be now, in place of `kept`; none
        are due often."""
        speed = self._speeds[self._current]
        started = self._starts.extra(kept) if cold else 0.0
        steps = self.PROBE + (not self._current)  # the first one starts the blocks
        share = self.PROBE_SHARE * (self.EARLY_SHARE if self._steps < self.EARLY else 1)
        others = [k for k in range(self._limit + 1) if k != self._current]
        for width in sorted(others, key=self._spent_before.__getitem__):
            # Few steps may have been disturbed ones: what they cost is not to keep a width away.
            few = self._costs.count(width) < 2 * self.MEASURE
            seconds = self._costs.fast(width) if few else self._costs.seconds(width)
            if seconds is None or not speed:
                continue
            loss = steps * max(0.0, seconds - self.expected_tokens(width) / speed)
            loss += steps * self._building[width]
            if cold or not self._current:
                # Where the answer starts, whatever is drafted starts the blocks, too.
                loss += max(0.0, self._starts.extra(width) - started)
            if loss <= share / self._limit * (self._spent - self._spent_before[width]):
                return [width] * steps
        return []

    # --- learning ---

    def _look(self) -> None:
        """Learn from the steps since the last look."""
        news, self._news = self._news, []
        for step in news:
            if step is not None:
                self._learn(step)
                continue
            self._answers = self._answers * self.FADE + 1
            self._gained *= self.FADE
            self._said = 0

    def _learn(self, step: _Step) -> None:
        drafted = step.drafted
        for depth, hit in zip(self._depths, step.hits, strict=False):
            depth.record(hit)
            if not hit:
                break
        if drafted < self._limit:
            for depth in self._depths[drafted:]:
                depth.fade()
        usual, more = None, 0.0
        if step.prepared or step.first or not step.steady:
            usual = self._costs.seconds(drafted)
            more = 0.0 if usual is None else max(0.0, step.seconds - usual)
        known = drafted <= self._limit
        if known and self._measured:  # before, everything is new
            built = more if step.prepared else 0.0
            self._building[drafted] += (built - self._building[drafted]) / 16
        self._run = self._run + 1 if drafted == self._last else 1
        if step.first:  # found nothing in the caches, whatever its width
            self._run = self.SETTLING
        if step.prepared:
            pass  # says nothing of the next such step
        elif step.first or not step.steady:
            # Blocks that start within an answer find the caches as its steps left them.
            if usual is not None and (step.first or drafted):
                self._starts.add(drafted, more + (0.0 if step.first else self._starts.plain))
        elif self._run > self.SETTLING:
            if known and self._steps - self._used[drafted] > self.STALE:
                self._costs.age(drafted)
            self._costs.add(drafted, step.seconds)
            if known:
                self._used[drafted] = self._steps
        gained = 1 + sum(step.hits)
        self._gained += gained
        self._said += gained
        self._last = drafted
        self._steps += 1
        self._rested += 1
        self._spent += step.seconds
        if known:
            self._spent_before[drafted] = self._spent
