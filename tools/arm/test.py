"""Everything that is checked for aarch64, on an x86-64 machine: `make test-arm`.

PYTHONPATH=tools python -m arm.test                # the whole suite under three processors: hours
PYTHONPATH=tools python -m arm.test --quick        # a part of it: minutes
PYTHONPATH=tools python -m arm.test --minutes 30   # begin no check after 30 minutes

What passed is kept in .arm/progress.jsonl; the next call goes on from there.
"""

from __future__ import annotations

import argparse
import functools
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from arm.checks import Check, Progress, digest, run_checks
from arm.compare import (
    CPUS,
    WIDE,
    answer_check,
    bundle,
    by_onnx_runtime,
    comparisons,
    session_checks,
)
from arm.environment import make_environment, with_onnx
from arm.main_job import main_job_check
from arm.paths import REPOSITORY, WORK, check_programs
from arm.suite import (
    LAST,
    ON_ONNX,
    ON_SMALL_SYSTEM,
    QUICK,
    QUICK_ON_ONNX,
    SMALL_SYSTEMS,
    Suite,
    all_but_last,
)
from arm.try_kit import try_kit
from arm.wheels import full_wheel

_QUICK_COMMANDS, _WIDE_COMMANDS, _ALL_COMMANDS = (2, 4), (1, 1), (12, 60)  # at f32, at int4
_QUICK_BY_ONNX, _ALL_BY_ONNX = 2, 12
_UNFINISHED = 3


def main() -> None:
    """Build, compare, run; ends with 1 when anything failed, with 3 when time was short."""
    parser = argparse.ArgumentParser(description="Check the aarch64 build under emulation.")
    parser.add_argument("--quick", action="store_true", help="only the part that takes minutes")
    parser.add_argument("--cpu", action="append", help="only this processor; may be repeated")
    parser.add_argument("--only", action="append", help="only checks with this in their name")
    parser.add_argument("--minutes", type=float, help="begin no check after so many")
    parser.add_argument("--afresh", action="store_true", help="also what passed before")
    parser.add_argument("--qemu", help="another emulator than qemu-aarch64-static (docs/arm.md)")
    parser.add_argument("--no-onnx", action="store_true", help="nothing of ONNX Runtime")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    wanted = parser.parse_args()
    check_programs()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if wanted.qemu:
        os.environ["MIMO_ARM_QEMU"] = str(Path(wanted.qemu).absolute())
    began = time.monotonic()
    full = full_wheel()
    suite = Suite(make_environment(full))
    print(f"built after {time.monotonic() - began:.0f} s", flush=True)
    progress_file = WORK / "progress.jsonl"
    if wanted.afresh:
        progress_file.unlink(missing_ok=True)
    chosen = [
        check
        for check in all_checks(suite, full, wanted.quick, wanted.cpu, not wanted.no_onnx)
        if not wanted.only or any(word in check.name for word in wanted.only)
    ]
    left_s = None if wanted.minutes is None else began + wanted.minutes * 60 - time.monotonic()
    try:
        result = run_checks(chosen, wanted.jobs, Progress(progress_file), left_s)
    finally:
        suite.close()
    print(f"{result.passed} checks passed, {result.failed} failed, {result.left} not begun "
          f"after {time.monotonic() - began:.0f} s", flush=True)  # fmt: skip
    sys.exit(1 if result.failed else _UNFINISHED if result.left else 0)


def all_checks(
    suite: Suite, full: Path, quick: bool, only: list[str] | None, onnx: bool
) -> Iterator[Check]:
    """What is to be checked, in this order."""
    exact, int4 = bundle("f32"), bundle("q4_k")
    python, state = suite.python, suite.state
    compared = only or (CPUS if quick else [*CPUS, *WIDE])
    whole = compared[:1] if quick else [cpu for cpu in compared if only or cpu in CPUS]
    kit_state = digest(state, *(path.read_bytes() for path in _kit_sources()))
    run_kit = functools.partial(try_kit, full, int4, compared[0])
    yield Check(compared[0], "device kit", kit_state, run_kit)
    for cpu in compared:
        wanted = _QUICK_COMMANDS if quick else _WIDE_COMMANDS if cpu in WIDE else _ALL_COMMANDS
        at_f32, at_int4 = comparisons(*wanted)
        yield answer_check(python, exact, cpu, at_f32, state)
        yield answer_check(python, int4, cpu, at_int4, state)
    for cpu in whole:
        yield main_job_check(python, cpu, state)
        yield from session_checks(python, exact, int4, cpu, state)
    if CPUS[0] in compared:
        for small in SMALL_SYSTEMS[: 1 if quick else None]:
            yield from suite.checks(CPUS[0], ON_SMALL_SYSTEM, small, " ".join(small.values()))
    for cpu in whole:
        yield from suite.checks(cpu, QUICK if quick else all_but_last())
    if onnx:
        yield from _onnx_checks(suite, whole, quick)
    for cpu in () if quick else whole:
        yield from suite.checks(cpu, LAST)


def _onnx_checks(suite: Suite, cpus: Sequence[str], quick: bool) -> Iterator[Check]:
    """The other backend, on ONNX Runtime."""
    model, settings = bundle("q4_k", "onnx"), with_onnx()
    wanted = by_onnx_runtime(_QUICK_BY_ONNX if quick else _ALL_BY_ONNX)
    for cpu in cpus:
        yield answer_check(suite.python, model, cpu, wanted, suite.state, settings)
        files = QUICK_ON_ONNX if quick else ON_ONNX
        yield from suite.checks(cpu, files, settings, "ONNX Runtime")


def _kit_sources() -> list[Path]:
    return [path for path in sorted((REPOSITORY / "tools" / "arm").rglob("*")) if path.is_file()
            and path.suffix != ".pyc"]  # fmt: skip


if __name__ == "__main__":
    main()
