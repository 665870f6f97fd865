"""Prefill and decode over a backend. Knows token ids, not text.

A `Sequence` keeps its cache between turns: a prompt that extends what was processed costs
only its new tokens. A `Generation` is one answer; between two of its steps the sequence is
always whole (cache rows == tokens), so it can be left at any step and used again. A step that is
cancelled or fails half-way is undone.
"""

from __future__ import annotations

import operator
import os
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ids
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol

import numpy as np

from mimo_edge.cache_rows import CacheLayout
from mimo_edge.cancel import Cancel, check_cancel
from mimo_edge.draft_policy import AdaptivePolicy, CostTable, DraftPolicy, FixedPolicy
from mimo_edge.errors import (
    BackendError,
    Cancelled,
    ContextLengthError,
    GenerationError,
    MimoEdgeError,
    UsageError,
)
from mimo_edge.experts.trace import Phase, TraceWriter
from mimo_edge.idle import IdleCaches
from mimo_edge.repetition import RepeatGuard, check_stop_repeats
from mimo_edge.runtimes.base import F32, Backend, Cache, ForwardResult, PreparingBackend
from mimo_edge.sampling import Sampler
from mimo_edge.sequence import Sequence
from mimo_edge.speculative import (
    MAX_DRAFT,
    DraftSetting,
    accept,
    check_draft,
    max_draft,
)
from mimo_edge.turns import TurnQueue
from mimo_edge.units import even_part

__all__ = ["Engine", "Generation", "GenerationStats", "Prefixes", "Sequence", "token_list"]

FinishReason = Literal["stop", "length", "repetition", "cancelled"]
PREFILL_CHUNK = 256


class Prefixes(Protocol):
    """Beginnings of prompts that are kept; see snapshots/prefixes.py. Used by whoever has the
    turn."""

    def wanted(self, border: int) -> bool:
        """Whether a beginning of that many tokens is worth keeping."""
        ...

    def load(
        self,
        engine: Engine,
        sequence: Sequence,
        prefix: Ids[int],
        drafting: bool,
        cancel: Cancel | None = None,
    ) -> bool:
        """Make `sequence` what it is after `prefix`, if that is kept. Raises Cancelled."""
        ...

    def keep(self, engine: Engine, sequence: Sequence) -> None:
        """Keep what `sequence` is now."""
        ...


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
    """Generates token ids with one backend; sequences take turns step by step, in the order in
    which they ask.

    `context` is the most tokens a sequence may hold, `draft` as in speculative decoding. `trace`
    is where the backend records its routes: the engine names the phases and closes it. `idle` keeps
    the caches of all sequences within their bound, `prefixes` the beginnings of prompts.
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
        self.idle = IdleCaches()
        self.prefixes: Prefixes | None = None
        self.between_tokens: Callable[[], None] = _nothing
        """Called before every step and prompt chunk, while nothing computes: it may change what
        the backend uses. Whatever it raises ends the generation."""
        self.draft_limit = MAX_DRAFT
        """Most drafts of a step, whatever is set or chosen."""
        # A backend takes one call at a time: threads queue here between steps.
        self.queue = TurnQueue()
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
        made = Sequence(self)
        self.idle.add(made)
        return made

    def forget(self, sequence: Sequence) -> None:
        """Reset a sequence nothing may be built on, while nobody else puts it away."""
        if os.getpid() == self._pid:  # in a forked process the turn may be taken for ever
            with self.queue.turn():
                sequence.reset()

    @cached_property
    def layout(self) -> CacheLayout:
        """What rows of caches are here. The caller has the turn."""
        cache = self.backend.new_cache(self.context, MAX_DRAFT + 1)
        cache.close()
        return cache.layout

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
        border: int = 0,
        answered: int = 0,
    ) -> Generation:
        """Continue `prompt` (the whole of it, also what the sequence already holds). Its first
        `border` tokens are a beginning that other prompts share; its last `answered` tokens are the
        answer's own, which goes on.

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
        # The newest token of an answer may have found no room in the context.
        ids = self.checked(prompt, self.context + (answered > 0))
        if self.prefixes is None or not (0 < border < len(ids) and self.prefixes.wanted(border)):
            border = 0
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
            border,
            answered,
        )

    def logits(self, token_ids: Ids[int]) -> F32:
        """Logits f32 [T, V] after every token of one sequence."""
        ids = self.checked(token_ids)
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
        """The backend for one step, when those who asked before are done with theirs. Raises as
        `check_open`, and Cancelled while waiting."""
        self.check_open()
        with self.queue.turn(cancel):
            self.check_open()
            yield

    @contextmanager
    def step_of(self, sequence: Sequence, cancel: Cancel | None = None) -> Iterator[None]:
        """The turn, for a step of `sequence`: its cache is in memory, and what others hold keeps
        its bound. A step that fails is undone."""
        with self.turn(cancel):
            try:
                self.idle.prepare(sequence, cancel)
                yield
            except BaseException as error:
                # Here and not later: without the turn, others may want to put the sequence away.
                sequence.recover(error)
                raise
            finally:
                self.idle.settle(sequence)

    def close(self) -> None:
        """Close the backend, after the step that is running. Calling it twice is harmless; in a
        forked process it does nothing, for the model is its parent's."""
        if os.getpid() != self._pid:
            self.closed = True
            return
        with self.queue.turn():
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

    def checked(self, prompt: Ids[int], limit: int | None = None) -> list[int]:
        """A prompt as plain ids. Raises UsageError when it is empty or has an id that the
        vocabulary has not, ContextLengthError above `limit` tokens, or the context's."""
        ids = token_list(prompt)
        vocab = self.backend.config.vocab_size
        if not ids:
            raise UsageError("the prompt has no tokens")
        if min(ids) < 0 or max(ids) >= vocab:
            bad = next(token for token in ids if not 0 <= token < vocab)
            raise UsageError(f"token id {bad} is outside the vocabulary of {vocab}")
        if len(ids) > (limit or self.context):
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


