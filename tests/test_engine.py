from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
from fake_backend import FakeBackend

from mimo_edge.cancel import Cancel
from mimo_edge.engine import Engine, Sequence
from mimo_edge.errors import ContextLengthError, UsageError
from mimo_edge.runtimes.reference import ReferenceBackend
from mimo_edge.sampling import Sampler, SamplingParams
from mimo_edge.units import even_part

PROMPT = [4, 8, 15, 16, 23, 42]


def greedy() -> Sampler:
    return Sampler(SamplingParams())


def generate(engine: Engine, sequence: Sequence, prompt: list[int], **options: Any) -> list[int]:
    return [t for step in engine.generate(sequence, prompt, greedy(), **options) for t in step]


def fake(context: int = 64, draft: Any = 0, **options: Any) -> tuple[Engine, FakeBackend]:
    backend = FakeBackend(tiny.tiny_config())
    return Engine(backend, context, draft, **options), backend


def expected(backend: FakeBackend, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(backend.next_logits(tokens))))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("draft", [0, 3, "auto"])
@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
def test_chunked_prefill_and_decode_follow_the_model(draft: Any, chunk: int) -> None:
    engine, backend = fake(draft=draft, prefill_chunk=chunk)
    out = generate(engine, engine.sequence(), PROMPT, max_tokens=30)
    assert out == expected(backend, PROMPT, 30)
    parts = -(-6 // chunk)
    assert sum(backend.forwards[:parts]) == 6
    assert max(backend.forwards[:parts]) <= chunk


def test_prompt_longer_than_the_context_is_refused_before_work() -> None:
    engine, backend = fake(context=10)
    with pytest.raises(ContextLengthError, match="11 tokens, the context holds 10"):
        engine.generate(engine.sequence(), list(range(11)), greedy())
    assert backend.forwards == []


@pytest.mark.parametrize("draft", [0, 3])
@pytest.mark.parametrize("length", [1, 7, 9, 10])
def test_the_context_ends_a_generation_with_length(draft: int, length: int) -> None:
    engine, backend = fake(context=10, draft=draft)
    prompt = [3] * length
    generation = engine.generate(engine.sequence(), prompt, greedy())
    out = [t for step in generation for t in step]
    assert generation.finish_reason == "length"
    assert out == expected(backend, prompt, 10 - length + 1)


@pytest.mark.parametrize("draft", [0, 1, 2, 3])
@pytest.mark.parametrize("stop_at", range(8))
def test_a_stop_token_inside_a_verify_discards_the_tail(draft: int, stop_at: int) -> None:
    engine, backend = fake(draft=draft)
    want = expected(backend, PROMPT, 40)
    stop = want[stop_at]
    first = want.index(stop)
    sequence, asked = engine.sequence(), []

    def is_last(token: int) -> bool:
        asked.append(token)
        return token == stop

    generation = engine.generate(sequence, PROMPT, greedy(), is_last=is_last)
    out = [t for step in generation for t in step]
    assert out == want[: first + 1] == asked
    assert generation.finish_reason == "stop"
    # As in plain decoding: everything before the last token is processed, it is not.
    assert sequence.tokens == PROMPT + out[:-1]
    assert sequence.cache is not None
    assert sequence.cache.length == len(sequence.tokens)


def test_max_tokens_is_exact_whatever_the_draft() -> None:
    for draft in (0, 1, 2, 3, "auto"):
        for count in range(1, 8):
            engine, backend = fake(draft=draft)
            out = generate(engine, engine.sequence(), PROMPT, max_tokens=count)
            assert out == expected(backend, PROMPT, count)


@pytest.mark.parametrize("draft", [0, 3])
def test_the_next_turn_processes_only_new_tokens(draft: int) -> None:
    engine, backend = fake(draft=draft, context=200)
    sequence = engine.sequence()
    history = list(PROMPT)
    for turn in range(4):
        generation = engine.generate(sequence, history, greedy(), max_tokens=9)
        out = [t for step in generation for t in step]
        assert out == expected(backend, history, 9)
        assert generation.stats.reused_tokens == (0 if turn == 0 else len(history) - 5)
        history += [*out, 50 + turn, 60, 61, 62]


def test_a_prompt_that_differs_late_rolls_back_and_else_starts_over() -> None:
    engine, backend = fake(draft=3, context=200)
    sequence = engine.sequence()
    out = generate(engine, sequence, PROMPT, max_tokens=9)
    near = [*PROMPT, *out[:-2], 90, 91]
    generation = engine.generate(sequence, near, greedy(), max_tokens=5)
    assert [t for s in generation for t in s] == expected(backend, near, 5)
    assert generation.stats.reused_tokens == len(near) - 2
    far = [*PROMPT[:2], 90, 91, 92]
    generation = engine.generate(sequence, far, greedy(), max_tokens=5)
    assert [t for s in generation for t in s] == expected(backend, far, 5)
    assert generation.stats.reused_tokens == 0


def test_repeating_a_prompt_recomputes_its_last_token() -> None:
    engine, backend = fake(draft=3)
    sequence = engine.sequence()
    first = generate(engine, sequence, PROMPT, max_tokens=1)
    assert generate(engine, sequence, PROMPT, max_tokens=1) == first
    assert backend.forwards == [6, 1]


@pytest.mark.parametrize("make", [tiny.tiny_config, tiny.tiny_mimo7b_config])
@pytest.mark.parametrize("draft", [0, 1, "auto"])
def test_turns_on_real_caches_equal_a_fresh_start(make: Any, draft: Any) -> None:
    weights = tiny.random_weights(make(), seed=4)
    engine = Engine(ReferenceBackend(weights), 300, draft, prefill_chunk=8)
    sequence = engine.sequence()
    rng = np.random.default_rng(0)
    history = PROMPT * 4
    for turn in range(5):
        out = generate(engine, sequence, history, max_tokens=7)
        fresh = Engine(ReferenceBackend(weights), 300, 0)
        assert out == generate(fresh, fresh.sequence(), history, max_tokens=7)
        history = (history + out)[: -2 if turn == 2 else None]  # turn 2 takes words back
        history += rng.integers(2, 90, 3 + 8 * turn).tolist()


def test_switching_drafts_on_later_processes_the_prompt_again() -> None:
    engine, backend = fake(draft=0, context=200)
    sequence = engine.sequence()
    history = PROMPT + generate(engine, sequence, PROMPT, max_tokens=5)
    generation = engine.generate(sequence, history, greedy(), max_tokens=20, draft=3)
    assert [t for s in generation for t in s] == expected(backend, history, 20)
    assert generation.stats.reused_tokens == 0
    assert sum(generation.stats.accepted_by_depth) > 0


def test_cancel_between_prefill_chunks_and_between_steps() -> None:
    engine, backend = fake(prefill_chunk=2)
    cancel = Cancel()
    sequence = engine.sequence()
    backend.on_call = lambda kind, rows: cancel.set() if len(backend.forwards) == 1 else None
    generation = engine.generate(sequence, PROMPT, greedy(), cancel=cancel)
    assert list(generation) == []
    assert generation.finish_reason == "cancelled"
    assert sequence.tokens == PROMPT[:4]
    cancel.clear()
    backend.on_call = lambda kind, rows: None
    generation = engine.generate(sequence, PROMPT, greedy(), cancel=cancel)
    out = []
    for step in generation:
        out += step
        if len(out) == 3:
            cancel.set()
    assert generation.finish_reason == "cancelled"
    assert generation.stats.reused_tokens == 4
    assert out == expected(backend, PROMPT, 3)
    assert generate(engine, sequence, PROMPT + out, max_tokens=4) == expected(
        backend, PROMPT + out, 4
    )


def test_an_abandoned_generation_leaves_the_sequence_usable() -> None:
    engine, backend = fake(draft=3)
    sequence = engine.sequence()
    steps = iter(engine.generate(sequence, PROMPT, greedy()))
    next(steps)
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    history = [*sequence.tokens, 70, 71]
    assert generate(engine, sequence, history, max_tokens=4) == expected(backend, history, 4)


def test_a_failing_backend_resets_the_sequence() -> None:
    engine, backend = fake()
    sequence = engine.sequence()
    backend.fail_after = 3
    with pytest.raises(RuntimeError, match="went away"):
        generate(engine, sequence, PROMPT)
    assert sequence.tokens == []
    assert sequence.cache is None
    backend.fail_after = None
    assert generate(engine, sequence, PROMPT, max_tokens=5) == expected(backend, PROMPT, 5)


def test_statistics_of_a_generation() -> None:
    now = [0.0]

    def tick(kind: str, rows: int) -> None:
        now[0] += 0.5 if kind == "forward" else 0.0

    backend = FakeBackend(tiny.tiny_config(), on_call=tick)
    engine = Engine(backend, 64, 0, prefill_chunk=3, clock=lambda: now[0])
    generation = engine.generate(engine.sequence(), PROMPT, greedy(), max_tokens=11)
    list(generation)
    stats = generation.stats
    assert (stats.prompt_tokens, stats.reused_tokens, stats.tokens) == (6, 0, 11)
    assert (stats.prefill_ms, stats.first_token_ms, stats.decode_ms) == (1000.0, 1000.0, 5000.0)
    assert (stats.prefill_tps, stats.decode_tps) == (6.0, 2.0)
    assert (stats.verifies, stats.tokens_per_verify) == (10, 1.0)


def test_full_logits_equal_the_reference() -> None:
    from mimo_edge.runtimes.reference import full_logits

    weights = tiny.random_weights(tiny.tiny_config(), seed=2)
    engine = Engine(ReferenceBackend(weights), 64)
    np.testing.assert_array_equal(engine.logits(PROMPT), full_logits(weights, PROMPT))


@pytest.mark.parametrize(
    "prompt", [[], [97], [-1], [1, 2.5], [1, "2"], [[1, 2]], np.zeros((2, 2)), 5]
)
def test_prompts_that_are_no_tokens(prompt: Any) -> None:
    engine, _ = fake()
    with pytest.raises(UsageError):
        engine.generate(engine.sequence(), prompt, greedy())
    with pytest.raises(UsageError):
        engine.logits(prompt)


def test_wrong_settings() -> None:
    backend = FakeBackend(tiny.tiny_config())
    with pytest.raises(ContextLengthError, match="4096"):
        Engine(backend, 5000)
    with pytest.raises(UsageError):
        Engine(backend, 0)
    with pytest.raises(UsageError):
        Engine(backend, 10, draft=4)
    engine = Engine(backend, 10)
    with pytest.raises(UsageError):
        engine.generate(engine.sequence(), [1], greedy(), max_tokens=0)


def test_a_closed_engine_says_so() -> None:
    engine, backend = fake()
    steps = iter(engine.generate(engine.sequence(), PROMPT, greedy()))
    next(steps)
    engine.close()
    engine.close()
    assert backend.closed
    with pytest.raises(UsageError, match="closed"):
        next(steps)
    with pytest.raises(UsageError, match="closed"):
        engine.generate(engine.sequence(), PROMPT, greedy())


@pytest.mark.parametrize("most", [1, 2, 7, 64])
@pytest.mark.parametrize("total", [1, 2, 7, 8, 63, 64, 65, 129])
def test_a_prompt_is_cut_into_few_equal_parts(total: int, most: int) -> None:
    parts, left = [], total
    while left:
        parts.append(even_part(left, most))
        left -= parts[-1]
    assert len(parts) == -(-total // most)
    assert max(parts) <= most
    assert max(parts) - min(parts) <= 1
