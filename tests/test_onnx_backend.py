"""The ONNX backend against the reference: the same numbers, caches in place, experts in slots."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_factory import Kind, write_checkpoint
from numpy.typing import NDArray
from onnx_models import make_bundle, onnx_backend

from mimo_edge.api import Runtime
from mimo_edge.bundle import Bundle
from mimo_edge.cancel import Cancel
from mimo_edge.engine import Engine
from mimo_edge.errors import (
    BackendError,
    BundleError,
    CacheError,
    Cancelled,
    ContextLengthError,
    DeviceError,
    GenerationError,
    UsageError,
)
from mimo_edge.export.pipeline import export_bundle
from mimo_edge.runtimes.base import F32, TokenIds
from mimo_edge.runtimes.onnx import backend as backend_module
from mimo_edge.runtimes.onnx import passes
from mimo_edge.runtimes.onnx.backend import OnnxBackend
from mimo_edge.runtimes.onnx.library import Session
from mimo_edge.runtimes.reference import ReferenceBackend
from mimo_edge.runtimes.weights import DictWeights
from mimo_edge.sampling import Sampler, SamplingParams

# f32 against f32, another order of additions; measured 8e-7.
TOLERANCE = 1e-5


def ids_of(count: int, seed: int = 0, vocab: int = 97) -> TokenIds:
    return np.random.default_rng(seed).integers(0, vocab, count).astype(np.int32)


def error(found: F32, want: F32) -> float:
    """Largest difference relative to the largest value."""
    assert found.shape == want.shape
    assert found.dtype == np.float32
    return float(np.abs(found - want).max() / np.abs(want).max()) if want.size else 0.0


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "flash": ("flash", {}),
    "v2.5": ("v25", {}),
    "7b": ("mimo7b", {}),
    "no value scale": ("flash_bf16", {"attention_value_scale": 1.0}),
    "sinks everywhere": ("flash_bf16", {"add_full_attention_sink_bias": True}),
    "no sinks": ("flash_bf16", {"add_swa_attention_sink_bias": False}),
    "weights not normalised, scaled": (
        "flash_bf16",
        {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
    ),
    "all experts chosen": ("flash_bf16", {"num_experts_per_tok": 8}),
    "only sliding layers": ("flash_bf16", {"hybrid_layer_pattern": (1, 1, 1, 1)}),
    "only global layers": ("flash_bf16", {"hybrid_layer_pattern": (0, 0, 0, 0)}),
    "one layer": (
        "flash_bf16",
        {"num_hidden_layers": 1, "hybrid_layer_pattern": (1,), "moe_layer_freq": (1,)},
    ),
    "dense layers alone": ("flash_bf16", {"moe_layer_freq": (0, 0, 0, 0)}),
    "window 2": ("flash_bf16", {"sliding_window": 2}),
    "odd sizes": ("flash_bf16", {"hidden_size": 52, "intermediate_size": 70, "head_dim": 18,
                                 "v_head_dim": 10, "moe_intermediate_size": 18}),
}  # fmt: skip


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DictWeights]:
    return make_bundle(tmp_path_factory.mktemp("flash"))


@pytest.fixture
def pair(flash: tuple[Path, DictWeights]) -> Iterator[tuple[OnnxBackend, ReferenceBackend]]:
    with onnx_backend(flash[0]) as backend:
        yield backend, ReferenceBackend(flash[1])


# --- the same numbers ---


@pytest.mark.parametrize(("kind", "overrides"), CONFIGS.values(), ids=CONFIGS.keys())
def test_prefill_decode_verify_and_drafts_equal_the_reference(
    tmp_path: Path, kind: Any, overrides: dict[str, Any]
) -> None:
    path, truth = make_bundle(tmp_path, kind, **overrides)
    ids, steps = ids_of(75), [1, 1, 20, 2, 4, 1, 13, 3, 12, 4, 5, 1, 8]  # eight windows of 9
    reference = ReferenceBackend(truth)
    with onnx_backend(path) as backend:
        ours, theirs = backend.new_cache(100), reference.new_cache(100)
        at, streams = 0, []
        for count in steps:
            part = ids[at : at + count]
            found = backend.forward(part, ours, logits_rows=count, hidden_rows=count)
            want = reference.forward(part, theirs, logits_rows=count, hidden_rows=count)
            assert error(found.logits, want.logits) < TOLERANCE
            assert error(found.hidden, want.hidden) < TOLERANCE
            streams.append(want.hidden)
            at += count
        assert ours.length == theirs.length == len(ids)
        hidden = np.concatenate(streams)
        for depth in range(truth.config.num_mtp_layers):
            for position, rows in ((0, 60), (58, 3), (60, 5), (65, 1)):
                tokens = ids[position + 1 + depth : position + 1 + depth + rows]
                given = (depth, tokens, hidden[position : position + rows], position)
                found_logits = backend.mtp_forward(*given, ours)
                want_logits = reference.mtp_forward(*given, theirs)
                assert error(found_logits, want_logits) < TOLERANCE


@pytest.mark.parametrize("chunk", [1, 7, 16, 40, 128])
def test_chunked_prefill_is_one_prefill(flash: tuple[Path, DictWeights], chunk: int) -> None:
    path, truth = flash
    ids = ids_of(83)
    want = ReferenceBackend(truth)
    cache = want.new_cache(90)
    whole = want.forward(ids, cache, logits_rows=83, hidden_rows=30)
    with onnx_backend(path, chunk=chunk) as backend:
        ours = backend.new_cache(90)
        found = backend.forward(ids, ours, logits_rows=83, hidden_rows=30)
        assert error(found.logits, whole.logits) < TOLERANCE
        assert error(found.hidden, whole.hidden) < TOLERANCE
        after = backend.forward(ids[:1], ours).logits
        assert error(after, want.forward(ids[:1], cache).logits) < TOLERANCE


@pytest.mark.parametrize("kind", ["flash", "mimo7b"])
def test_a_long_pass_runs_graphs_for_few_rows_at_a_time(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven rows a run, of passes of 40 tokens, and of MTP blocks: past the window, past a cache
    that grows, and its columns."""
    for module in (backend_module, passes):
        monkeypatch.setattr(module, "RUN_ROWS", 7)
    path, truth = make_bundle(tmp_path, kind)
    reference, ids = ReferenceBackend(truth), ids_of(140)
    with onnx_backend(path, chunk=40) as backend:
        caches = reference.new_cache(200), backend.new_cache(200)
        want = reference.forward(ids, caches[0], logits_rows=140, hidden_rows=140)
        have = backend.forward(ids, caches[1], logits_rows=140, hidden_rows=140)
        assert error(have.logits, want.logits) < TOLERANCE
        assert error(have.hidden, want.hidden) < TOLERANCE
        for depth in range(truth.config.num_mtp_layers):
            known = np.roll(ids, -1 - depth)
            for at, count in ((0, 60), (60, 38), (98, 3)):
                part = slice(at, at + count)
                given = depth, known[part], want.hidden[part], at
                drafts = backend.mtp_forward(*given, caches[1])
                assert error(drafts, reference.mtp_forward(*given, caches[0])) < TOLERANCE


