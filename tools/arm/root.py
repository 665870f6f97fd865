"""A root of Debian's arm64 packages in a folder, and a `python3` in it that the emulator runs.

The interpreter is replaced by a script that calls the emulator with it, so that programs which
start Python again (tests, venv, pip) come back here without binfmt_misc.
"""

from __future__ import annotations

from pathlib import Path

from arm.debian import unpacked
from arm.paths import QEMU, WORK, fresh, is_made

ROOT = WORK / "root"
PACKAGES = ("python3", "libstdc++6", "libgomp1")
_WRAPPER = """#!/bin/sh
# QEMU_CPU names the processor. Absolute paths of libraries are looked for in the root first.
exec "${{MIMO_ARM_QEMU:-{qemu}}}" -L {root} -0 "$0" {elf} "$@"
"""


def make_root() -> Path:
    """The interpreter's path in the root, which is made when it is not there."""
    stamp, key = ROOT / ".made", " ".join((_WRAPPER, *PACKAGES))
    if not is_made(stamp, key):
        fresh(ROOT)
        unpacked(PACKAGES, ROOT, WORK / "apt", "arm64")
        _wrap()
        stamp.write_text(key, "utf-8")
    return interpreter()


def interpreter() -> Path:
    """The Python of the root, by its version's name."""
    return (ROOT / "usr" / "bin" / "python3").resolve()


def _wrap() -> None:
    """Put the script in the interpreter's place."""
    python = interpreter()
    elf = python.with_name(f"{python.name}.elf")
    python.rename(elf)
    python.write_text(_WRAPPER.format(qemu=QEMU, root=ROOT, elf=elf), "utf-8")
    python.chmod(0o755)


if __name__ == "__main__":
    print(make_root())
