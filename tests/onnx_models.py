"""Bundles with an ONNX form, and backends over them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from checkpoint_factory import Kind, write_checkpoint

from mimo_edge.bundle import Bundle
from mimo_edge.experts.table import ExpertTable
from mimo_edge.export.pipeline import export_bundle
from mimo_edge.runtimes.ggml.device import Device
from mimo_edge.runtimes.ggml.expert_source import CachedExperts
from mimo_edge.runtimes.onnx.backend import OnnxBackend
from mimo_edge.runtimes.weights import DictWeights


def make_bundle(
    folder: Path, kind: Kind = "flash", recipe: str = "f32", **options: Any
) -> tuple[Path, DictWeights]:
    """(bundle of a random model in both forms, its true weights)."""
    source, truth = write_checkpoint(folder / "source", kind, **options)
    export_bundle(source, folder / "bundle", recipe=recipe, formats=("both",)).close()
    return folder / "bundle", truth


@contextmanager
def onnx_backend(path: Path, slots: int | None = None, **options: Any) -> Iterator[OnnxBackend]:
    """The backend over a bundle; `slots` for routed experts, by default as many as there are."""
    bundle = Bundle.open(path)
    config = bundle.config
    count = slots or max(1, config.n_routed_experts * sum(config.moe_layer_freq))

    def experts(device: Device) -> CachedExperts:
        return CachedExperts(device, ExpertTable.from_bundle(bundle), count)

    moe = any(config.moe_layer_freq)
    options = {"threads": 1, **options}
    backend = OnnxBackend(bundle, experts=experts if moe else None, **options)
    try:
        yield backend
    finally:
        backend.close()
