"""The reference forward pass: against its definition, against itself in pieces, and refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_model import NaiveModel
from tiny import random_weights, tiny_config, tiny_mimo7b_config

from mimo_edge.config import MimoConfig
from mimo_edge.errors import (
    BackendError,
    CacheError,
    CheckpointError,
    ContextLengthError,
    GenerationError,
    UsageError,
)
from mimo_edge.runtimes import reference
from mimo_edge.runtimes.base import Backend, ExpertWeights
from mimo_edge.runtimes.reference import (
    ReferenceBackend,
    full_logits,
    mtp_full_logits,
    rotary_angles,
    route,
)
from mimo_edge.runtimes.weights import DictWeights

# f32 sums in another order: differences of a few ulp per layer, well below this
TOLERANCE = 1e-5


def tokens(config: MimoConfig, n: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, config.vocab_size, n).astype(np.int32)


def difference(ours: Any, theirs: Any) -> float:
    """Largest absolute difference over the largest absolute value."""
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def assert_same(ours: Any, theirs: Any) -> None:
    assert difference(ours, theirs) <= TOLERANCE
    assert np.array_equal(ours.argmax(-1), theirs.argmax(-1))


# What transformers cannot check: free kv heads, sinks anywhere, no renormalisation, MTP.
VARIANTS: dict[str, MimoConfig] = {
    "mimo_v2": tiny_config(),
    "free kv heads, window 3": tiny_config(
        num_attention_heads=6, num_key_value_heads=3, swa_num_key_value_heads=1, sliding_window=3
    ),
    "sinks on global layers only": tiny_config(
        add_swa_attention_sink_bias=False, add_full_attention_sink_bias=True
    ),
    "raw router weights, scaled": tiny_config(norm_topk_prob=False, routed_scaling_factor=2.5),
    "one expert, window 1": tiny_config(num_experts_per_tok=1, sliding_window=1),
    "all experts, full rotary, tied": tiny_config(
        num_experts_per_tok=8, partial_rotary_factor=1.0, tie_word_embeddings=True
    ),
    "mimo 7b": tiny_mimo7b_config(),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_definition(name: str) -> None:
    config = VARIANTS[name]
    weights = random_weights(config, seed=3)
    ids = tokens(config, 24)
    naive = NaiveModel(weights)
    logits, hidden = naive.run(ids)
    assert_same(full_logits(weights, ids), logits)

    backend = ReferenceBackend(weights)
    result = backend.forward(ids, backend.new_cache(24), logits_rows=1, hidden_rows=24)
    assert difference(result.hidden, np.stack(hidden)) <= TOLERANCE
    for depth in range(config.num_mtp_layers):
        assert_same(mtp_full_logits(weights, ids, depth), naive.mtp(ids, hidden, depth))


def test_a_sink_far_above_every_score_takes_all_the_mass_without_overflow() -> None:
    config = tiny_config()
    weights = random_weights(config, seed=4)
    tensors = {n: weights.tensor(n) for n in weights._tensors}
    for layer, sinks in ((1, [200.0, -200.0, 95.0, 0.0]), (2, [0.0, 1e4, -1e4, 3.0])):
        tensors[f"blk.{layer}.attn_sinks.weight"] = np.array(sinks, np.float32)
    extreme = DictWeights(config, tensors)
    ids = tokens(config, 20)
    assert_same(full_logits(extreme, ids), NaiveModel(extreme).run(ids)[0])


def test_rotary_angles_are_exact_enough_and_start_at_zero() -> None:
    cos, sin = rotary_angles(np.arange(2000), 64, 5e6)
    assert cos.dtype == sin.dtype == np.float32
    exact = np.arange(2000)[:, None] * 5e6 ** (-np.arange(0, 64, 2) / 64)
    # f32 rounds the angle itself, at position 2000 by up to 2000 * 2^-23 = 2.4e-4
    assert np.abs(cos - np.cos(exact)).max() < 2.4e-4
    assert np.abs(sin - np.sin(exact)).max() < 2.4e-4
    assert np.array_equal(cos[0], np.ones(32))


def test_router_bias_chooses_sigmoid_weighs_and_ties_take_the_lowest_index() -> None:
    config = tiny_config(n_routed_experts=5, num_experts_per_tok=2)
    logits = np.array([[0.0, 1.0, 1.0, 1.0, -9.0]], np.float32)
    ids, weights = route(logits, np.zeros(5, np.float32), config)
    assert ids.tolist() == [[1, 2]]
    np.testing.assert_allclose(weights, [[0.5, 0.5]], rtol=1e-6)
    ids, weights = route(logits, np.array([0, 0, 0, 0, 5], np.float32), config)
    assert ids.tolist() == [[4, 1]]
    s = 1 / (1 + np.exp(-np.array([-9.0, 1.0])))
    np.testing.assert_allclose(weights, [s / s.sum()], rtol=1e-6)
    many = tiny_config(n_routed_experts=100, num_experts_per_tok=7)
    levels = np.random.default_rng(0).integers(0, 3, (20, 100)).astype(np.float32)
    ids, _ = route(levels, np.zeros(100, np.float32), many)
    for row, chosen in zip(levels, ids.tolist(), strict=True):
        assert chosen == [e for level in (2, 1) for e in np.flatnonzero(row == level)][:7]
    # all sigmoids underflow: 1e-20 keeps the weights finite
    with np.errstate(over="ignore"):
        _, weights = route(np.full((1, 5), -1e4, np.float32), np.zeros(5, np.float32), config)
    assert weights.tolist() == [[0.0, 0.0]]


# --- the same sequence in pieces ---


def run_in_chunks(backend: ReferenceBackend, ids: Any, sizes: list[int]) -> tuple[Any, Any, Any]:
    cache = backend.new_cache(len(ids))
    logits, hidden, start = [], [], 0
    for size in sizes:
        part = ids[start : start + size]
        got = backend.forward(part, cache, logits_rows=len(part), hidden_rows=len(part))
        logits.append(got.logits)
        hidden.append(got.hidden)
        start += size
    assert cache.length == len(ids)
    return np.concatenate(logits), np.concatenate(hidden), cache


@pytest.mark.parametrize("config", [tiny_config(), tiny_mimo7b_config()], ids=["v2", "7b"])
@pytest.mark.parametrize("size", [1, 2, 4, 5, 11, 12, 13, 31, 90])
def test_chunked_prefill_equals_one_prefill(config: MimoConfig, size: int) -> None:
    """90 tokens are ten windows; 12 rows is the ring, so 11, 12, 13 straddle it."""
    weights = random_weights(config, seed=5)
    ids = tokens(config, 90)
    sizes = [size] * (90 // size) + ([90 % size] if 90 % size else [])
    whole = full_logits(weights, ids)
    logits, hidden, cache = run_in_chunks(ReferenceBackend(weights), ids, sizes)
    assert_same(logits, whole)
    # and MTP blocks fed in the same pieces equal the blocks fed at once
    backend = ReferenceBackend(weights)
    for depth in range(config.num_mtp_layers):
        rows, start, got = 90 - 1 - depth, 0, []
        while start < rows:
            stop = min(start + size, rows)
            given_tokens = ids[start + 1 + depth : stop + 1 + depth]
            got.append(backend.mtp_rows(depth, given_tokens, hidden[start:stop], start, cache))
            start = stop
        assert_same(np.concatenate(got), mtp_full_logits(weights, ids, depth))


def test_queries_in_blocks_equal_queries_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    weights, ids = random_weights(config, seed=6), tokens(config, 70)
    whole = full_logits(weights, ids)
    for block in (1, 7, 64):
        monkeypatch.setattr(reference, "QUERY_BLOCK", block)
        assert_same(full_logits(weights, ids), whole)


def test_ring_equals_full_attention_with_an_explicit_mask() -> None:
    """The same weights with an unbounded cache per sliding layer and the window as a mask."""
    config = tiny_config()
    weights, ids = random_weights(config, seed=7), tokens(config, 80)
    backend = ReferenceBackend(weights)
    cache = backend.new_cache(80)
    for index, spec in enumerate(config.layers):
        if spec.sliding:
            cache.layers[index] = reference_full_cache(config, spec, 80)
    wide = [backend.forward(ids[i : i + 1], cache).logits[0] for i in range(80)]
    assert cache.layers[1].length == 80
    ring, _, _ = run_in_chunks(ReferenceBackend(weights), ids, [1] * 80)
    assert_same(ring, np.stack(wide))


def reference_full_cache(config: MimoConfig, spec: Any, context: int) -> Any:
    from mimo_edge.kv_cache import FullCache

    return FullCache(spec.num_key_value_heads, config.head_dim, config.v_head_dim, context)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 99),
    steps=st.lists(
        st.one_of(
            st.tuples(st.integers(1, 4), st.integers(0, 3)),
            st.tuples(st.integers(5, 30), st.just(0)),
        ),
        min_size=1,
        max_size=10,
    ),
)
def test_verify_and_rollback_equal_plain(seed: int, steps: list[tuple[int, int]]) -> None:
    """Batches of up to q = 4 rows of which a suffix, of wrong tokens, is undone."""
    config = tiny_config(
        num_hidden_layers=3, hybrid_layer_pattern=(0, 1, 1), moe_layer_freq=(0, 1, 1)
    )
    weights = random_weights(config, seed=8)
    kept = [(rows, min(undo, rows - 1)) for rows, undo in steps]
    ids = tokens(config, sum(rows - undo for rows, undo in kept), seed)
    whole = full_logits(weights, ids)
    backend = ReferenceBackend(weights)
    cache = backend.new_cache(len(ids) + 4)
    wrong = np.random.default_rng(seed + 1)
    for rows, undo in kept:
        start = cache.length
        good = ids[start : start + rows - undo]
        bad = wrong.integers(0, config.vocab_size, undo).astype(np.int32)
        batch = np.concatenate([good, bad])
        logits = backend.forward(batch, cache, logits_rows=rows).logits
        cache.rollback(undo)
        assert_same(logits[: len(good)], whole[start : start + len(good)])
    assert cache.length == len(ids)


# --- what it refuses ---


def small() -> tuple[MimoConfig, DictWeights, ReferenceBackend]:
    config = tiny_config()
    weights = random_weights(config, seed=9)
    return config, weights, ReferenceBackend(weights)


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        ([], "one or more integers"),
        ([[1, 2]], "one or more integers"),
        ([1.5], "one or more integers"),
        ([3, -1], "token id -1 is outside 0..96"),
        ([3, 97], "token id 97 is outside 0..96"),
        (np.array([2**32], np.int64), "token id 4294967296"),
    ],
)
def test_bad_token_ids(ids: Any, match: str) -> None:
    _, _, backend = small()
    cache = backend.new_cache(10)
    with pytest.raises(UsageError, match=match):
        backend.forward(np.array(ids), cache)
    assert cache.length == 0


def test_context_is_checked_before_the_cache_is_touched() -> None:
    config, weights, backend = small()
    ids = tokens(config, 20)
    cache = backend.new_cache(19)
    backend.forward(ids[:15], cache)
    held = [layer.length for layer in cache.layers]
    with pytest.raises(ContextLengthError, match=r"15 \+ 5 tokens exceed the context of 19"):
        backend.forward(ids[15:], cache)
    assert held == [layer.length for layer in cache.layers]
    logits = backend.forward(ids[15:19], cache, logits_rows=4).logits
    assert_same(logits, full_logits(weights, ids[:19])[15:])


def test_wrong_row_counts_caches_and_blocks() -> None:
    config, _, backend = small()
    cache = backend.new_cache(10)
    for logits_rows, hidden_rows in ((3, 0), (1, 3), (-1, 0)):
        with pytest.raises(UsageError, match="of 2 new tokens"):
            backend.forward(
                tokens(config, 2), cache, logits_rows=logits_rows, hidden_rows=hidden_rows
            )
    other = ReferenceBackend(random_weights(tiny_config(sliding_window=10)))
    with pytest.raises(CacheError, match="another backend or model"):
        backend.forward(tokens(config, 2), other.new_cache(10))
    hidden = backend.forward(tokens(config, 5), cache, logits_rows=0, hidden_rows=5).hidden
    for depth in (-1, 3):
        with pytest.raises(UsageError, match=f"MTP block {depth}"):
            backend.mtp_forward(depth, tokens(config, 5), hidden, 0, cache)
    with pytest.raises(UsageError, match="hidden states of shape"):
        backend.mtp_forward(0, tokens(config, 4), hidden, 0, cache)
    with pytest.raises(CacheError, match="has processed 5 tokens"):
        backend.mtp_forward(0, tokens(config, 5), hidden, 1, cache)
    with pytest.raises(CacheError, match=r"rows 0\.\.3 are needed by position 4"):
        backend.mtp_forward(0, tokens(config, 1), hidden[4:], 4, cache)
    with pytest.raises(UsageError, match="no row"):
        mtp_full_logits(random_weights(config), tokens(config, 3), 2)
    with pytest.raises(UsageError, match="max_cached_experts"):
        ReferenceBackend(random_weights(config), max_cached_experts=-1)


def test_rolled_back_mtp_rows_cannot_be_read() -> None:
    config, _, backend = small()
    ids = tokens(config, 12)
    cache = backend.new_cache(20)
    hidden = backend.forward(ids[:8], cache, hidden_rows=8).hidden
    backend.mtp_forward(0, ids[1:9], hidden, 0, cache)
    cache.rollback(3)
    hidden[5:7] = backend.forward(ids[5:7], cache, hidden_rows=2).hidden
    with pytest.raises(CacheError, match=r"by position 6, but only rows below 5 were written"):
        backend.mtp_forward(0, ids[7:8], hidden[6:7], 6, cache)
    backend.mtp_forward(0, ids[6:8], hidden[5:7], 5, cache)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("blk.0.attn_norm.weight", "block 0"),
        ("blk.2.ffn_gate_inp.weight", "block 2"),
        ("blk.3.ffn_down_exps.weight", "block 3"),
        ("output.weight", "output head"),
        ("token_embd.weight", "block 0"),
    ],
)
def test_damaged_weights_are_an_error_that_names_the_block(
    name: str, match: str, bad: float
) -> None:
    config, weights, _ = small()
    tensors = {n: weights.tensor(n) for n in weights._tensors}
    tensors[name] = tensors[name].copy()
    tensors[name][...] = bad
    backend = ReferenceBackend(DictWeights(config, tensors))
    cache = backend.new_cache(10)
    with pytest.raises(GenerationError, match=match):
        backend.forward(tokens(config, 6), cache)
    assert cache.length == 0


def test_damaged_mtp_block_names_its_block() -> None:
    config, weights, _ = small()
    tensors = {n: weights.tensor(n) for n in weights._tensors}
    tensors["blk.5.nextn.enorm.weight"] = np.full(config.hidden_size, np.nan, np.float32)
    with pytest.raises(GenerationError, match=r"block 5: .*enorm.weight holds NaN or Inf"):
        mtp_full_logits(DictWeights(config, tensors), tokens(config, 6), 1)


def test_a_forward_that_failed_half_way_can_be_run_again() -> None:
    """An expert that cannot be read stops the pass after some layers were written."""
    config, weights, _ = small()
    ids = tokens(config, 30)

    class Flaky(DictWeights):
        fail = False

        def expert(self, layer: int, expert: int) -> ExpertWeights:
            if self.fail and layer == 2:
                raise CheckpointError("read failed")
            return super().expert(layer, expert)

    flaky = Flaky(config, {n: weights.tensor(n) for n in weights._tensors})
    backend = ReferenceBackend(flaky, max_cached_experts=0)
    cache = backend.new_cache(30)
    backend.forward(ids[:26], cache)
    flaky.fail = True
    with pytest.raises(CheckpointError, match="read failed"):
        backend.forward(ids[26:], cache)
    assert cache.length == 26
    flaky.fail = False
    logits = backend.forward(ids[26:], cache, logits_rows=4).logits
    assert_same(logits, full_logits(weights, ids)[26:])


def test_closed_backend() -> None:
    config, weights, backend = small()
    cache = backend.new_cache(10)
    backend.forward(tokens(config, 2), cache)
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.forward(tokens(config, 2), cache)
    assert not weights.has("output.weight"), "the backend closes its weights"


# --- memory and contract ---


def test_satisfies_the_backend_contract() -> None:
    _, _, backend = small()
    contract: Backend = backend
    assert contract.name == "reference"
    assert contract.new_cache(10).capacity == 10


@pytest.mark.parametrize("limit", [0, 1, 5, None])
def test_cached_experts_are_bounded_and_change_nothing(limit: int | None) -> None:
    config, weights, _ = small()
    ids = tokens(config, 12)
    backend = ReferenceBackend(weights, max_cached_experts=limit)
    cache = backend.new_cache(12)
    got = [backend.forward(ids[i : i + 1], cache).logits[0] for i in range(12)]
    assert_same(np.stack(got), full_logits(weights, ids))
    all_experts = 3 * config.n_routed_experts
    assert len(backend._experts) <= (all_experts if limit is None else limit)


def test_sliding_layers_take_constant_memory() -> None:
    config = tiny_config(hybrid_layer_pattern=(1, 1, 1, 1))
    backend = ReferenceBackend(random_weights(config))
    cache = backend.new_cache(300)
    before = cache.nbytes()
    backend.forward(tokens(config, 300), cache)
    assert cache.nbytes() == before


def test_only_the_rows_asked_for_come_back() -> None:
    config, weights, backend = small()
    ids = tokens(config, 10)
    whole = full_logits(weights, ids)
    for logits_rows, hidden_rows in ((0, 0), (1, 0), (3, 10), (10, 2)):
        got = backend.forward(
            ids, backend.new_cache(10), logits_rows=logits_rows, hidden_rows=hidden_rows
        )
        assert got.logits.shape == (logits_rows, config.vocab_size)
        assert got.hidden.shape == (hidden_rows, config.hidden_size)
        assert got.logits.dtype == got.hidden.dtype == np.float32
        if logits_rows:
            assert_same(got.logits, whole[-logits_rows:])


# --- the observer ---


class Recorder:
    def __init__(self) -> None:
        self.inputs: dict[str, list[Any]] = {}
        self.experts: dict[tuple[str, int], list[Any]] = {}
        self.routes: dict[int, list[tuple[Any, Any]]] = {}

    def matmul(self, name: str, x: Any) -> None:
        self.inputs.setdefault(name, []).append(x.copy())

    def expert_matmul(self, name: str, expert: int, x: Any) -> None:
        self.experts.setdefault((name, expert), []).append(x.copy())

    def route(self, layer: int, ids: Any, weights: Any) -> None:
        self.routes.setdefault(layer, []).append((ids.copy(), weights.copy()))


def test_observer_sees_every_matmul_and_route() -> None:
    config, weights, _ = small()
    ids = tokens(config, 16)
    seen = Recorder()
    backend = ReferenceBackend(weights, observer=seen)
    cache = backend.new_cache(16)
    got = backend.forward(ids, cache, logits_rows=16, hidden_rows=16)
    assert np.array_equal(got.logits, full_logits(weights, ids)), "watching changed the result"
    for depth in range(3):
        rows = 15 - depth
        backend.mtp_rows(depth, ids[1 + depth :], got.hidden[:rows], 0, cache)

    matrices = {n for n in weights._tensors if weights.tensor(n).ndim == 2}
    assert set(seen.inputs) == matrices - {"token_embd.weight"}
    stacks = {n for n in weights._tensors if weights.tensor(n).ndim == 3}
    assert {name for name, _ in seen.experts} == stacks
    for name, calls in seen.inputs.items():
        width = weights.tensor(name).shape[1]
        assert all(x.shape[1] == width for x in calls)
    for (name, _), calls in seen.experts.items():
        assert all(x.shape[1] == weights.tensor(name).shape[2] for x in calls)
    for name, rows in (("blk.0.attn_q.weight", 16), ("blk.6.ffn_down.weight", 13)):
        assert sum(len(x) for x in seen.inputs[name]) == rows

    naive = NaiveModel(weights)
    naive.run(ids)
    for layer in (1, 2, 3):
        (chosen, shares) = (
            np.concatenate(parts) for parts in zip(*seen.routes[layer], strict=True)
        )
        assert [sorted(row) for row in chosen.tolist()] == [
            sorted(naive.routes[layer, i]) for i in range(16)
        ]
        np.testing.assert_allclose(shares.sum(-1), 1, rtol=1e-5)
        for part in ("gate", "up", "down"):
            stack = f"blk.{layer}.ffn_{part}_exps.weight"
            for e in range(config.n_routed_experts):
                rows = sum(len(x) for x in seen.experts.get((stack, e), []))
                assert rows == int((chosen == e).sum())
    # the recorded input times the weight is what the next step works with
    x, gate = seen.inputs["blk.0.ffn_gate.weight"][0], weights.tensor("blk.0.ffn_gate.weight")
    up = x @ weights.tensor("blk.0.ffn_up.weight").T
    a = x @ gate.T
    down_input = seen.inputs["blk.0.ffn_down.weight"][0]
    np.testing.assert_allclose(down_input, a / (1 + np.exp(-a)) * up, rtol=1e-4, atol=1e-6)
