"""KV caches against a model that keeps every row: random chunks, accepts and rollbacks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config, tiny_mimo7b_config

from mimo_edge.errors import CacheError, ContextLengthError, UsageError
from mimo_edge.kv_cache import FullCache, ModelCache, Rows, SlidingCache

G, D, DV = 2, 3, 2


class EveryRow:
    """The naive model: a list of all rows, each with its own number."""

    def __init__(self, window: int | None) -> None:
        self.window, self.rows, self.made = window, list[int](), 0

    def new(self, count: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        tags = list(range(self.made + 1, self.made + 1 + count))
        self.made += count
        scale = np.array(tags, np.float32)[:, None, None]
        keys = scale * (1 + np.arange(G * D, dtype=np.float32).reshape(G, D))
        values = scale * (1 + np.arange(G * DV, dtype=np.float32).reshape(G, DV))
        return keys, values, tags

    def check(self, rows: Rows, queries: int) -> None:
        """Each query sees exactly the newest row of each position in its window."""
        assert rows.keys.shape == (G, rows.positions.size, D)
        assert rows.values.shape == (G, rows.positions.size, DV)
        reach = self.window or 1 << 40
        for i in range(len(self.rows) - queries, len(self.rows)):
            seen = np.flatnonzero((rows.positions <= i) & (i - rows.positions < reach))
            order = seen[np.argsort(rows.positions[seen])]
            want = list(range(max(0, i - reach + 1), i + 1))
            assert rows.positions[order].tolist() == want
            tags = np.array([self.rows[j] for j in want], np.float32)
            assert rows.keys[0, order, 0].tolist() == tags.tolist()
            assert rows.keys[1, order, 2].tolist() == (tags * 6).tolist()
            assert rows.values[1, order, 1].tolist() == (tags * 4).tolist()


steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(1, 4)),
        st.tuples(st.just("write"), st.integers(1, 40)),
        st.tuples(st.just("undo"), st.integers(0, 6)),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(
    window=st.integers(1, 12),
    verify=st.integers(1, 5),
    steps=steps,
    share=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_sliding_cache_equals_keeping_every_row(
    window: int, verify: int, steps: list[tuple[str, int]], share: float
) -> None:
    """`share` of the rows of a write query it: the newest alone, some, or all of them."""
    cache = SlidingCache(G, D, DV, window, window - 1 + verify)
    model, highest = EveryRow(window), 0
    for kind, n in steps:
        length = len(model.rows)
        if kind == "write":
            keys, values, tags = model.new(n)
            model.rows += tags
            queries = max(1, int(n * share))
            model.check(cache.write(length, keys, values, queries), queries)
            highest = max(highest, length + n)
            continue
        target = max(0, length - n)
        try:
            cache.check_rollback(target)
        except CacheError:
            assert highest - target > verify, "a rollback of up to q rows was refused"
            assert cache.length == length
        else:
            cache.truncate(target)
            del model.rows[target:]
        assert cache.length == len(model.rows)


@settings(max_examples=60, deadline=None)
@given(steps=steps)
def test_full_cache_equals_keeping_every_row(steps: list[tuple[str, int]]) -> None:
    cache, model = FullCache(G, D, DV, 10_000), EveryRow(None)
    for kind, n in steps:
        length = len(model.rows)
        if kind == "write":
            keys, values, tags = model.new(n)
            model.rows += tags
            model.check(cache.write(length, keys, values, n), n)
        else:
            target = max(0, length - n)
            cache.check_rollback(target)
            cache.truncate(target)
            del model.rows[target:]


@settings(max_examples=100, deadline=None)
@given(
    window=st.integers(1, 12),
    depth=st.integers(0, 2),
    prompt=st.integers(1, 60),
    accepted=st.lists(st.integers(0, 3), max_size=30),
)
def test_mtp_ring_of_w_rows_serves_every_draft(
    window: int, depth: int, prompt: int, accepted: list[int]
) -> None:
    """Rows p-k+1..p' are rewritten each round and only the newest one queries."""
    cache, model = SlidingCache(G, D, DV, window, window), EveryRow(window)
    newest = prompt - 1
    first = max(0, newest - window + 1)
    model.rows = [0] * first
    for a in [0, *accepted]:
        keys, values, tags = model.new(newest + 1 - first)
        model.rows += [0] * (first - len(model.rows))  # never seen: behind the window
        model.rows[first:] = tags
        model.check(cache.write(first, keys, values, 1), 1)
        assert cache.length == newest + 1
        previous, newest = newest, newest + 1 + a
        first = max(0, previous - depth + 1, newest - window + 1)
        first = min(first, newest)


