"""Everything that is checked for aarch64, on an x86-64 machine: `make test-arm`.

PYTHONPATH=tools python -m arm.test            # the whole suite under three processors: hours
PYTHONPATH=tools python -m arm.test --quick    # what CI runs: minutes
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from arm import suite
from arm.compare import bundle, same_matches, same_tokens
from arm.environment import make_environment
from arm.paths import check_programs
from arm.try_kit import try_kit

_QUICK_COMMANDS, _ALL_COMMANDS = (2, 2), (12, 40)  # compared at f32, at int4


def main() -> None:
    """Build, compare, run; ends with 1 when anything failed."""
    parser = argparse.ArgumentParser(description="Check the aarch64 build under emulation.")
    parser.add_argument("--quick", action="store_true", help="only what CI runs")
    parser.add_argument("--cpu", action="append", help="only this processor; may be repeated")
    parser.add_argument("--qemu", help="another emulator than qemu-aarch64-static (docs/arm.md)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    wanted = parser.parse_args()
    check_programs()
    if wanted.qemu:
        os.environ["MIMO_ARM_QEMU"] = str(Path(wanted.qemu).absolute())
    began = time.monotonic()
    cpus = tuple(wanted.cpu or suite.CPUS)
    python = make_environment()
    print(f"built after {time.monotonic() - began:.0f} s", flush=True)
    exact, int4 = bundle("f32"), bundle("q4_k")
    at_f32, at_int4 = _QUICK_COMMANDS if wanted.quick else _ALL_COMMANDS
    results = [
        try_kit(int4, cpus[0]),
        same_tokens(python, exact, cpus, at_f32),
        same_matches(python, int4, cpus, at_int4),
    ]
    files = list(suite.QUICK) if wanted.quick else suite.all_files()
    results += [suite.run_suite(python, cpu, files, wanted.jobs) for cpu in cpus]
    print(f"{'passed' if all(results) else 'FAILED'} after {time.monotonic() - began:.0f} s")
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
