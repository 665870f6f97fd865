"""The ggml backend against the reference (f32 and dequantised weights) and stock llama.cpp."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import llamacpp_runner
import numpy as np
import pytest
import tiny
from stopping import stopped_after

from mimo_edge.cancel import Cancel
from mimo_edge.config import MimoConfig
from mimo_edge.engine import Engine
from mimo_edge.errors import (
    BackendError,
    BundleError,
    CacheError,
    Cancelled,
    ContextLengthError,
    GenerationError,
    UsageError,
)
from mimo_edge.experts.table import ExpertLayer, ExpertTable, Stack
from mimo_edge.gguf_file import GgufFile
from mimo_edge.gguf_meta import read_config
from mimo_edge.kv_format import KV_FORMATS
from mimo_edge.quant.base import FORMATS
from mimo_edge.runtimes.base import F32, Cache, ForwardResult, TokenIds
from mimo_edge.runtimes.ggml import bindings, expert_matrix, library
from mimo_edge.runtimes.ggml.backend import GgmlBackend
from mimo_edge.runtimes.ggml.cache_memory import KV_TYPES
from mimo_edge.runtimes.ggml.device import Device
from mimo_edge.runtimes.ggml.expert_source import CachedExperts
from mimo_edge.runtimes.ggml.kept_graphs import SMALL_GRAPH_BYTES, SMALL_GRAPHS
from mimo_edge.runtimes.ggml.raw import GgufTensors, PackedTensors, RawTensor, raw_tensor, unpack
from mimo_edge.runtimes.ggml.slots import (
    PARTS,
    ExpertGroup,
    ExpertLayout,
    ExpertSlots,
    Ids,
)
from mimo_edge.runtimes.ggml.streamed import FEW_TOKENS
from mimo_edge.runtimes.reference import ReferenceBackend
from mimo_edge.runtimes.weights import DictWeights
from mimo_edge.sampling import Sampler, SamplingParams

ROOT = Path(__file__).parent.parent
F32_TOLERANCE = 1e-5  # f32 against f32, another order of additions; measured 6e-7

RNG = np.random.default_rng(0)


def ids_of(config: MimoConfig, count: int, seed: int = 0) -> TokenIds:
    return np.random.default_rng(seed).integers(0, config.vocab_size, count).astype(np.int32)


@functools.cache
def _packed(config: MimoConfig, fmt: str, seed: int) -> dict[str, RawTensor]:
    kind = FORMATS[fmt]
    if not kind.requires_importance:
        return PackedTensors.pack(tiny.random_weights(config, seed), lambda name: fmt)._tensors
    tensors = dict(_packed(config, "F32", seed))
    for name, raw in tensors.items():
        if len(raw.shape) > 1 and not name.endswith("ffn_gate_inp.weight"):
            values, columns = unpack(raw), raw.shape[-1]
            data = kind.quantize(values.reshape(-1, columns), np.ones(columns, np.float32))
            tensors[name] = raw_tensor(name, kind.ggml_type, raw.shape, data.reshape(-1))
    return tensors


def packed(config: MimoConfig, fmt: str = "F32", seed: int = 0) -> PackedTensors:
    return PackedTensors(config, _packed(config, fmt, seed))


@contextmanager
def pair(
    config: MimoConfig, fmt: str = "F32", seed: int = 0, **options: Any
) -> Iterator[tuple[GgmlBackend, ReferenceBackend]]:
    """Our backend and the oracle on the same (dequantised) weights."""
    source = packed(config, fmt, seed)
    oracle = ReferenceBackend(source.unpacked())
    options = {"threads": 1, "kv_type": "f32", **options}
    backend = GgmlBackend(source, **options)
    try:
        yield backend, oracle
    finally:
        backend.close()


def error(found: F32, want: F32) -> float:
    """Largest difference relative to the largest value."""
    assert found.shape == want.shape
    assert found.dtype == np.float32
    return float(np.abs(found - want).max() / np.abs(want).max()) if want.size else 0.0


CONFIGS = {
    "v2": tiny.tiny_config(),
    "7b": tiny.tiny_mimo7b_config(),
    "no value scale": tiny.tiny_config(attention_value_scale=1.0),
    "sinks everywhere": tiny.tiny_config(add_full_attention_sink_bias=True),
    "no sinks": tiny.tiny_config(add_swa_attention_sink_bias=False),
    "weights not normalised, scaled": tiny.tiny_config(
        norm_topk_prob=False, routed_scaling_factor=2.5
    ),
    "all experts chosen": tiny.tiny_config(num_experts_per_tok=8),
    "one expert": tiny.tiny_config(n_routed_experts=1, num_experts_per_tok=1),
    "only sliding layers": tiny.tiny_config(hybrid_layer_pattern=(1, 1, 1, 1)),
    "only global layers": tiny.tiny_config(hybrid_layer_pattern=(0, 0, 0, 0)),
    "one layer": tiny.tiny_config(
        num_hidden_layers=1, hybrid_layer_pattern=(1,), moe_layer_freq=(1,)
    ),
    "tied embeddings": tiny.tiny_config(tie_word_embeddings=True),
    "window 1": tiny.tiny_config(sliding_window=1),
    "odd sizes": tiny.tiny_config(
        hidden_size=52, intermediate_size=70, head_dim=18, v_head_dim=10, moe_intermediate_size=18
    ),
}


# --- f32: the same numbers as the reference ---


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_prefill_decode_and_verify_equal_the_reference(config: MimoConfig) -> None:
    ids = ids_of(config, 75)  # eight windows of 9
    steps = [1, 1, 20, 2, 4, 1, 13, 3, 12, 4, 5, 1, 8]
    assert sum(steps) == len(ids)
    with pair(config) as (backend, oracle):
        ours, theirs = backend.new_cache(100), oracle.new_cache(100)
        start = 0
        for count in steps:
            part = ids[start : start + count]
            found = backend.forward(part, ours, logits_rows=count, hidden_rows=count)
            want = oracle.forward(part, theirs, logits_rows=count, hidden_rows=count)
            assert error(found.logits, want.logits) < F32_TOLERANCE
            assert error(found.hidden, want.hidden) < F32_TOLERANCE
            start += count
            assert ours.length == theirs.length == start


@pytest.mark.parametrize("chunk", [1, 3, 8, 11, 64])
def test_internal_chunks_change_nothing(chunk: int) -> None:
    config = CONFIGS["v2"]
    ids = ids_of(config, 50)
    with pair(config, chunk=chunk) as (backend, oracle):
        found = backend.forward(ids, backend.new_cache(50), logits_rows=17, hidden_rows=50)
        want = oracle.forward(ids, oracle.new_cache(50), logits_rows=17, hidden_rows=50)
        assert error(found.logits, want.logits) < F32_TOLERANCE
        assert error(found.hidden, want.hidden) < F32_TOLERANCE


@pytest.mark.parametrize("rows", [(0, 0), (0, 3), (3, 0), (1, 9), (9, 1), (9, 9)])
def test_only_the_rows_asked_for(rows: tuple[int, int]) -> None:
    config = CONFIGS["v2"]
    ids = ids_of(config, 30)
    with pair(config, chunk=12) as (backend, oracle):
        ours, theirs = backend.new_cache(40), oracle.new_cache(40)
        found = backend.forward(ids, ours, logits_rows=rows[0], hidden_rows=rows[1])
        want = oracle.forward(ids, theirs, logits_rows=rows[0], hidden_rows=rows[1])
        assert error(found.logits, want.logits) < F32_TOLERANCE
        assert error(found.hidden, want.hidden) < F32_TOLERANCE
        # and the rows not asked for left their keys and values
        last = backend.forward(ids[:1], ours), oracle.forward(ids[:1], theirs)
        assert error(last[0].logits, last[1].logits) < F32_TOLERANCE


@pytest.mark.parametrize("verify_rows", [1, 2, 4, 7])
@pytest.mark.parametrize("name", ["v2", "7b", "only sliding layers"])
def test_any_sequence_of_verify_and_rollback_equals_the_reference(
    name: str, verify_rows: int
) -> None:
    config = CONFIGS[name]
    rng = np.random.default_rng(verify_rows)
    with pair(config, seed=verify_rows) as (backend, oracle):
        ours, theirs = backend.new_cache(200, verify_rows), oracle.new_cache(200, verify_rows)
        while ours.length < 150:
            count = int(rng.integers(1, verify_rows + 1))
            if rng.random() < 0.15:
                count = int(rng.integers(1, 30))
            ids = rng.integers(0, config.vocab_size, count, np.int32)
            found = backend.forward(ids, ours, logits_rows=count).logits
            assert error(found, oracle.forward(ids, theirs, logits_rows=count).logits) < (
                F32_TOLERANCE
            )
            undo = int(rng.integers(0, min(count, verify_rows) + 1))
            ours.rollback(undo)
            theirs.rollback(undo)
            assert ours.length == theirs.length


def test_rollback_refuses_exactly_when_the_reference_does() -> None:
    config = CONFIGS["v2"]
    rng = np.random.default_rng(5)
    refused = 0
    with pair(config) as (backend, oracle):
        # With a window of 9 these rings have 16 slots, which `ring_slots` leaves as they are.
        ours, theirs = backend.new_cache(400, 8), oracle.new_cache(400, 8)
        assert ours.memory.ring_rows == config.sliding_window - 1 + 8 == 16
        for _ in range(60):
            ids = ids_of(config, int(rng.integers(1, 12)))
            backend.forward(ids, ours)
            oracle.forward(ids, theirs)
            for undo in (int(rng.integers(0, 16)), int(rng.integers(0, 6))):
                results = []
                for cache in (ours, theirs):
                    try:
                        cache.rollback(undo)
                        results.append("")
                    except CacheError as failure:
                        results.append(str(failure))
                assert results[0] == results[1]
                refused += bool(results[0])
                assert ours.length == theirs.length
    assert refused > 10


def test_a_context_that_fills_to_the_last_row() -> None:
    config = CONFIGS["v2"]
    with pair(config) as (backend, oracle):
        for context in (1, 5, 9, 12, 13, 65):
            ours, theirs = backend.new_cache(context), oracle.new_cache(context)
            ids = ids_of(config, context)
            for part in (ids[: context // 2], ids[context // 2 :]):
                if len(part):
                    found, want = backend.forward(part, ours), oracle.forward(part, theirs)
                    assert error(found.logits, want.logits) < F32_TOLERANCE
            with pytest.raises(ContextLengthError, match=f"{context} \\+ 1 tokens"):
                backend.forward(ids[:1], ours)
            assert ours.length == context


def test_two_threads_give_the_same_numbers() -> None:
    config = CONFIGS["v2"]
    ids = ids_of(config, 40)
    with pair(config, threads=2) as (backend, oracle):
        found = backend.forward(ids, backend.new_cache(40), logits_rows=40)
        want = oracle.forward(ids, oracle.new_cache(40), logits_rows=40)
        assert error(found.logits, want.logits) < F32_TOLERANCE


# --- MTP blocks ---


@pytest.mark.parametrize("name", ["v2", "7b"])
def test_mtp_blocks_equal_the_reference(name: str) -> None:
    config = CONFIGS[name]
    ids = ids_of(config, 64)
    with pair(config) as (backend, oracle):
        ours, theirs = backend.new_cache(64), oracle.new_cache(64)
        h = oracle.forward(ids[:40], theirs, hidden_rows=40).hidden
        backend.forward(ids[:40], ours)
        for depth in range(config.num_mtp_layers):
            # whole prompt, a few rows again with other tokens, one row more
            for first, end in ((0, 30), (28, 31), (31, 32), (30, 38)):
                tokens = ids[first + 1 + depth + end % 2 : end + 1 + depth + end % 2]
                args = depth, tokens, h[first:end], first
                found = backend.mtp_forward(*args, ours)
                assert error(found, oracle.mtp_forward(*args, theirs)) < F32_TOLERANCE


def test_mtp_rows_beyond_the_ring_are_not_needed() -> None:
    config = CONFIGS["v2"]
    ids = ids_of(config, 64)
    with pair(config) as (backend, oracle):
        ours, theirs = backend.new_cache(64), oracle.new_cache(64)
        h = oracle.forward(ids[:50], theirs, hidden_rows=50).hidden
        backend.forward(ids[:50], ours)
        for first in (0, 50 - config.sliding_window):
            found = backend.mtp_forward(1, ids[first + 2 : 52], h[first:], first, ours)
            want = oracle.mtp_forward(1, ids[first + 2 : 52], h[first:], first, theirs)
            assert error(found, want) < F32_TOLERANCE


def test_mtp_calls_are_refused_as_the_reference_refuses_them() -> None:
    config = CONFIGS["v2"]
    with pair(config) as (backend, oracle):
        messages = []
        for one in (backend, oracle):
            cache = one.new_cache(60)
            one.forward(ids_of(config, 40), cache)
            h = np.ones((5, config.hidden_size), np.float32)
            tokens = np.arange(5, dtype=np.int32)
            found = []
            for args in (
                (3, tokens, h, 0),
                (-1, tokens, h, 0),
                (0, tokens[:4], h, 0),
                (0, tokens, h, 36),
                (0, tokens, h, -1),
                (0, tokens, h, 20),  # a hole before row 20
                (0, tokens + 1000, h, 0),
            ):
                with pytest.raises((UsageError, CacheError)) as caught:
                    one.mtp_forward(*args, cache)
                found.append((type(caught.value), caught.value.message))
            messages.append(found)
        assert messages[0] == messages[1]


class SomeGoodDrafts:
    """The backend with part of its proposals replaced by the true next token: a random model
    accepts nothing on its own."""

    name = "ggml"

    def __init__(self, inner: GgmlBackend, truth: list[int]) -> None:
        self.inner, self.config, self.truth = inner, inner.config, truth
        self.rng = np.random.default_rng(1)

    def new_cache(self, context: int, verify_rows: int = 4) -> Cache:
        return self.inner.new_cache(context, verify_rows)

    def forward(self, token_ids: TokenIds, cache: Cache, **options: Any) -> ForwardResult:
        return self.inner.forward(token_ids, cache, **options)

    def mtp_forward(
        self,
        depth: int,
        token_ids: TokenIds,
        hidden: F32,
        position: int,
        cache: Cache,
        *,
        cancel: Cancel | None = None,
    ) -> F32:
        logits = self.inner.mtp_forward(depth, token_ids, hidden, position, cache)
        target = position + len(token_ids) + 1 + depth
        if self.rng.random() < 0.75 and target < len(self.truth):
            logits = np.zeros_like(logits)
            logits[self.truth[target]] = 1
        return logits

    def close(self) -> None:
        self.inner.close()


@pytest.mark.parametrize(("name", "draft"), [("v2", 1), ("v2", 2), ("v2", 3), ("7b", 1)])
@pytest.mark.parametrize("fmt", ["F32", "Q8_0"])
def test_greedy_speculation_is_token_identical(name: str, draft: int, fmt: str) -> None:
    config = replace(CONFIGS[name], eos_token_ids=())
    prompt = ids_of(config, 20, seed=7).tolist()

    def generate(backend: Any, setting: int) -> tuple[list[int], Any]:
        engine = Engine(backend, 200, setting, prefill_chunk=9)
        generation = engine.generate(
            engine.sequence(), prompt, Sampler(SamplingParams()), max_tokens=60
        )
        return [token for step in generation for token in step], generation.stats

    with pair(config, fmt, seed=2, kv_type="f16") as (backend, _):
        plain, _ = generate(backend, 0)
        drafted, stats = generate(SomeGoodDrafts(backend, prompt + plain), draft)
        assert drafted == plain
        assert stats.tokens_per_verify > 1.3


# --- quantised weights ---

# Every width a multiple of 256, as K-quants need; all experts chosen, so that a rounded
# activation cannot flip a route (which is a different, larger effect: see the test after).
WIDE = tiny.tiny_config(
    hidden_size=256,
    head_dim=96,
    v_head_dim=64,
    intermediate_size=512,
    moe_intermediate_size=256,
    n_routed_experts=4,
    num_experts_per_tok=4,
    swa_num_key_value_heads=2,
)
# Root mean square difference of logits and hidden rows over their own root mean square, against
# f32 on the dequantised weights. ggml rounds the activations of a matmul to the partner format
# of the weight: f16 (11 bits) for F16, bf16 (8 bits) for BF16, blocks of 8-bit integers for the
# rest. A step is absmax / 127: for normal values 0.019 standard deviations in q8_0's blocks of 32
# and 0.023 in q8_K's of 256, so each matmul input is off by 0.55 or 0.68 %; about six of them in a
# row add up over four layers. Measured, worst of four seeds: F16 0.06 %, BF16 0.34 %, blocks of
# 32 1.27 %, blocks of 256 1.90 %.
#
# ARM processors with f16 arithmetic also sum the products of F16 matrices in f16 (test_ggml_graph
# has the bits), 512 of them 0.07 % off; SVE does so for eight rows and more. Measured on a
# Cortex-A76: 0.19 %.
COMPILED = bindings.describe_library()["compiled_for"]
RMS_BOUNDS = {"F32": 1e-6, "F16": 2.5e-3 if "fp16" in COMPILED else 1e-3, "BF16": 5e-3}
RMS_BLOCKS_OF_32, RMS_BLOCKS_OF_256 = 0.016, 0.023


def rms_error(found: list[F32], want: list[F32]) -> float:
    """Root mean square difference relative to the root mean square of `want`."""
    a, b = np.concatenate(found), np.concatenate(want)
    assert a.shape == b.shape
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))


def on_flash(source: PackedTensors, path: Path) -> ExpertTable:
    """The routed experts of `source`, written to a file."""
    config, at, layers = source.config, 0, []
    with path.open("wb") as file:
        for spec in config.layers:
            if not spec.moe:
                continue
            stacks = []
            for part in PARTS:
                raw = source.tensor(f"blk.{spec.index}.ffn_{part}_exps.weight")
                nbytes, shape = raw.data.size // config.n_routed_experts, raw.shape[1:]
                stacks.append(Stack(path, at, nbytes, raw.ggml_type, (shape[0], shape[1])))
                at += file.write(raw.data.tobytes())
            layers.append(ExpertLayer(spec.index, (stacks[0], stacks[1], stacks[2])))
    return ExpertTable(tuple(layers), config.n_routed_experts, config.num_experts_per_tok)


WIDE_7B = tiny.tiny_mimo7b_config(
    hidden_size=256, head_dim=64, v_head_dim=64, intermediate_size=512
)


class Run(NamedTuple):
    """What a backend gives for one sequence of calls: rows of the trunk, and of MTP blocks."""

    logits: list[F32]
    hidden: list[F32]
    drafts: list[F32]


def run_past_windows(backend: Any, hidden: list[F32] | None = None) -> Run:
    """Prefill, decode and verify over four windows, then the MTP blocks on `hidden` (default: its
    own)."""
    config = backend.config
    ids, cache, found = ids_of(config, 41), backend.new_cache(60), Run([], [], [])
    start = 0
    for count in (25, 1, 1, 4, 1, 8):
        part = ids[start : start + count]
        rows = backend.forward(part, cache, logits_rows=count, hidden_rows=count)
        found.logits.append(rows.logits)
        found.hidden.append(rows.hidden)
        start += count
    h = np.concatenate(found.hidden if hidden is None else hidden)
    for depth in range(config.num_mtp_layers):
        for first, end in ((0, 37), (36, 39)):
            tokens = ids[first + 1 : end + 1]
            out = backend.mtp_forward(depth, tokens, h[first:end], first, cache)
            found.drafts.append(out[None])
    return found


@functools.cache
def reference_run(config: MimoConfig, fmt: str) -> Run:
    """The oracle on the dequantised weights: the same whatever way the backend takes."""
    return run_past_windows(ReferenceBackend(packed(config, fmt).unpacked()))


@pytest.mark.parametrize("fmt", sorted(FORMATS))
@pytest.mark.parametrize("way", ["repacked", "file order", "streamed", "7b"])
def test_formats_agree_with_dequantised_weights(fmt: str, way: str, tmp_path: Path) -> None:
    """All weights resident, or routed experts read from a file into too few slots."""
    config = WIDE_7B if way == "7b" else WIDE
    block = FORMATS[fmt].block_size
    bound = RMS_BOUNDS.get(fmt, RMS_BLOCKS_OF_32 if block == 32 else RMS_BLOCKS_OF_256)
    source = packed(config, fmt)
    table = on_flash(source, tmp_path / "experts") if way == "streamed" else None
    backend = GgmlBackend(
        source,
        threads=1,
        kv_type="f32" if fmt == "F32" else "f16",
        repack=way != "file order",
        experts=None if table is None else lambda device: CachedExperts(device, table, 5),
    )
    want = reference_run(config, fmt)
    found = run_past_windows(backend, want.hidden)
    for ours, theirs in zip(found, want, strict=True):
        assert rms_error(ours, theirs) < bound
    if table is not None:
        assert isinstance(backend._experts, CachedExperts)
        assert backend._experts.stats().total().evictions > 0
    backend.close()


def test_mixed_formats_keep_q_k_and_v_apart() -> None:
    formats = {"attn_q.": "Q8_0", "attn_k.": "Q4_0", "attn_v.": "Q6_K", "_exps": "Q4_K"}

    def choose(name: str) -> str:
        return next((f for part, f in formats.items() if part in name), "Q8_0")

    source = PackedTensors.pack(tiny.random_weights(WIDE), choose)
    oracle = ReferenceBackend(source.unpacked())
    backend = GgmlBackend(source, threads=1)
    ids = ids_of(WIDE, 30)
    found = backend.forward(ids, backend.new_cache(30), logits_rows=30).logits
    want = oracle.forward(ids, oracle.new_cache(30), logits_rows=30).logits
    assert error(found, want) < 0.03
    backend.close()


# Rows of K and V, and the queries that meet K, in blocks of 32 8-bit integers: 0.55 % of each (see
# RMS_BOUNDS), averaged over the attended rows, in two of four layers, or three of three and the
# block. f16 rows keep 11 bits, and ggml sums f16 values in f16. Measured, worst of four seeds:
# q8_0 0.55 %, f16 0.08 %.
KV_BOUNDS = {"f32": 1e-6, "f16": 1.2e-3, "q8_0": 0.008}
KV_CONFIGS = {"v2": WIDE, "7b": tiny.tiny_mimo7b_config(head_dim=32, v_head_dim=32)}


@pytest.mark.parametrize("kv_type", KV_FORMATS)
@pytest.mark.parametrize("name", KV_CONFIGS)
def test_cache_formats_agree_with_the_reference(name: str, kv_type: str) -> None:
    """Eight windows of prefill, decode, verify and rollback, and the MTP blocks behind them."""
    config = KV_CONFIGS[name]
    ids = ids_of(config, 80)
    logits: tuple[list[F32], list[F32]] = ([], [])
    drafts: tuple[list[F32], list[F32]] = ([], [])
    with pair(config, "F32", kv_type=kv_type) as (backend, oracle):
        ours, theirs = backend.new_cache(100), oracle.new_cache(100)
        start, hidden = 0, np.empty((0, config.hidden_size), np.float32)
        for count, undo in ((30, 0), (1, 0), (4, 3), (4, 2), (1, 0), (20, 0), (4, 1), (1, 0)):
            part = ids[start : start + count]
            found = backend.forward(part, ours, logits_rows=count)
            want = oracle.forward(part, theirs, logits_rows=count, hidden_rows=count)
            logits[0].append(found.logits)
            logits[1].append(want.logits)
            for cache in (ours, theirs):
                cache.rollback(undo)
            start += count - undo
            hidden = np.concatenate([hidden, want.hidden[: count - undo]])
        for depth in range(config.num_mtp_layers):
            for first, end in ((0, start - 1), (start - 1, start)):
                args = depth, ids[first + 1 : end + 1], hidden[first:end], first
                drafts[0].append(backend.mtp_forward(*args, ours)[None])
                drafts[1].append(oracle.mtp_forward(*args, theirs)[None])
    assert rms_error(*logits) < KV_BOUNDS[kv_type]
    assert rms_error(*drafts) < KV_BOUNDS[kv_type]


def test_cache_formats_are_those_of_ggml() -> None:
    for name, fmt in KV_FORMATS.items():
        info = library.TYPES[KV_TYPES[name]]
        assert (info.name, info.blck_size, info.type_size) == (name, *fmt)
    assert set(KV_TYPES) == set(KV_FORMATS)
    with pytest.raises(UsageError, match="head_dim = 24"):
        GgmlBackend(packed(CONFIGS["v2"]), threads=1, kv_type="q8_0")
    with pytest.raises(UsageError, match="kv_type"):
        GgmlBackend(packed(CONFIGS["v2"]), threads=1, kv_type="q4_0")


# --- stock llama.cpp on the same file ---


@pytest.fixture(scope="module")
def random_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    spec = importlib.util.spec_from_file_location(
        "make_random_model", ROOT / "tools" / "make_random_model.py"
    )
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    sys.modules["make_random_model"] = tool
    spec.loader.exec_module(tool)
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for name, model, fmt in (
        ("v2-q4_0", "MiMo-V2-Flash", "Q4_0"),
        ("v2-q8_0", "MiMo-V2-Flash", "Q8_0"),
        ("v2-f16", "MiMo-V2-Flash", "F16"),
        ("v2-f32", "MiMo-V2-Flash", "F32"),
        ("7b-q4_k", "MiMo-7B", "Q4_K"),
    ):
        config = tool.tiny_config(model, 3 if model == "MiMo-V2-Flash" else 0)
        if config.n_routed_experts:
            config = replace(config, num_experts_per_tok=config.n_routed_experts)
        made[name] = folder / f"{name}.gguf"
        tool.write_model(
            made[name], config, experts=fmt, dense=fmt, head="F32" if fmt == "F32" else "Q6_K"
        )
    return made


def open_gguf(path: Path, **options: Any) -> GgmlBackend:
    file = GgufFile.open(path)
    config = read_config(file.metadata, file.tensors, path)
    return GgmlBackend(GgufTensors(config, [file]), **{"threads": 1, "kv_type": "f32", **options})


# First rows: bit for bit, as both call the same kernels on the same numbers. Later ones: attention
# sums in another order (1e-7), which now and then moves an 8-bit activation by one step; through
# four layers that grows to the size of the 8-bit rounding itself (measured 1.1 % of the largest
# logit). All experts are chosen: a moved activation would flip routes otherwise.
@pytest.mark.parametrize(
    ("name", "worst"),
    [("v2-f32", 1e-6), ("v2-f16", 5e-3), ("v2-q8_0", 0.02), ("v2-q4_0", 0.02), ("7b-q4_k", 0.02)],
)
@pytest.mark.parametrize("repack", [True, False])
def test_same_numbers_as_llama_cpp_on_the_same_file(
    random_models: dict[str, Path], name: str, worst: float, repack: bool
) -> None:
    path = random_models[name]
    backend = open_gguf(path, repack=repack)
    ids = ids_of(backend.config, 100)
    found = backend.forward(ids, backend.new_cache(100), logits_rows=100).logits
    want = llamacpp_runner.run(path, ids.tolist())["logits"]
    assert error(found[:1], want[:1]) < 1e-6
    assert error(found, want) < worst
    backend.close()


@pytest.mark.parametrize(("name", "worst"), [("v2-f32", 1e-6), ("v2-q4_0", 0.02)])
def test_mtp_block_0_gives_llama_cpps_numbers(
    random_models: dict[str, Path], name: str, worst: float
) -> None:
    """Of the further blocks llama.cpp feeds chained states, so it is an oracle of block 0 only."""
    backend = open_gguf(random_models[name])
    ids = ids_of(backend.config, 60)
    cache = backend.new_cache(60)
    h = backend.forward(ids, cache, hidden_rows=60).hidden
    want = llamacpp_runner.run(random_models[name], ids.tolist(), mtp=[0])["mtp0"]
    for last in (0, 1, 30, 58):
        found = backend.mtp_forward(0, ids[1 : last + 2], h[: last + 1], 0, cache)
        assert error(found, want[last]) < worst
    backend.close()


def test_fused_and_split_q_k_v_are_one_model(random_models: dict[str, Path]) -> None:
    backend = open_gguf(random_models["v2-q4_0"])
    source = backend._source
    from mimo_edge.gguf_meta import expected_shapes

    split = {name: source.tensor(name) for name in expected_shapes(backend.config)}
    other = GgmlBackend(PackedTensors(backend.config, split), threads=1, kv_type="f32")
    ids = ids_of(backend.config, 20)
    a, b = (x.forward(ids, x.new_cache(20), logits_rows=20).logits for x in (backend, other))
    assert np.array_equal(a, b)
    backend.close()
    other.close()


# --- routed experts in slots ---


class LoopingExperts:
    """An expert source over packed tensors: few slots, filled anew in a random order, so that a
    slot is overwritten as soon as it may be."""

    def __init__(
        self, device: Device, source: PackedTensors, layers: list[int], count: int
    ) -> None:
        self.slots = ExpertSlots(device, {i: ExpertLayout.of(source, i) for i in layers}, count)
        self._source = source
        self._rng = np.random.default_rng(3)
        self.asked: list[tuple[int, list[int], list[int]]] = []
        self.expected: list[tuple[int, list[int] | None]] = []
        self.fail = False

    def close(self) -> None:
        self.slots.close()

    def guesses(self, rows: int) -> bool:
        return True

    def passed(self, rows: int, guessed: bool, seconds: float) -> None:
        assert guessed
        assert seconds > 0

    def expect(self, layer: int, experts: Ids | None) -> None:
        self.expected.append((layer, None if experts is None else experts.tolist()))

    def groups(self, layer: int, experts: Ids, counts: Ids) -> Generator[ExpertGroup, None, None]:
        self.asked.append((layer, experts.tolist(), counts.tolist()))
        order = self._rng.permutation(experts)
        for start in range(0, len(order), self.slots.count):
            if self.fail and start:
                raise BundleError(f"layer {layer}: cannot read expert {order[start]}")
            group = order[start : start + self.slots.count]
            slots = self._rng.permutation(self.slots.count)[: len(group)].astype(np.int64)
            for expert, slot in zip(group.tolist(), slots.tolist(), strict=True):
                for index, part in enumerate(PARTS):
                    raw = self._source.tensor(f"blk.{layer}.ffn_{part}_exps.weight")
                    stack = raw.data.reshape(raw.shape[0], -1)
                    self.slots.part(layer, slot, index)[...] = stack[expert]
            yield ExpertGroup(group, slots)


@pytest.mark.parametrize("fmt", ["F32", "Q4_0"])
@pytest.mark.parametrize("layers", [[1], [3], [1, 2, 3]])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_streamed_experts_change_nothing(fmt: str, layers: list[int], count: int) -> None:
    config = CONFIGS["v2"]
    made: list[LoopingExperts] = []

    def experts(device: Device) -> LoopingExperts:
        made.append(LoopingExperts(device, source, layers, count))
        return made[0]

    source = packed(config, fmt)
    options: dict[str, Any] = {"threads": 1, "kv_type": "f32", "repack": False}
    streamed = GgmlBackend(source, experts=experts, **options)
    resident = GgmlBackend(packed(config, fmt), **options)
    assert sum(streamed.weight_bytes.values()) < sum(resident.weight_bytes.values())
    ids = ids_of(config, 60)
    caches = streamed.new_cache(60), resident.new_cache(60)
    start = 0
    for rows, wanted in ((20, 20), (1, 1), (4, 4), (1, 1), (11, 2), (3, 0), (9, 9)):
        part = ids[start : start + rows]
        a = streamed.forward(part, caches[0], logits_rows=wanted, hidden_rows=wanted)
        b = resident.forward(part, caches[1], logits_rows=wanted, hidden_rows=wanted)
        assert error(a.logits, b.logits) < 1e-6
        assert error(a.hidden, b.hidden) < 1e-6
        start += rows
    used = config.num_experts_per_tok
    for layer, asked, counts in made[0].asked:
        assert layer in layers
        assert asked == sorted(set(asked))
        assert sum(counts) % used == 0
    for backend in (streamed, resident):
        backend.close()
    made[0].slots.close()


# Where sums run in another order an 8-bit activation may move by a step (see above); in plain
# memory the matrix kernels of Q4_0 and F32 add up like the row kernels, but not those of Q4_0 on
# ARM with dotprod, which have one sum where the row kernels have two.
Q4_0_STEP = 0.02 if "dotprod" in COMPILED else 1e-6


@pytest.mark.parametrize(
    ("fmt", "repack", "worst"),
    [
        ("F32", False, 1e-6),
        ("Q4_0", False, Q4_0_STEP),
        ("Q4_0", True, 0.02),
        ("Q8_0", True, 0.02),
        ("Q4_K", False, 0.02),
        ("Q4_K", True, 0.02),
    ],
)
@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_a_long_pass_computes_large_experts_one_by_one(
    fmt: str, repack: bool, worst: float, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrix products give what mul_mat_id gives, also in pieces and padded pieces. All experts
    are chosen: a moved activation would flip routes otherwise."""
    config = replace(
        CONFIGS["all experts chosen"],
        hidden_size=256,
        moe_intermediate_size=256,
        intermediate_size=256,
        v_head_dim=64,
    )
    monkeypatch.setattr(expert_matrix, "MOST_ROWS", 20)
    monkeypatch.setattr(expert_matrix, "EXACT_ROWS", 5)
    calls = []
    run = expert_matrix.MatrixExperts.run

    def counted(*args: Any) -> None:
        calls.append(1)
        run(*args)

    monkeypatch.setattr(expert_matrix.MatrixExperts, "run", counted)

    def experts(device: Device) -> LoopingExperts:
        return LoopingExperts(device, packed(config, fmt), [1, 2, 3], 3)

    ids = ids_of(config, 59)
    found: list[ForwardResult] = []
    for least in (1, 1 << 30):  # elements of an expert that is computed alone
        monkeypatch.setattr(expert_matrix, "LEAST_ELEMENTS", least)
        backend = GgmlBackend(
            packed(config, fmt),
            threads=2,
            kv_type="f32",
            repack=repack,
            experts=None if kind == "resident" else experts,
        )
        found.append(backend.forward(ids, backend.new_cache(60), logits_rows=59, hidden_rows=59))
        backend.close()
        # every expert of three layers once, streamed or not, and then no more
        assert len(calls) == 3 * 8
    assert error(found[0].logits, found[1].logits) < worst
    assert error(found[0].hidden, found[1].hidden) < worst
    if fmt == "F32":
        oracle = ReferenceBackend(packed(config).unpacked())
        want = oracle.forward(ids, oracle.new_cache(60), logits_rows=59)
        assert error(found[0].logits, want.logits) < F32_TOLERANCE


