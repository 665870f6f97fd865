"""Typed ctypes signatures of the ggml functions the backend calls, and checks of their structs.

`bindings()` loads libggml-base and libggml-cpu once (through `library`, which checks version
and types) and proves that struct ggml_tensor has the layout read here: a library built from
other headers is refused with a BackendError instead of corrupting memory later.

ggml ends the process on bad input. Nothing outside runtimes/ggml may call these functions, and
inside only after the arguments were checked (`graph.py` does it for tensors).
"""

from __future__ import annotations

import ctypes
import logging
import threading
from ctypes import (
    CDLL,
    POINTER,
    Structure,
    c_bool,
    c_char,
    c_char_p,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_void_p,
)
from pathlib import Path
from typing import Any

from mimo_edge.errors import BackendError
from mimo_edge.runtimes.ggml import library
from mimo_edge.runtimes.ggml.cpu_library import check_features, cpu_library, variant_name

MAX_DIMS = 4
MAX_SRC = 10
MAX_NAME = 64

# enum ggml_type: what graphs are made of besides the weight formats.
TYPE_F32 = 0
TYPE_F16 = 1
TYPE_Q8_0 = 8
TYPE_I32 = 26
TYPE_I64 = 27

STATUS_SUCCESS = 0
STATUS_ABORTED = 1

ROPE_NEOX = 2
SORT_DESCENDING = 1
BUFFER_USAGE_WEIGHTS = 1

Ne = c_int64 * MAX_DIMS
Nb = c_size_t * MAX_DIMS


class TensorStruct(Structure):
    """struct ggml_tensor of ggml.h; its layout is verified before it is used."""

    _fields_ = (
        ("type", c_int),
        ("buffer", c_void_p),
        ("ne", Ne),
        ("nb", Nb),
        ("op", c_int),
        ("op_params", c_int32 * 16),
        ("flags", c_int32),
        ("src", c_void_p * MAX_SRC),
        ("view_src", c_void_p),
        ("view_offs", c_size_t),
        ("data", c_void_p),
        ("name", c_char * MAX_NAME),
        ("extra", c_void_p),
        ("padding", c_char * 8),
    )


