"""Execution providers: which one runs the graphs, and the variant of the package it takes."""

from __future__ import annotations

from dataclasses import dataclass

from mimo_edge.errors import BackendError, ProviderError
from mimo_edge.onnx_io import CPU_VARIANT


@dataclass(frozen=True)
class Provider:
    """`name` as ONNX Runtime calls it; `variant` of the package, or the NPU ("" when the bundle has
    graphs for one only)."""

    name: str
    variant: str


CPU = Provider("CPUExecutionProvider", CPU_VARIANT)


def choose(ep: str) -> Provider:
    """The provider for `--ep`. Raises BackendError for one that this build does not have: it is
    never replaced by another."""
    if ep in ("auto", "cpu"):
        return CPU
    if ep.partition(":")[0] == "qnn":
        from mimo_edge.runtimes.onnx import qnn

        if reason := qnn.why_unavailable():
            raise ProviderError(f"there is no QNN provider: {reason}", "use --ep cpu")
        return Provider(qnn.PROVIDER, ep.partition(":")[2])
    raise BackendError(
        f"the execution provider {ep} is not in this build", "use --ep cpu, or leave --ep out"
    )
