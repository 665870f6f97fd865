"""The NPU backend without an NPU: every component refused, so the same static passes, rings, masks
and padding run on CPU graphs, and must give what the reference gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoint_factory import Kind
from npu_models import Rows
from onnx_models import make_bundle

from mimo_edge.bundle import Bundle
from mimo_edge.cancel import Cancel
from mimo_edge.errors import (
    BundleError,
    Cancelled,
    ContextLengthError,
    ProviderError,
    UsageError,
)
from mimo_edge.experts.table import ExpertTable
from mimo_edge.export.npu_stage import head_norms
from mimo_edge.export.onnx.npu_compile import Compiler, NpuPlan
from mimo_edge.npu_io import INDEX_NAME, NORMS_NAME, NpuVariant, read_index, write_index
from mimo_edge.onnx_io import FOLDER
from mimo_edge.runtimes.base import Backend
from mimo_edge.runtimes.ggml.device import Device
from mimo_edge.runtimes.ggml.expert_source import CachedExperts
from mimo_edge.runtimes.onnx.npu_backend import NpuBackend
from mimo_edge.runtimes.onnx.qnn_targets import target
from mimo_edge.runtimes.reference import ReferenceBackend
from mimo_edge.runtimes.weights import DictWeights

BUCKETS = (32, 96, 256)
TOLERANCE = 2e-5  # f32 sums in another order


def add_npu_form(path: Path, truth: DictWeights, npu: str = "v73") -> None:
    """What an export leaves for an NPU that refuses everything, in f32."""
    plan = NpuPlan(truth.config, (target(npu),), "fp16", BUCKETS, 2)
    folder = path / FOLDER
    compiler = Compiler(plan, target(npu), Rows(truth), None, folder, folder / "work")
    parts = tuple(
        replace(compiler.on_cpu(part, "refused here"), single=0) for part in plan.components()
    )
    t = target(npu)
    variant = NpuVariant(t.name, t.arch, t.soc_model, BUCKETS, parts)
    index = folder / INDEX_NAME
    known = read_index(index.read_bytes(), "index") if index.exists() else {}
    index.write_bytes(write_index({**known, variant.name: variant}))
    (folder / NORMS_NAME).write_bytes(head_norms(truth))


@contextmanager
def npu_backend(path: Path, npu: str | None = None) -> Iterator[NpuBackend]:
    bundle = Bundle.open(path)
    config = bundle.config
    slots = config.n_routed_experts * sum(config.moe_layer_freq)

    def experts(device: Device) -> CachedExperts:
        return CachedExperts(device, ExpertTable.from_bundle(bundle), slots)

    backend = NpuBackend(bundle, npu=npu, threads=1, experts=experts if slots else None)
    try:
        yield backend
    finally:
        backend.close()


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DictWeights]:
    path, truth = make_bundle(tmp_path_factory.mktemp("flash"))
    add_npu_form(path, truth)
    return path, truth


def close(found: np.ndarray, want: np.ndarray) -> None:
    assert np.abs(found - want).max() <= TOLERANCE * np.abs(want).max()


def walk(backend: Backend, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Prefill, single tokens, verifies with drafts refused, to the end: every row's logits and
    hidden states, each as first committed."""
    cache = backend.new_cache(len(ids) + 8)
    logits, hidden = [], []
    at = 0
    for count, keep in ((70, 70), (1, 1), (4, 1), (3, 2), (1, 1), (4, 4), (17, 17), (4, 2), (4, 3)):
        rows = min(count, 4)
        part = ids[at : at + count].copy()
        part[keep:] = (part[keep:] + 1) % backend.config.vocab_size  # wrong drafts
        got = backend.forward(part, cache, logits_rows=rows, hidden_rows=rows)
        first = count - rows
        logits += list(got.logits[: keep - first])
        hidden += list(got.hidden[: keep - first])
        cache.rollback(count - keep)
        at += keep
        assert cache.length == at
    return np.array(logits), np.array(hidden)


@pytest.mark.parametrize("kind", ["flash", "mimo7b"])
def test_passes_give_what_the_reference_gives(kind: Kind, tmp_path: Path) -> None:
    """Past the window and past two cache lengths, with drafts undone."""
    path, truth = make_bundle(tmp_path, kind)
    add_npu_form(path, truth)
    ids = np.random.default_rng(1).integers(0, truth.config.vocab_size, 140).astype(np.int32)
    want = walk(ReferenceBackend(truth), ids)
    with npu_backend(path) as backend:
        assert backend.provider_stats()["on_npu"] == 0
        have = walk(backend, ids)
        close(have[0], want[0])
        close(have[1], want[1])


