from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
from fake_backend import FakeBackend

from mimo_edge.cancel import Cancel
from mimo_edge.draft_policy import AdaptivePolicy, CostTable, FixedPolicy
from mimo_edge.engine import Engine
from mimo_edge.errors import UsageError
from mimo_edge.runtimes.base import F32, Cache, ForwardResult, TokenIds
from mimo_edge.runtimes.reference import ReferenceBackend, mtp_full_logits
from mimo_edge.sampling import Sampler, SamplingParams
from mimo_edge.speculative import (
    accept,
    check_draft,
    max_draft,
)


def run(
    backend: Any,
    draft: Any,
    tokens: int,
    params: SamplingParams | None = None,
    prompt: list[int] | None = None,
    chunk: int = 7,
) -> tuple[list[int], Any]:
    engine = Engine(backend, context=400, draft=draft, prefill_chunk=chunk)
    generation = engine.generate(
        engine.sequence(),
        prompt or [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16],
        Sampler(params or SamplingParams()),
        max_tokens=tokens,
    )
    out = [token for step in generation for token in step]
    assert len(out) == tokens
    return out, generation.stats


class WithGoodDrafts:
    """The reference backend, with proposals swapped for the target's own next token in part.

    A random model accepts nothing; this gives every accepted length while the rows written
    and the logits they give stay the real ones. Those logits are compared with
    teacher-forced rows of a fresh computation each time: the oracle of the bookkeeping.
    """

    name = "reference"

    def __init__(self, weights: Any, answer: list[int], prompt: list[int], seed: int) -> None:
        self.inner = ReferenceBackend(weights)
        self.config = weights.config
        self.weights = weights
        self.truth = prompt + answer
        self.rng = np.random.default_rng(seed)
        self.compared = 0
        self.worst = 0.0
        self.seen: list[int] = []

    def new_cache(self, context: int, verify_rows: int = 4) -> Cache:
        return self.inner.new_cache(context, verify_rows)

    def forward(self, token_ids: TokenIds, cache: Cache, **options: Any) -> ForwardResult:
        self.seen = self.seen[: cache.length] + token_ids.tolist()
        return self.inner.forward(token_ids, cache, **options)

    def mtp_forward(
        self,
        depth: int,
        token_ids: TokenIds,
        hidden: F32,
        position: int,
        cache: Cache,
        *,
        cancel: Cancel | None = None,
    ) -> F32:
        logits = self.inner.mtp_forward(depth, token_ids, hidden, position, cache)
        end = position + len(token_ids)
        if depth == 0:
            self.drafts: list[int] = []
        self.drafts.append(int(token_ids[-1]))
        if self.rng.random() < 0.6:
            sequence = self.seen[: cache.length][:end] + self.drafts[: depth + 1]
            want = mtp_full_logits(self.weights, sequence, depth)[-1]
            self.worst = max(self.worst, float(np.abs(logits - want).max() / np.abs(want).max()))
            self.compared += 1
        if self.rng.random() < (0.8, 0.75, 0.7)[depth] and end + 1 + depth < len(self.truth):
            logits = np.zeros_like(logits)
            logits[self.truth[end + 1 + depth]] = 1
        return logits

    def close(self) -> None:
        self.inner.close()