def _nothing() -> None:
    return None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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
        border: int,
        answered: int,
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
        self._border = border
        self._answered = answered
        self._ended: FinishReason | None = None
        for token in prompt[len(prompt) - answered :]:
            self._is_last(token)
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
            self.finish_reason = "cancelled"
        except BaseException as error:
            # What failed in a step was undone there. Between two: a sample of broken logits, an
            # interrupt.
            if isinstance(error, GenerationError) or not isinstance(error, MimoEdgeError):
                self._engine.forget(self._sequence)
            raise
        finally:
            self.stats.draft_why = self._policy.why()

    def _run(self) -> Iterator[list[int]]:
        if self._answered and (self._ended is not None or self._at_limit(len(self._prompt) - 1)):
            self.finish_reason = self._ended or "length"
            return
        logits = self._prefill()
        token = self._sampler.sample(logits)
        self._is_last(token)
        self.stats.tokens = 1
        self.stats.first_token_ms = self.stats.prefill_ms
        yield [token]
        self._policy.begin()
        while self._ended is None and not self._at_limit(len(self._sequence.tokens)):
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

    def _at_limit(self, processed: int) -> bool:
        """Whether max_tokens are out, or the last token finds no room behind `processed` ones."""
        if self._max_tokens is not None and self._said >= self._max_tokens:
            return True
        return processed >= self._engine.context

    @property
    def _said(self) -> int:
        """Tokens of the answer so far."""
        return self._answered + self.stats.tokens

    def _prefill(self) -> F32:
        """Process the prompt in chunks; logits [V] of its last token."""
        engine, sequence, prompt = self._engine, self._sequence, self._prompt
        drafting = self._draft != 0 and max_draft(engine.backend.config) > 0
        with engine.turn(self._cancel):
            engine.idle.make_room(sequence)
            start = engine.clock()
            at = self.stats.reused_tokens = sequence.adopt(
                prompt, drafting, self._border, self._cancel
            )
            engine.idle.settle(sequence)
            self.stats.prefill_ms += (engine.clock() - start) * 1e3
        while True:
            check_cancel(self._cancel)
            # Whether it is found or computed, what follows a border is processed by itself: the
            # rounding of a pass depends on its rows, and the answer must not.
            end = self._border if at < self._border else len(prompt)
            chunk = prompt[at : at + even_part(end - at, engine.prefill_chunk)]
            with engine.step_of(sequence, self._cancel):
                engine.between_tokens()
                start = engine.clock()
                following = end - at - len(chunk)
                last = end == len(prompt) and not following
                # The last layer of a chunk matters only where somebody looks at its rows.
                rows, hidden = sequence.advance(
                    chunk, 1 if last else 0, cancel=self._cancel, following=following
                )
                sequence.commit(chunk, hidden, len(chunk), self._cancel)
                at += len(chunk)
                if at == self._border and engine.prefixes is not None:
                    engine.prefixes.keep(engine, sequence)
                self.stats.prefill_ms += (engine.clock() - start) * 1e3
            if last:  # at least one token is always left to process
                logits: F32 = rows[-1]
                return logits

    def _step(self, pending: int) -> list[int]:
        """Draft, verify and commit; the tokens gained. `pending` is chosen, not processed."""
        engine, sequence, stats = self._engine, self._sequence, self.stats
        room = engine.context - len(sequence.tokens) - 1
        left = room + 1
        if self._max_tokens is not None:
            left = min(left, self._max_tokens - self._said)
        with engine.step_of(sequence, self._cancel):
            engine.between_tokens()
            start, prepared = engine.clock(), engine.prepared
            # More drafts than can still be used would only be thrown away.
            cold = sequence.drafter is not None and sequence.drafter.cold
            want = min(self._policy.choose(cold), room, left - 1, engine.draft_limit)
            drafts: list[int] = []
            steady = True
            if want > 0 and sequence.drafter is not None:
                known = [*sequence.tokens, pending]
                try:
                    drafts = sequence.drafter.draft(
                        known,
                        want,
                        self._sampler.propose,
                        self._cancel,
                        self._sampler.propose_likeliest,
                    )
                finally:
                    self._sampler.retract()
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
            made = engine.prepared != prepared
            self._policy.record(len(drafts), hits, seconds, steady, made)
        stats.verifies += 1
        stats.tokens += len(gained)
        stats.decode_ms += seconds * 1e3
        for depth in range(len(drafts)):
            stats.drafted_by_depth[depth] += 1
            stats.accepted_by_depth[depth] += depth < len(hits) and hits[depth]
        return gained