@pytest.mark.parametrize("rows", [1, 3, FEW_TOKENS])
def test_guessed_routes_are_the_routes_where_layers_add_nothing(rows: int) -> None:
    """The router of the next layer on the stream as it is. With nothing added on the way there,
    the guess is the truth, in order of choice."""
    config = CONFIGS["v2"]
    tensors = dict(tiny.random_weights(config, 0)._tensors)
    for name, value in tensors.items():
        if name.endswith(("attn_output.weight", "ffn_down.weight", "ffn_down_exps.weight")):
            tensors[name] = np.zeros_like(value)
    source = PackedTensors.pack(DictWeights(config, tensors), lambda name: "F32")
    made: list[LoopingExperts] = []

    def experts(device: Device) -> LoopingExperts:
        made.append(LoopingExperts(device, source, [1, 2, 3], 3))
        return made[0]

    backend = GgmlBackend(source, threads=1, kv_type="f32", experts=experts)
    cache = backend.new_cache(60, rows)
    backend.forward(ids_of(config, rows), cache, logits_rows=rows)
    assert [layer for layer, _ in made[0].expected] == [1, 2, 3]
    guesses = [sorted(ids or ()) for _, ids in made[0].expected]
    assert guesses == [asked for _, asked, _ in made[0].asked]
    if rows == 1:
        oracle = ReferenceBackend(source.unpacked(), routes=lambda layer, ids: order.append(ids[0]))
        order: list[Any] = []
        oracle.forward(ids_of(config, 1), oracle.new_cache(60))
        assert [ids for _, ids in made[0].expected] == [list(ids) for ids in order]
    backend.close()