class InitParams(Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


P, N, L, Z, F = c_void_p, c_int, c_int64, c_size_t, c_float

# name -> (result, arguments). P stands for every opaque pointer.
_BASE: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_init": (P, (InitParams,)),
    "ggml_free": (None, (P,)),
    "ggml_tensor_overhead": (Z, ()),
    "ggml_graph_overhead_custom": (Z, (Z, c_bool)),
    "ggml_new_tensor": (P, (P, N, N, POINTER(L))),
    "ggml_nbytes": (Z, (P,)),
    "ggml_get_data": (P, (P,)),
    "ggml_get_name": (P, (P,)),
    "ggml_set_name": (P, (P, c_char_p)),
    "ggml_op_name": (c_char_p, (N,)),
    "ggml_log_set": (None, (P, P)),
    "ggml_set_output": (None, (P,)),
    "ggml_set_input": (None, (P,)),
    "ggml_is_contiguous": (c_bool, (P,)),
    # operations
    "ggml_add": (P, (P, P, P)),
    "ggml_mul": (P, (P, P, P)),
    "ggml_div": (P, (P, P, P)),
    "ggml_sum_rows": (P, (P, P)),
    "ggml_concat": (P, (P, P, P, N)),
    "ggml_sigmoid": (P, (P, P)),
    "ggml_swiglu_split": (P, (P, P, P)),
    "ggml_rms_norm": (P, (P, P, F)),
    "ggml_mul_mat": (P, (P, P, P)),
    "ggml_mul_mat_id": (P, (P, P, P, P)),
    "ggml_out_prod": (P, (P, P, P)),
    "ggml_scale_bias": (P, (P, P, F, F)),
    "ggml_clamp": (P, (P, P, F, F)),
    "ggml_cpy": (P, (P, P, P)),
    "ggml_cast": (P, (P, P, N)),
    "ggml_cont": (P, (P, P)),
    "ggml_repeat_4d": (P, (P, P, L, L, L, L)),
    "ggml_pad": (P, (P, P, N, N, N, N)),
    "ggml_reshape_2d": (P, (P, P, L, L)),
    "ggml_reshape_3d": (P, (P, P, L, L, L)),
    "ggml_reshape_4d": (P, (P, P, L, L, L, L)),
    "ggml_view_1d": (P, (P, P, L, Z)),
    "ggml_view_2d": (P, (P, P, L, L, Z, Z)),
    "ggml_view_3d": (P, (P, P, L, L, L, Z, Z, Z)),
    "ggml_permute": (P, (P, P, N, N, N, N)),
    "ggml_get_rows": (P, (P, P, P)),
    "ggml_set_rows": (P, (P, P, P, P)),
    "ggml_argmax": (P, (P, P)),
    "ggml_argsort": (P, (P, P, N)),
    "ggml_rope_ext": (P, (P, P, P, P, N, N, N, F, F, F, F, F, F)),
    "ggml_soft_max_ext": (P, (P, P, P, F, F)),
    "ggml_soft_max_add_sinks": (None, (P, P)),
    "ggml_flash_attn_ext": (P, (P, P, P, P, P, F, F, F)),
    "ggml_flash_attn_ext_add_sinks": (None, (P, P)),
    # graphs
    "ggml_new_graph_custom": (P, (P, Z, c_bool)),
    "ggml_build_forward_expand": (None, (P, P)),
    "ggml_graph_n_nodes": (N, (P,)),
    "ggml_gallocr_new": (P, (P,)),
    "ggml_gallocr_free": (None, (P,)),
    "ggml_gallocr_reserve": (c_bool, (P, P)),
    "ggml_gallocr_alloc_graph": (c_bool, (P, P)),
    "ggml_gallocr_get_buffer_size": (Z, (P, N)),
    # backends and buffers
    "ggml_backend_free": (None, (P,)),
    "ggml_backend_graph_compute": (N, (P, P)),
    "ggml_backend_get_device": (P, (P,)),
    "ggml_backend_dev_supports_op": (c_bool, (P, P)),
    "ggml_backend_reg_dev_get": (P, (P, Z)),
    "ggml_backend_reg_get_proc_address": (P, (P, c_char_p)),
    "ggml_backend_buft_name": (c_char_p, (P,)),
    "ggml_backend_buft_alloc_buffer": (P, (P, Z)),
    "ggml_backend_buft_get_alignment": (Z, (P,)),
    "ggml_backend_buft_get_alloc_size": (Z, (P, P)),
    "ggml_backend_buffer_free": (None, (P,)),
    "ggml_backend_buffer_get_base": (P, (P,)),
    "ggml_backend_buffer_set_usage": (None, (P, N)),
    "ggml_backend_tensor_alloc": (N, (P, P, P)),
    "ggml_backend_tensor_set": (None, (P, P, Z, Z)),
    "ggml_backend_tensor_get": (None, (P, P, Z, Z)),
    "ggml_backend_cpu_buffer_from_ptr": (P, (P, Z)),
    "ggml_backend_cpu_buffer_type": (P, ()),
}

_CPU: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_backend_cpu_init": (P, ()),
    "ggml_backend_cpu_reg": (P, ()),
    "ggml_backend_cpu_set_n_threads": (None, (P, N)),
    "ggml_backend_cpu_set_abort_callback": (None, (P, P, P)),
}


