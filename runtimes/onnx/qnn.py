"""Qualcomm's QNN execution provider, from the separate and proprietary package onnxruntime-qnn, or
from a library of that name a device brings itself.

On x86-64 Linux the package holds the compiler for every architecture and Qualcomm's HTP emulator.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mimo_edge.errors import ProviderError
from mimo_edge.runtimes.onnx.library import onnxruntime
from mimo_edge.runtimes.onnx.plugin import Plugin
from mimo_edge.runtimes.onnx.qnn_targets import Target

PROVIDER = "QNNExecutionProvider"
PACKAGE = "onnxruntime_qnn"
HTP_LIBRARY = "libQnnHtp.so"
# Makes Gemm of a MatMul and an Add, which the provider does not take with these shapes.
_SESSION = {"optimization.disable_specified_optimizers": "MatMulAddFusion"}
_HINT = "export the model for this NPU again, or use --ep cpu"


@dataclass(frozen=True)
class Qnn:
    """Where the provider comes from and what it is told: `library` is its file (None: that of the
    package), `options` are provider options that win over ours (a device profile's, a user's)."""

    library: Path | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    def plugin(self, target: Target | None) -> Plugin:
        """The provider, set up for a target. Float nodes are computed in fp16, of fp16 models and
        in the float islands of quantised ones. Raises ProviderError when there is none."""
        library, backend = self._files()
        made = {"backend_path": str(backend)}
        # Quantising float inputs of a graph is the NPU's work too: otherwise it stays on the CPU.
        made["offload_graph_io_quantization"] = "0"
        if target is not None:
            made |= {"htp_arch": str(target.arch), "soc_model": str(target.soc_model)}
        return Plugin(PROVIDER, library, made | dict(self.options), _HINT)

    def _files(self) -> tuple[Path, Path]:
        """The provider's library and the HTP's."""
        if self.library is not None:
            return self.library, self.library.parent / HTP_LIBRARY
        if reason := why_unavailable():
            raise ProviderError(f"there is no QNN provider: {reason}", "use --ep cpu")
        module = importlib.import_module(PACKAGE)
        return Path(module.get_library_path()), Path(module.get_qnn_htp_path())

    def open_session(
        self, model: Path | bytes, target: Target | None, config: Mapping[str, str] | None = None
    ) -> Any:
        """A session with every node on the NPU; `config` are session entries. Raises
        ProviderError naming the nodes that are not."""
        plugin = self.plugin(target)
        options = onnxruntime().SessionOptions()
        options.log_severity_level = 3
        return plugin.session(model, options, {**_SESSION, **(config or {})})


def why_unavailable() -> str:
    """Why the package's provider cannot be used on this machine; empty when it can, as far as is
    known without loading it."""
    if importlib.util.find_spec(PACKAGE) is not None:
        return ""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        return f"onnxruntime-qnn has no build we use for {platform.system()} {platform.machine()}"
    library, version = platform.libc_ver()
    need = (2, 35) if platform.machine() == "x86_64" else (2, 34)
    if library != "glibc":
        return "onnxruntime-qnn needs glibc, and this system has another C library (musl?)"
    if tuple(int(part) for part in version.split(".")[:2]) < need:
        return f"onnxruntime-qnn needs glibc {need[0]}.{need[1]}, this system has {version}"
    return "onnxruntime-qnn is not installed (pip install 'mimo-edge[npu]')"


def emulated() -> bool:
    """Whether the HTP here is Qualcomm's emulator: x86-64 machines have no other."""
    return platform.machine() == "x86_64"
