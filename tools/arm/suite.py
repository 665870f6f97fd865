"""The test suite under the emulator, and which part of it runs there."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from arm.checks import Check, Outcome, digest
from arm.forks import Forks
from arm.paths import REPOSITORY, WORK

# The quick part: what most depends on the processor, the C library or the kernel.
QUICK = (
    "test_cpu_library", "test_ggml_library", "test_ggml_graph", "test_native_library",
    "test_quant_base", "test_limits", "test_runtime_alone", "test_ggml_masks", "test_row_counts",
    "test_recent_rows", "test_kv_cache", "test_engine", "test_ggml_backend_models",
    "test_experts_cache", "test_experts_ggml", "test_row_reader", "test_gguf_file",
    "test_safetensors_file", "test_damaged_weights", "test_quant_formats", "test_quant_mxfp4",
    "test_fp8", "test_checkpoint", "test_chat_template", "test_reference_golden", "test_sampling",
    "test_fork",
)  # fmt: skip
QUICK_ON_ONNX = ("test_onnx_experts",)
# 39 bits of address space and pages of 64 KiB, as some kernels for ARM give them, or of 16 KiB, as
# newer phones have them. Emulators from QEMU 9 on know only the host's pages. On the first
# processor alone: of a large page that is partly behind a file's end QEMU maps no more than the
# host's pages, where a system has zeroes, and the libggml for SVE2 has tables there.
SMALL_SYSTEMS = (
    {"QEMU_PAGESIZE": "65536", "QEMU_RESERVED_VA": hex(1 << 39)},
    {"QEMU_PAGESIZE": "16384", "QEMU_RESERVED_VA": hex(1 << 39)},
)
ON_SMALL_SYSTEM = ("test_limits", "test_kv_cache", "test_runtime_alone")
# What needs onnxruntime, and with it another emulator (emulator.py).
ON_ONNX = (
    "test_export_onnx", "test_npu_backend", "test_npu_isolated", "test_npu_provider",
    "test_npu_qdq", "test_npu_stage", "test_onnx_backend", "test_onnx_experts",
    "test_onnx_nano", "test_quant_npu",
)  # fmt: skip
# What takes long and is arithmetic of Python alone: after all the rest.
LAST = (
    "test_measuring_tools", "test_planner", "test_quality_table", "test_budget",
    "test_experts_policy", "test_overlap",
)  # fmt: skip
# With SME OpenBLAS enters streaming mode, which by the architecture sets the flags of all
# floating-point exceptions; NumPy warns of them, and a warning fails a test.
_WITHOUT_SME = {"OPENBLAS_CORETYPE": "ARMV8SVE"}
_NOTHING_LEFT = 5  # how pytest ends when every test of a file is left out
# Files that cannot run, or say nothing of the processor there, and why.
EXCLUDED = {
    "test_arm_forks": "checks what runs these checks",
    "test_bench": "memory caps need the host's cgroups",
    "test_cli_page": "help texts, the same everywhere",
    "test_onnx_memory": "an emulator's own memory is more than its cap",
    "test_oracle_llamacpp": "needs llama-cpp-python",
    "test_oracle_transformers": "needs torch",
    "test_packaging": "looks at the source tree, not at the wheel",
    "test_qnn_sim": "Qualcomm's emulator is a program for x86-64",
}
# Tests that say nothing of the processor there, or need what is not there, and why.
DESELECTED = {
    "test_calibrate.py::test_stock_llama_cpp_measures_the_same": "llama-cpp-python",
    "test_ggml_backend.py::test_same_numbers_as_llama_cpp_on_the_same_file": "llama-cpp-python",
    "test_ggml_backend.py::test_mtp_block_0_gives_llama_cpps_numbers": "llama-cpp-python",
    "test_ggml_graph.py::test_regions_cost_nothing_until_touched": "the emulator's own page tables",
    # Another test measures the emulator once; a minute of that is an hour there.
    "test_measuring_tools.py::test_forecasts_stand_beside_what_was_measured": "a whole probe",
    "test_probe.py::test_the_command_writes_what_auto_reads": "three whole probes",
}


class Suite:
    """Checks of test files with the emulated `python`, until `close`."""

    def __init__(self, python: Path) -> None:
        self.python = python
        self.state = _shared_state(python)  # what all checks depend on
        self._forks = Forks(python)

    def checks(
        self,
        cpu: str,
        files: Sequence[str],
        settings: Mapping[str, str] = MappingProxyType({}),
        system: str = "",
    ) -> Iterator[Check]:
        """A check for every test file in `files` on the processor `cpu`. `settings` are more of
        the emulated Python's variables, `system` says what they make of it."""
        for name in files:
            state = digest(self.state, (REPOSITORY / "tests" / f"{name}.py").read_bytes())
            run = functools.partial(self._run_file, name, {"QEMU_CPU": cpu, **settings})
            yield Check(f"{cpu} {system}".rstrip(), name, state, run)

    def close(self) -> None:
        """End the Pythons that wait for more."""
        self._forks.close()

    def _run_file(self, name: str, settings: Mapping[str, str]) -> Outcome:
        """pytest's verdict on a file; what it said is printed when anything failed."""
        env = {
            "PYTHONPYCACHEPREFIX": str(WORK / "pycache"),
            "GGML_NO_BACKTRACE": "1",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            **(_WITHOUT_SME if settings["QEMU_CPU"].startswith("max") else {}),
            **settings,
        }
        code, told = self._forks.pytest(_pytest_words(name), env)
        if code == _NOTHING_LEFT:
            return Outcome(True, "nothing in it runs there")
        if code:
            print(told, flush=True)
        last = told.strip().rpartition("\n")[2].strip("= ")
        return Outcome(not code, last or f"pytest ended with {code}")


def all_but_last() -> list[str]:
    """Every test file that runs under the emulator, without LAST; what most depends on it comes
    first."""
    found = [path.stem for path in sorted((REPOSITORY / "tests").glob("test_*.py"))]
    others = {*QUICK, *ON_ONNX, *LAST, *EXCLUDED}
    return [*QUICK, *(name for name in found if name not in others)]


def _pytest_words(name: str) -> list[str]:
    """pytest's arguments for a file, without what is slow or needs torch."""
    return ["-q", "-p", "no:cacheprovider", "-m", "not slow and not oracle",
            str(REPOSITORY / "tests" / f"{name}.py"),
            *(f"--deselect=tests/{test}" for test in DESELECTED)]  # fmt: skip


def _shared_state(python: Path) -> bytes:
    """Our installed package, libggml, and the tests' own helpers."""
    site = python.parents[1] / "lib"
    records = sorted(site.glob("python*/site-packages/mimo_edge*.dist-info/RECORD"))
    helpers = [
        path
        for path in sorted((REPOSITORY / "tests").rglob("*"))
        if path.is_file() and path.suffix != ".pyc" and not path.name.startswith("test_")
    ]
    return digest(*(path.read_bytes() for path in [*records, *helpers])).encode()