def test_a_long_pass_says_when_it_wants_nearly_all_experts_next() -> None:
    config = CONFIGS["v2"]
    source = packed(config)
    made: list[LoopingExperts] = []

    def experts(device: Device) -> LoopingExperts:
        made.append(LoopingExperts(device, source, [1, 2, 3], 3))
        return made[0]

    backend = GgmlBackend(source, threads=1, experts=experts)
    backend.forward(ids_of(config, 50), backend.new_cache(60))
    # the first has nobody before it, and the last computes one row only
    assert made[0].expected == [(2, None)]
    backend.close()


def test_a_failing_expert_read_ends_the_pass_and_it_can_be_repeated() -> None:
    config = CONFIGS["v2"]
    source = packed(config)
    made: list[LoopingExperts] = []

    def experts(device: Device) -> LoopingExperts:
        made.append(LoopingExperts(device, source, [1, 2, 3], 1))
        return made[0]

    backend = GgmlBackend(source, threads=1, kv_type="f32", experts=experts)
    oracle = ReferenceBackend(packed(config).unpacked())
    ids = ids_of(config, 30)
    cache, theirs = backend.new_cache(40), oracle.new_cache(40)
    backend.forward(ids[:25], cache)
    oracle.forward(ids[:25], theirs)
    made[0].fail = True
    for _ in range(2):
        with pytest.raises(BundleError, match="cannot read expert"):
            backend.forward(ids[25:28], cache)
        assert cache.length == 25
    made[0].fail = False
    found, want = backend.forward(ids[25:28], cache), oracle.forward(ids[25:28], theirs)
    assert error(found.logits, want.logits) < F32_TOLERANCE
    backend.close()
    made[0].slots.close()


