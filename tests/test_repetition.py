"""The guard against endless repetition: what it takes for one, and that drafts change nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
from fake_backend import FakeBackend
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import END, runtime

from mimo_edge.engine import Engine, Generation
from mimo_edge.errors import UsageError
from mimo_edge.repetition import MAX_PERIOD, RepeatGuard
from mimo_edge.sampling import Sampler, SamplingParams


def is_repetition(tokens: list[int], repeats: int) -> bool:
    """The definition: the tail is some cycle, `repeats` times."""
    for period in range(1, MAX_PERIOD + 1):
        tail = tokens[len(tokens) - period * repeats :] if period * repeats <= len(tokens) else []
        if tail and tail == tail[:period] * repeats:
            return True
    return False


@settings(max_examples=300, deadline=None)
@given(
    head=st.lists(st.integers(0, 2), max_size=12),
    cycle=st.lists(st.integers(0, 2), min_size=1, max_size=5),
    tail=st.lists(st.integers(0, 1), max_size=12),
    repeats=st.integers(2, 5),
)
def test_it_sees_what_the_definition_sees(
    head: list[int], cycle: list[int], tail: list[int], repeats: int
) -> None:
    tokens = head + cycle * 3 + tail
    guard = RepeatGuard(repeats)
    found = [guard.add(token) for token in tokens]
    assert found == [is_repetition(tokens[: n + 1], repeats) for n in range(len(tokens))]


@pytest.mark.parametrize("period", [1, 2, 100, MAX_PERIOD])
def test_long_cycles_end_with_the_last_token_of_the_last_round(period: int) -> None:
    guard = RepeatGuard(3)
    found = [guard.add(token) for token in [*range(1000, 1010), *list(range(period)) * 3]]
    assert found.index(True) == len(found) - 1


def test_a_cycle_longer_than_the_longest_is_let_through() -> None:
    guard = RepeatGuard(2)
    assert not any(guard.add(token) for token in list(range(MAX_PERIOD + 1)) * 4)


class Looping(FakeBackend):
    """Says 20, 21, .. 26 and then 30, 31, 32 for ever."""

    def next_logits(self, tokens: list[int]) -> Any:
        logits = np.zeros(self.config.vocab_size, np.float32)
        said = len(tokens) - 3
        logits[20 + said if said < 7 else 30 + (said - 7) % 3] = 50
        return logits


def generation(draft: Any, stop_repeats: int, stop_token: int = -1) -> Generation:
    engine = Engine(Looping(tiny.tiny_config(eos_token_ids=())), 200, draft)
    return engine.generate(
        engine.sequence(),
        [1, 2, 3],
        Sampler(SamplingParams()),
        max_tokens=100,
        is_last=lambda token: token == stop_token,
        stop_repeats=stop_repeats,
    )


@pytest.mark.parametrize("draft", [0, 1, 3, "auto"])
def test_an_endless_answer_is_ended(draft: Any) -> None:
    ended = generation(draft, 4)
    tokens = [token for step in ended for token in step]
    assert tokens == [*range(20, 27), *[30, 31, 32] * 4]
    assert ended.finish_reason == "repetition"
    assert ended.stats.tokens == len(tokens)


def test_off_by_default_and_other_reasons_come_first() -> None:
    endless = generation(0, 0)
    assert sum(len(step) for step in endless) == 100
    assert endless.finish_reason == "length"
    stopped = generation(3, 2, stop_token=32)
    assert [t for step in stopped for t in step][-1] == 32
    assert stopped.finish_reason == "stop"


@pytest.mark.parametrize("value", [1, -3, True, 2.5, "3"])
def test_counts_that_mean_nothing(value: Any) -> None:
    with pytest.raises(UsageError, match="stop_repeats"):
        generation(0, value)


def test_a_session_goes_on_after_a_repetition() -> None:
    rt, _ = runtime(["One. " + "la " * 60 + END, "Two" + END])
    with rt:
        session = rt.session()
        pieces = list(session.stream("sing", max_tokens=None, stop_repeats=8))
        assert pieces[-1].finish_reason == "repetition"
        text = "".join(piece.text for piece in pieces)
        assert text.startswith("One. la la")
        assert 7 <= text.count("la") <= 9
        reply = session.generate("and now?", stop_repeats=8)
        assert (reply.text, reply.finish_reason) == ("Two", "stop")
        with pytest.raises(UsageError, match="stop_repeats = 1"):
            session.stream("x", stop_repeats=1)


def test_counts_beyond_any_answer_never_come_true() -> None:
    for repeats in (1 << 40, 1 << 63, 10**30):
        guard = RepeatGuard(repeats)
        assert not any(guard.add(7) for _ in range(1000))
