"""Wheels as deterministic zip files: the same contents give the same bytes, whoever packs them."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

_EPOCH = (1980, 1, 1, 0, 0, 0)


def read_zip(path: Path) -> dict[str, bytes]:
    """Contents by name."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name[-1] != "/"}


def write_wheel(folder: Path, tag: str, files: Mapping[str, bytes]) -> Path:
    """Pack `files`, which hold one .dist-info with METADATA, and add WHEEL and RECORD.

    `tag` is as in a wheel's name ("py3-none-any"). Returns the wheel's path.
    """
    info = next(name.partition("/")[0] for name in files if name.endswith(".dist-info/METADATA"))
    pure = "true" if tag.endswith("-any") else "false"
    packed = {
        **files,
        f"{info}/WHEEL": (
            f"Wheel-Version: 1.0\nGenerator: mimo-edge\nRoot-Is-Purelib: {pure}\nTag: {tag}\n"
        ).encode(),
    }
    packed.pop(f"{info}/RECORD", None)
    lines = [f"{name},{_digest(data)},{len(data)}" for name, data in sorted(packed.items())]
    packed[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,", ""]).encode()
    path = folder / f"{info.removesuffix('.dist-info')}-{tag}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, data in sorted(packed.items()):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = 0o100644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data, compresslevel=9)
    return path


def unpack(wheel: Path, site_packages: Path) -> None:
    """Install a wheel that has no scripts: its files where they are imported from."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site_packages)


def _digest(data: bytes) -> str:
    raw = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=")
    return f"sha256={raw.decode()}"