def test_a_ring_one_row_too_small_is_found_out() -> None:
    """W - 1 + q rows are needed: with one less, a full rejection loses a row and says so."""
    window, verify = 128, 4
    for rows, enough in ((window - 1 + verify, True), (window - 2 + verify, False)):
        cache, model = SlidingCache(G, D, DV, window, rows), EveryRow(window)
        cache.write(0, *model.new(300)[:2], 1)
        cache.write(300, *model.new(verify)[:2], verify)
        if enough:
            cache.check_rollback(300)
        else:
            with pytest.raises(CacheError, match="rows below"):
                cache.check_rollback(300)


def test_rollback_past_the_ring_raises_and_changes_nothing() -> None:
    cache, model = SlidingCache(G, D, DV, 5, 8), EveryRow(5)
    cache.write(0, *model.new(30)[:2], 30)
    for n in range(5):
        cache.check_rollback(30 - n)
    for n in range(5, 30):
        with pytest.raises(CacheError, match=f"from 30 rows to {30 - n}"):
            cache.check_rollback(30 - n)
    cache.check_rollback(0)  # the first position sees nothing before it
    with pytest.raises(CacheError, match="31"):
        cache.check_rollback(31)


def test_rows_written_and_undone_still_count_as_lost() -> None:
    """Four drafts, all undone, overwrote four old rows: the promise shrinks by what they took."""
    window, verify = 5, 4
    cache, model = SlidingCache(G, D, DV, window, window - 1 + verify), EveryRow(window)
    cache.write(0, *model.new(30)[:2], 1)
    cache.write(30, *model.new(4)[:2], 4)
    cache.check_rollback(30)
    cache.truncate(30)
    cache.write(30, *model.new(1)[:2], 1)  # 31 rows, but row 33 was there: rows below 26 are gone
    cache.check_rollback(30)
    with pytest.raises(CacheError, match="from 31 rows to 29"):
        cache.check_rollback(29)


def test_starting_again_from_zero_after_wrapping() -> None:
    cache, model = SlidingCache(G, D, DV, 5, 8), EveryRow(5)
    cache.write(0, *model.new(30)[:2], 30)
    cache.truncate(0)
    model.rows = []
    for n in (1, 2, 1, 9, 1):
        keys, values, tags = model.new(n)
        model.rows += tags
        model.check(cache.write(len(model.rows) - n, keys, values, n), n)


def test_a_query_that_needs_lost_rows_raises_and_changes_nothing() -> None:
    cache, model = SlidingCache(G, D, DV, 5, 5), EveryRow(5)
    cache.write(0, *model.new(20)[:2], 1)
    before = (cache.length, cache._keys.copy(), cache._positions.copy())
    with pytest.raises(CacheError, match=r"rows 12\.\.15 are needed by position 16, but rows"):
        cache.write(16, *model.new(2)[:2], 2)
    with pytest.raises(CacheError, match="only rows below 20 were written"):
        cache.write(23, *model.new(2)[:2], 2)
    with pytest.raises(CacheError, match="negative"):
        cache.write(-1, *model.new(2)[:2], 2)
    assert cache.length == before[0]
    assert np.array_equal(cache._keys, before[1])
    assert np.array_equal(cache._positions, before[2])


