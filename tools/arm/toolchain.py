"""Compilers that make libraries for aarch64 here: Debian's GCC, and Zig for other C libraries.

Debian's makes what asks for Debian's own glibc and brings GNU OpenMP. The wheel `ziglang` holds a
whole cross compiler with musl and every older glibc; what it makes carries its C++ library inside,
and ggml computes with threads of its own.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from arm.paths import WORK, ProgramError

GCC_TARGET = "aarch64-linux-gnu"
_ZIG_TARGET = re.compile(r"aarch64-linux-(musl|gnu\.(2\.\d+))")
MUSL = "1.2"  # what Zig's stubs and the wheels on PyPI are made for
# NumPy's wheel brings libraries of GCC whose relocations are packed (DT_RELR). The loader of an
# older musl passes over them, and the process ends while such a library is opened.
MUSL_OF_WHEELS = "1.2.4"


@dataclass(frozen=True)
class Toolchain:
    """A target in the compilers' own words, such as "aarch64-linux-musl"."""

    target: str = GCC_TARGET

    def __post_init__(self) -> None:
        if not (self.is_gcc or _ZIG_TARGET.fullmatch(self.target)):
            raise SystemExit(
                f"{self.target}: known are {GCC_TARGET} (GCC), aarch64-linux-musl and "
                "aarch64-linux-gnu.2.28 or another glibc (Zig)"
            )

    @property
    def is_gcc(self) -> bool:
        """Whether Debian's GCC compiles, and OpenMP is used."""
        return self.target == GCC_TARGET

    @property
    def is_musl(self) -> bool:
        """Whether the C library is musl."""
        return self.target.endswith("-musl")

    @property
    def folder(self) -> str:
        """What folders of this target's files end with."""
        return "" if self.is_gcc else f"-{self.target}"

    def options(self) -> dict[str, str]:
        """What CMake is told of it."""
        if self.is_gcc:
            programs = {"C": f"{GCC_TARGET}-gcc", "CXX": f"{GCC_TARGET}-g++"}
            more = {}
        else:
            place = _zig_programs(self.target)
            programs = {"C": str(place / "cc"), "CXX": str(place / "c++")}
            more = {"CMAKE_AR": str(place / "ar"), "CMAKE_RANLIB": str(place / "ranlib")}
        named = {f"CMAKE_{language}_COMPILER": path for language, path in programs.items()}
        return {**named, **more, "GGML_OPENMP": "ON" if self.is_gcc else "OFF"}

    def platforms(self) -> list[str]:
        """Tags of wheels that load on such a system, newest first."""
        if self.is_musl:
            return ["musllinux_1_2_aarch64", "musllinux_1_1_aarch64"]
        newest = 28 if self.is_gcc else int(self.target.rpartition(".")[2])
        minors = [minor for minor in (28, 27, 17) if minor <= newest]
        return [*(f"manylinux_2_{minor}_aarch64" for minor in minors), "manylinux2014_aarch64"]

    def licenses(self) -> dict[str, bytes]:
        """Licence texts of what the compiler puts into the libraries or beside them."""
        if self.is_gcc:
            text = Path("/usr/share/doc/libgomp1-arm64-cross/copyright")
            return {"LICENSE.libgomp": text.read_bytes()}
        names = ("libcxx", "libcxxabi", "libunwind")
        found = {n: _zig_package() / "lib" / n / "LICENSE.TXT" for n in names}
        return {f"LICENSE.{name}": path.read_bytes() for name, path in found.items()}

    def license_expression(self) -> str:
        """Licence of ggml together with those."""
        own = "GPL-3.0-or-later WITH GCC-exception-3.1"
        return f"MIT AND {own if self.is_gcc else 'Apache-2.0 WITH LLVM-exception'}"


def _zig_package() -> Path:
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        raise ProgramError("this target is compiled by Zig: pip install ziglang")
    return Path(spec.origin).parent


# Zig names processors where GCC names architectures: -march=armv8.2-a+dotprod+fp16.
_ZIG_PROGRAM = """#!/bin/sh
export ZIG_GLOBAL_CACHE_DIR={cache} ZIG_LOCAL_CACHE_DIR={cache}
for word do
    shift
    case $word in
        -march=armv8-a) word=-mcpu=generic ;;
        -march=armv*) word=$(echo "$word" | sed \\
            's/-march=armv\\(.*\\)[.]\\(.*\\)-a/-mcpu=generic+v\\1_\\2a/; s/+fp16/+fullfp16/') ;;
    esac
    set -- "$@" "$word"
done
exec {python} -m ziglang {aimed} "$@"
"""


def _zig_programs(target: str) -> Path:
    """A folder with `cc`, `c++`, `ar` and `ranlib`: CMake wants a program's name, not a command."""
    _zig_package()
    place = WORK / "zig" / target
    place.mkdir(parents=True, exist_ok=True)
    cache = WORK / "zig" / "cache"
    for name in ("cc", "c++", "ar", "ranlib"):
        aimed = f"{name} -target {target}" if name in ("cc", "c++") else name
        program = _ZIG_PROGRAM.format(cache=cache, python=sys.executable, aimed=aimed)
        (place / name).write_text(program, "utf-8")
        (place / name).chmod(0o755)
    return place
