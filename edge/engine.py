"""Prefill and decode over a backend. Knows token ids, not text.

A `Sequence` keeps its cache between turns: a prompt that extends what was processed costs
only its new tokens. A `Generation` is one answer; between two of its steps the sequence is
always whole (cache rows == tokens), so it can be left at any step and used again. A step that is
cancelled or fails half-way is undone.
"""

from __future__ import annotations

import operator
import os
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ids
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mimo_edge.cancel import Cancel, check_cancel
from mimo_edge.errors import (
    BackendError,
    CacheError,
    Cancelled,
    ContextLengthError,
    GenerationError,
    MimoEdgeError,
    UsageError,
)
from mimo_edge.experts.trace import Phase, TraceWriter
from mimo_edge.repetition import RepeatGuard, check_stop_repeats
from mimo_edge.runtimes.base import F32, Backend, Cache, ForwardResult, PreparingBackend
from mimo_edge.sampling import Sampler
from mimo_edge.speculative import (
    MAX_DRAFT,
    AdaptivePolicy,
    CostTable,
    Drafter,
    DraftPolicy,
    DraftSetting,
    FixedPolicy,
    accept,
    check_draft,
    max_draft,
)
from mimo_edge.units import even_part

FinishReason = Literal["stop", "length", "repetition", "cancelled"]
PREFILL_CHUNK = 256
# How often somebody who waits for a turn looks whether he still wants it.
_TURN_POLL_S = 0.02


@dataclass
class GenerationStats:
    """What one generation did. Times in milliseconds of wall time inside the engine."""

    prompt_tokens: int = 0
    reused_tokens: int = 0  # of the prompt, already in the cache
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    first_token_ms: float | None = None
    tokens: int = 0  # generated, the stop token included
    verifies: int = 0  # target passes after prefill
    drafted_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)
    draft_why: str = ""

    @property
    def tokens_per_verify(self) -> float:
        """Tokens gained per target pass; the first token comes from prefill. 0 before any."""
        return (self.tokens - 1) / self.verifies if self.verifies else 0.0

    @property
    def decode_tps(self) -> float:
        """Generated tokens per second of decoding, the first one not counted."""
        return (self.tokens - 1) / self.decode_ms * 1e3 if self.decode_ms else 0.0

    @property
    def prefill_tps(self) -> float:
        """Newly processed prompt tokens per second."""
        new = self.prompt_tokens - self.reused_tokens
        return new / self.prefill_ms * 1e3 if self.prefill_ms else 0.0


