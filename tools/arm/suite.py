"""The test suite under the emulator, and which part of it runs there."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from arm.paths import REPOSITORY, WORK

# ARMv8.0; dotprod and fp16; i8mm and SVE2 with vectors of 128 bits, as phones have.
MAX = "max,sve-default-vector-length=16"
CPUS = ("cortex-a53", "cortex-a76", MAX)
# The quick part: what most depends on the processor, the C library or the kernel.
QUICK = (
    "test_cpu_library", "test_ggml_library", "test_ggml_graph", "test_native_library",
    "test_quant_base", "test_limits", "test_runtime_alone",
)  # fmt: skip
# Pages of 64 KiB and 39 bits of address space, as some kernels for ARM give them. Emulators from
# QEMU 9 on know only the host's pages.
SMALL_SYSTEM = {"QEMU_PAGESIZE": "65536", "QEMU_RESERVED_VA": hex(1 << 39)}
ON_SMALL_SYSTEM = ("test_limits", "test_kv_cache", "test_runtime_alone")
# Files that cannot run, or say nothing of the processor there, and why.
EXCLUDED = {
    "test_bench": "memory caps need the host's cgroups",
    "test_cli_page": "help texts, the same everywhere",
    "test_export_onnx": "needs onnx and onnxruntime: docs/arm.md",
    "test_onnx_backend": "needs onnx and onnxruntime: docs/arm.md",
    "test_oracle_llamacpp": "needs llama-cpp-python",
    "test_oracle_transformers": "needs torch",
    "test_packaging": "looks at the source tree, not at the wheel",
}
# Tests that say nothing of the processor there, and why.
_HARD = "test_quant_formats.py::test_bytes_equal_ggml_on_hard_cases"
DESELECTED = {
    f"{_HARD}[Q4_0]": "blocks below 1e-38: their scale is 0, and C leaves open what the codes are",
    f"{_HARD}[Q8_0]": "the same",
    "test_ggml_graph.py::test_regions_cost_nothing_until_touched": "the emulator's own page tables",
}


def command_line(python: Path, files: Sequence[str]) -> list[str]:
    """pytest on these files, without what is slow or needs torch."""
    tests = [str(REPOSITORY / "tests" / f"{name}.py") for name in files]
    return [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider",
            "-m", "not slow and not oracle", *tests,
            *(f"--deselect=tests/{name}" for name in DESELECTED)]  # fmt: skip


def run_suite(
    python: Path,
    cpu: str,
    files: Sequence[str],
    jobs: int,
    settings: Mapping[str, str] = MappingProxyType({}),
) -> bool:
    """Run `files` under the processor `cpu`, in `jobs` processes; whether everything passed.
    `settings` are more of the emulator's."""
    began = time.monotonic()
    env = {
        **os.environ,
        "QEMU_CPU": cpu,
        "PYTHONPYCACHEPREFIX": str(WORK / "pycache"),
        "GGML_NO_BACKTRACE": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        **settings,
    }
    groups = [files[start::jobs] for start in range(jobs)]
    running = [
        subprocess.Popen(command_line(python, group), cwd=REPOSITORY, env=env)
        for group in groups
        if group
    ]
    # pytest ends with 5 where every test of a group is left out.
    failed = sum(process.wait() not in (0, 5) for process in running)
    where = " ".join([cpu, *settings.values()])
    verdict = "FAILED" if failed else "passed"
    seconds = time.monotonic() - began
    print(f"{where}: {len(files)} files, {verdict}, {seconds:.0f} s", flush=True)
    return not failed


def all_files() -> list[str]:
    """Every test file that runs under the emulator."""
    found = (path.stem for path in sorted((REPOSITORY / "tests").glob("test_*.py")))
    return [name for name in found if name not in EXCLUDED]
