"""Finding, loading and checking libggml-base: the one place that calls its quantisation.

ggml ends the process on bad input, so every call here validates first and raises a typed
error instead. The graph bindings (runtimes/ggml) load the same library through `load`.

Where it is looked for, one rule: the `lib/` folder of the first of PACKAGES that is installed,
found without importing that package; a `folder` given to `load` replaces it. `mimo_edge_libggml` is
what a device kit brings, `llama_cpp` is compiled on the machine itself.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from mimo_edge.errors import BackendError, QuantError

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

# The versions whose struct layouts and formats were read; patch releases do not change them.
GGML_VERSION = (0, 25)
SONAME_VERSION = 0
SPIN_COUNT = "20000"  # of GNU OpenMP
PACKAGES = ("mimo_edge_libggml", "llama_cpp")
BUILT_BY = "llama-cpp-python==0.3.36"
INSTALL_HINT = f"pip install {BUILT_BY}"


@dataclass(frozen=True)
class TypeInfo:
    """One ggml type: `blck_size` elements take `type_size` bytes."""

    ggml_type: int
    name: str
    blck_size: int
    type_size: int
    requires_imatrix: bool = False


# Every type we read or write. Source: ggml.h enum ggml_type, ggml-common.h block structs.
TYPES: Mapping[int, TypeInfo] = MappingProxyType(
    {
        info.ggml_type: info
        for info in (
            TypeInfo(0, "f32", 1, 4),
            TypeInfo(1, "f16", 1, 2),
            TypeInfo(2, "q4_0", 32, 18),
            TypeInfo(8, "q8_0", 32, 34),
            TypeInfo(10, "q2_K", 256, 84),
            TypeInfo(11, "q3_K", 256, 110),
            TypeInfo(12, "q4_K", 256, 144),
            TypeInfo(13, "q5_K", 256, 176),
            TypeInfo(14, "q6_K", 256, 210),
            TypeInfo(16, "iq2_xxs", 256, 66, requires_imatrix=True),
            TypeInfo(18, "iq3_xxs", 256, 98),
            TypeInfo(20, "iq4_nl", 32, 18),
            TypeInfo(23, "iq4_xs", 256, 136),
            TypeInfo(30, "bf16", 1, 2),
            TypeInfo(39, "mxfp4", 32, 17),
        )
    }
)

_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _TypeTraits(ctypes.Structure):
    """struct ggml_type_traits of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


# name -> (result, arguments) of what is called here.
_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "ggml_version": (ctypes.c_char_p, ()),
    "ggml_commit": (ctypes.c_char_p, ()),
    "ggml_type_size": (ctypes.c_size_t, (ctypes.c_int,)),
    "ggml_blck_size": (ctypes.c_int64, (ctypes.c_int,)),
    "ggml_row_size": (ctypes.c_size_t, (ctypes.c_int, ctypes.c_int64)),
    "ggml_get_type_traits": (ctypes.POINTER(_TypeTraits), (ctypes.c_int,)),
    "ggml_quantize_init": (None, (ctypes.c_int,)),
    "ggml_quantize_requires_imatrix": (ctypes.c_bool, (ctypes.c_int,)),
    "ggml_validate_row_data": (
        ctypes.c_bool,
        (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t),
    ),
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        (
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
        ),
    ),
}


