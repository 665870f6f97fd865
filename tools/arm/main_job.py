"""The README's main job, `make demo`, under the emulator: export mimo-nano there, ask it there."""

from __future__ import annotations

import functools
import hashlib
import shutil
import sys
from pathlib import Path

from arm.checks import Check, Outcome, digest
from arm.paths import WORK, run

COMMANDS = ("turn on guest wifi for two hours", "把客厅的灯调暗一点")


def main_job_check(python: Path, cpu: str, state: bytes) -> Check:
    """`mimo-edge export` and `mimo-edge run` under `cpu` against the same on this machine."""
    run_it = functools.partial(_compare, python, cpu)
    return Check(cpu, "main job", digest(state, *(text.encode() for text in COMMANDS)), run_it)


def _compare(python: Path, cpu: str) -> Outcome:
    want, files_here = _demo(Path(sys.executable), {}, WORK / f"demo-{cpu}-here")
    found, files_there = _demo(python, {"QEMU_CPU": cpu}, WORK / f"demo-{cpu}-there")
    same = sorted(name for name in files_here if files_there.get(name) == files_here[name])
    other = sorted({*files_here, *files_there} - set(same))
    told = f"answered {found}, wanted {want}; files with the same bytes: {', '.join(same)}"
    return Outcome(
        all(want) and found == want,
        f"{told}; with others: {', '.join(other)}" if other else told,
    )


def _demo(python: Path, env: dict[str, str], bundle: Path) -> tuple[list[str], dict[str, str]]:
    """What is printed for each command, and the sha256 of every file of the bundle."""
    shutil.rmtree(bundle, ignore_errors=True)
    run([python, "-m", "mimo_edge", "export", "mimo-nano", bundle], env=env, capture=True)
    answers = [
        run([python, "-m", "mimo_edge", "run", bundle, "-p", text], env=env, capture=True).strip()
        for text in COMMANDS
    ]
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in bundle.iterdir()}
    shutil.rmtree(bundle)
    return answers, files
