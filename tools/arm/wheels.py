"""Our own wheels for a device: the package without its built-in model, and libggml."""

from __future__ import annotations

import re
import sys
from email.message import Message
from email.parser import BytesParser
from pathlib import Path

from arm import libggml
from arm.paths import REPOSITORY, WORK, fresh, run
from arm.wheel import read_zip, write_wheel
from mimo_edge.runtimes.ggml import library

# What a device imports; the rest of our dependencies export, show and measure.
RUNTIME = ("numpy", "jinja2")
LIBGGML = "mimo_edge_libggml"
_BUILT_IN = "mimo_edge/nano/checkpoint/"
_DEVICE = "device"  # the local version that tells this wheel from the full one
_OPENMP_LICENSE = Path("/usr/share/doc/libgomp1-arm64-cross/copyright")


def full_wheel(folder: Path = WORK / "dist") -> Path:
    """The wheel of this working tree, by way of a source distribution; what else was in `folder`
    is gone."""
    out = fresh(folder)
    run([sys.executable, "-m", "build", "--outdir", out, REPOSITORY], capture=True)
    return next(out.glob("*.whl"))


def device_wheel(full: Path, out: Path) -> Path:
    """The full wheel without mimo-nano's weights, and with the runtime's requirements alone."""
    files = read_zip(full)
    info = next(name for name in files if name.endswith(".dist-info/METADATA")).partition("/")[0]
    metadata = BytesParser().parsebytes(files[f"{info}/METADATA"])
    version = f"{metadata['Version']}+{_DEVICE}"
    _device_metadata(metadata, version)
    renamed = f"mimo_edge-{version}.dist-info"
    kept = {
        name.replace(info, renamed): data
        for name, data in files.items()
        if not (name.startswith(_BUILT_IN) and name.endswith(".safetensors"))
        and name != f"{info}/entry_points.txt"
    }
    kept[f"{renamed}/METADATA"] = metadata.as_bytes()
    return write_wheel(out, "py3-none-any", kept)


def _device_metadata(metadata: Message, version: str) -> None:
    """Version and requirements of the device's wheel; its extras need the full one."""
    bounds = {
        re.split(r"[^\w-]", text, maxsplit=1)[0]: text
        for text in metadata.get_all("Requires-Dist", [])
        if "extra ==" not in text
    }
    for key in ("Requires-Dist", "Provides-Extra", "Version"):
        del metadata[key]
    metadata["Version"] = version
    for name in RUNTIME:
        metadata["Requires-Dist"] = bounds[name]
    metadata["Requires-Dist"] = LIBGGML


def libggml_wheel(libraries: Path, out: Path) -> Path:
    """A wheel of the libraries in `libraries`: the package `mimo_edge_libggml`."""
    paths = sorted(libraries.glob("*.so*"))
    glibc = needed(paths, "GLIBC")
    version = _version()
    info = f"{LIBGGML}-{version}.dist-info"
    files = {f"{LIBGGML}/lib/{path.name}": path.read_bytes() for path in paths}
    files[f"{LIBGGML}/__init__.py"] = (
        f'"""libggml {version} for aarch64, from {library.BUILT_BY}; found by mimo_edge."""\n'
    ).encode()
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.4\nName: {LIBGGML}\nVersion: {version}\n"
        "Summary: libggml with a variant for every ARMv8 and ARMv9 core\n"
        "License-Expression: MIT AND GPL-3.0-or-later WITH GCC-exception-3.1\n"
        "License-File: LICENSE.ggml\nLicense-File: LICENSE.libgomp\n"
    ).encode()
    files[f"{info}/licenses/LICENSE.ggml"] = (libggml.source() / "LICENSE").read_bytes()
    files[f"{info}/licenses/LICENSE.libgomp"] = _OPENMP_LICENSE.read_bytes()
    return write_wheel(out, f"py3-none-manylinux_{glibc.replace('.', '_')}_aarch64", files)


def needed(paths: list[Path], name: str) -> str:
    """The newest version of a library's symbols ("GLIBC", "GLIBCXX") that the libraries ask for."""
    text = run(["aarch64-linux-gnu-objdump", "-T", *paths], capture=True)
    found = re.findall(rf"\b{name}_(\d+(?:\.\d+)+)", text)
    numbers = max([int(part) for part in version.split(".")] for version in found)
    return ".".join(map(str, numbers))


def _version() -> str:
    """ggml's version, from the sources the libraries are built from."""
    text = (libggml.source() / "ggml" / "CMakeLists.txt").read_text("utf-8")
    parts = (
        re.search(rf"set\(GGML_VERSION_{part} (\d+)\)", text)
        for part in ("MAJOR", "MINOR", "PATCH")
    )
    return ".".join(part[1] for part in parts if part)
