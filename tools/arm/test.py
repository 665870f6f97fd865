"""Everything that is checked for aarch64, on an x86-64 machine: `make test-arm`.

PYTHONPATH=tools python -m arm.test            # the whole suite under three processors: hours
PYTHONPATH=tools python -m arm.test --quick    # a part of it: minutes
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from arm import suite
from arm.compare import bundle, same_matches, same_sessions, same_tokens
from arm.environment import make_environment
from arm.paths import check_programs
from arm.try_kit import try_kit

_QUICK_COMMANDS, _ALL_COMMANDS = (2, 4), (12, 60)  # compared at f32, at int4


def main() -> None:
    """Build, compare, run; ends with 1 when anything failed."""
    parser = argparse.ArgumentParser(description="Check the aarch64 build under emulation.")
    parser.add_argument("--quick", action="store_true", help="only the part that takes minutes")
    parser.add_argument("--cpu", action="append", help="only this processor; may be repeated")
    parser.add_argument("--qemu", help="another emulator than qemu-aarch64-static (docs/arm.md)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    wanted = parser.parse_args()
    check_programs()
    if wanted.qemu:
        os.environ["MIMO_ARM_QEMU"] = str(Path(wanted.qemu).absolute())
    began = time.monotonic()
    # SVE is emulated many times slower than NEON: too slowly for the quick part.
    quick = tuple(cpu for cpu in suite.CPUS if cpu != suite.MAX)
    cpus = tuple(wanted.cpu or (quick if wanted.quick else suite.CPUS))
    python = make_environment()
    print(f"built after {time.monotonic() - began:.0f} s", flush=True)
    exact, int4 = bundle("f32"), bundle("q4_k")
    at_f32, at_int4 = _QUICK_COMMANDS if wanted.quick else _ALL_COMMANDS
    results = [
        try_kit(int4, cpus[0]),
        same_sessions(python, exact, cpus[0]),
        same_tokens(python, exact, cpus, at_f32, wanted.jobs),
        same_matches(python, int4, cpus, at_int4, wanted.jobs),
    ]
    files = list(suite.QUICK) if wanted.quick else suite.all_files()
    suites = cpus[:1] if wanted.quick else cpus
    results += [suite.run_suite(python, cpu, files, wanted.jobs) for cpu in suites]
    small = suite.SMALL_SYSTEM
    results.append(suite.run_suite(python, cpus[0], suite.ON_SMALL_SYSTEM, wanted.jobs, small))
    print(f"{'passed' if all(results) else 'FAILED'} after {time.monotonic() - began:.0f} s")
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