@pytest.mark.parametrize("fault", ["no such slot", "left out"])
def test_a_broken_expert_source_is_noticed(fault: str) -> None:
    config = CONFIGS["v2"]
    source = packed(config)
    made: list[LoopingExperts] = []

    class Broken(LoopingExperts):
        def groups(
            self, layer: int, experts: Ids, counts: Ids
        ) -> Generator[ExpertGroup, None, None]:
            if fault == "left out":
                yield ExpertGroup(experts[1:], np.arange(len(experts) - 1))
            else:
                yield ExpertGroup(experts, np.arange(len(experts)) + 6)

    def experts(device: Device) -> LoopingExperts:
        made.append(Broken(device, source, [2], 8))
        return made[0]

    backend = GgmlBackend(source, threads=1, experts=experts)
    with pytest.raises(BackendError, match="given no slot" if fault == "left out" else "of 8"):
        backend.forward(ids_of(config, 20), backend.new_cache(20))
    backend.close()
    made[0].slots.close()


# --- memory, sessions, failures ---


def test_two_sequences_interleaved_give_what_each_gives_alone() -> None:
    config = CONFIGS["v2"]
    with pair(config) as (backend, oracle):
        sequences = [ids_of(config, 45, seed) for seed in (1, 2)]
        caches = [backend.new_cache(60), backend.new_cache(50)]
        found: list[list[F32]] = [[], []]
        for start in range(0, 45, 5):
            for i in (0, 1):
                part = sequences[i][start : start + 5]
                found[i].append(backend.forward(part, caches[i], logits_rows=5).logits)
        for i in (0, 1):
            want = oracle.forward(sequences[i], oracle.new_cache(45), logits_rows=45).logits
            assert error(np.concatenate(found[i]), want) < F32_TOLERANCE