def test_one_long_pass_is_kept_whatever_sequences_there_are(
    flash: tuple[Path, DictWeights],
) -> None:
    """The plan has room for one."""
    with onnx_backend(flash[0]) as backend:
        caches = [backend.new_cache(64) for _ in range(3)]
        for cache in caches:
            backend.forward(ids_of(40), cache)
            held = [kept.large for one in caches for kept in one._passes.values()]
            assert held.count(True) == 1


@pytest.mark.parametrize("seed", range(6))
def test_random_rejections(pair: tuple[OnnxBackend, ReferenceBackend], seed: int) -> None:
    """Drafts come and go for many windows; what is left has the logits of an undisturbed pass."""
    backend, reference = pair
    rng = np.random.default_rng(seed)
    ours = backend.new_cache(400)
    kept: list[int] = []
    for step in range(90):
        count = int(rng.integers(1, 5)) if step % 7 else int(rng.integers(1, 30))
        tokens = rng.integers(0, 97, count).astype(np.int32)
        if len(kept) + count > 390:
            break
        found = backend.forward(tokens, ours, logits_rows=count)
        undone = int(rng.integers(0, count)) if count <= 4 else 0
        if undone:
            ours.rollback(undone)
        kept += tokens[: count - undone].tolist()
        assert ours.length == len(kept)
        last = found.logits
    theirs = reference.new_cache(400)
    want = reference.forward(np.array(kept, np.int32), theirs, logits_rows=1)
    again = backend.new_cache(400)
    whole = backend.forward(np.array(kept, np.int32), again, logits_rows=1)
    assert error(whole.logits, want.logits) < TOLERANCE
    ours.rollback(1)
    found = backend.forward(np.array(kept[-1:], np.int32), ours)
    assert error(found.logits, want.logits) < TOLERANCE
    assert last.shape[1] == 97


