from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_edge.errors import GenerationError, UsageError
from mimo_edge.sampling import Sampler, SamplingParams


def slow_distribution(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The definition, one token at a time, on exact sorts: the oracle of the fast filters."""
    order = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))
    weights = {
        i: np.exp((float(logits[i]) - float(logits.max())) / params.temperature) for i in order
    }
    if params.top_k:
        weights = {i: weights[i] for i in order[: params.top_k]}
    total = sum(weights.values())
    p = {i: w / total for i, w in weights.items()}
    if params.top_p < 1:
        kept, mass = {}, 0.0
        for i in sorted(p, key=lambda i: (-p[i], i)):
            kept[i] = p[i]
            mass += p[i]
            if mass >= params.top_p:
                break
        p = {i: v / mass for i, v in kept.items()}
    if params.min_p:
        top = max(p.values())
        p = {i: v for i, v in p.items() if v >= params.min_p * top}
        p = {i: v / sum(p.values()) for i, v in p.items()}
    out = np.zeros(len(logits))
    for i, v in p.items():
        out[i] = v
    return out


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(2, 40),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 100]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
    ties=st.booleans(),
)
def test_filters_equal_their_definition(
    seed: int, size: int, temperature: float, top_k: int, top_p: float, min_p: float, ties: bool
) -> None:
    logits = np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)
    if ties:  # powers of two: sums of equal weights are then exact in both orders
        logits = np.zeros(size, np.float32)
    params = SamplingParams(temperature, top_p, min_p, top_k)
    got = Sampler(params).distribution(logits)
    want = slow_distribution(logits, params)
    assert (got > 0).sum() == (want > 0).sum() or abs(
        np.sort(want)[::-1].cumsum() - top_p
    ).min() < 1e-9
    if (got > 0).sum() == (want > 0).sum():
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
    assert got.sum() == pytest.approx(1.0)


def test_large_vocabulary_nucleus_equals_definition() -> None:
    logits = np.random.default_rng(3).normal(0, 2, 5000).astype(np.float32)
    params = SamplingParams(1.0, top_p=0.8, top_k=900)
    np.testing.assert_allclose(
        Sampler(params).distribution(logits), slow_distribution(logits, params), rtol=1e-9
    )


def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits = np.array([1, 5, 5, 2], np.float32)
    sampler = Sampler(SamplingParams())
    assert sampler.sample(logits) == 1
    np.testing.assert_array_equal(sampler.distribution(logits), [0, 1, 0, 0])


def test_top_k_keeps_exactly_k_lowest_ids_of_a_tie() -> None:
    p = Sampler(SamplingParams(1.0, top_k=2)).distribution(np.zeros(5, np.float32))
    np.testing.assert_allclose(p, [0.5, 0.5, 0, 0, 0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_ids_are_never_drawn(temperature: float) -> None:
    banned = np.array([False, True, False, True])
    sampler = Sampler(SamplingParams(temperature, seed=0), banned)
    logits = np.array([0, 50, 1, 60], np.float32)
    assert {sampler.sample(logits) for _ in range(200)} <= {0, 2}
    assert sampler.propose(logits) == 2


def test_draws_follow_the_distribution_and_the_seed() -> None:
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))
    sampler = Sampler(SamplingParams(1.0, seed=5))
    drawn = [sampler.sample(logits) for _ in range(8000)]
    counts = np.bincount(drawn, minlength=4)
    expected = np.array([0.1, 0.2, 0.3, 0.4]) * 8000
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 dof, p = 0.001
    again = Sampler(SamplingParams(1.0, seed=5))
    assert [again.sample(logits) for _ in range(50)] == drawn[:50]
    other = Sampler(SamplingParams(1.0, seed=6))
    assert [other.sample(logits) for _ in range(50)] != drawn[:50]


def test_ids_without_mass_are_never_drawn() -> None:
    sampler = Sampler(SamplingParams(1.0, seed=1))
    p = np.array([0.0, 0.3, 0.0, 0.7, 0.0])
    assert {sampler.draw(p) for _ in range(500)} == {1, 3}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_an_error(bad: float, temperature: float) -> None:
    logits = np.array([0.0, bad, 1.0], np.float32)
    with pytest.raises(GenerationError, match=r"NaN|infinite"):
        Sampler(SamplingParams(temperature)).sample(logits)


def test_nothing_left_to_choose_is_an_error() -> None:
    with pytest.raises(GenerationError, match="no usable"):
        Sampler(SamplingParams(), np.ones(3, np.bool_)).sample(np.zeros(3, np.float32))
    with pytest.raises(GenerationError, match="mask of 2"):
        Sampler(SamplingParams(), np.array([True, False])).sample(np.zeros(3, np.float32))


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_p": 0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"top_k": -1},
        {"top_k": 1.5},
        {"seed": -3},
        {"seed": True},
    ],
)
def test_settings_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        SamplingParams(**values)