class GgmlBase:
    """A loaded and checked libggml-base. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        """Load `path` and check it. Raises BackendError saying what was found and expected."""
        self.path = path
        self._lock = threading.Lock()
        self._initialised: set[int] = set()
        self.cdll = open_library(path)
        for name, (result, arguments) in _SIGNATURES.items():
            try:
                function = getattr(self.cdll, name)
            except AttributeError:
                raise BackendError(f"{path} has no function {name}", INSTALL_HINT) from None
            function.restype = result
            function.argtypes = arguments
        self.version = _text(self.cdll.ggml_version())
        self.commit = _text(self.cdll.ggml_commit())
        check_version(self.version, path)
        self._to_float = {info.ggml_type: self._check_type(info) for info in TYPES.values()}

    def _check_type(self, info: TypeInfo) -> ctypes._FuncPointer | None:
        """Compare one type with what we expect and return its dequantiser (None for f32)."""
        lib, number = self.cdll, info.ggml_type
        traits = lib.ggml_get_type_traits(number).contents
        # Asked in both ways: if the struct had another layout the two would disagree.
        found = (
            _text(traits.type_name),
            int(traits.blck_size),
            int(traits.type_size),
            bool(lib.ggml_quantize_requires_imatrix(number)),
            int(lib.ggml_blck_size(number)),
            int(lib.ggml_type_size(number)),
            int(lib.ggml_row_size(number, info.blck_size * 3)),
        )
        expected = (
            info.name,
            info.blck_size,
            info.type_size,
            info.requires_imatrix,
            info.blck_size,
            info.type_size,
            info.type_size * 3,
        )
        if found != expected:
            raise BackendError(
                f"ggml type {number} of {self.path} is {found}, expected {expected}", INSTALL_HINT
            )
        if number == 0:
            return None
        if not traits.to_float:
            raise BackendError(f"ggml type {info.name} of {self.path} has no to_float")
        return _ToFloat(traits.to_float)

    def quantize(self, ggml_type: int, x: F32, out: U8, importance: F32 | None = None) -> None:
        """f32 [rows, cols] -> out u8 [rows, row bytes] as ggml's reference quantiser does it.

        `importance` f32 [cols] or None. Raises QuantError on anything ggml would abort on; the
        values themselves must be finite and of a sane size, which is checked too.
        """
        info = _info(ggml_type)
        rows, cols = _check_matrix(x, np.float32, "input")
        _check_output(out, np.uint8, (rows, _row_bytes(info, cols)))
        if not np.isfinite(x).all():
            raise QuantError(f"input of {info.name} holds NaN or infinity")
        pointer = None
        if importance is not None:
            if importance.dtype != np.float32 or importance.shape != (cols,):
                raise QuantError(
                    f"importance is {importance.dtype} {list(importance.shape)}, not f32 [{cols}]"
                )
            if not importance.flags.c_contiguous or not np.isfinite(importance).all():
                raise QuantError("importance is not contiguous, or holds NaN or infinity")
            pointer = importance.ctypes.data
        elif info.requires_imatrix:
            raise QuantError(f"{info.name} cannot be made without an importance matrix")
        if rows == 0:
            return
        self._init_tables(ggml_type)
        written = int(
            self.cdll.ggml_quantize_chunk(
                ggml_type, x.ctypes.data, out.ctypes.data, 0, rows, cols, pointer
            )
        )
        if written != out.nbytes:
            raise BackendError(f"ggml wrote {written} bytes of {info.name}, not {out.nbytes}")

    def dequantize(self, ggml_type: int, raw: U8, out: F32) -> None:
        """u8 [rows, row bytes] -> out f32 [rows, cols] with ggml's own to_float."""
        info = _info(ggml_type)
        rows, width = _check_matrix(raw, np.uint8, "input")
        if out.ndim != 2:
            raise QuantError(f"output has {out.ndim} dimensions, not 2")
        cols = int(out.shape[1])
        _check_output(out, np.float32, (rows, cols))
        if width != _row_bytes(info, cols):
            raise QuantError(
                f"rows of {cols} {info.name} elements have {_row_bytes(info, cols)} bytes, "
                f"got {width}"
            )
        to_float = self._to_float[ggml_type]
        if to_float is None:
            out[...] = raw.view(np.float32)
        elif rows:
            # Rows are whole blocks and contiguous, so all of them are one long row.
            to_float(raw.ctypes.data, out.ctypes.data, rows * cols)

    def validate(self, ggml_type: int, raw: U8) -> bool:
        """ggml's own opinion on whether packed data [rows, row bytes] holds NaN or infinities."""
        info = _info(ggml_type)
        _, width = _check_matrix(raw, np.uint8, "input")
        if width % info.type_size:
            raise QuantError(f"{width} bytes are not whole {info.name} blocks")
        return bool(self.cdll.ggml_validate_row_data(ggml_type, raw.ctypes.data, raw.nbytes))

    def _init_tables(self, ggml_type: int) -> None:
        """Build the codebooks of the IQ formats once, before any thread uses them: the chunk
        function would do it itself, in every thread at the same time."""
        with self._lock:
            if ggml_type not in self._initialised:
                self.cdll.ggml_quantize_init(ggml_type)
                self._initialised.add(ggml_type)


_loaded: dict[Path, GgmlBase] = {}
_installed: GgmlBase | None = None  # finding the package again would cost a millisecond a token
_load_lock = threading.Lock()