@pytest.mark.parametrize("recipe", ["f32", "q8_0"])
@pytest.mark.parametrize("kind", ["flash", "v25", "mimo7b"])
def test_rows_of_a_verify_have_the_bits_they_have_alone(
    tmp_path: Path, kind: Any, recipe: str
) -> None:
    """Also where a row would run in a graph of another length, at 64 tokens, and past the ring."""
    path, _ = make_bundle(tmp_path, kind, recipe)
    ids = ids_of(90)
    with onnx_backend(path) as backend:
        alone, cache = [], backend.new_cache(100)
        for token in ids:
            result = backend.forward(np.array([token]), cache, hidden_rows=1)
            alone.append((result.logits[0], result.hidden[0]))
        for first, counts in ((0, (4, 3, 4, 2)), (50, (4, 4, 4, 4, 3)), (62, (4, 2, 4))):
            cache = backend.new_cache(100)
            for token in ids[:first]:
                backend.forward(np.array([token]), cache)
            at = first
            for count in counts:
                rows = backend.forward(
                    ids[at : at + count], cache, logits_rows=count, hidden_rows=count
                )
                for row in range(count):
                    assert np.array_equal(rows.logits[row], alone[at + row][0]), (first, at, row)
                    assert np.array_equal(rows.hidden[row], alone[at + row][1])
                at += count