def test_sliding_rows_are_constant_and_global_rows_grow() -> None:
    sliding, full = CONFIGS["only sliding layers"], CONFIGS["only global layers"]
    for config, grows in ((sliding, False), (full, True)):
        backend = GgmlBackend(packed(replace(config, num_mtp_layers=0)), threads=1)
        cache = backend.new_cache(4000)
        sizes = []
        for _ in range(3):
            backend.forward(ids_of(config, 300), cache)
            sizes.append(cache.nbytes())
        assert (sizes[0] < sizes[1] < sizes[2]) == grows
        assert (sizes[0] == sizes[2]) != grows
        backend.close()


def test_nan_weights_stop_with_an_error() -> None:
    """Where the sort behind top-k would meet NaN too: it must not."""
    config = CONFIGS["v2"]
    for name in ("token_embd.weight", "blk.1.attn_output.weight", "output.weight"):
        weights = tiny.random_weights(config)
        source = PackedTensors.pack(weights, lambda name: "F32")
        raw = source.tensor(name)
        values = raw.data.copy().view(np.float32)
        values[: values.shape[0] // 2] = np.nan
        source._tensors[name] = RawTensor(raw.ggml_type, raw.shape, values.view(np.uint8))
        backend = GgmlBackend(source, threads=1)
        cache = backend.new_cache(40)
        with pytest.raises(GenerationError, match="NaN or Inf at position 1"):
            backend.forward(ids_of(config, 20), cache)
        assert cache.length == 0
        backend.close()


@pytest.mark.parametrize("count", [1, 4, 9, 25])
def test_a_pass_cancelled_anywhere_is_undone(count: int) -> None:
    """Cancelled after any of its operations, a pass of any length leaves a cache that goes on as
    if it had never been: also when rows the next token sees had been overwritten already."""
    config = CONFIGS["v2"]
    ids = ids_of(config, 60)
    with pair(config) as (backend, oracle):
        cache, theirs = backend.new_cache(80), oracle.new_cache(80)
        backend.forward(ids[:20], cache)
        oracle.forward(ids[:20], theirs)
        want = oracle.forward(ids[20 : 20 + count], theirs, logits_rows=count)
        stops = 0
        for after in (*range(1, 40), *range(40, 400, 13)):
            cancel = Cancel()
            with stopped_after(backend, after, cancel):
                try:
                    backend.forward(ids[20 : 20 + count], cache, logits_rows=count, cancel=cancel)
                except Cancelled:
                    stops += 1
                    assert cache.length == 20
                else:
                    cache.rollback(0)
                    break
            if after % 7 == 0:  # and not only at the end
                found = backend.forward(ids[20:21], cache)
                assert error(found.logits, want.logits[:1]) < F32_TOLERANCE
                cache.rollback(1)
        else:
            raise AssertionError("never ran to its end")
        assert stops > 40
        found = backend.forward(ids[20 + count : 30 + count], cache)
        expected = oracle.forward(ids[20 + count : 30 + count], theirs)
        assert error(found.logits, expected.logits) < F32_TOLERANCE


def test_cancel_from_another_thread_stops_a_long_prefill() -> None:
    config = tiny.tiny_config(hidden_size=512, intermediate_size=4096)
    backend = GgmlBackend(packed(config), threads=1, chunk=64)
    cache = backend.new_cache(4096)
    cancel = Cancel()
    timer = threading.Timer(0.15, cancel.set)
    timer.start()
    with pytest.raises(Cancelled):
        backend.forward(ids_of(config, 4096), cache, cancel=cancel)
    timer.join()
    assert cache.length % 64 == 0
    assert cache.length < 4096
    backend.close()


def test_graphs_are_reused_and_few_are_kept() -> None:
    config = CONFIGS["v2"]
    with pair(config) as (backend, _):
        cache = backend.new_cache(4096)
        rng = np.random.default_rng(0)
        for _ in range(8):
            backend.forward(ids_of(config, 1), cache)
        assert len(cache.graphs) == 1
        kept = []
        for number in range(160):  # of some hundred shapes
            tokens = 30 if number % 10 == 9 else int(rng.integers(1, 17))
            backend.forward(ids_of(config, tokens), cache)
            kept.append(len(cache.graphs))
            assert cache.graphs.nbytes <= SMALL_GRAPH_BYTES + (1 << 20)
        # and one of many tokens
        assert max(kept) == kept[-1] == SMALL_GRAPHS + 1


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bindings, "_loaded", None)
    monkeypatch.setattr(library, "_installed", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match="pip install llama-cpp-python"):
        GgmlBackend(packed(CONFIGS["v2"]))