def load(folder: Path | None = None) -> GgmlBase:
    """The checked libggml-base of `folder` (default: the installed one), loaded once.

    Raises BackendError naming what was found, what was expected and what to install.
    """
    global _installed
    if folder is None and _installed is not None:
        return _installed
    path = library_path("ggml-base", folder)
    with _load_lock:
        if path not in _loaded:
            _loaded[path] = GgmlBase(path)
        if folder is None:
            _installed = _loaded[path]
        return _loaded[path]


def library_folder() -> Path:
    """The folder of the installed libggml. Raises BackendError if there is none."""
    for package in PACKAGES:
        # find_spec does not import: llama_cpp would load and start everything it has.
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue
        folder = Path(next(iter(spec.submodule_search_locations))) / "lib"
        if not folder.is_dir():
            raise BackendError(f"the package {package} has no folder {folder}", INSTALL_HINT)
        return folder
    raise BackendError(
        f"libggml, which the packages {' and '.join(PACKAGES)} carry, is missing", INSTALL_HINT
    )


def library_path(name: str, folder: Path | None = None) -> Path:
    """Path of library `name` ("ggml-base", "ggml-cpu", ...) in `folder` or the installed one."""
    folder = library_folder() if folder is None else folder
    if sys.platform == "win32":
        file_name = f"{name}.dll"
    elif sys.platform == "darwin":
        file_name = f"lib{name}.dylib"
    else:
        file_name = f"lib{name}.so"
    path = folder / file_name
    # A wheel holds copies where a build has links. Of those the linker, and llama_cpp with it,
    # loads the one called like the SONAME; another copy would be a second ggml in the process.
    soname = path.with_name(f"{path.name}.{SONAME_VERSION}")
    if soname.is_file():
        path = soname
    if not path.is_file():
        raise BackendError(f"{path} does not exist", INSTALL_HINT)
    return path.resolve()


def open_library(path: Path) -> ctypes.CDLL:
    """dlopen with the settings all of ggml needs. Raises BackendError if it cannot be loaded."""
    # Without it an abort of ggml starts a debugger to print the stack, which can hang for minutes.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    try:
        if sys.platform == "win32":
            os.add_dll_directory(str(path.parent))
        with _short_spin():
            return ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendError(f"{path} cannot be loaded: {error}", INSTALL_HINT) from error


@contextmanager
def _short_spin() -> Iterator[None]:
    """Let OpenMP threads that libraries loaded here start spin for 0.3 ms before they sleep.

    After every graph the other threads wait for the next one. GNU's default of 5 ms keeps a core
    busy all the time that experts are waited for; no spinning at all costs 10 % of decoding. The
    runtime reads its settings once, when it is loaded; what the user has set stays.
    """
    if any(name in os.environ for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")):
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
    try:
        yield
    finally:
        os.environ.pop("GOMP_SPINCOUNT", None)


def check_version(version: str, path: Path) -> None:
    """Raises BackendError unless `version` is one whose layouts we know."""
    expected = ".".join(map(str, GGML_VERSION))
    if tuple(version.split(".")[:2]) != tuple(map(str, GGML_VERSION)):
        raise BackendError(f"{path} is ggml {version}, expected {expected}.x", INSTALL_HINT)


def _info(ggml_type: int) -> TypeInfo:
    try:
        return TYPES[ggml_type]
    except KeyError:
        raise QuantError(f"ggml type {ggml_type} is not one of {sorted(TYPES)}") from None


def _row_bytes(info: TypeInfo, cols: int) -> int:
    if cols <= 0 or cols % info.blck_size:
        raise QuantError(f"{info.name} needs a multiple of {info.blck_size} columns, got {cols}")
    return cols // info.blck_size * info.type_size


def _check_matrix(
    x: NDArray[np.float32] | NDArray[np.uint8], dtype: type[np.generic], what: str
) -> tuple[int, int]:
    if x.ndim != 2 or x.dtype != dtype or not x.flags.c_contiguous:
        raise QuantError(
            f"{what} is {x.dtype} {list(x.shape)}, not contiguous {np.dtype(dtype)} in two "
            "dimensions"
        )
    return int(x.shape[0]), int(x.shape[1])


def _check_output(
    out: NDArray[np.float32] | NDArray[np.uint8], dtype: type[np.generic], shape: tuple[int, int]
) -> None:
    _check_matrix(out, dtype, "output")
    if out.shape != shape or not out.flags.writeable:
        raise QuantError(f"output is {list(out.shape)}, not writeable {list(shape)}")


def _text(raw: bytes | None) -> str:
    return "" if raw is None else raw.decode("utf-8", "replace")
