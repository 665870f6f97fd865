"""Where the ARM tools keep what they make, and how they call other programs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
# Everything lies here, ignored by git; deleting it makes the next call begin afresh.
WORK = REPOSITORY / ".arm"
QEMU = "qemu-aarch64-static"
NEEDED = {
    QEMU: "qemu-user-static",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "cmake": "cmake",
    "dpkg": "dpkg",
}


def run(
    command: Sequence[object],
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    capture: bool = False,
) -> str:
    """Run a program (words and paths) to its end; its output when `capture`. Ends this one when it
    fails."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=None if env is None else {**os.environ, **env},
        stdout=subprocess.PIPE if capture else None,
        text=True,
        check=False,
    )
    if done.returncode:
        if done.stdout:
            sys.stderr.write(done.stdout)
        raise SystemExit(f"{command[0]} failed ({done.returncode}): {' '.join(map(str, command))}")
    return done.stdout or ""


def check_programs() -> None:
    """Ends with the command that installs what is missing."""
    missing = sorted(package for program, package in NEEDED.items() if not shutil.which(program))
    if missing:
        raise SystemExit(f"these are needed: apt-get install -y {' '.join(missing)}")


def fresh(folder: Path) -> Path:
    """An empty folder at this place."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def is_made(stamp: Path, key: str) -> bool:
    """Whether what `stamp` speaks of was finished, and with this key."""
    return stamp.is_file() and stamp.read_text("utf-8") == key