def test_rows_that_differ_together_run_alone(
    flash: tuple[Path, DictWeights], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph whose rows differ in company is run row by row."""
    from mimo_edge.runtimes.onnx import backend as module

    monkeypatch.setattr(module, "rows_together", lambda session: 1)
    ids = ids_of(30)
    with onnx_backend(flash[0]) as backend:
        assert set(backend.rows_together) == {1}
        cache = backend.new_cache(64)
        want = ReferenceBackend(flash[1])
        theirs = want.new_cache(64)
        for start, count in ((0, 20), (20, 4), (24, 3), (27, 1)):
            part = ids[start : start + count]
            found = backend.forward(part, cache, logits_rows=count, hidden_rows=1)
            expected = want.forward(part, theirs, logits_rows=count, hidden_rows=1)
            assert error(found.logits, expected.logits) < TOLERANCE


def test_caches_are_written_in_place(pair: tuple[OnnxBackend, ReferenceBackend]) -> None:
    """No graph copies a cache: new rows appear in the arrays that were bound."""
    backend, reference = pair
    cache = backend.new_cache(64)
    ids = ids_of(9)
    backend.forward(ids[:5], cache)
    before = [(kv.keys.ctypes.data, kv.values.ctypes.data) for kv in cache.kv]
    backend.forward(ids[5:9], cache)
    assert before == [(kv.keys.ctypes.data, kv.values.ctypes.data) for kv in cache.kv]
    theirs = reference.new_cache(64)
    reference.forward(ids, theirs)
    for index, layer in enumerate(theirs.layers):
        keys = layer._keys[:, :9]  # type: ignore[attr-defined]
        np.testing.assert_allclose(cache.kv[index].keys[0, :, :9], keys, atol=1e-5)
        # ours are not scaled: the scale is in the output projection
        values = layer._values[:, :9] / np.float32(backend.config.attention_value_scale)  # type: ignore[attr-defined]
        np.testing.assert_allclose(cache.kv[index].values[0, :, :9], values, atol=1e-5)


def test_no_graph_copies_a_cache(flash: tuple[Path, DictWeights]) -> None:
    """ONNX Runtime warns of every cache it copies; when caches are not bound to one memory it does,
    which shows that the warning is still there to be seen."""
    code = """
import sys
import numpy as np
from onnx_models import onnx_backend
from mimo_edge.runtimes.onnx import library
library.LOG_SEVERITY = 2
with onnx_backend(sys.argv[1]) as backend:
    print("loaded", file=sys.stderr, flush=True)
    cache, ids = backend.new_cache(64), np.arange(40, dtype=np.int32)
    for start, stop in ((0, 20), (20, 21), (21, 25), (25, 26)):
        hidden = backend.forward(ids[start:stop], cache, hidden_rows=1).hidden
    backend.mtp_forward(0, ids[:1], hidden, 0, cache)
    print("done", file=sys.stderr, flush=True)
    session = backend.package.layers[1]._session
    feed = {}
    for io in backend.package.layers[1].inputs:
        free = {"T": 1}
        shape = [d if isinstance(d, int) else free.get(d, 12) for d in io.shape]
        feed[io.name] = np.zeros(shape, io.dtype)
    session.run(None, feed)
"""
    folders = (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))
    done = subprocess.run(
        [sys.executable, "-c", code, str(flash[0])],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))},
    )
    assert done.returncode == 0, done.stderr
    passes, _, copying = done.stderr.partition("loaded")[2].partition("done")
    assert "in-place" not in passes
    assert "in-place optimization not activated" in copying


def test_two_sequences_take_turns(pair: tuple[OnnxBackend, ReferenceBackend]) -> None:
    backend, reference = pair
    tokens = [ids_of(40, seed) for seed in (1, 2)]
    ours, theirs = ([b.new_cache(64) for _ in tokens] for b in (backend, reference))
    for start, stop in ((0, 20), (20, 24), (24, 25), (25, 40)):
        for mine, his, ids in zip(ours, theirs, tokens, strict=True):
            found = backend.forward(ids[start:stop], mine)
            assert error(found.logits, reference.forward(ids[start:stop], his).logits) < TOLERANCE


# --- drafting ---


@pytest.mark.parametrize("recipe", ["f32", "q8_0"])
def test_drafting_changes_no_token(tmp_path: Path, recipe: str) -> None:
    path, _ = make_bundle(tmp_path, "flash", recipe)
    answers = []
    for draft in (0, 1, 3):
        with onnx_backend(path) as backend:
            engine = Engine(backend, 200, draft)
            for params in (SamplingParams(), SamplingParams(temperature=0.9, seed=3)):
                generation = engine.generate(
                    engine.sequence(), ids_of(30).tolist(), Sampler(params), max_tokens=60
                )
                answers.append([token for step in generation for token in step])
    assert answers[0::2] == [answers[0]] * 3
    assert answers[1::2] == [answers[1]] * 3


# --- routed experts ---


def test_any_number_of_slots_gives_the_same_bits(flash: tuple[Path, DictWeights]) -> None:
    ids, found = ids_of(60), []
    for slots in (3, 8, 24):
        with onnx_backend(flash[0], slots) as backend:
            cache = backend.new_cache(100)
            rows = [backend.forward(ids[:40], cache, logits_rows=40).logits]
            rows += [backend.forward(ids[i : i + 4], cache).logits for i in range(40, 60, 4)]
            found.append(np.concatenate(rows))
    for logits in found[1:]:
        assert np.array_equal(logits, found[0])


def test_routes_are_told(flash: tuple[Path, DictWeights]) -> None:
    told: list[tuple[int, NDArray[Any]]] = []
    expected: list[tuple[int, NDArray[Any]]] = []
    ids = ids_of(20)
    reference = ReferenceBackend(flash[1], routes=lambda n, i: expected.append((n, i.copy())))
    reference.forward(ids, reference.new_cache(40))
    with onnx_backend(flash[0], routes=lambda n, i: told.append((n, i.copy()))) as backend:
        backend.forward(ids, backend.new_cache(40))
    assert [layer for layer, _ in told] == [1, 2, 3] == [layer for layer, _ in expected]
    for (_, ours), (_, theirs) in zip(told, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_damaged_expert_stops_the_pass_and_no_more(tmp_path: Path) -> None:
    path, truth = make_bundle(tmp_path)
    with Bundle.open(path) as bundle:
        file, offset, size = bundle.expert(2, 5).up
    whole = file.read_bytes()
    file.write_bytes(whole[: offset + 8] + b"\xff" * 8 + whole[offset + 16 :])
    assert size > 16
    ids = ids_of(30)
    with onnx_backend(path, 8) as backend:
        cache = backend.new_cache(64)
        with pytest.raises(BundleError, match=r"layer 2.*expert 5"):
            backend.forward(ids, cache)
        assert cache.length == 0
        file.write_bytes(whole)
        found = backend.forward(ids, cache).logits
    reference = ReferenceBackend(truth)
    assert error(found, reference.forward(ids, reference.new_cache(64)).logits) < TOLERANCE


# --- what goes wrong ---


def test_a_cancelled_pass_leaves_the_tokens_that_were_complete(
    flash: tuple[Path, DictWeights],
) -> None:
    path, truth = flash
    ids = ids_of(70)
    with onnx_backend(path) as backend:
        for before, count in ((0, 30), (30, 4), (30, 1), (20, 50)):
            cache = backend.new_cache(100)
            if before:
                backend.forward(ids[:before], cache)
            cancel = Cancel()
            experts: Any = backend._source
            groups = experts.groups

            def interrupted(*args: Any, groups: Any = groups, cancel: Cancel = cancel) -> Any:
                cancel.set()
                return groups(*args)

            experts.groups = interrupted
            try:
                with pytest.raises(Cancelled):
                    backend.forward(ids[before : before + count], cache, cancel=cancel)
            finally:
                experts.groups = groups
            assert cache.length == before
            cache.rollback(0)
            found = backend.forward(ids[before : before + count], cache).logits
            reference = ReferenceBackend(truth)
            theirs = reference.new_cache(100)
            want = reference.forward(ids[: before + count], theirs).logits
            assert error(found, want) < TOLERANCE


def test_wrong_calls(pair: tuple[OnnxBackend, ReferenceBackend]) -> None:
    backend, reference = pair
    cache = backend.new_cache(20)
    ids = ids_of(10)
    with pytest.raises(UsageError, match="outside"):
        backend.forward(np.array([97]), cache)
    with pytest.raises(UsageError, match="integers"):
        backend.forward(np.array([1.5]), cache)
    with pytest.raises(UsageError, match="logits_rows"):
        backend.forward(ids, cache, logits_rows=11)
    with pytest.raises(ContextLengthError):
        backend.forward(ids_of(21), cache)
    with pytest.raises(CacheError, match="another backend"):
        backend.forward(ids, reference.new_cache(20))
    with pytest.raises(ContextLengthError):
        backend.new_cache(1 << 20)
    with pytest.raises(UsageError):
        backend.new_cache(0)
    backend.forward(ids, cache)
    with pytest.raises(CacheError, match="cannot undo"):
        cache.rollback(11)
    with pytest.raises(UsageError, match="MTP block 3"):
        backend.mtp_forward(3, ids[:1], np.zeros((1, 64), np.float32), 0, cache)
    with pytest.raises(UsageError, match="hidden states"):
        backend.mtp_forward(0, ids[:2], np.zeros((1, 64), np.float32), 0, cache)
    with pytest.raises(CacheError, match="has processed 10"):
        backend.mtp_forward(0, ids[:2], np.zeros((2, 64), np.float32), 9, cache)
    with pytest.raises(CacheError, match="only rows below 0"):
        backend.mtp_forward(0, ids[:2], np.zeros((2, 64), np.float32), 5, cache)
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.forward(ids, cache)


def test_a_ring_undoes_no_more_than_it_holds(
    pair: tuple[OnnxBackend, ReferenceBackend],
) -> None:
    backend, _ = pair
    cache = backend.new_cache(64, 3)
    for token in ids_of(40):
        backend.forward(np.array([token]), cache)
    with pytest.raises(CacheError, match="cannot go back"):
        cache.rollback(9)
    cache.rollback(2)
    assert cache.length == 38


def test_damaged_weights_are_noticed(tmp_path: Path) -> None:
    path, _ = make_bundle(tmp_path)
    file = path / "onnx/layers_01/cpu/weights.bin"
    file.write_bytes(np.full(file.stat().st_size // 4, np.nan, "<f4").tobytes())
    with onnx_backend(path) as backend:
        cache = backend.new_cache(20)
        with pytest.raises(GenerationError, match="NaN or Inf at position 0"):
            backend.forward(ids_of(4), cache)
        assert cache.length == 0


def test_a_forked_process_is_refused(flash: tuple[Path, DictWeights]) -> None:
    with onnx_backend(flash[0]) as backend:
        cache = backend.new_cache(20)
        backend.forward(ids_of(4), cache)
        child = os.fork()
        if child == 0:
            try:
                backend.forward(ids_of(1), cache)
            except BackendError as refusal:
                os._exit(7 if "forked" in str(refusal) else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        backend.forward(ids_of(1), cache)


def test_arrays_that_cannot_be_bound(flash: tuple[Path, DictWeights]) -> None:
    session = Session(flash[0] / "onnx/embed/cpu/model.onnx", 1)
    out = np.zeros((2, 64), np.float32)
    for wrong in (np.zeros(2, np.int32), np.zeros(4, np.int64)[::2]):
        with pytest.raises(BackendError, match="tokens: an array of"):
            session.bind({"tokens": wrong, "h": out})
    with pytest.raises(BackendError, match="ONNX Runtime failed"):
        session.bind({"tokens": np.array([0, 97]), "h": out}).run()


# --- memory ---


def test_a_bound_on_memory_streams_experts_or_is_refused(tmp_path: Path) -> None:
    wide: dict[str, Any] = {
        "hidden_size": 256,
        "moe_intermediate_size": 768,
        "n_routed_experts": 16,
    }
    source, _ = write_checkpoint(tmp_path / "source", "flash_bf16", **wide)
    export_bundle(source, tmp_path / "out", recipe="f32", formats=("both",)).close()
    ids = ids_of(60).tolist()
    with Runtime.open(tmp_path / "out", backend="onnx", threads=1, context=64) as runtime:
        want = runtime.logits(ids)
        whole = runtime.stats()["budget"]
    assert whole["slots"] == 48
    assert not whole["streamed"]
    assert set(whole["lines"]) >= {
        "process",
        "weights",
        "MTP",
        "KV cache",
        "graphs",
        "expert slots",
    }
    experts = whole["lines"]["expert slots"]
    ram = whole["total"] - experts // 2
    with Runtime.open(tmp_path / "out", backend="onnx", threads=1, context=64, ram=ram) as runtime:
        budget = runtime.stats()["budget"]
        assert budget["streamed"]
        assert 3 <= budget["slots"] < 48
        assert budget["total"] <= ram
        # With fewer slots than a layer has experts a prompt is computed in groups of them, and the
        # f32 sums over a token's experts are in another order.
        np.testing.assert_allclose(runtime.logits(ids), want, rtol=0, atol=1e-5)
        found = runtime.stats()["experts"]
        assert found["slots_used"] <= budget["slots"]
        assert found["evictions"] > 0
    with pytest.raises(DeviceError, match="the ONNX backend needs"):
        Runtime.open(tmp_path / "out", backend="onnx", context=64, ram=64 << 20)


def test_without_drafts_mtp_blocks_are_not_loaded(flash: tuple[Path, DictWeights]) -> None:
    with Runtime.open(flash[0], backend="onnx", threads=1, context=64, draft=0) as runtime:
        assert runtime.config.num_mtp_layers == 0
        assert "MTP" not in runtime.stats()["budget"]["lines"]
        runtime.session().generate(ids_of(20).tolist(), max_tokens=4)