class Engine:
    """Generates token ids with one backend; sequences take turns step by step.

    `context` is the most tokens a sequence may hold, `draft` as in speculative decoding. `trace`
    is where the backend records its routes: the engine names the phases and closes it.
    Raises UsageError when `draft` is more than the model can propose, ContextLengthError
    when the model has fewer positions than `context`.
    """

    def __init__(
        self,
        backend: Backend,
        context: int,
        draft: DraftSetting = "auto",
        *,
        prefill_chunk: int = PREFILL_CHUNK,
        clock: Callable[[], float] = time.perf_counter,
        trace: TraceWriter | None = None,
    ) -> None:
        if context < 1 or prefill_chunk < 1:
            raise UsageError(f"context {context}, prefill chunk {prefill_chunk}: both start at 1")
        limit = backend.config.max_position_embeddings
        if context > limit:
            raise ContextLengthError(
                f"a context of {context} exceeds the model's {limit} positions",
                f"use --context {limit} or less",
            )
        check_draft(draft, backend.config)
        self.backend = backend
        self._preparing = backend if isinstance(backend, PreparingBackend) else None
        self.context = context
        self.draft = draft
        self.prefill_chunk = prefill_chunk
        self.clock = clock
        self._trace = trace
        # Shared by all sequences: what drafting costs and brings need not be learnt by each.
        self._auto = AdaptivePolicy(max_draft(backend.config), CostTable())
        # A backend takes one call at a time: threads queue here between steps.
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self.closed = False

    def draft_policy(self, draft: DraftSetting) -> DraftPolicy:
        """The policy of a setting; one for all that draft "auto"."""
        return self._auto if draft == "auto" else FixedPolicy(draft)

    @property
    def prepared(self) -> int:
        """See `PreparingBackend`; 0 throughout for other backends."""
        return 0 if self._preparing is None else self._preparing.prepared

    def sequence(self) -> Sequence:
        """A new, empty sequence."""
        return Sequence(self)

    def generate(
        self,
        sequence: Sequence,
        prompt: Ids[int],
        sampler: Sampler,
        *,
        max_tokens: int | None = None,
        is_last: Callable[[int], bool] = lambda token: False,
        cancel: Cancel | None = None,
        draft: DraftSetting | None = None,
        stop_repeats: int = 0,
    ) -> Generation:
        """Continue `prompt` (the whole of it, also what the sequence already holds).

        `is_last` is asked once for every token, in order, and ends the generation with that
        token. So does a sequence of up to repetition.MAX_PERIOD tokens that comes `stop_repeats`
        times in a row (0: nobody looks); then `finish_reason` is "repetition". Raises UsageError or
        ContextLengthError before any work.
        """
        self.check_open()
        if max_tokens is not None and (not _is_count(max_tokens) or max_tokens < 1):
            raise UsageError(f"max_tokens = {max_tokens!r}", "ask for at least one")
        setting = self.draft if draft is None else draft
        check_draft(setting, self.backend.config)
        check_stop_repeats(stop_repeats)
        ids = self._checked(prompt)
        return Generation(
            self,
            sequence,
            ids,
            sampler,
            max_tokens,
            is_last,
            cancel or Cancel(),
            setting,
            RepeatGuard(stop_repeats) if stop_repeats else None,
        )

    def logits(self, token_ids: Ids[int]) -> F32:
        """Logits f32 [T, V] after every token of one sequence."""
        ids = self._checked(token_ids)
        with self.turn():
            cache = self.backend.new_cache(len(ids))
            result = self.forward(ids, cache, Phase.PREFILL, logits_rows=len(ids))
        return result.logits

    def forward(
        self,
        token_ids: Ids[int],
        cache: Cache,
        phase: Phase,
        *,
        cancel: Cancel | None = None,
        **rows: int,
    ) -> ForwardResult:
        """One pass of the backend (`rows` as there); its routes go to the trace. Takes the turn of
        whoever calls for granted."""
        ids = np.asarray(token_ids, dtype=np.int32)
        if self._trace is None:
            return self.backend.forward(ids, cache, cancel=cancel, **rows)
        self._trace.phase = phase
        result = self.backend.forward(ids, cache, cancel=cancel, **rows)
        self._trace.flush()
        return result

    @contextmanager
    def turn(self, cancel: Cancel | None = None) -> Iterator[None]:
        """The backend for one step, when the others are done with theirs. Raises as `check_open`,
        and Cancelled while waiting."""
        self.check_open()
        while not self._lock.acquire(timeout=_TURN_POLL_S):
            check_cancel(cancel)
        try:
            self.check_open()
            yield
        finally:
            self._lock.release()

    def close(self) -> None:
        """Close the backend, after the step that is running. Calling it twice is harmless; in a
        forked process it does nothing, for the model is its parent's."""
        if os.getpid() != self._pid:
            self.closed = True
            return
        with self._lock:
            if not self.closed:
                self.closed = True
                self.backend.close()
                if self._trace is not None:
                    self._trace.close()

    def check_open(self) -> None:
        """Raises UsageError once closed, BackendError in a forked process."""
        if self.closed:
            raise UsageError("the runtime is closed")
        if os.getpid() != self._pid:
            raise BackendError(
                "this process was forked from the one that opened the model",
                "threads and their locks do not survive fork: open the model after forking",
            )

    def _checked(self, prompt: Ids[int]) -> list[int]:
        ids = token_list(prompt)
        vocab = self.backend.config.vocab_size
        if not ids:
            raise UsageError("the prompt has no tokens")
        bad = next((token for token in ids if not 0 <= token < vocab), None)
        if bad is not None:
            raise UsageError(f"token id {bad} is outside the vocabulary of {vocab}")
        if len(ids) > self.context:
            raise ContextLengthError(
                f"the prompt has {len(ids)} tokens, the context holds {self.context}",
                "use a larger --context or a shorter prompt",
            )
        return ids


