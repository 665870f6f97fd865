"""Rows of a verify have, to the bit, what passes of one token give: drafting changes no answer.

Equal bits in every logit and every row of the residual stream say more than equal tokens: they
leave no tie for a draft setting to break.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
from test_ggml_backend import LoopingExperts, packed

from mimo_edge.config import MimoConfig
from mimo_edge.runtimes.base import F32, VERIFY_ROWS, Backend
from mimo_edge.runtimes.ggml import expert_matrix
from mimo_edge.runtimes.ggml.backend import GgmlBackend
from mimo_edge.runtimes.ggml.graph import ExactRows, Tensor
from mimo_edge.runtimes.ggml.rows import RowCheck
from mimo_edge.runtimes.reference import ReferenceBackend
from mimo_edge.speculative import MAX_DRAFT

# Widths that every format and the reordered layouts accept.
WIDE = tiny.tiny_config(
    hidden_size=256,
    head_dim=96,
    v_head_dim=64,
    intermediate_size=512,
    moe_intermediate_size=256,
    swa_num_key_value_heads=2,
    vocab_size=640,
    sliding_window=17,
)
# ggml computes one query otherwise from 512 rows on, and more rows are read in steps of 64.
PROMPT, END = 490, 530


def rows_of(backend: Backend, widths: bool, prompt: int, end: int) -> tuple[F32, F32]:
    """Logits and residual rows of tokens prompt-1..end-1 of one sequence: in passes of one token,
    or in verifies of random width with random rejections."""
    vocab = backend.config.vocab_size
    ids = np.random.default_rng(1).integers(0, vocab, end).astype(np.int32)
    rng = np.random.default_rng(2)
    cache = backend.new_cache(end + VERIFY_ROWS)
    first = backend.forward(ids[:prompt], cache, hidden_rows=20 if widths else 0)
    logits, hidden = [first.logits], []
    while cache.length < end:
        batch = ids[cache.length : cache.length + 1]
        kept = 1
        if widths:
            batch = ids[cache.length : cache.length + int(rng.integers(1, VERIFY_ROWS + 1))].copy()
            kept = int(rng.integers(1, len(batch) + 1))
            batch[kept:] = rng.integers(0, vocab, len(batch) - kept)  # drafts that are rejected
        count = len(batch)
        result = backend.forward(batch, cache, logits_rows=count, hidden_rows=count)
        cache.rollback(count - kept)
        logits.append(result.logits[:kept])
        hidden.append(result.hidden[:kept])
    return np.concatenate(logits), np.concatenate(hidden)


def assert_same_bits(backend: Backend, prompt: int = PROMPT, end: int = END) -> None:
    alone = rows_of(backend, False, prompt, end)
    together = rows_of(backend, True, prompt, end)
    for one, several in zip(alone, together, strict=True):
        assert one.shape == several.shape
        assert np.array_equal(one.view(np.int32), several.view(np.int32))


@pytest.mark.parametrize("repack", [True, False])
@pytest.mark.parametrize("fmt", ["F32", "F16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "MXFP4"])
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_ggml(fmt: str, repack: bool, kv_type: str) -> None:
    backend = GgmlBackend(packed(WIDE, fmt), threads=1, kv_type=kv_type, repack=repack)
    assert_same_bits(backend)
    backend.close()


@pytest.mark.parametrize("kv_type", ["f32", "f16"])
def test_ggml_on_two_threads(kv_type: str) -> None:
    backend = GgmlBackend(packed(WIDE, "Q4_0"), threads=2, kv_type=kv_type)
    assert_same_bits(backend)
    backend.close()


OTHERS: dict[str, MimoConfig] = {
    "window 1": tiny.tiny_config(sliding_window=1),
    "window of 600": tiny.tiny_config(sliding_window=600),
    "only sliding layers": tiny.tiny_config(hybrid_layer_pattern=(1, 1, 1, 1)),
    "one streamed layer": tiny.tiny_config(),
    "7b": tiny.tiny_mimo7b_config(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_ggml_on_other_shapes(name: str) -> None:
    config = OTHERS[name]
    backend = GgmlBackend(packed(config, "F32"), threads=1)
    assert_same_bits(backend, *((595, 620) if name == "window of 600" else (PROMPT, END)))
    backend.close()


@pytest.mark.parametrize("layers", [[1, 2, 3], [3], [1, 2]])
def test_ggml_with_streamed_experts(layers: list[int]) -> None:
    source = packed(WIDE, "Q4_0")
    backend = GgmlBackend(
        source, threads=1, experts=lambda device: LoopingExperts(device, source, layers, 5)
    )
    assert_same_bits(backend, 60, 100)
    backend.close()


@pytest.mark.parametrize("layers", [[], [3], [1, 2, 3]])
@pytest.mark.parametrize("fmt", ["Q4_0", "Q4_K"])
def test_logits_of_a_long_pass_that_computes_experts_one_by_one(
    fmt: str, layers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first token of an answer: the last layer also gives rows for the MTP blocks, and many
    rows of an expert go through other kernels than one."""
    monkeypatch.setattr(expert_matrix, "LEAST_ELEMENTS", 0)
    source = packed(WIDE, fmt)
    experts = None if not layers else lambda device: LoopingExperts(device, source, layers, 5)
    backend = GgmlBackend(source, threads=1, experts=experts)
    ids = np.random.default_rng(4).integers(0, WIDE.vocab_size, 90).astype(np.int32)
    for wanted in (1, VERIFY_ROWS):
        found = [
            backend.forward(ids, backend.new_cache(90), logits_rows=wanted, hidden_rows=rows)
            for rows in (0, 30, 90)
        ]
        for other in found[1:]:
            same = other.logits.view(np.int32) == found[0].logits.view(np.int32)
            assert same.all()
        assert np.abs(found[2].hidden[-30:] - found[1].hidden).max() < 0.05
    backend.close()


