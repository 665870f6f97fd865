"""Penalties, log-probabilities and deadlines of one request."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import pytest
import tiny
from fake_backend import FakeBackend
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_edge.api import Runtime
from mimo_edge.cancel import Cancel, check_cancel
from mimo_edge.chat_template import ChatTemplate
from mimo_edge.deadline import Deadline
from mimo_edge.errors import UsageError
from mimo_edge.logprobs import token_logprob
from mimo_edge.model_source import Model
from mimo_edge.penalties import Penalties
from mimo_edge.sampling import Sampler, SamplingParams


def bare(backend: FakeBackend, draft: Any = 0) -> Runtime:
    """A runtime on token ids."""
    return Runtime(Model("fake", backend, None, ChatTemplate(), frozenset()), 400, draft)


# --- penalties --------------------------------------------------------------------------


def slowly(
    logits: np.ndarray, prompt: list[int], said: list[int], params: SamplingParams
) -> list[float]:
    """The definitions, one token at a time."""
    out = []
    for token, value in enumerate(logits.tolist()):
        if token in prompt or token in said:
            r = params.repetition_penalty
            value = value / r if value > 0 else value * r
        count = said.count(token)
        if count:
            value -= params.presence_penalty + params.frequency_penalty * count
        out.append(value)
    return out


@settings(max_examples=100, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 11), max_size=6),
    said=st.lists(st.integers(0, 11), max_size=10),
    repetition=st.sampled_from([1.0, 0.5, 1.7]),
    presence=st.sampled_from([0.0, 1.5, -2.0]),
    frequency=st.sampled_from([0.0, 0.25, -1.0]),
    undone=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_penalties_equal_their_definition(
    prompt: list[int],
    said: list[int],
    repetition: float,
    presence: float,
    frequency: float,
    undone: int,
    seed: int,
) -> None:
    params = SamplingParams(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
    )
    logits = np.random.default_rng(seed).normal(0, 3, 12).astype(np.float32)
    penalties = Penalties(prompt, repetition, presence, frequency)
    for token in said:
        penalties.add(token)
    for token in range(undone):
        penalties.add(token)
    for token in range(undone):
        penalties.remove(token)
    before = logits.copy()
    got = penalties.apply(logits)
    np.testing.assert_array_equal(logits, before)
    # f32 against f64: a difference of numbers up to 32 keeps the rounding of both.
    want = slowly(logits, prompt, said, params)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=32 * 1.2e-7)
    assert (params.penalties(prompt) is None) == ((repetition, presence, frequency) == (1, 0, 0))


@pytest.mark.oracle
def test_repetition_equals_transformers() -> None:
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = np.random.default_rng(0).normal(0, 3, 50).astype(np.float32)
    prompt, said = [3, 4, 4, 9], [9, 11, 12]
    want = RepetitionPenaltyLogitsProcessor(1.3)(
        torch.tensor([prompt + said]), torch.tensor(logits[None])
    )[0].numpy()
    penalties = Penalties(prompt, 1.3, 0.0, 0.0)
    for token in said:
        penalties.add(token)
    np.testing.assert_allclose(penalties.apply(logits), want, rtol=1e-6)


@pytest.mark.parametrize(
    "values",
    [
        {"repetition_penalty": 0},
        {"repetition_penalty": math.inf},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -3},
        {"frequency_penalty": "much"},
    ],
)
def test_penalties_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        SamplingParams(**values)


@pytest.mark.parametrize("draft", [1, 2, 3, "auto"])
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"temperature": 1.0, "seed": 4, "min_p": 0.02, "frequency_penalty": 1.0},
    ],
    ids=str,
)
def test_penalties_and_drafts(draft: Any, options: dict[str, Any]) -> None:
    """Within a verify each row is penalised for the tokens accepted before it."""

    def answer(setting: Any, **more: Any) -> Any:
        with bare(FakeBackend(tiny.tiny_config(), skill=(1.0, 1.0, 1.0)), setting) as rt:
            return rt.session().generate([5, 6, 7, 8], max_tokens=60, **more)

    plain = answer(0, **options)
    drafted = answer(draft, **options)
    assert drafted.token_ids == plain.token_ids
    assert plain.token_ids != answer(0, **{**options, **NEUTRAL}).token_ids
    assert sum(drafted.stats.accepted_by_depth) > (2 if draft == "auto" else 10)


NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


def test_proposals_are_not_counted() -> None:
    params = SamplingParams(presence_penalty=2.0)
    sampler = Sampler(params)
    logits = np.array([3, 2.5, 0, 0], np.float32)
    assert [sampler.propose(logits) for _ in range(3)] == [0, 1, 0]
    sampler.retract()
    assert sampler.sample(logits) == 0
    assert sampler.sample(logits) == 1
    assert sampler.propose(logits) == 0


# --- log-probabilities ------------------------------------------------------------------


def test_logprobs_are_the_models_own() -> None:
    logits = np.random.default_rng(1).normal(0, 4, 40).astype(np.float32)
    exact = logits.astype(np.float64)
    exact = exact - np.log(np.exp(exact).sum())
    found = token_logprob(logits, 7, 5)
    assert found.token_id == 7
    assert found.logprob == pytest.approx(exact[7], abs=1e-12)
    order = np.argsort(-exact)[:5]
    assert [id_ for id_, _ in found.top] == order.tolist()
    np.testing.assert_allclose([value for _, value in found.top], exact[order], atol=1e-12)
    assert token_logprob(logits, 7, 0).top == ()
    assert len(token_logprob(logits, 7, 100).top) == 40


def test_equal_and_impossible_tokens() -> None:
    logits = np.array([1, 2, 2, 2, -np.inf], np.float32)
    assert [id_ for id_, _ in token_logprob(logits, 1, 2).top] == [1, 2]
    assert [id_ for id_, _ in token_logprob(logits, 1, 5).top] == [1, 2, 3, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_token_has_its_logprob_whatever_the_draft(temperature: float) -> None:
    replies = []
    for draft in (0, 1, 3, "auto"):
        with bare(FakeBackend(tiny.tiny_config(), skill=(1.0, 1.0, 1.0)), draft) as rt:
            session = rt.session()
            pieces = list(
                session.stream(
                    [5, 6, 7], max_tokens=30, logprobs=3, temperature=temperature, seed=1
                )
            )
            reply = session.last_reply
            assert reply is not None
            logits = rt.logits([5, 6, 7, *reply.token_ids])
        assert [one.token_id for one in reply.logprobs] == list(reply.token_ids)
        assert [one for piece in pieces for one in piece.logprobs] == list(reply.logprobs)
        for piece in pieces:
            assert [one.token_id for one in piece.logprobs] == list(piece.token_ids)
        for row, one in enumerate(reply.logprobs):
            assert one == token_logprob(logits[2 + row], one.token_id, 3)
        replies.append(reply.logprobs)
    assert len(set(replies)) == 1
    with bare(FakeBackend(tiny.tiny_config())) as rt:
        assert rt.session().generate([5], max_tokens=2).logprobs == ()
        for bad in (-1, 21, True, "all"):
            with pytest.raises(UsageError, match="logprobs"):
                rt.session().generate([5], logprobs=bad)


# --- deadlines --------------------------------------------------------------------------


class Waits(FakeBackend):
    """The pass number `at` goes on until it is cancelled: a deadline must reach into it."""

    at = 0

    def forward(self, token_ids: Any, cache: Any, **options: Any) -> Any:
        if len(self.forwards) == self.at:
            self.forwards.append(0)
            cancel = options["cancel"]
            while True:
                check_cancel(cancel)
                threading.Event().wait(0.001)
        return super().forward(token_ids, cache, **options)


@pytest.mark.parametrize("draft", [0, 3])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_deadline_ends_a_pass(draft: int, at: int) -> None:
    backend = Waits(tiny.tiny_config())
    backend.at = at
    with bare(backend, draft) as rt:
        session = rt.session()
        reply = session.generate([5, 6, 7], max_tokens=50, timeout_s=0.05)
        assert reply.finish_reason == "deadline"
        assert (len(reply.token_ids) > 0) == (at > 0)
        # What was said stands, and the next answer has its own time.
        rest = session.generate([9], max_tokens=5)
        assert rest.finish_reason == "length"
    with bare(FakeBackend(tiny.tiny_config())) as rt:
        prompt = [5, 6, 7, *reply.token_ids, 9]
        assert rt.session().generate(prompt, max_tokens=5).token_ids == rest.token_ids


def test_a_deadline_counts_from_the_request() -> None:
    backend = FakeBackend(tiny.tiny_config())
    with bare(backend) as rt:
        session = rt.session()
        pieces = session.stream([5, 6], timeout_s=1e-6)
        threading.Event().wait(0.01)
        assert [piece.finish_reason for piece in pieces] == ["deadline"]
        assert backend.forwards == []
        assert session.generate([7], max_tokens=3, timeout_s=1000).finish_reason == "length"
        session.stream([8], timeout_s=0.001)  # never looked at: nothing is left behind
        threading.Event().wait(0.01)
        assert session.generate([9], max_tokens=3).finish_reason == "length"
    assert not [t for t in threading.enumerate() if isinstance(t, threading.Timer)]


def test_a_cancel_is_no_deadline() -> None:
    with bare(FakeBackend(tiny.tiny_config())) as rt:
        session = rt.session()
        pieces = session.stream([5, 6], timeout_s=1000, max_tokens=200)
        assert next(pieces).finish_reason is None
        session.cancel()
        assert [piece.finish_reason for piece in pieces] == ["cancelled"]


def test_a_timer_that_is_late_cancels_nothing() -> None:
    cancel = Cancel()
    deadline = Deadline(cancel, 1000)
    with deadline:
        pass
    deadline._pass()
    assert not cancel.is_set()
    assert not deadline.passed


@pytest.mark.parametrize("timeout", [0, -1, math.nan, math.inf, True, "soon"])
def test_times_that_are_none(timeout: Any) -> None:
    with pytest.raises(UsageError, match="timeout_s"):
        Deadline(Cancel(), timeout)