def test_a_ring_may_start_late_when_the_newest_row_sees_none_of_the_missing_ones() -> None:
    cache, model = SlidingCache(G, D, DV, 5, 5), EveryRow(5)
    model.rows = [0] * 95
    keys, values, tags = model.new(5)
    model.rows += tags
    model.check(cache.write(95, keys, values, 1), 1)
    keys, values, tags = model.new(2)
    model.rows += tags
    model.check(cache.write(100, keys, values, 2), 2)


def test_full_cache_grows_in_blocks_up_to_the_context_and_refuses_holes() -> None:
    cache, model = FullCache(G, D, DV, 600), EveryRow(None)
    assert cache.nbytes() == 0
    row_bytes = G * (D + DV) * 4 + 8
    for n, held in ((1, 256), (255, 256), (1, 512), (343, 600)):
        cache.write(cache.length, *model.new(n)[:2], n)
        assert cache.nbytes() == held * row_bytes
    with pytest.raises(ContextLengthError, match="601 rows exceed the context of 600"):
        cache.write(600, *model.new(1)[:2], 1)
    cache.truncate(10)
    with pytest.raises(CacheError, match="hole"):
        cache.write(11, *model.new(1)[:2], 1)
    assert cache.length == 10


def test_model_cache_has_one_cache_per_layer_and_block() -> None:
    config = tiny_config()
    cache = ModelCache(config, context=1000, verify_rows=4)
    kinds = [type(c) for c in cache.layers]
    assert kinds == [FullCache, SlidingCache, SlidingCache, FullCache]
    assert [type(c) for c in cache.mtp] == [SlidingCache] * 3
    rings = cache.layers[1], cache.mtp[0]
    assert [ring._rows for ring in rings if isinstance(ring, SlidingCache)] == [
        config.sliding_window - 1 + 4,
        config.sliding_window,
    ]
    assert (cache.length, cache.capacity) == (0, 1000)
    # MiMo-7B's MTP block attends to every row, so it keeps every row
    assert [type(c) for c in ModelCache(tiny_mimo7b_config(), 100).mtp] == [FullCache]


def test_model_rollback_is_all_or_nothing() -> None:
    config = tiny_config()
    cache = ModelCache(config, context=200, verify_rows=4)
    rng = np.random.default_rng(0)

    def append(n: int) -> None:
        cache.require(n)
        for layer, spec in zip(cache.layers, config.layers, strict=True):
            g = spec.num_key_value_heads
            keys = rng.standard_normal((n, g, config.head_dim), dtype=np.float32)
            values = rng.standard_normal((n, g, config.v_head_dim), dtype=np.float32)
            layer.write(cache.length, keys, values, n)
        cache.commit(n)

    append(50)
    cache.rollback(3)
    append(4)
    assert cache.length == 51
    for n in (-1, 52):
        with pytest.raises(CacheError, match="cannot undo"):
            cache.rollback(n)
    with pytest.raises(CacheError, match="rows below"):
        cache.rollback(20)
    assert cache.length == 51
    assert [layer.length for layer in cache.layers] == [51] * 4
    with pytest.raises(ContextLengthError, match="51 \\+ 150 tokens exceed the context of 200"):
        cache.require(150)
    cache.require(149)


def test_sliding_bytes_do_not_depend_on_the_context() -> None:
    config = tiny_config(hybrid_layer_pattern=(1, 1, 1, 1))
    small, large = (ModelCache(config, context=n).nbytes() for n in (100, 4000))
    assert small == large > 0
    # and a context shorter than the ring takes less
    assert ModelCache(config, context=5).nbytes() < small


def test_absurd_caches_are_refused() -> None:
    with pytest.raises(UsageError):
        ModelCache(tiny_config(), context=0)
    with pytest.raises(UsageError):
        ModelCache(tiny_config(), context=10, verify_rows=0)
    with pytest.raises(ContextLengthError, match="4096"):
        ModelCache(tiny_config(), context=4097)
