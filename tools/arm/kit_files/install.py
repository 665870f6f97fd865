"""Install the device kit into a virtual environment: python3 install.py [FOLDER].

Needs Python's standard library and nothing else: no pip, no compiler, no network, no root. The
folder must be new; an install that fails leaves none behind.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KIT = Path(__file__).resolve().parent
MARGIN_BYTES = 16 << 20
# In a process each: a library that this processor cannot run ends the process, not the install.
CHECKS = (
    ("NumPy", "import numpy; numpy.ones((64, 64), 'f4') @ numpy.ones((64, 64), 'f4')"),
    ("Jinja", "import jinja2"),
    ("libggml", "from mimo_edge.runtimes.ggml.device import Device; Device(1).close()"),
)


class InstallError(Exception):
    """What is wrong and what to do."""


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "mimo-edge")
    try:
        manifest = json.loads((KIT / "manifest.json").read_text("utf-8"))
        check_machine(manifest)
        check_files(manifest)
        wheels = [KIT / wheel["file"] for wheel in manifest["wheels"]]
        check_room(folder, wheels)
        install(folder, wheels)
    except (InstallError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        sys.stderr.write(f"not installed: {error}\n")
        return 1
    print(f"mimo-edge {manifest['version']} is installed in {folder}: try")
    print(f"  {folder}/bin/python {KIT / 'ask.py'} BUNDLE 'turn on guest wifi for two hours'")
    return 0


def check_machine(manifest: dict[str, Any]) -> None:
    """Whether the libraries can run here at all."""
    machine, python = platform.machine(), "{}.{}".format(*sys.version_info)
    if machine != manifest["machine"]:
        raise InstallError(f"this kit is for {manifest['machine']}, this machine is {machine}")
    if python != manifest["python"] or sys.implementation.name != "cpython":
        raise InstallError(
            f"this kit is for CPython {manifest['python']}, this is {sys.implementation.name} "
            f"{python}: make one with `python -m arm.kit --python {python}`"
        )
    check_libc(manifest["libc"]["name"], manifest["libc"]["version"])


def check_libc(wanted: str, oldest: str) -> None:
    """Whether the C library is the kit's, and new enough."""
    name, version = platform.libc_ver()
    if name != "glibc":
        name, version = musl(Path("/lib"))
    if name != wanted:
        raise InstallError(f"this kit needs {wanted}, here is {name or 'another C library'}")
    if version and numbers(version) < numbers(oldest):
        raise InstallError(f"this kit needs {name} {oldest}, here is {version}")


def musl(folder: Path) -> tuple[str, str]:
    """The name and what its loader in `folder` tells of its version; "" for what is not known."""
    for loader in folder.glob("ld-musl-*.so.1"):
        try:
            done = subprocess.run([str(loader)], stderr=subprocess.PIPE, check=False, timeout=60)
        except OSError:  # the loader of another processor
            return "musl", ""
        found = re.search(rb"Version (\d+(?:\.\d+)+)", done.stderr)
        return "musl", found[1].decode() if found else ""
    return "", ""


def numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def check_files(manifest: dict[str, Any]) -> None:
    """Whether the kit is whole."""
    for name, entry in manifest["files"].items():
        data = (KIT / name).read_bytes()
        if len(data) != entry["size"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise InstallError(f"{name} is damaged: copy the kit again")


def check_room(folder: Path, wheels: Sequence[Path]) -> None:
    """Whether the folder is new and its disk has room."""
    if folder.exists():
        raise InstallError(f"{folder} exists: remove it, or name another folder")
    need = MARGIN_BYTES
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            need += sum(entry.file_size for entry in archive.infolist())
    place = folder.absolute().parent
    if not place.is_dir():
        raise InstallError(f"there is no folder {place}")
    free = shutil.disk_usage(place).free
    if free < need:
        raise InstallError(f"{place} has {free >> 20} MiB free, {need >> 20} MiB are needed")


def install(folder: Path, wheels: Sequence[Path]) -> None:
    """Make the environment, unpack, check; on any failure the folder is removed again."""
    try:
        venv.create(folder, with_pip=False, symlinks=True)
        version = "python{}.{}".format(*sys.version_info)
        site = folder / "lib" / version / "site-packages"
        for wheel in wheels:
            unpack(wheel, site)
        for name, code in CHECKS:
            check(folder, name, code)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def unpack(wheel: Path, site: Path) -> None:
    """Wheels of this kit have no scripts and no data folders: they are unpacked where they go,
    without the packages' own tests."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for name in names:
            if name.startswith("/") or ".." in name.split("/") or ".data/" in name:
                raise InstallError(f"{wheel.name} holds {name!r}, which is not unpacked")
        archive.extractall(site, [name for name in names if "/tests/" not in name])


def check(folder: Path, name: str, code: str) -> None:
    """Try a library in a process of its own."""
    done = subprocess.run(
        [str(folder / "bin" / "python"), "-c", code],
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
    )
    if done.returncode < 0:
        number = -done.returncode
        known = number in [one.value for one in signal.Signals]
        why = signal.Signals(number).name if known else f"signal {number}"
        raise InstallError(f"{name} ends by {why} on this processor")
    if done.returncode:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise InstallError(f"{name} does not work here: {' '.join(last)}")


if __name__ == "__main__":
    sys.exit(main())
