"""The emulator for ONNX Runtime, which ends with SIGSEGV in QEMU 7.2 as soon as it is imported.

QEMU 10 runs it. It is not used for all the rest: it is slower, and cannot give a program pages of
another size than the host's.
"""

from __future__ import annotations

import os
import re
import shutil

from arm.debian import unpacked
from arm.paths import QEMU, WORK, fresh, is_made, run

ENOUGH = 10  # the major version that was tried
_RELEASE, _PACKAGE = "trixie", "qemu-user"  # Debian 13 has 10.0, linked statically


def newer_emulator() -> str:
    """An emulator of QEMU 10 or newer: the one that was asked for, the system's, or Debian 13's."""
    chosen = os.environ.get("MIMO_ARM_QEMU", QEMU)
    if shutil.which(chosen) and _major(chosen) >= ENOUGH:
        return chosen
    folder = WORK / "qemu"
    program = folder / "usr" / "bin" / "qemu-aarch64"
    key = f"{_RELEASE} {_PACKAGE}"
    if not is_made(folder / ".made", key):
        fresh(folder)
        host = run(["dpkg", "--print-architecture"], capture=True).strip()
        unpacked([_PACKAGE], folder, WORK / "apt-qemu", host, _RELEASE, alone=True)
        (folder / ".made").write_text(key, "utf-8")
    return str(program)


def _major(program: str) -> int:
    told = run([program, "--version"], capture=True)
    found = re.search(r"version (\d+)\.", told)
    return int(found[1]) if found else 0


if __name__ == "__main__":
    print(newer_emulator())