def token_list(token_ids: Ids[int]) -> list[int]:
    """Token ids [T] as plain integers. Raises UsageError when one is no whole number."""
    try:
        return [operator.index(token) for token in token_ids]
    except TypeError as error:
        raise UsageError(f"token ids are a flat list of whole numbers: {error}") from None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class Sequence:
    """Tokens processed so far, their cache and the drafter that follows it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.tokens: list[int] = []
        self.cache: Cache | None = None
        self.drafter: Drafter | None = None

    def reset(self) -> None:
        """Forget everything; the next prompt is processed from its start."""
        self.tokens, self.cache, self.drafter = [], None, None

    def nbytes(self) -> int:
        """Bytes of the cache."""
        return self.cache.nbytes() if self.cache is not None else 0

    def recover(self) -> None:
        """After a step that failed half-way: back to the tokens that stand. When rows that the
        next token needs are gone, everything is forgotten."""
        if self.cache is None:
            return
        try:
            self.cache.rollback(self.cache.length - len(self.tokens))
        except CacheError:
            self.reset()
            return
        if self.drafter is not None and self.drafter.length != len(self.tokens):
            self.reset()

    def adopt(self, prompt: Ids[int], drafting: bool) -> int:
        """Keep what `prompt` shares with the processed tokens; how many tokens that is.

        At least the last token of the prompt is left to process: its logits are needed.
        """
        if self.cache is not None:
            shared = _common_prefix(self.tokens, prompt)
            keep = min(shared, len(prompt) - 1)
            whole = keep == len(self.tokens)
            if drafting and self.drafter is None:
                whole, keep = False, 0  # H rows were not kept: drafting must see them
            elif not whole and self._engine.backend.config.family == "mimo":
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
        self.cache = self._engine.backend.new_cache(self._engine.context, MAX_DRAFT + 1)
        if drafting:
            self.drafter = Drafter(self._engine.backend, self.cache)
        return 0

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


class Generation:
    """One answer, as an iterator over the groups of tokens each step gained.

    `stats` is live; `finish_reason` is set when the iterator ends. Leaving it early, `cancel`
    (which stops a step within one layer) and errors leave the sequence at its last whole token.
    """

    def __init__(
        self,
        engine: Engine,
        sequence: Sequence,
        prompt: list[int],
        sampler: Sampler,
        max_tokens: int | None,
        is_last: Callable[[int], bool],
        cancel: Cancel,
        draft: DraftSetting,
        repeats: RepeatGuard | None,
    ) -> None:
        self._engine = engine
        self._sequence = sequence
        self._prompt = prompt
        self._sampler = sampler
        self._max_tokens = max_tokens
        self._ask_last = is_last
        self._cancel = cancel
        self._draft = draft
        self._repeats = repeats
        self._ended: FinishReason | None = None
        config = engine.backend.config
        depths = max_draft(config) if draft == "auto" else draft
        self._policy = engine.draft_policy(draft)
        self.stats = GenerationStats(
            prompt_tokens=len(prompt),
            drafted_by_depth=[0] * depths,
            accepted_by_depth=[0] * depths,
        )
        self.finish_reason: FinishReason | None = None

    def __iter__(self) -> Iterator[list[int]]:
        try:
            yield from self._run()
        except GeneratorExit:
            raise
        except Cancelled:
            self._sequence.recover()
            self.finish_reason = "cancelled"
        except MimoEdgeError as error:
            if isinstance(error, GenerationError):
                self._sequence.reset()  # NaN in rows nobody should see still spreads from there
            else:
                self._sequence.recover()
            raise
        except BaseException:
            # A bug, or an interrupt in the middle of anything: nothing may be built on this.
            self._sequence.reset()
            raise
        finally:
            self.stats.draft_why = self._policy.why()

    def _run(self) -> Iterator[list[int]]:
        logits = self._prefill()
        token = self._sampler.sample(logits)
        self._is_last(token)
        self.stats.tokens = 1
        self.stats.first_token_ms = self.stats.prefill_ms
        yield [token]
        self._policy.begin()
        while self._ended is None and not self._at_limit():
            check_cancel(self._cancel)
            gained = self._step(token)
            token = gained[-1]
            yield gained
        self.finish_reason = self._ended or "length"

    def _is_last(self, token: int) -> bool:
        if self._ask_last(token):
            self._ended = "stop"
        elif self._repeats is not None and self._repeats.add(token):
            self._ended = "repetition"
        return self._ended is not None

    def _at_limit(self) -> bool:
        """Whether max_tokens are out, or the last token found no room in the context."""
        if self._max_tokens is not None and self.stats.tokens >= self._max_tokens:
            return True
        return len(self._sequence.tokens) >= self._engine.context

    def _prefill(self) -> F32:
        """Process the prompt in chunks; logits [V] of its last token."""
        engine, sequence = self._engine, self._sequence
        drafting = self._draft != 0 and max_draft(engine.backend.config) > 0
        with engine.turn(self._cancel):
            at = self.stats.reused_tokens = sequence.adopt(self._prompt, drafting)
        while True:
            check_cancel(self._cancel)
            chunk = self._prompt[at : at + even_part(len(self._prompt) - at, engine.prefill_chunk)]
            with engine.turn(self._cancel):
                start = engine.clock()
                following = len(self._prompt) - at - len(chunk)
                # The last layer of a chunk matters only where somebody looks at its rows.
                rows, hidden = sequence.advance(
                    chunk, 0 if following else 1, cancel=self._cancel, following=following
                )
                sequence.commit(chunk, hidden, len(chunk), self._cancel)
                self.stats.prefill_ms += (engine.clock() - start) * 1e3
            at += len(chunk)
            if not following:  # at least one token is always left to process
                logits: F32 = rows[-1]
                return logits

    def _step(self, pending: int) -> list[int]:
        """Draft, verify and commit; the tokens gained. `pending` is chosen, not processed."""
        engine, sequence, stats = self._engine, self._sequence, self.stats
        room = engine.context - len(sequence.tokens) - 1
        left = room + 1
        if self._max_tokens is not None:
            left = min(left, self._max_tokens - stats.tokens)
        with engine.turn(self._cancel):
            start, prepared = engine.clock(), engine.prepared
            # More drafts than can still be used would only be thrown away.
            cold = sequence.drafter is not None and sequence.drafter.cold
            want = min(self._policy.choose(cold), room, left - 1)
            drafts: list[int] = []
            steady = True
            if want > 0 and sequence.drafter is not None:
                known = [*sequence.tokens, pending]
                drafts = sequence.drafter.draft(known, want, self._sampler.best, self._cancel)
                steady = sequence.drafter.steady
            batch = [pending, *drafts]
            phase = Phase.VERIFY if drafts else Phase.DECODE
            logits, hidden = sequence.advance(batch, len(batch), phase, self._cancel)
            gained = accept(logits, drafts, self._sampler.sample, self._is_last, left)
            # The newest token is chosen but not processed, as after a plain step.
            sequence.commit(batch, hidden, len(gained), self._cancel)
            seconds = engine.clock() - start
            hits = [a == b for a, b in zip(gained, drafts, strict=False)]
            # Here, because other sequences share the policy.
            typical = seconds if engine.prepared == prepared else None
            self._policy.record(len(drafts), hits, typical, steady)
        stats.verifies += 1
        stats.tokens += len(gained)
        stats.decode_ms += seconds * 1e3
        for depth in range(len(drafts)):
            stats.drafted_by_depth[depth] += 1
            stats.accepted_by_depth[depth] += depth < len(hits) and hits[depth]
        return gained


def _common_prefix(a: Ids[int], b: Ids[int]) -> int:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