class Bindings:
    """Every function of `_BASE` and `_CPU` as an attribute, with its signature set.

    A private CDLL object per library, so that signatures set here and in `library` (or by
    llama_cpp itself) never disturb each other.
    """

    def __init__(self, folder: Path | None = None) -> None:
        base = library.load(folder)
        self.version = base.version
        base_cdll = library.open_library(base.path)
        cpu_path = cpu_library(folder)
        cpu_cdll = library.open_library(cpu_path)
        self.cpu_path = cpu_path
        self.features = check_features(cpu_cdll, cpu_path)
        _bind(self, base_cdll, _BASE, base.path)
        _bind(self, cpu_cdll, _CPU, cpu_path)
        self._check_same_base(base_cdll, cpu_cdll, cpu_path)
        self._check_tensor_layout(base.path)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"ggml function {name!r} is not bound")

    @staticmethod
    def _check_same_base(base: CDLL, cpu: CDLL, path: Path) -> None:
        """libggml-cpu must use the libggml-base we checked, not another copy of it."""
        ours, theirs = (_address(lib, "ggml_init") for lib in (base, cpu))
        if ours != theirs:
            raise BackendError(
                f"{path} is linked to another libggml-base than the one beside it",
                library.INSTALL_HINT,
            )

    def _check_tensor_layout(self, path: Path) -> None:
        """Compare TensorStruct with tensors the library itself made."""
        overhead = int(self.ggml_tensor_overhead())
        object_bytes = 32  # struct ggml_object: two size_t, a pointer, an enum, 4 bytes padding
        size = ctypes.sizeof(TensorStruct)
        if overhead != size + object_bytes:
            raise BackendError(
                f"a tensor of {path} takes {overhead} bytes, expected {size + object_bytes}",
                library.INSTALL_HINT,
            )
        # Room for data, although none is wanted: where no_alloc is misread, ggml would abort.
        context = self.ggml_init(InitParams(overhead * 8 + (1 << 16), None, True))
        if not context:
            raise BackendError("ggml could not make a context: out of memory")
        try:
            shape = Ne(64, 3, 5, 2)
            a = self.ggml_new_tensor(context, TYPE_F16, MAX_DIMS, shape)
            view = self.ggml_view_1d(context, a, 32, 128)
            total = self.ggml_add(context, a, a)
            self.ggml_set_name(a, b"layout")
            self.ggml_set_output(a)
            made, viewed, added = (TensorStruct.from_address(t) for t in (a, view, total))
            found = (
                made.type,
                tuple(made.ne),
                tuple(made.nb),
                made.flags,
                made.name,
                made.data,
                made.buffer,
                self.ggml_get_name(a) - a,
                viewed.view_src == a,
                viewed.view_offs,
                added.src[0] == a and added.src[1] == a,
                self.ggml_op_name(added.op),
            )
            expected = (
                TYPE_F16,
                (64, 3, 5, 2),
                (2, 128, 384, 1920),
                2,
                b"layout",
                None,
                None,
                TensorStruct.name.offset,
                True,
                128,
                True,
                b"ADD",
            )
            if found != expected:
                raise BackendError(
                    f"struct ggml_tensor of {path} reads as {found}, expected {expected}",
                    library.INSTALL_HINT,
                )
        finally:
            self.ggml_free(context)


def extra_buffer_types(b: Bindings, device: int) -> list[int]:
    """Buffer types that store weights in another order (REPACK, KleidiAI, AMX), best first."""
    registry = b.ggml_backend_cpu_reg()
    address = b.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return []
    function = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)
    found: list[int] = []
    listed = function(device)
    while pointer := listed[len(found)]:
        found.append(pointer)
    return found


def flag_function() -> tuple[int, Any]:
    """(address, keep alive) of a C function that says whether a byte string is not empty.

    ggml asks an abort callback `bool (*)(void *)` after every node. A Python callback would need
    the interpreter lock thousands of times per token; libc's strlen on a two-byte buffer answers
    the same question without it.
    """
    libc = CDLL(None)
    return _address(libc, "strlen"), libc


def _address(lib: CDLL, name: str) -> int:
    return ctypes.cast(getattr(lib, name), c_void_p).value or 0


def _bind(
    target: Bindings, lib: CDLL, table: dict[str, tuple[Any, tuple[Any, ...]]], path: Path
) -> None:
    for name, (result, arguments) in table.items():
        try:
            function = getattr(lib, name)
        except AttributeError:
            raise BackendError(f"{path} has no function {name}", library.INSTALL_HINT) from None
        function.restype = result
        function.argtypes = arguments
        setattr(target, name, function)


_LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_LOG_WARNING = 3
_logger = logging.getLogger("mimo_edge.ggml")


def _log(level: int, text: bytes | None, _data: int | None) -> None:
    """Warnings and errors of ggml go to logging; it prints everything to stderr otherwise."""
    if text and _LOG_WARNING <= level <= _LOG_WARNING + 1:
        _logger.warning(text.decode("utf-8", "replace").rstrip())


_log_callback = _LogCallback(_log)  # ggml keeps the pointer for the life of the process


_loaded: Bindings | None = None
_lock = threading.Lock()


def bindings() -> Bindings:
    """The checked bindings of the installed library, made once.

    Raises BackendError when it is missing, of another version, or laid out differently.
    """
    global _loaded
    with _lock:
        if _loaded is None:
            _loaded = Bindings()
            _loaded.ggml_log_set(ctypes.cast(_log_callback, c_void_p), None)
        return _loaded


def describe_library() -> dict[str, Any]:
    """JSON-ready: which libggml computes, its variant ("" without variants), and the vector
    extensions it was compiled for. Raises BackendError as `bindings`."""
    loaded = bindings()
    return {
        "path": str(loaded.cpu_path),
        "version": loaded.version,
        "variant": variant_name(loaded.cpu_path),
        "compiled_for": list(loaded.features),
    }
