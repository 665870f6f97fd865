"""Which libggml-cpu is chosen, and that one this processor cannot run is refused."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mimo_edge import machine
from mimo_edge.errors import BackendError
from mimo_edge.hwcap import arm_extensions
from mimo_edge.runtimes.ggml import cpu_library, library
from mimo_edge.runtimes.ggml.bindings import Bindings, bindings
from mimo_edge.runtimes.ggml.cpu_library import check_features, compiled_features, variant_name


@pytest.fixture
def variants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of variants whose files hold the score they tell; every one is unloaded."""
    open_handles: list[Path] = []

    def opened(path: Path) -> SimpleNamespace:
        open_handles.append(path)
        text = path.read_text()
        score = {"ggml_backend_score": lambda: int(text)} if text else {}
        return SimpleNamespace(_handle=path, **score)

    monkeypatch.setattr(library, "open_library", opened)
    monkeypatch.setattr(
        cpu_library, "_ctypes", SimpleNamespace(dlclose=lambda path: open_handles.remove(path))
    )
    yield tmp_path
    assert not open_handles


def write(folder: Path, scores: Mapping[str, str]) -> None:
    for name, score in scores.items():
        (folder / f"libggml-cpu-{name}.so").write_text(score)


def test_the_best_score_wins(variants: Path) -> None:
    write(variants, {"armv8.0_1": "1", "armv8.2_2": "7", "armv8.6_2": "0"})
    best = cpu_library.cpu_library(variants)
    assert best == variants / "libggml-cpu-armv8.2_2.so"
    assert variant_name(best) == "armv8.2_2"


def test_none_that_runs_here(variants: Path) -> None:
    write(variants, {"armv8.2_2": "0", "armv8.6_2": "0"})
    with pytest.raises(BackendError, match=r"none of armv8\.2_2, armv8\.6_2 .* this processor"):
        cpu_library.cpu_library(variants)


def test_a_library_without_a_score(variants: Path) -> None:
    write(variants, {"armv8.2_2": ""})
    with pytest.raises(BackendError, match="no function ggml_backend_score"):
        cpu_library.cpu_library(variants)


def test_without_variants_it_is_the_one_there_is(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"libggml-cpu.* does not exist"):
        cpu_library.cpu_library(tmp_path)
    (tmp_path / "libggml-cpu.so").touch()
    path = cpu_library.cpu_library(tmp_path)
    assert path == tmp_path / "libggml-cpu.so"
    assert variant_name(path) == ""


def test_the_package_of_a_kit_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = library.library_folder()
    package = tmp_path / "mimo_edge_libggml"
    (package / "lib").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert library.library_folder() == package / "lib" != installed
    shutil.rmtree(package / "lib")
    with pytest.raises(BackendError, match="mimo_edge_libggml has no folder"):
        library.library_folder()


def test_the_installed_library_is_one_that_runs_here() -> None:
    found = bindings()
    assert found.cpu_path.parent == library.library_folder()
    assert set(found.features) <= set(machine.isa_flags())


def test_a_library_for_a_better_processor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu: Any = SimpleNamespace(ggml_cpu_has_matmul_int8=lambda: 1, ggml_cpu_has_neon=lambda: 1)
    monkeypatch.setattr(machine, "isa_flags", lambda: ("neon", "dotprod"))
    assert compiled_features(cpu) == ("neon", "i8mm")
    with pytest.raises(BackendError, match=r"compiled for i8mm, which .* \(it has neon, dotprod\)"):
        check_features(cpu, Path("libggml-cpu.so"))
    monkeypatch.setattr(machine, "isa_flags", lambda: ())  # nobody says what there is
    assert check_features(cpu, Path("libggml-cpu.so")) == ("neon", "i8mm")


def test_every_load_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def more(cpu: ctypes.CDLL) -> tuple[str, ...]:
        return ("made-up",)

    monkeypatch.setattr(cpu_library, "compiled_features", more)
    monkeypatch.setattr(machine, "isa_flags", lambda: ("neon",))
    with pytest.raises(BackendError, match="compiled for made-up"):
        Bindings()


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ((0x8FB, 0), ("neon",)),  # Cortex-A53: asimd, aes, pmull, sha1, sha2, crc32, cpuid
        ((0x100FFF, 0), ("neon", "fp16", "dotprod")),  # Cortex-A76
        ((0x500402, 1 << 13 | 1 << 1), ("neon", "fp16", "dotprod", "i8mm", "sve", "sve2")),
        ((0, 0), ()),
    ],
)
def test_extensions_by_the_words_of_the_kernel(
    words: tuple[int, int], names: tuple[str, ...]
) -> None:
    assert arm_extensions(words) == names


def test_isa_flags_of_arm_come_from_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "hwcap_words", lambda: (1 << 1 | 1 << 20, 1 << 13))
    assert machine.isa_flags() == ("neon", "dotprod", "i8mm")
