"""A graph on the CPU as it is written, without ONNX Runtime's rewrites: what NPUs are held against.

Rewritten, quantised products round their activations to 8 bits where the graph says 16.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimo_edge.errors import BackendError
from mimo_edge.runtimes.onnx.library import onnxruntime


class PlainSession:
    """One graph; inputs and outputs by name."""

    def __init__(self, path: Path) -> None:
        """Raises BackendError for a file that is no graph ONNX Runtime can run."""
        ort = onnxruntime()
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime raises classes of its own, without a base
            raise BackendError(f"{path.name}: {error}") from error
        self._names = [found.name for found in self._session.get_outputs()]

    def run(self, feed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs. Raises BackendError."""
        try:
            found = self._session.run(None, dict(feed))
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed: {error}") from error
        return {name: np.asarray(x) for name, x in zip(self._names, found, strict=True)}
