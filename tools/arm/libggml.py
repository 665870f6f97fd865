"""libggml for aarch64, compiled here from the sources that llama-cpp-python carries.

One libggml-base and one libggml-cpu for each variant: ggml's own list (GGML_CPU_ALL_VARIANTS),
from ARMv8.0 to SVE2, as far as the compiler knows the extensions. Which of them computes is
decided on the device (runtimes/ggml/cpu_library.py).

    PYTHONPATH=tools python -m arm.libggml                       # all variants
    PYTHONPATH=tools python -m arm.libggml armv8.0_1 armv8.2_2   # only these
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from arm.paths import WORK, check_programs, fresh, is_made, run
from mimo_edge.runtimes.ggml.library import BUILT_BY

# SME needs a newer compiler than Debian 12 has; processors with it run the SVE2 variant.
VARIANTS = ("armv8.0_1", "armv8.2_1", "armv8.2_2", "armv8.2_3", "armv8.6_1", "armv8.6_2")
_PREFIX = "aarch64-linux-gnu"
# Unique symbols would keep a library loaded that was only asked for its score.
_COMPILE = "-fno-gnu-unique -ffile-prefix-map={source}=ggml"
_LINK = "-Wl,-rpath,$ORIGIN -Wl,-s"
_OPTIONS = {
    "CMAKE_SYSTEM_NAME": "Linux",
    "CMAKE_SYSTEM_PROCESSOR": "aarch64",
    "CMAKE_C_COMPILER": f"{_PREFIX}-gcc",
    "CMAKE_CXX_COMPILER": f"{_PREFIX}-g++",
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "GGML_NATIVE": "OFF",
    "GGML_BACKEND_DL": "ON",
    "GGML_CPU_ALL_VARIANTS": "ON",
    "GGML_LLAMAFILE": "ON",
    "GGML_CCACHE": "OFF",
    "GGML_BUILD_TESTS": "OFF",
    "GGML_BUILD_EXAMPLES": "OFF",
    "CMAKE_SHARED_LINKER_FLAGS": _LINK,
    "CMAKE_MODULE_LINKER_FLAGS": _LINK,
}


def source() -> Path:
    """The folder of ggml's sources, with llama.cpp's licence beside it."""
    folder = WORK / "source" / BUILT_BY
    if not is_made(folder / ".made", BUILT_BY):
        fresh(folder)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        run([*pip, "--no-binary", ":all:", "--dest", folder, BUILT_BY])
        with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
            for member in archive:
                _, _, name = member.name.partition("/vendor/llama.cpp/")
                if name == "LICENSE" or name.startswith(("ggml/", "cmake/")):
                    member.name = name
                    archive.extract(member, folder, filter="data")
        (folder / "ggml" / "ggml.pc.in").touch()  # wanted by cmake, of no use, not in the archive
        (folder / ".made").write_text(BUILT_BY, "utf-8")
    return folder


def build(variants: Sequence[str] = VARIANTS) -> Path:
    """The folder of the finished libraries; what is there already is not compiled again."""
    check_programs()
    place = source()
    work, out = WORK / "ggml", WORK / "libggml"
    flags = _COMPILE.format(source=place)
    options = {**_OPTIONS, "CMAKE_C_FLAGS": flags, "CMAKE_CXX_FLAGS": flags}
    key = f"{place} {options}"
    if not is_made(work / ".configured", key):
        fresh(work)
        fresh(out)
        run(
            ["cmake", "-S", place / "ggml", "-B", work, "-Wno-dev", "--log-level=ERROR"]
            + [f"-D{name}={value}" for name, value in options.items()],
            env={"CFLAGS": "", "CXXFLAGS": ""},  # what suits the compiler of this machine
            capture=True,
        )
        (work / ".configured").write_text(key, "utf-8")
    names = ["ggml-base", *(f"ggml-cpu-{variant}" for variant in variants)]
    wanted = {out / f"lib{name}.so": f"lib{name}.so" for name in names}
    wanted[out / "libggml-base.so.0"] = wanted.pop(out / "libggml-base.so")
    if not all(path.is_file() for path in wanted):
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        print(f"compiling libggml: {', '.join(variants)}", flush=True)
        run(["cmake", "--build", work, "--parallel", jobs, "--target", *names], capture=True)
        for path, name in wanted.items():
            shutil.copy(next(work.rglob(name)).resolve(), path)
        # Systems without a compiler often have no OpenMP either.
        shutil.copy(Path(f"/usr/{_PREFIX}/lib/libgomp.so.1").resolve(), out / "libgomp.so.1")
    return out


if __name__ == "__main__":
    print(build(sys.argv[1:] or VARIANTS))
