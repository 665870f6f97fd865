"""Reading beside computing: by hand, by enumeration, and within what no engine could leave."""

from __future__ import annotations

import itertools
from dataclasses import replace
from math import prod

import pytest

from mimo_edge.planner.overlap import (
    FIRST_RIGHT_GUESSES,
    PROMPT_AHEAD,
    RIGHT_GUESSES,
    Streamed,
    few_tokens,
    many_tokens,
)

# A layer of 8 experts, all on flash, with nothing before its router.
ALONE = Streamed(
    before=[0.0],
    wanted=8.0,
    missing=1.0,
    compute_s=1.0,
    read_s=5.0,
    arrival_s=0.0,
    slowed=0.0,
    late_s=0.5,
)


def test_what_comes_last_is_computed_behind_its_read() -> None:
    found = few_tokens(ALONE)
    assert (found.flash, found.computing, found.experts) == pytest.approx((40.0, 1.0, 8.0))
    assert (found.lost, found.host) == (0.0, 0.0)


def test_reads_behind_products_are_not_waited_for() -> None:
    found = few_tokens(replace(ALONE, compute_s=6.0, slowed=0.1, arrival_s=0.25))
    # reads run for 40 of the 48 seconds
    assert found == pytest.approx((0.0, 48.0, 4.0, 2.0, 8.0))


def test_guesses_are_read_from_the_last_product_to_the_next_router() -> None:
    found = few_tokens(replace(ALONE, before=[10.0, 4.0]))
    first = 2.0  # experts read before the first router is done
    left = 8 - FIRST_RIGHT_GUESSES * first
    reading = 5 * left + (1 - FIRST_RIGHT_GUESSES) * 0.5
    second = (1.0 + 4.0) / 5.0
    after = 5 * (8 - RIGHT_GUESSES * second) + (1 - RIGHT_GUESSES) * 0.5
    assert found.flash == pytest.approx(reading + after)
    assert found.computing == pytest.approx(2.0)
    wrong = (1 - FIRST_RIGHT_GUESSES) * first + (1 - RIGHT_GUESSES) * second
    assert found.experts == pytest.approx(16 + wrong)


def test_one_too_many_is_waited_for_and_one_too_few_gains_nothing() -> None:
    """Every set of missing experts in two layers, by its chance, without guesses."""
    pass_ = Streamed([0.0, 0.0], 4.0, 0.4, 2.4, 5.0, arrival_s=0.1, slowed=0.0, late_s=1e9)
    seconds = 0.0
    for sets in itertools.product(itertools.product((0, 1), repeat=4), repeat=2):
        chance = prod(0.4 if gone else 0.6 for gone in itertools.chain(*sets))
        for gone in map(sum, sets):
            behind = 5.0 * gone + 2.4 if gone else 0.0
            seconds += chance * max(4 * 2.4 + 0.1 * gone, behind)
    found = few_tokens(pass_)
    assert found.seconds == pytest.approx(seconds)
    assert found.experts == pytest.approx(2 * 1.6)
    assert found.seconds > 1.05 * 2 * max(4 * 2.4 + 0.16, 5 * 1.6 + 2.4)  # as if always the mean


def test_guesses_that_do_not_pay_are_not_made() -> None:
    """Where products hide all reads, wrong guesses are only more of them to care for."""
    found = few_tokens(replace(ALONE, before=[5.0, 5.0], compute_s=7.0, arrival_s=0.1))
    assert found == pytest.approx((0.0, 112.0, 0.0, 1.6, 16.0))


def test_a_prompt_reads_two_groups_ahead() -> None:
    bank = replace(ALONE, wanted=64.0, before=[1e6, 1e6])
    found = many_tokens(bank)
    assert found.experts == 128
    assert found.flash == pytest.approx(5 * 64 + 5 * (64 - PROMPT_AHEAD))
    assert many_tokens(replace(bank, before=[0.0, 0.0])).flash == pytest.approx(5 * (128 - 0.2))


@pytest.mark.parametrize("missing", [0.01, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("read_s", [0.01, 0.5, 1.5, 20.0])
@pytest.mark.parametrize("wanted", [1.0, 8.0, 26.5, 1800.0])
def test_within_what_is_possible(missing: float, read_s: float, wanted: float) -> None:
    """Never faster than flash or computing alone, never slower than one after the other."""
    pass_ = replace(
        ALONE,
        before=[3.0, 1.0, 1.0],
        wanted=wanted,
        missing=missing,
        read_s=read_s,
        arrival_s=0.01,
        slowed=0.05,
        late_s=0.1 * read_s,
    )
    for found in (few_tokens(pass_), many_tokens(pass_)):
        need = 3 * wanted * missing
        reading, computing, whole = need * read_s, 3 * wanted, 5.0 + found.seconds
        assert need * (1 - 1e-9) <= found.experts <= 2 * need
        assert whole >= max(reading, 5.0 + computing) * (1 - 1e-9)
        lost = 0.05 * (computing + 5.0) + 0.01 * found.experts
        assert found.seconds <= reading + computing + lost
        assert min(found) >= 0


def test_more_of_anything_is_never_slower() -> None:
    base = replace(
        ALONE,
        before=[3.0, 1.0, 1.0],
        missing=0.5,
        read_s=1.7,
        arrival_s=0.1,
        slowed=0.1,
        late_s=0.3,
    )
    slower = few_tokens(base).seconds
    for name in ("missing", "compute_s", "read_s", "arrival_s", "slowed", "late_s"):
        better = few_tokens(replace(base, **{name: 0.7 * getattr(base, name)})).seconds
        assert better < slower, name
