"""ONNX Runtime itself: loading it, sessions, arrays bound to their inputs and outputs.

The only module that knows onnxruntime. Arrays are NumPy's own memory: nothing is copied in or out.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mimo_edge.errors import BackendError, BundleError
from mimo_edge.native_library import check_import

LEAST_VERSION = (1, 32)
INSTALL_HINT = "pip install 'onnxruntime>=1.32'"
LOG_SEVERITY = 4  # fatal errors only: others are raised
Array = NDArray[Any]

_TYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(int64)": np.dtype(np.int64),
}


def onnxruntime() -> Any:
    """The module. Raises BackendError when it is missing, broken or too old, or when importing it
    would end the process, as on some ARM cores."""
    try:
        if "onnxruntime" not in sys.modules:
            check_import("onnxruntime")
        import onnxruntime as found
    except ImportError as error:
        raise BackendError(f"onnxruntime cannot be imported: {error}", INSTALL_HINT) from error
    version = tuple(int(part) for part in found.__version__.split(".")[:2])
    if version < LEAST_VERSION:
        raise BackendError(f"onnxruntime {found.__version__} is too old", INSTALL_HINT)
    return found


@dataclass(frozen=True)
class Io:
    """One input or output of a session; dimensions are numbers, or names where any will do."""

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | str, ...]


class Opener(Protocol):
    """A provider that opens sessions itself: runtimes/onnx/plugin.Plugin."""

    def session(self, model: Path | bytes, options: Any) -> Any:
        """An ONNX Runtime session. Raises ProviderError."""
        ...


class Session:
    """A loaded graph on one execution provider."""

    def __init__(self, path: Path, threads: int, provider: Opener | None = None) -> None:
        """`provider` None: the CPU. Raises BundleError for a file that is no graph ONNX Runtime can
        run, ProviderError for one the provider does not run."""
        ort = onnxruntime()
        self.path = path
        self._ort = ort
        options = ort.SessionOptions()
        # An arena of its own for each of many sessions would keep the scratch memory of the longest
        # pass once per session; shapes differ from pass to pass, so patterns are of no use either.
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        options.log_severity_level = LOG_SEVERITY
        # Not the process-wide pool of threads: it would be forced on every other session of the
        # application.
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Threads that wait while others compute (another graph's, ggml's) must not take a core.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if provider is not None:
            self._session = provider.session(path, options)
        else:
            self._session = self._on_cpu(path, options)
        self.inputs = tuple(self._io(found) for found in self._session.get_inputs())
        self.outputs = tuple(self._io(found) for found in self._session.get_outputs())

    def _on_cpu(self, path: Path, options: Any) -> Any:
        try:
            return self._ort.InferenceSession(
                str(path),
                options,
                providers=["CPUExecutionProvider"],
                enable_fallback=0,
            )
        except Exception as error:  # ONNX Runtime raises classes of its own, without a base
            raise BundleError(f"{path}: {first_line(error)}", "export the model again") from error

    @staticmethod
    def _io(found: Any) -> Io:
        shape = tuple(d if isinstance(d, (int, str)) else "?" for d in found.shape)
        return Io(found.name, _TYPES.get(found.type), shape)

    def bind(self, arrays: Mapping[str, Array]) -> Bound:
        """Bind every input and output to an array, by name. The arrays must be C-contiguous; they
        are kept alive, and read and written at every run."""
        return Bound(self._ort, self._session, self.inputs, self.outputs, arrays)


class Bound:
    """A session with an array for each input and output, to be run again and again."""

    def __init__(
        self,
        ort: Any,
        session: Any,
        inputs: tuple[Io, ...],
        outputs: tuple[Io, ...],
        arrays: Mapping[str, Array],
    ) -> None:
        self._session = session
        self._binding = session.io_binding()
        made: dict[int, Any] = {}

        def value(io: Io) -> Any:
            array = arrays[io.name]
            if array.dtype != io.dtype or not array.flags.c_contiguous:
                raise BackendError(f"{io.name}: an array of {array.dtype}, {array.strides}")
            # The same memory in and out is one value: caches are written in place.
            key = array.ctypes.data
            found = made.get(key)
            if found is None or tuple(found.shape()) != array.shape:
                found = made[key] = ort.OrtValue.ortvalue_from_numpy(array)
            return found

        for io in inputs:
            self._binding.bind_ortvalue_input(io.name, value(io))
        for io in outputs:
            self._binding.bind_ortvalue_output(io.name, value(io))
        self._keep = (made, dict(arrays))

    def run(self) -> None:
        """Compute the outputs from the inputs. Raises BackendError when ONNX Runtime fails."""
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What ONNX Runtime says, without the places in its source that it says it from."""
    lines = str(error).strip().splitlines() or [repr(error)]
    words = [
        word for word in lines[0].split() if "/onnxruntime_src/" not in word and "::" not in word
    ]
    return " ".join(words)[:300]
