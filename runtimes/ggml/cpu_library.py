"""Which libggml-cpu computes: the one there is, or the best variant this processor runs.

A device kit holds several, `libggml-cpu-VARIANT`, each compiled for one set of vector extensions.
Every one of them tells by `ggml_backend_score` how well it suits the processor: 0 where something
is missing that it was compiled for, else more the more it uses. That function, and what runs when
such a library is loaded, is compiled without extensions. The best score wins, as in ggml itself.

A library compiled for more than the processor has would end the process by an illegal instruction
in the middle of a graph: `check_features` refuses it before anything is computed.
"""

from __future__ import annotations

import _ctypes
import ctypes
from pathlib import Path

from mimo_edge import machine
from mimo_edge.errors import BackendError
from mimo_edge.runtimes.ggml import library

_PREFIX = "libggml-cpu-"
# What a library says it was compiled for, and how device profiles name that.
_FEATURES = {
    "ggml_cpu_has_neon": "neon",
    "ggml_cpu_has_fp16_va": "fp16",
    "ggml_cpu_has_dotprod": "dotprod",
    "ggml_cpu_has_matmul_int8": "i8mm",
    "ggml_cpu_has_sve": "sve",
    "ggml_cpu_has_sme": "sme",
    "ggml_cpu_has_avx": "avx",
    "ggml_cpu_has_avx2": "avx2",
    "ggml_cpu_has_fma": "fma",
    "ggml_cpu_has_f16c": "f16c",
    "ggml_cpu_has_avx512": "avx512",
    "ggml_cpu_has_avx512_vnni": "avx512-vnni",
    "ggml_cpu_has_avx_vnni": "avx-vnni",
    "ggml_cpu_has_amx_int8": "amx-int8",
}


def cpu_library(folder: Path | None = None) -> Path:
    """Path of the libggml-cpu to use in `folder` (default: the installed one).

    libggml-base must be loaded already. Raises BackendError when there is none, or none that runs
    here.
    """
    place = library.library_folder() if folder is None else folder
    variants = sorted(place.glob(f"{_PREFIX}*.so"))
    if not variants:
        return library.library_path("ggml-cpu", place)
    scores = {path: _score(path) for path in variants}
    best = max(variants, key=lambda path: scores[path])
    if not scores[best]:
        raise BackendError(
            f"none of {', '.join(map(variant_name, variants))} in {place} runs on this processor "
            f"({', '.join(machine.isa_flags()) or 'no known extensions'})",
            "build libggml on the device: docs/arm.md says how",
        )
    return best


def variant_name(path: Path) -> str:
    """The variant of a kit's library, such as "armv8.2_2"; "" for a library without variants."""
    name = path.name
    return name[len(_PREFIX) : -len(".so")] if name.startswith(_PREFIX) else ""


def _score(path: Path) -> int:
    """How well the variant suits this processor, 0: not at all. It is unloaded again."""
    loaded = library.open_library(path)
    try:
        return int(loaded.ggml_backend_score())
    except AttributeError:
        raise BackendError(
            f"{path} has no function ggml_backend_score",
            "it was not built with GGML_CPU_ALL_VARIANTS: make the kit again",
        ) from None
    finally:
        _ctypes.dlclose(loaded._handle)


def compiled_features(cpu: ctypes.CDLL) -> tuple[str, ...]:
    """The vector extensions a libggml-cpu was compiled for, as device profiles name them."""
    found = []
    for function, name in _FEATURES.items():
        try:
            if getattr(cpu, function)():
                found.append(name)
        except AttributeError:  # a newer or older patch release
            continue
    return tuple(found)


def check_features(cpu: ctypes.CDLL, path: Path) -> tuple[str, ...]:
    """What the library was compiled for. Raises BackendError when the processor lacks any of it."""
    compiled, present = compiled_features(cpu), machine.isa_flags()
    missing = [name for name in compiled if name not in present]
    if missing and present:  # a system that does not tell what it has is believed to have it
        raise BackendError(
            f"{path} was compiled for {', '.join(missing)}, which this processor does not have "
            f"(it has {', '.join(present)})",
            "build llama-cpp-python on this machine, or install the device kit (docs/arm.md)",
        )
    return compiled