@pytest.mark.parametrize("kind", ["flash", "mimo7b"])
def test_mtp_blocks_give_what_the_reference_gives(kind: Kind, tmp_path: Path) -> None:
    path, truth = make_bundle(tmp_path, kind)
    add_npu_form(path, truth)
    ids = np.random.default_rng(2).integers(0, truth.config.vocab_size, 120).astype(np.int32)
    reference = ReferenceBackend(truth)
    with npu_backend(path) as backend:
        both: tuple[Backend, ...] = (reference, backend)
        caches = [b.new_cache(200) for b in both]
        hidden = reference.forward(ids, caches[0], hidden_rows=len(ids)).hidden
        backend.forward(ids, caches[1])
        for depth in range(truth.config.num_mtp_layers):
            # The rows of drafts that were refused are written again.
            for at, count in ((0, 100), (98, 3), (100, 4), (104, 1)):
                known = np.roll(ids, -1 - depth)[at : at + count]
                found = [
                    b.mtp_forward(depth, known, hidden[at : at + count], at, cache)
                    for b, cache in zip(both, caches, strict=True)
                ]
                close(found[1], found[0])


def test_a_pass_that_is_cancelled_costs_nothing_but_itself(
    flash: tuple[Path, DictWeights],
) -> None:
    path, truth = flash
    ids = np.random.default_rng(3).integers(0, truth.config.vocab_size, 90).astype(np.int32)
    with npu_backend(path) as backend:
        cache, again = backend.new_cache(128), backend.new_cache(128)
        backend.forward(ids[:50], cache)
        want = backend.forward(ids, again).logits
        cancel = Cancel()
        cancel.set()
        with pytest.raises(Cancelled):
            backend.forward(ids[50:], cache, cancel=cancel)
        assert cache.length == 50
        close(backend.forward(ids[50:], cache).logits, want)


def test_a_verify_has_the_bits_of_single_tokens(flash: tuple[Path, DictWeights]) -> None:
    path, truth = flash
    ids = np.random.default_rng(4).integers(0, truth.config.vocab_size, 100).astype(np.int32)
    with npu_backend(path) as backend:
        one, four = backend.new_cache(128), backend.new_cache(128)
        for cache in (one, four):
            backend.forward(ids[:60], cache)
        singles = [backend.forward(ids[i : i + 1], one).logits[0] for i in range(60, 100)]
        verified: list[np.ndarray] = []
        for i in range(60, 100, 4):
            verified += list(backend.forward(ids[i : i + 4], four, logits_rows=4).logits)
        assert np.array(singles).tobytes() == np.array(verified).tobytes()


def test_limits_are_errors(flash: tuple[Path, DictWeights], tmp_path: Path) -> None:
    path, _ = flash
    with npu_backend(path) as backend:
        with pytest.raises(ContextLengthError, match="compiled for"):
            backend.new_cache(BUCKETS[-1] + 1)
        with pytest.raises(UsageError, match="verify 4"):
            backend.new_cache(64, verify_rows=5)
    refused = pytest.raises(ProviderError, match="no graphs for v79, only for v73")
    with refused, npu_backend(path, "v79"):
        pass
    bare, _ = make_bundle(tmp_path)
    with pytest.raises(ProviderError, match="--npu"), npu_backend(bare):
        pass


def test_several_targets_must_be_told_apart(tmp_path: Path) -> None:
    path, truth = make_bundle(tmp_path)
    add_npu_form(path, truth, "v73")
    add_npu_form(path, truth, "sa8295")
    with pytest.raises(UsageError, match=r"sa8295, v73|v73, sa8295"), npu_backend(path):
        pass
    with npu_backend(path, "sa8295") as backend:
        assert backend.provider_stats()["target"] == "sa8295"
        name = backend.name
    with npu_backend(path, "v73") as backend:  # what one computed is not taken for the other's
        assert backend.name != name


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (INDEX_NAME, b"{"),
        (INDEX_NAME, b'{"schema": 2, "variants": {}}'),
        (INDEX_NAME, b'{"schema": 1, "variants": {"x": {"target": "../x"}}}'),
        (NORMS_NAME, b"short"),
    ],
)
def test_damaged_files_are_typed_errors(name: str, content: bytes, tmp_path: Path) -> None:
    path, truth = make_bundle(tmp_path)
    add_npu_form(path, truth)
    (path / FOLDER / name).write_bytes(content)
    with pytest.raises(BundleError), npu_backend(path):
        pass


def test_stats_say_what_runs_on_the_cpu_and_why(flash: tuple[Path, DictWeights]) -> None:
    path, _ = flash
    with npu_backend(path) as backend:
        found = backend.provider_stats()
        assert found["components"] == len(found["on_cpu"])  # type: ignore[arg-type]
        assert {c["reason"] for c in found["on_cpu"]} == {"refused here"}  # type: ignore[attr-defined]