@pytest.mark.parametrize("config", [tiny.tiny_config(), tiny.tiny_mimo7b_config()])
def test_reference(config: MimoConfig) -> None:
    assert_same_bits(ReferenceBackend(tiny.random_weights(config, seed=3)), 40, 100)


@pytest.mark.parametrize("ways", [ExactRows(1), ExactRows(2), ExactRows(3), ExactRows(1, True)])
def test_every_way_to_keep_rows_exact_gives_the_same(
    ways: ExactRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ways that this processor does not need are those others do."""
    backend = GgmlBackend(packed(WIDE, "Q8_0"), threads=1)
    want = rows_of(backend, True, 60, 90)
    backend.close()
    real = RowCheck.weight

    def forced(self: RowCheck, weight: Tensor) -> ExactRows:
        own = real(self, weight)
        return ways if own.together == VERIFY_ROWS else own

    monkeypatch.setattr(RowCheck, "weight", forced)
    monkeypatch.setattr(RowCheck, "attention_together", lambda *_: False)
    backend = GgmlBackend(packed(WIDE, "Q8_0"), threads=1)
    found = rows_of(backend, True, 60, 90)
    backend.close()
    for a, b in zip(found, want, strict=True):
        assert np.array_equal(a.view(np.int32), b.view(np.int32))


def test_the_check_sees_other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel for several rows that differs in one bit of one number is not used."""
    backend = GgmlBackend(packed(WIDE, "Q8_0"), threads=1)
    check, weight = backend._rows, backend._weights.model.output
    run, calls, alone = RowCheck._run, 0, np.zeros(0, np.float32)

    def off(self: RowCheck, *args: Any) -> F32:
        nonlocal calls, alone
        result = run(self, *args)
        calls += 1
        if calls == 1:
            alone = result
        elif calls <= VERIFY_ROWS:  # as of kernels that are exact, whatever this processor's are
            result = alone[:calls].copy()
        if calls in (4, 6):  # after one row at a time, two and three; after one query at a time
            result.view(np.int32)[-1, 3] ^= 1
        return result

    monkeypatch.setattr(RowCheck, "_run", off)
    fresh = RowCheck(backend.device)
    assert fresh.weight(weight) == ExactRows(VERIFY_ROWS - 1)
    cache = backend.new_cache(64)
    assert not fresh.attention_together(cache.memory, True, cache.ring.rows)
    assert not check.attention_together(cache.memory, False, 512)  # not even tried
    assert calls == 6
    backend.close()


def test_a_verify_is_no_wider_than_what_is_kept_exact() -> None:
    assert MAX_DRAFT + 1 == VERIFY_ROWS
