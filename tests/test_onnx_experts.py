"""Routed experts of the ONNX backend: all in memory, in ggml's order of them, or in slots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_factory import write_checkpoint

from mimo_edge import onnx_budget
from mimo_edge.api import Runtime
from mimo_edge.bundle import Bundle
from mimo_edge.experts.table import ExpertTable
from mimo_edge.export.pipeline import export_bundle
from mimo_edge.runtimes.ggml.device import Device
from mimo_edge.runtimes.ggml.expert_source import CachedExperts
from mimo_edge.runtimes.ggml.raw import GgufTensors
from mimo_edge.runtimes.ggml.resident_experts import ExpertWeights, ResidentExperts
from mimo_edge.runtimes.ggml.slots import ExpertSource
from mimo_edge.runtimes.onnx.experts import HostExperts
from mimo_edge.runtimes.onnx.package import onnx_form


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts wide enough to be computed one by one in a long pass."""
    folder = tmp_path_factory.mktemp("wide")
    wide: dict[str, Any] = {
        "hidden_size": 512,
        "moe_intermediate_size": 1024,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
    }
    source, _ = write_checkpoint(folder / "source", "flash_bf16", **wide)
    export_bundle(source, folder / "out", recipe="q4_0", formats=("both",)).close()
    return folder / "out"


@pytest.mark.parametrize("total", [1, 4, 60])
def test_resident_experts_give_what_slots_give(bundle: Path, total: int) -> None:
    """Another order of the same weights in memory: a token, a verify, a long pass."""
    rng = np.random.default_rng(total)
    with Bundle.open(bundle) as files:
        config, device = files.config, Device(1)
        layer = next(spec.index for spec in config.layers if spec.moe)
        x = rng.standard_normal((total, config.hidden_size)).astype(np.float32)
        weights = rng.random((total, 2), np.float32)
        ids = np.array([rng.permutation(4)[:2] for _ in range(total)])
        sources: tuple[ExpertSource, ...] = (
            ResidentExperts.loaded(device, GgufTensors(config, [files.gguf])),
            CachedExperts(device, ExpertTable.from_bundle(files), 12),
        )
        found = []
        for source in sources:
            experts = HostExperts(device, config, source, total, None)
            experts.x[...], experts.weights[...] = x, weights
            h = np.zeros_like(x)
            experts.add(layer, ids, h, None)
            found.append(h)
            experts.close()
            source.close()
        device.close()
    off = np.abs(found[0] - found[1]).max(axis=1) / np.abs(found[1]).max(axis=1)
    # f32 sums of the same products in another order; and what lies between two of its 8-bit codes
    # on the way to the second product may fall to the other, in a row or two.
    assert np.median(off) <= 1e-5
    assert off.max() <= 0.01


def test_a_model_that_fits_has_its_experts_resident(bundle: Path) -> None:
    with Runtime.open(bundle, backend="onnx", threads=1, context=80) as runtime:
        assert not runtime.stats()["budget"]["streamed"]
        assert runtime.stats()["experts"] is None


def test_drafts_change_no_token(bundle: Path) -> None:
    found = []
    for draft in (0, 3):
        with Runtime.open(bundle, backend="onnx", threads=1, context=80, draft=draft) as runtime:
            found.append(runtime.session().generate(list(range(3, 40)), max_tokens=24).token_ids)
    assert found[0] == found[1]


def test_weights_that_are_experts_alone(bundle: Path) -> None:
    with Bundle.open(bundle) as files:
        device = Device(1)
        weights = ExpertWeights(device, GgufTensors(files.config, [files.gguf]))
        moe = [spec.index for spec in files.config.layers if spec.moe]
        assert list(weights.layers) == moe
        one = 3 * 512 * 1024 * 18 // 32  # Q4_0: 18 bytes for 32 weights
        assert sum(weights.nbytes.values()) >= 4 * one * len(moe)
        weights.close()
        weights.close()
        device.close()


def test_where_loading_them_does_not_fit_they_are_in_slots(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer's matrices are there twice while they are reordered; a cap may have no room for it,
    and for the experts all the same."""
    monkeypatch.setattr(onnx_budget, "pass_bytes", lambda *_: 0)
    with Bundle.open(bundle) as files:
        given = (files.config, onnx_form(files), files.tensors, 64)
        free = onnx_budget.plan(*given, None, process_bytes=0)
        lines = {line.name: line.nbytes for line in free.lines}
        assert not free.streamed
        assert lines["loading"] > 1 << 20
        bare = free.nbytes - lines["loading"]
        ram = (bare + (8 << 20)) * 64 // 63 + 4096  # with the reserve
        capped = onnx_budget.plan(*given, ram, process_bytes=0)
        assert capped.streamed
        assert capped.slots == free.slots == capped.experts
        assert not onnx_budget.plan(*given, ram + lines["loading"] * 2, process_bytes=0).streamed
