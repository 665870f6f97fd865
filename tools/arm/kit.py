"""The device kit: one archive that installs the runtime on aarch64 Linux without compiler, root or
network.

    PYTHONPATH=tools python -m arm.kit [--python 3.11] [--out dist] [--target aarch64-linux-musl]

Same sources, same pins, same compiler: same bytes. docs/arm.md tells what is in it and why.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import sys
import tarfile
from email.message import Message
from email.parser import BytesParser
from pathlib import Path

from arm import libggml
from arm.paths import WORK, fresh, run
from arm.toolchain import GCC_TARGET, MUSL_OF_WHEELS, Toolchain
from arm.wheel import read_zip
from arm.wheels import device_wheel, full_wheel, libc, libggml_wheel
from mimo_edge.runtimes.ggml.library import BUILT_BY

_FILES = Path(__file__).with_name("kit_files")
# The releases that were tested; their wheels ask for glibc 2.28, or musl 1.2.4.
PINS = ("numpy==2.4.6", "jinja2==3.1.6", "markupsafe==3.0.4")
SCHEMA = 1


def make_kit(python: str, out: Path, full: Path, toolchain: Toolchain = libggml.GCC) -> Path:
    """Write the archive for CPython `python` ("3.11") into the folder `out`; returns its path.
    `full` is the wheel of this repository."""
    libraries = libggml.build(toolchain=toolchain)
    wheels = fresh(WORK / "kit" / "wheels")
    device = device_wheel(full, wheels)
    libggml_wheel(libraries, wheels, toolchain)
    _download(python, wheels, toolchain)
    files = {f"wheels/{path.name}": path.read_bytes() for path in sorted(wheels.glob("*.whl"))}
    files |= {path.name: path.read_bytes() for path in sorted(_FILES.iterdir()) if path.is_file()}
    for path in sorted(wheels.glob("*.whl")):
        files |= _licenses(path)
    version = device.name.split("-")[1]
    libc_name, libc_version = libc(sorted(libraries.glob("*.so*")), toolchain)
    if toolchain.is_musl:
        libc_version = MUSL_OF_WHEELS
    manifest = {
        "schema": SCHEMA,
        "version": version,
        "python": python,
        "machine": "aarch64",
        "libc": {"name": libc_name, "version": libc_version},
        "libggml": {"from": BUILT_BY, "variants": list(libggml.VARIANTS)},
        "wheels": [_about(path) for path in sorted(wheels.glob("*.whl"))],
        "files": {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in sorted(files.items())
        },
    }
    files["manifest.json"] = (json.dumps(manifest, indent=1) + "\n").encode()
    system = "aarch64-musl" if toolchain.is_musl else "aarch64"
    name = f"mimo-edge-kit-{version.partition('+')[0]}-py{python}-{system}"
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.tar.gz"
    path.write_bytes(_archive(name, files))
    return path


def _download(python: str, wheels: Path, toolchain: Toolchain) -> None:
    """The pinned wheels for this Python on aarch64."""
    run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels]
        + ["--only-binary", ":all:", "--implementation", "cp", "--python-version", python]
        + [word for platform in toolchain.platforms() for word in ("--platform", platform)]
        + list(PINS)
    )


def _about(wheel: Path) -> dict[str, str]:
    """Name, version and licence of a wheel as its metadata states them."""
    raw = next(d for n, d in read_zip(wheel).items() if n.endswith(".dist-info/METADATA"))
    metadata = BytesParser().parsebytes(raw)
    return {
        "file": f"wheels/{wheel.name}",
        "name": metadata["Name"],
        "version": metadata["Version"],
        "license": metadata["License-Expression"] or metadata["License"] or _classified(metadata),
    }


def _classified(metadata: Message) -> str:
    """The licence among the classifiers, which older packages state alone."""
    prefix = "License :: OSI Approved :: "
    lines = metadata.get_all("Classifier", [])
    found = [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]
    return " AND ".join(found) or "see licenses/"


def _licenses(wheel: Path) -> dict[str, bytes]:
    """The licence texts a wheel carries, under licenses/NAME/."""
    name = wheel.name.partition("-")[0]
    found = {}
    for path, data in read_zip(wheel).items():
        _, inside, rest = path.partition(".dist-info/")
        if inside and ("license" in rest.lower() or "copying" in rest.lower()):
            found[f"licenses/{name}/{rest.removeprefix('licenses/')}"] = data
    return found


def _archive(folder: str, files: dict[str, bytes]) -> bytes:
    """A tar.gz without times and owners."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=0, filename="") as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name, data in sorted(files.items()):
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = len(data)
            entry.mode = 0o755 if name.endswith(".sh") else 0o644
            archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


def main() -> None:
    """Make the kit and say how large it is."""
    parser = argparse.ArgumentParser(description="Make the device kit for aarch64 Linux.")
    parser.add_argument("--python", default="3.11", help="Python of the device, such as 3.11")
    parser.add_argument("--out", type=Path, default=Path("dist"))
    parser.add_argument("--target", default=GCC_TARGET, help="such as aarch64-linux-musl: by Zig")
    wanted = parser.parse_args()
    path = make_kit(wanted.python, wanted.out, full_wheel(), Toolchain(wanted.target))
    print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
