"""Qualcomm's QNN execution provider, from the separate and proprietary package onnxruntime-qnn.

What is asked of the NPU runs there or fails: sessions are made with the CPU as a fallback
forbidden, and the assignment of every node is looked at afterwards, because a provider that does
not load, or refuses a node, otherwise leaves a session that silently computes on the CPU.

On x86-64 Linux the package holds the compiler for every architecture and Qualcomm's HTP emulator.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mimo_edge.errors import ProviderError
from mimo_edge.runtimes.onnx.library import onnxruntime
from mimo_edge.runtimes.onnx.qnn_targets import Target

PROVIDER = "QNNExecutionProvider"
PACKAGE = "onnxruntime_qnn"
_SESSION = {
    "session.disable_cpu_ep_fallback": "1",
    "session.record_ep_graph_assignment_info": "1",
    # Makes Gemm of a MatMul and an Add, which the provider does not take with these shapes.
    "optimization.disable_specified_optimizers": "MatMulAddFusion",
}


def why_unavailable() -> str:
    """Why the QNN provider cannot be used on this machine; empty when it can, as far as is known
    without loading it."""
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


def register() -> Any:
    """Load the provider's library into this process, once; its Python module comes back.

    Raises ProviderError when the package is missing or its library does not load."""
    if reason := why_unavailable():
        raise ProviderError(f"there is no QNN provider: {reason}", "use --ep cpu")
    ort = onnxruntime()
    module = importlib.import_module(PACKAGE)
    if all(device.ep_name != PROVIDER for device in ort.get_ep_devices()):
        try:
            ort.register_execution_provider_library(PROVIDER, module.get_library_path())
        except Exception as error:  # onnxruntime raises its own and RuntimeError
            raise ProviderError(
                f"the QNN provider's library does not load: {error}",
                "onnxruntime and onnxruntime-qnn must fit together: install 'mimo-edge[npu]' anew",
            ) from error
    return module


def devices() -> list[Any]:
    """The NPUs of this machine as ONNX Runtime names them. Raises ProviderError when there is
    none."""
    register()
    found = [device for device in onnxruntime().get_ep_devices() if device.ep_name == PROVIDER]
    if not found:
        raise ProviderError("the QNN provider finds no device on this machine", "use --ep cpu")
    return found


def options(target: Target | None) -> dict[str, str]:
    """Provider options: the HTP library, and the target when something is compiled. Float nodes
    are computed in fp16, of fp16 models and in the float islands of quantised ones."""
    module = register()
    made = {"backend_path": str(module.get_qnn_htp_path())}
    # Quantising float inputs of a graph is the NPU's work too: otherwise it stays on the CPU.
    made["offload_graph_io_quantization"] = "0"
    if target is not None:
        made |= {"htp_arch": str(target.arch), "soc_model": str(target.soc_model)}
    return made


def session_options(
    target: Target | None,
    *,
    config: Mapping[str, str] | None = None,
    extra: Mapping[str, str] | None = None,
) -> Any:
    """Options of a session that runs on the NPU or not at all. `config` are session entries,
    `extra` provider options that win over ours (a device profile's)."""
    made = onnxruntime().SessionOptions()
    for key, value in {**_SESSION, **(config or {})}.items():
        made.add_session_config_entry(key, value)
    made.log_severity_level = 3
    made.add_provider_for_devices(devices(), {**options(target), **(extra or {})})
    return made


def open_session(
    model: Path | bytes,
    target: Target | None,
    *,
    config: Mapping[str, str] | None = None,
    extra: Mapping[str, str] | None = None,
) -> Any:
    """A session with every node on the NPU. Raises ProviderError naming the nodes that are not."""
    source = model if isinstance(model, bytes) else str(model)
    with provider_errors("opened"):
        session = onnxruntime().InferenceSession(
            source, session_options(target, config=config, extra=extra)
        )
    session.disable_fallback()
    assert_assigned(session)
    return session


def assert_assigned(session: Any) -> int:
    """Check that all of a session's nodes are the provider's; the number of partitions.

    Raises ProviderError with the first nodes that are not."""
    partitions, elsewhere = 0, []
    for part in session.get_provider_graph_assignment_info():
        nodes = [(node.name or node.op_type, node.op_type) for node in part.get_nodes()]
        if part.ep_name == PROVIDER:
            partitions += 1
        else:
            elsewhere += [f"{name} ({op}) on {part.ep_name}" for name, op in nodes]
    if elsewhere or not partitions:
        shown = ", ".join(elsewhere[:8]) or "no node at all was given to it"
        more = f" and {len(elsewhere) - 8} more" if len(elsewhere) > 8 else ""
        raise ProviderError(
            f"{PROVIDER} was asked for and does not run {shown}{more}",
            "export the model for this NPU again, or use --ep cpu",
        )
    return partitions


@contextmanager
def provider_errors(what: str) -> Iterator[None]:
    """Errors of ONNX Runtime in the block as ProviderError: "the model could not be `what`"."""
    try:
        yield
    except ProviderError:
        raise
    except Exception as error:  # its exceptions share no base class but Exception
        raise ProviderError(
            f"the model could not be {what} by {PROVIDER}: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