def test_importing_the_package_loads_no_library() -> None:
    code = """
import sys, mimo_edge.runtimes.ggml, mimo_edge.runtimes.ggml.backend
assert "llama_cpp" not in sys.modules
assert "libggml" not in open("/proc/self/maps").read()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_wrong_calls() -> None:
    config = CONFIGS["v2"]
    with pair(config) as (backend, oracle), pair(config) as (other, _):
        cache = backend.new_cache(10)
        for ids in ([], [[1]], [1.5], [-1], [97]):
            with pytest.raises(UsageError):
                backend.forward(np.array(ids), cache)
        with pytest.raises(UsageError, match="logits_rows = 3 of 2"):
            backend.forward(ids_of(config, 2), cache, logits_rows=3)
        with pytest.raises(ContextLengthError):
            backend.forward(ids_of(config, 11), cache)
        for foreign in (oracle.new_cache(10), other.new_cache(10)):
            with pytest.raises(CacheError, match="another backend"):
                backend.forward(ids_of(config, 2), foreign)
        with pytest.raises(ContextLengthError, match="positions"):
            backend.new_cache(5000)
        with pytest.raises(UsageError):
            backend.new_cache(0)
        assert cache.length == 0
        cache.close()
        cache.close()
        with pytest.raises(CacheError, match="closed"):
            backend.forward(ids_of(config, 2), cache)
        late = backend.new_cache(10)
        backend.close()
        backend.close()
        for call in (
            lambda: backend.forward(ids_of(config, 2), late),
            lambda: backend.new_cache(5),
        ):
            with pytest.raises(BackendError, match="closed"):
                call()


@pytest.mark.parametrize("name", ["blk.2.attn_k.weight", "output_norm.weight"])
def test_missing_and_misshapen_tensors_are_named(name: str) -> None:
    config = CONFIGS["v2"]
    source = packed(config)
    good = source._tensors.pop(name)
    with pytest.raises(BundleError, match=name):
        GgmlBackend(source, threads=1)
    source._tensors[name] = RawTensor(good.ggml_type, (*good.shape[:-1], 3), good.data)
    with pytest.raises(BundleError, match=name):
        GgmlBackend(source, threads=1)


def test_opening_and_closing_leaks_nothing() -> None:
    config = CONFIGS["v2"]
    source = packed(config, "Q4_0")
    ids = ids_of(config, 20)

    def cycle(count: int) -> None:
        for _ in range(count):
            backend = GgmlBackend(PackedTensors(config, source._tensors), threads=1)
            cache = backend.new_cache(200)
            backend.forward(ids, cache)
            backend.forward(ids[:1], cache)
            if count % 2:
                cache.close()
            del cache  # or left to the collector
            if count % 3:
                backend.close()
            del backend
        gc.collect()

    def state() -> tuple[int, int, int]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages, len(os.listdir("/proc/self/fd")), threading.active_count()

    cycle(20)
    before = state()
    cycle(61)
    after = state()
    assert after[0] - before[0] < 1024  # 4 MiB; a model and its cache take a tenth of that
    assert after[1:] == before[1:]


@pytest.mark.parametrize("kv_type", ["f16", "f32"])
def test_a_pass_that_gave_nan_leaves_nothing_behind(kv_type: str) -> None:
    """Not even in rows that the mask hides: attention may multiply them by 0."""
    config = CONFIGS["v2"]
    backend = GgmlBackend(packed(config, "F32"), threads=1, kv_type=kv_type)
    ids = ids_of(config, 34)
    found = []
    for breaks in (False, True):
        cache = backend.new_cache(64)
        before = backend.forward(ids[:30], cache, hidden_rows=30)
        if breaks:
            norms = [backend._weights.model.layers[0].attn_norm]
            norms += [w.attn_norm for w in backend._weights.model.mtp[:1]]
            kept = [norm.array().copy() for norm in norms]
            for norm in norms:
                norm.array()[...] = np.nan
            with pytest.raises(GenerationError):
                backend.forward(ids[30:], cache, logits_rows=4)
            with pytest.raises(GenerationError):
                backend.mtp_forward(0, ids[1:30], before.hidden[:29], 0, cache)
            for norm, values in zip(norms, kept, strict=True):
                norm.array()[...] = values
        after = backend.forward(ids[30:31], cache, hidden_rows=1)
        draft = backend.mtp_forward(0, ids[1:20], before.hidden[:19], 0, cache)
        found.append((after.logits, after.hidden, draft))
    for a, b in zip(*found, strict=True):
        assert np.array_equal(a.view(np.int32), b.view(np.int32))
    backend.close()
