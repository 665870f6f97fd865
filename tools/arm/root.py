"""A root of Debian's arm64 packages in a folder, and a `python3` in it that the emulator runs.

apt resolves and downloads into folders of its own, dpkg unpacks; nothing is installed and no
privilege is needed. The interpreter is replaced by a script that calls the emulator with it, so
that programs which start Python again (tests, venv, pip) come back here without binfmt_misc.
"""

from __future__ import annotations

from pathlib import Path

from arm.paths import QEMU, WORK, fresh, is_made, run

ROOT = WORK / "root"
PACKAGES = ("python3", "libstdc++6", "libgomp1")
# The system's own Debian sources, without what else was added to it.
_SOURCES = ("/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list")
_WRAPPER = """#!/bin/sh
# QEMU_CPU names the processor. Absolute paths of libraries are looked for in the root first.
exec "${{MIMO_ARM_QEMU:-{qemu}}}" -L {root} -0 "$0" {elf} "$@"
"""


def make_root() -> Path:
    """The interpreter's path in the root, which is made when it is not there."""
    stamp, key = ROOT / ".made", " ".join((_WRAPPER, *PACKAGES))
    if not is_made(stamp, key):
        fresh(ROOT)
        for package in _downloaded():
            run(["dpkg", "-x", package, ROOT])
        _wrap()
        stamp.write_text(key, "utf-8")
    return interpreter()


def interpreter() -> Path:
    """The Python of the root, by its version's name."""
    return (ROOT / "usr" / "bin" / "python3").resolve()


def _downloaded() -> list[Path]:
    """The packages and what they depend on, as files."""
    place = WORK / "apt"
    (place / "state" / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    archives = fresh(place / "cache" / "archives")
    (archives / "partial").mkdir()
    (place / "state" / "status").touch()
    source = next(name for name in _SOURCES if Path(name).is_file())
    options = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "",
        "Acquire::Retries": "5",
        "Acquire::http::Timeout": "60",
        "Acquire::https::Timeout": "60",
        "Debug::NoLocking": "1",
        "Dir::Etc::sourcelist": source,
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State": str(place / "state"),
        "Dir::State::status": str(place / "state" / "status"),
        "Dir::Cache": str(place / "cache"),
    }
    apt = ["apt-get", "-qq", *(f"-o{key}={value}" for key, value in options.items())]
    run([*apt, "update"])
    run([*apt, "install", "-y", "--no-install-recommends", "--download-only", *PACKAGES])
    return sorted(archives.glob("*.deb"))


def _wrap() -> None:
    """Put the script in the interpreter's place."""
    python = interpreter()
    elf = python.with_name(f"{python.name}.elf")
    python.rename(elf)
    python.write_text(_WRAPPER.format(qemu=QEMU, root=ROOT, elf=elf), "utf-8")
    python.chmod(0o755)


if __name__ == "__main__":
    print(make_root())