@pytest.mark.parametrize("draft", [1, 2, 3, "auto"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_never_change_the_answer(draft: Any, temperature: float) -> None:
    params = SamplingParams(temperature, top_p=0.95, seed=11)
    plain, _ = run(FakeBackend(tiny.tiny_config()), 0, 200, params)
    drafted, stats = run(FakeBackend(tiny.tiny_config()), draft, 200, params)
    assert drafted == plain
    if isinstance(draft, int):
        assert stats.tokens_per_verify > 1.3
        assert stats.verifies < 170


@pytest.mark.parametrize("draft", [1, 2, 3, "auto"])
def test_greedy_on_a_random_model_is_token_identical_past_several_windows(draft: Any) -> None:
    config = tiny.tiny_config(eos_token_ids=())
    prompt = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    weights = tiny.random_weights(config, seed=3)
    plain, _ = run(ReferenceBackend(weights), 0, 60, prompt=prompt)
    backend = WithGoodDrafts(weights, plain, prompt, seed=2)
    drafted, stats = run(backend, draft, 60, prompt=prompt)
    assert drafted == plain  # 72 tokens are eight windows of 9
    if draft == 3:
        assert stats.tokens_per_verify > 1.8
        assert {k for k in stats.accepted_by_depth if k}
        assert min(stats.accepted_by_depth) > 0
    assert backend.compared >= (2 if draft == "auto" else 5)
    # f32 forward passes over different row counts: rounding only.
    assert backend.worst < 1e-4


def test_mimo_7b_drafts_with_its_one_block() -> None:
    config = tiny.tiny_mimo7b_config(eos_token_ids=())
    prompt = list(range(20, 40))
    weights = tiny.random_weights(config, seed=1)
    plain, _ = run(ReferenceBackend(weights), 0, 90, prompt=prompt)
    backend = WithGoodDrafts(weights, plain, prompt, seed=5)
    drafted, stats = run(backend, 1, 90, prompt=prompt, chunk=6)
    assert drafted == plain
    assert stats.tokens_per_verify > 1.4
    assert backend.compared >= 8
    assert backend.worst < 1e-4


def test_a_block_that_sees_everything_keeps_few_hidden_rows() -> None:
    backend = FakeBackend(tiny.tiny_mimo7b_config())
    engine = Engine(backend, context=400, draft="auto", prefill_chunk=16)
    sequence = engine.sequence()
    prompt = [i % 90 + 2 for i in range(300)]
    list(engine.generate(sequence, prompt, Sampler(SamplingParams()), max_tokens=3))
    assert sequence.drafter is not None
    assert len(sequence.drafter._hidden) < 100


def test_accept_counts_and_stops() -> None:
    logits = np.eye(4, dtype=np.float32)[[1, 2, 3, 0]]
    best = Sampler(SamplingParams()).sample

    def gained(drafts: list[int], stop: int | None = None, limit: int = 9) -> list[int]:
        return accept(logits, drafts, best, lambda token: token == stop, limit)

    assert gained([1, 2, 3]) == [1, 2, 3, 0]  # all accepted, and one more
    assert gained([1, 0, 3]) == [1, 2]  # the second is corrected, the third never looked at
    assert gained([0, 0, 0]) == [1]
    assert gained([]) == [1]
    assert gained([1, 2, 3], stop=2) == [1, 2]  # the tail after a stop token is dropped
    assert gained([1, 2, 3], limit=1) == [1]


def test_acceptance_counters_add_up() -> None:
    _, stats = run(FakeBackend(tiny.tiny_config(), skill=(1.0, 1.0, 0.0)), 3, 201)
    assert stats.accepted_by_depth[0] == stats.verifies
    assert stats.accepted_by_depth[2] <= 1  # rolled logits can hit by chance
    assert stats.tokens == 201
    gained = stats.verifies + sum(stats.accepted_by_depth)
    assert 0 <= gained - (stats.tokens - 1) <= 1
    assert stats.tokens_per_verify == pytest.approx(200 / stats.verifies)


def test_settings_are_checked_against_the_model() -> None:
    v2, seven, none = (
        tiny.tiny_config(),
        tiny.tiny_mimo7b_config(),
        tiny.tiny_config(num_mtp_layers=0),
    )
    assert [max_draft(c) for c in (v2, seven, none)] == [3, 1, 0]
    for config in (v2, seven, none):
        check_draft("auto", config)
        check_draft(0, config)
    wrong: list[tuple[Any, Any]] = [
        (4, v2),
        (2, seven),
        (2, none),
        (-1, v2),
        ("fast", v2),
        (True, v2),
    ]
    for draft, config in wrong:
        with pytest.raises(UsageError):
            check_draft(draft, config)
    assert AdaptivePolicy(0, CostTable()).choose() == 0
    run(FakeBackend(none), "auto", 20)


class Clock:
    """Time that passes only when a backend is called."""

    def __init__(self, mtp: float, forward: dict[int, float]) -> None:
        self.now = 0.0
        self.mtp, self.forward = mtp, forward

    def call(self, kind: str, rows: int) -> None:
        self.now += self.mtp if kind == "mtp" else self.forward.get(rows, 0.1)

    def __call__(self) -> float:
        return self.now


def timed(
    draft: Any, skill: tuple[float, ...], clock: Clock, tokens: int = 3000
) -> tuple[float, Any]:
    backend = FakeBackend(tiny.tiny_config(), skill=skill, on_call=clock.call)
    engine = Engine(backend, context=4000, draft=draft, clock=clock)
    sampler = Sampler(SamplingParams())
    generation = engine.generate(engine.sequence(), [3, 4, 5], sampler, max_tokens=tokens)
    list(generation)
    return clock.now, generation.stats


@pytest.mark.parametrize(
    ("skill", "mtp", "widths"),
    [
        ((0.95, 0.95, 0.95), 0.05, (1.0, 1.05, 1.1, 1.15)),  # memory bound: drafting wins
        ((0.9, 0.5, 0.05), 0.05, (1.0, 1.2, 1.6, 2.2)),  # one or two pay
        ((0.5, 0.5, 0.5), 0.1, (1.0, 1.9, 2.8, 3.6)),  # bound by the batch: off wins
        ((0.0, 0.0, 0.0), 0.1, (1.0, 1.2, 1.4, 1.6)),  # drafts are useless
    ],
)
def test_auto_comes_close_to_the_best_fixed_setting(
    skill: tuple[float, ...], mtp: float, widths: tuple[float, ...]
) -> None:
    costs = dict(enumerate(widths, start=1))
    fixed = {k: timed(k, skill, Clock(mtp, costs))[0] for k in range(4)}
    auto, stats = timed("auto", skill, Clock(mtp, costs))
    assert min(fixed.values()) / auto >= 0.97
    best = min(fixed, key=lambda k: fixed[k])
    chosen = int(stats.draft_why.split(":")[0].removeprefix("draft "))
    assert fixed[chosen] <= 1.03 * fixed[best]
    assert "times the time of a plain one" in stats.draft_why


def test_auto_notices_that_drafting_pays_again() -> None:
    policy = AdaptivePolicy(3, CostTable())

    def steps(count: int, hit: bool) -> list[int]:
        chosen = []
        for _ in range(count):
            k = policy.choose()
            chosen.append(k)
            policy.record(k, [hit] * (k if hit else min(k, 1)), 1.0 + 0.2 * k, steady=True)
        return chosen

    off = steps(1000, hit=False)
    assert off[60:].count(0) > 0.9 * len(off[60:])
    on = steps(3000, hit=True)
    assert on[-100:].count(3) > 70  # the rest looks at other widths
    assert "draft 3" in policy.why()


def test_fixed_policy_stays() -> None:
    policy = FixedPolicy(2)
    policy.record(2, [False], 9.0, steady=True)
    assert policy.choose() == 2
    assert policy.why() == "draft 2, as set"


def test_costs_are_the_middle_of_the_newest_steps() -> None:
    costs = CostTable()
    assert costs.seconds(1) is None
    for seconds in (1.0, 50.0, 1.0, 1.0, 0.0):
        costs.add(0, seconds)  # a disturbed step does not count
    assert (costs.seconds(0), costs.count(0), costs.count(1)) == (1.0, 5, 0)
    for _ in range(CostTable.NEWEST):
        costs.add(0, 3.0)
    assert (costs.seconds(0), costs.count(0)) == (3.0, CostTable.NEWEST)
