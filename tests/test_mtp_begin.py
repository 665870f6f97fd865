"""MTP blocks that begin in the middle of a sequence: rows before are not seen, and not missed.

The oracle is the reference with a window that ends where the rows begin, given the same hidden
states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
from fake_backend import FakeBackend
from test_ggml_backend import ids_of, packed

from mimo_edge.engine import Engine
from mimo_edge.errors import CacheError
from mimo_edge.runtimes.base import F32, Backend
from mimo_edge.runtimes.ggml.backend import GgmlBackend
from mimo_edge.runtimes.reference import ReferenceBackend
from mimo_edge.sampling import Sampler, SamplingParams
from mimo_edge.speculative import FILL_ROWS, Drafter

CONFIG = tiny.tiny_config(eos_token_ids=())  # a window of 9
TOKENS = 30
IDS = ids_of(CONFIG, TOKENS + 4, seed=1)


@pytest.fixture(params=["reference", "ggml"])
def backend(request: pytest.FixtureRequest) -> Iterator[Any]:
    source = packed(CONFIG, "F32")
    made: Any = (
        ReferenceBackend(source.unpacked())
        if request.param == "reference"
        else GgmlBackend(source, threads=1, kv_type="f32")
    )
    yield made
    made.close()


def processed(backend: Backend) -> tuple[Any, F32]:
    """A cache of TOKENS tokens, and their H."""
    cache = backend.new_cache(60)
    return cache, backend.forward(IDS[:TOKENS], cache, hidden_rows=TOKENS).hidden


def expected(hidden: F32, depth: int, rows: int) -> F32:
    """Logits of the last row when it sees `rows` rows, itself included."""
    config = replace(CONFIG, sliding_window=rows)
    oracle = ReferenceBackend(packed(config, "F32").unpacked())
    cache, _ = processed(oracle)
    first = TOKENS - rows
    return oracle.mtp_forward(
        depth, IDS[first + 1 + depth : TOKENS + 1 + depth], hidden[first:], first, cache
    )


def close(found: F32, want: F32) -> None:
    # f32 sums in another order
    assert np.abs(found - want).max() <= 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("written_before", [0, 12, TOKENS])
@pytest.mark.parametrize("rows", [2, 4, 7])
def test_nothing_before_the_beginning_is_seen(
    backend: Backend, rows: int, written_before: int
) -> None:
    """Whether other rows were there or not; and rows that follow see it from there on."""
    cache, hidden = processed(backend)
    for depth in range(3):
        if written_before:
            ids = IDS[1 + depth : written_before + 1 + depth]
            backend.mtp_forward(depth, ids, hidden[:written_before], 0, cache)
        first = TOKENS - rows
        cache.begin_mtp(depth, first)
        for end in range(first + 1, TOKENS + 1):  # row by row
            ids = IDS[end + depth : end + 1 + depth]
            found = backend.mtp_forward(depth, ids, hidden[end - 1 : end], end - 1, cache)
        close(found, expected(hidden, depth, rows))
        # and all of them again at once
        ids = IDS[first + 1 + depth : TOKENS + 1 + depth]
        close(backend.mtp_forward(depth, ids, hidden[first:], first, cache), found)


@pytest.mark.parametrize("rows", [(4, 4, 4), (9, 4, 4), (4, 6, 8), (9, 9, 5)])
def test_a_chain_sees_what_all_its_blocks_have(rows: tuple[int, int, int]) -> None:
    backend = GgmlBackend(packed(CONFIG, "F32"), threads=1, kv_type="f32")
    cache, hidden = processed(backend)
    last = TOKENS - 2  # the chain writes this row and the next
    for depth, count in enumerate(rows):
        first = TOKENS - count
        cache.begin_mtp(depth, first)
        ids = IDS[first + 1 + depth : last + 1 + depth]
        backend.mtp_forward(depth, ids, hidden[first:last], first, cache)
    tokens, logits = backend.mtp_chain(3, IDS[last + 1 : TOKENS + 1], hidden[last:], last, cache)
    known = [*IDS[: TOKENS + 1].tolist(), *tokens]
    least = min(rows)
    first = TOKENS - least
    for depth in range(3):
        config = replace(CONFIG, sliding_window=least)
        oracle = ReferenceBackend(packed(config, "F32").unpacked())
        other, _ = processed(oracle)
        ids = np.array(known[first + 1 + depth : TOKENS + 1 + depth], np.int32)
        close(logits[depth], oracle.mtp_forward(depth, ids, hidden[first:], first, other))
    backend.close()


def test_rows_that_go_missing_otherwise_are_still_an_error(backend: Backend) -> None:
    cache, hidden = processed(backend)
    cache.begin_mtp(0, 20)
    backend.mtp_forward(0, IDS[21:25], hidden[20:24], 20, cache)
    with pytest.raises(CacheError, match=r"rows 20\.\.25 are needed by position 27, but only"):
        backend.mtp_forward(0, IDS[27:29], hidden[26:28], 26, cache)


def test_a_block_that_sees_everything_cannot_begin_later() -> None:
    config = tiny.tiny_mimo7b_config()
    for made in (
        ReferenceBackend(packed(config).unpacked()),
        GgmlBackend(packed(config), threads=1),
    ):
        with pytest.raises(CacheError, match="attends to everything"):
            made.new_cache(20).begin_mtp(0, 5)
        made.close()


def test_a_restored_cache_misses_what_was_not_saved(backend: Backend) -> None:
    """A cache saved while its blocks had few rows goes on with those."""
    cache, hidden = processed(backend)
    for depth in range(3):
        cache.begin_mtp(depth, 24)
        backend.mtp_forward(depth, IDS[25 + depth : 29 + depth], hidden[24:28], 24, cache)
    copy = backend.new_cache(60)
    copy.restore(cache.length, list(cache.rows()))
    for depth in range(3):
        found = [
            backend.mtp_forward(depth, IDS[29 + depth : 31 + depth], hidden[28:], 28, one)
            for one in (cache, copy)
        ]
        assert np.array_equal(found[0], found[1])
        close(found[0], expected(hidden, depth, 6))


def test_the_first_draft_writes_few_rows_and_later_ones_fewer() -> None:
    """A window of 129 begins with FILL_ROWS rows; after steps without drafts, with as many as there
    are new ones, rounded up, or so many again."""
    calls: list[int] = []

    def note(kind: str, rows: int) -> None:
        if kind == "mtp":
            calls.append(rows)

    config = tiny.tiny_config(sliding_window=129, eos_token_ids=())
    backend = FakeBackend(config, on_call=note)
    engine = Engine(backend, 600, 0)
    sequence = engine.sequence()
    prompt = [i % 90 + 2 for i in range(200)]

    def answer(draft: int, count: int) -> list[int]:
        calls.clear()
        known = [*sequence.tokens, 7] if sequence.tokens else prompt
        generation = engine.generate(
            sequence, known, Sampler(SamplingParams()), max_tokens=count, draft=draft
        )
        list(generation)
        return sorted(set(calls), reverse=True)

    assert answer(3, 40) == [FILL_ROWS, 4]
    assert isinstance(sequence.drafter, Drafter)
    drafter = sequence.drafter
    drafter.draft([*sequence.tokens, 7], 3, lambda row: int(row.argmax()))
    for plain, rows in ((5, 8), (11, FILL_ROWS), (20, FILL_ROWS), (80, FILL_ROWS)):
        # not drafting leaves rows out, but the drafter still sees them
        tokens = [*sequence.tokens, 7]
        for _ in range(plain):
            _, hidden = sequence.advance(tokens[-1:], 1)
            sequence.commit(tokens[-1:], hidden, 1)
            tokens.append(7)
        calls.clear()
        drafter.draft(tokens, 3, lambda row: int(row.argmax()))
        assert set(calls) == {rows}, plain
        calls.clear()
        drafter.draft(tokens, 3, lambda row: int(row.argmax()))
        assert set(calls) == {4}
