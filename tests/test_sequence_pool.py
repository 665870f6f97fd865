"""Which processed tokens a new session goes on from, and how many are kept."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import tiny
from fake_backend import FakeBackend

from mimo_edge.api import Runtime
from mimo_edge.budget import Budget, Line
from mimo_edge.chat_template import ChatTemplate
from mimo_edge.errors import ContextLengthError, UsageError
from mimo_edge.model_source import Model
from mimo_edge.sequence_pool import SequencePool


def opened(budget: Budget | None = None) -> Runtime:
    backend = FakeBackend(tiny.tiny_config(eos_token_ids=()))
    model = Model("fake", backend, None, ChatTemplate(), frozenset(), budget=budget)
    return Runtime(model, 200)


def ask(runtime: Runtime, pool: SequencePool | None, prompt: list[int]) -> tuple[list[int], int]:
    """What is answered, and how many tokens of the prompt were processed before."""
    session = runtime.session(pool=pool)
    reply = session.generate(prompt, max_tokens=4)
    session.close()
    session.close()
    return list(reply.token_ids), reply.stats.reused_tokens


def test_a_prompt_that_goes_on_is_not_processed_again() -> None:
    runtime = opened()
    pool = runtime.sequence_pool(4)
    first, reused = ask(runtime, pool, [1, 2, 3])
    assert reused == 0
    longer = [1, 2, 3, *first, 9]
    second, reused = ask(runtime, pool, longer)
    assert reused == 3 + len(first) - 1
    assert second == ask(runtime, None, longer)[0]


def test_the_longest_beginning_is_taken() -> None:
    runtime = opened()
    pool = runtime.sequence_pool(4)
    short, _ = ask(runtime, pool, [1, 2])
    long, _ = ask(runtime, pool, [1, 2, *short, 5, 6, 7])
    assert pool.idle == 1  # the second went on from the first
    other, _ = ask(runtime, pool, [1, 2])
    assert (other, pool.idle) == (short, 2)
    _, reused = ask(runtime, pool, [1, 2, *short, 5, 6, 7, *long, 8])
    assert reused == 2 + len(short) + 3 + len(long) - 1
    _, reused = ask(runtime, pool, [1, 2, *short, 4])
    assert reused == 2 + len(short) - 1


@pytest.mark.parametrize("change", [0, 2, 5])
def test_what_differs_anywhere_is_not_taken(change: int) -> None:
    runtime = opened()
    pool = runtime.sequence_pool(2)
    prompt = [1, 2, 3]
    first, _ = ask(runtime, pool, prompt)
    known = [*prompt, *first, 9]
    known[change] = 30
    assert ask(runtime, pool, known)[1] == 0
    assert ask(runtime, pool, prompt)[1] == 0  # the same prompt would have to go back
    assert pool.idle == 2


def test_the_number_counts_those_in_use() -> None:
    runtime = opened()
    pool = runtime.sequence_pool(2)
    for start in range(5):
        ask(runtime, pool, [start, start])
        assert pool.idle <= 2
    assert pool.nbytes() > 0
    sessions = [runtime.session(pool=pool) for _ in range(2)]
    for number, session in enumerate(sessions):
        session.generate([40 + number], max_tokens=1)
        assert pool.idle == 1 - number
    for session in sessions:
        session.close()
    assert pool.idle == 2
    pool.clear()
    assert (pool.idle, pool.nbytes()) == (0, 0)


def test_a_session_without_a_prompt_gives_nothing() -> None:
    runtime = opened()
    pool = runtime.sequence_pool(2)
    runtime.session(pool=pool).close()
    assert pool.idle == 0


def test_a_failed_generation_gives_its_place_back() -> None:
    runtime = opened()
    pool = runtime.sequence_pool(1)
    backend: Any = runtime.engine.backend
    backend.fail_after = 0
    session = runtime.session(pool=pool)
    with pytest.raises(RuntimeError):
        session.generate([1, 2], max_tokens=1)
    session.close()
    backend.fail_after = None
    assert pool.idle == 0
    ask(runtime, pool, [1, 2])
    assert pool.idle == 1


def test_a_bound_on_the_prompt() -> None:
    session = opened().session()
    with pytest.raises(ContextLengthError, match="4 tokens, at most 3"):
        session.stream([1, 2, 3, 4], max_prompt_tokens=3)
    session.generate([1, 2, 3], max_prompt_tokens=3, max_tokens=1)


@pytest.mark.parametrize("most", [0, -1, True, 1.5, "2"])
def test_bad_numbers(most: Any) -> None:
    with pytest.raises(UsageError):
        opened().sequence_pool(most)


@pytest.mark.parametrize(
    ("ram", "room"), [(None, None), (1000, 1), (1129, 1), (1130, 2), (1400, 4)]
)
def test_the_memory_plan_bounds_it(ram: int | None, room: int | None) -> None:
    lines = (Line("weights", 870), Line("KV cache", 100), Line("graphs", 30))
    runtime = opened(Budget(lines, ram, 200, 16, False))
    assert runtime.planned_conversations == room
    assert runtime.sequence_pool(room or 50).most == (room or 50)
    if room is not None:
        with pytest.raises(UsageError, match=f"room for {room} of 200 tokens"):
            runtime.sequence_pool(room + 1)


def test_from_many_threads() -> None:
    """Whatever is taken over, every answer is the one given alone."""
    runtime = opened()
    pool = runtime.sequence_pool(3)
    alone = opened()
    errors: list[BaseException] = []

    def talk(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(6):
                prompt = [rng.randrange(3)]
                for _ in range(3):
                    found, _ = ask(runtime, pool, prompt)
                    assert found == ask(alone, None, prompt)[0]
                    assert pool.idle <= 3
                    prompt = [*prompt, *found, rng.randrange(3)]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=talk, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
