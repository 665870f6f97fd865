"""Where the ARM tools keep what they make, and how they call other programs."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
# Everything lies here, ignored by git; deleting it makes the next call begin afresh.
WORK = REPOSITORY / ".arm"
QEMU = "qemu-aarch64-static"
# Of one program, since an emulator may hang. The longest, `test_onnx_nano` with SVE and SME, takes
# two hours.
TIMEOUT_S = 10_800.0
_running: set[subprocess.Popen[str]] = set()
NEEDED = {
    QEMU: "qemu-user-static",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "cmake": "cmake",
    "dpkg": "dpkg",
}


class ProgramError(SystemExit):
    """A program that was called failed or did not end: what it was and what it said."""


def run(
    command: Sequence[object],
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    capture: bool = False,
) -> str:
    """Run a program (words and paths) to its end; its output when `capture`.

    Raises ProgramError, which ends this one, when it fails.
    """
    code, told = outcome(command, cwd, env, None if capture else False)
    if code:
        raise ProgramError(f"{told}{command[0]} failed ({code}): {' '.join(map(str, command))}")
    return told


def outcome(
    command: Sequence[object],
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    errors: bool | None = True,
    timeout_s: float = TIMEOUT_S,
) -> tuple[int, str]:
    """Run a program to its end; its exit status and its output, with what it says of `errors`.

    `errors` None leaves those on the terminal, False leaves there all the output. A program that
    does not end is killed with all it started: an emulator may hang. Raises ProgramError then.
    """
    words = [str(word) for word in command]
    process = started(
        words,
        cwd,
        env,
        stdin=subprocess.DEVNULL,
        stdout=None if errors is False else subprocess.PIPE,
        stderr=subprocess.STDOUT if errors else None,
    )
    try:
        told, _ = process.communicate(timeout=timeout_s)
    except BaseException as error:
        kill(process)
        told, _ = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise ProgramError(
            f"{told or ''}{words[0]} did not end within {timeout_s:.0f} s: {' '.join(words)}"
        ) from None
    finally:
        forget(process)
    return process.returncode, told or ""


def forget(process: subprocess.Popen[str]) -> None:
    """It has ended: its number may be another's."""
    _running.discard(process)


def started(
    words: Sequence[str],
    cwd: Path | None,
    env: Mapping[str, str] | None,
    stdin: int,
    stdout: int | None,
    stderr: int | None = None,
) -> subprocess.Popen[str]:
    """A program that `kill_running` ends until `forget` is called. `env` is added to our own."""
    process = subprocess.Popen(
        words,
        cwd=cwd,
        env=None if env is None else {**os.environ, **env},
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )
    _running.add(process)
    return process


def kill_running() -> None:
    """End the programs that other threads wait for, with all they started."""
    for process in list(_running):
        kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """End a program with all it started."""
    with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
        os.killpg(process.pid, signal.SIGKILL)


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
