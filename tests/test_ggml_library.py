"""The libggml loader: what it accepts, and that nothing bad reaches ggml, which would abort."""

from __future__ import annotations

import _ctypes
import ctypes
import dataclasses
import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mimo_edge.errors import BackendError, QuantError
from mimo_edge.runtimes.ggml import library
from mimo_edge.runtimes.ggml.cpu_library import cpu_library


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_installed_library_is_loaded_once_and_checked() -> None:
    base = library.load()
    assert base is library.load() is library.load(library.library_folder())
    assert base.path.name.startswith(("libggml-base", "ggml-base"))
    assert base.version.startswith("0.25.")
    assert base.commit
    assert cpu_library().is_file()


def test_loading_imports_neither_llama_cpp_nor_onnxruntime() -> None:
    code = (
        "import sys, os; from mimo_edge.runtimes.ggml import library; library.load();"
        "print(sorted(m for m in ('llama_cpp', 'onnxruntime', 'gguf') if m in sys.modules),"
        "os.environ['GGML_NO_BACKTRACE'])"
    )
    assert run(code) == "[] 1"


def test_importing_quant_loads_no_library() -> None:
    code = (
        "import mimo_edge.quant; from mimo_edge.runtimes.ggml import library;"
        "print(len(library._loaded))"
    )
    assert run(code) == "0"


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(library, "_installed", None)
    with pytest.raises(BackendError, match=r"missing: pip install llama-cpp-python==0\.3\.36"):
        library.load()


def test_a_package_without_libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location(
        "llama_cpp", tmp_path / "__init__.py", submodule_search_locations=[str(tmp_path)]
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(library, "_installed", None)
    with pytest.raises(BackendError, match="has no folder"):
        library.load()
    (tmp_path / "lib").mkdir()
    with pytest.raises(BackendError, match="does not exist"):
        library.load()


def test_another_folder(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"ggml-base.* does not exist"):
        library.load(tmp_path)
    installed = library.library_path("ggml-base")
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    copy = tmp_path / (installed.name.partition(".")[0] + suffix)
    copy.write_bytes(installed.read_bytes())
    other = library.load(tmp_path)
    assert other.path == copy.resolve()
    assert other is not library.load()
    assert other.version == library.load().version


@pytest.mark.parametrize(
    ("platform", "name"),
    [("linux", "libggml-cpu.so"), ("darwin", "libggml-cpu.dylib"), ("win32", "ggml-cpu.dll")],
)
def test_file_names_by_platform(
    platform: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).touch()
    monkeypatch.setattr(sys, "platform", platform)
    assert library.library_path("ggml-cpu", tmp_path).name == name


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    path = tmp_path / "libggml-base.so"
    path.write_text("not a library")
    with pytest.raises(BackendError, match=r"cannot be loaded.*pip install"):
        library.GgmlBase(path)


def test_a_library_that_is_not_ggml() -> None:
    with pytest.raises(BackendError, match="has no function ggml_version"):
        library.GgmlBase(Path(_ctypes.__file__))


@pytest.mark.parametrize("version", ["0.24.9", "0.26.0", "1.25.0", "0.2.5", "", "0", "x.y"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(BackendError, match=rf"is ggml {version}, expected 0\.25\.x: pip install"):
        library.check_version(version, Path("libggml-base.so"))


def test_the_version_is_really_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "GGML_VERSION", (0, 99))
    with pytest.raises(BackendError, match=r"ggml 0\.25\.\d+, expected 0\.99\.x"):
        library.GgmlBase(library.library_path("ggml-base"))


@pytest.mark.parametrize(
    "change",
    [{"name": "q4_9"}, {"blck_size": 64}, {"type_size": 20}, {"requires_imatrix": True}],
    ids=str,
)
def test_every_type_is_really_checked(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    types = dict(library.TYPES)
    types[2] = dataclasses.replace(types[2], **change)
    monkeypatch.setattr(library, "TYPES", MappingProxyType(types))
    with pytest.raises(BackendError, match=r"ggml type 2 of .* is \('q4_0', 32, 18.*expected"):
        library.GgmlBase(library.library_path("ggml-base"))


def arrays(cols: int = 256, rows: int = 2) -> tuple[Any, Any]:
    x = np.random.default_rng(0).standard_normal((rows, cols)).astype(np.float32)
    return x, np.empty((rows, cols // 32 * 18), dtype=np.uint8)


def test_quantise_validates_before_it_calls() -> None:
    base = library.load()
    x, out = arrays()
    q4_0 = 2
    readonly = out.copy()
    readonly.flags.writeable = False
    nan = x.copy()
    nan[1, 1] = np.nan
    narrow = np.ones((2, 250), dtype=np.float32)
    half = np.ones(128, dtype=np.float32)
    bad: list[tuple[Any, ...]] = [
        (999, x, out),
        (3, x, out),
        (q4_0, x[0], out),
        (q4_0, x.astype(np.float64), out),
        (q4_0, x[:, ::-1], out),
        (q4_0, x.T, out),
        (q4_0, narrow, out),
        (q4_0, x[:, :0], out),
        (q4_0, x, out[:1]),
        (q4_0, x, out[:, :-1]),
        (q4_0, x, out.view(np.int8)),
        (q4_0, x, np.empty((2, 288), np.uint8)[:, ::2]),
        (q4_0, x, readonly),
        (q4_0, nan, out),
        (q4_0, x, out, half),
        (q4_0, x, out, np.ones(256)),
        (q4_0, x, out, np.ones(512, dtype=np.float32)[::2]),
        (q4_0, x, out, np.full(256, np.inf, dtype=np.float32)),
        (16, x, np.empty((2, 66), np.uint8)),
    ]
    for arguments in bad:
        with pytest.raises(QuantError):
            base.quantize(*arguments)
    base.quantize(q4_0, x, out)
    base.quantize(q4_0, x[:0], out[:0])


def test_dequantise_validates_before_it_calls() -> None:
    base = library.load()
    x, raw = arrays()
    base.quantize(2, x, raw)
    values = np.zeros_like(x)
    readonly = values.copy()
    readonly.flags.writeable = False
    bad: list[tuple[Any, ...]] = [
        (999, raw, values),
        (2, raw[0], values),
        (2, raw.view(np.int8), values),
        (2, raw[:, :-1], values),
        (2, raw[:1], values),
        (2, raw[::-1], values),
        (2, raw, values[:1]),
        (2, raw, values[:, :-32]),
        (2, raw, values[0]),
        (2, raw, values.astype(np.float64)),
        (2, raw, values.T),
        (2, raw, readonly),
        (8, raw, values),
    ]
    for arguments in bad:
        with pytest.raises(QuantError):
            base.dequantize(*arguments)
    base.dequantize(2, raw, values)
    assert np.abs(values - x).max() < 0.5
    base.dequantize(0, x.view(np.uint8), values)
    assert values.tobytes() == x.tobytes()


def test_validate_refuses_partial_blocks() -> None:
    with pytest.raises(QuantError, match="not whole q4_0 blocks"):
        library.load().validate(2, np.zeros((1, 17), dtype=np.uint8))


def test_threads_that_start_together_build_the_tables_once() -> None:
    """In a fresh process, where no codebook exists yet; bytes equal those of one thread."""
    code = """
import threading, numpy as np
from mimo_edge.runtimes.ggml import library
from mimo_edge.runtimes.ggml.cpu_library import cpu_library
x = np.random.default_rng(0).standard_normal((1, 256)).astype(np.float32)
imp = np.ones(256, np.float32)
start, outs = threading.Barrier(6), []
def work(kind, size):
    out = np.empty((1, size), np.uint8)
    start.wait()
    library.load().quantize(kind, x, out, imp)
    outs.append((kind, out.tobytes()))
threads = [threading.Thread(target=work, args=a) for a in [(16, 66), (18, 98)] * 3]
[t.start() for t in threads]; [t.join() for t in threads]
for kind, size in [(16, 66), (18, 98)]:
    out = np.empty((1, size), np.uint8)
    library.load().quantize(kind, x, out, imp)
    outs.append((kind, out.tobytes()))
print(len(outs), len(set(outs)), len(library._loaded))
"""
    assert run(code) == "8 2 1"


def test_concurrent_first_loads_give_one_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_loaded", {})
    found: list[library.GgmlBase] = []
    threads = [threading.Thread(target=lambda: found.append(library.load())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len({id(base) for base in found}) == 1


def test_openmp_threads_of_our_libraries_spin_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """GNU OpenMP reads its settings when it is loaded: they are set just then, unless the user
    has an opinion, and other programs we start do not inherit them."""
    seen: list[str | None] = []

    def loaded(path: str) -> ctypes.CDLL:
        seen.append(os.environ.get("GOMP_SPINCOUNT"))
        return ctypes.CDLL(None)

    fake = SimpleNamespace(CDLL=loaded)
    monkeypatch.setattr(library, "ctypes", fake)
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    library.open_library(Path("x"))
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    library.open_library(Path("x"))
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    library.open_library(Path("x"))
    assert seen == [library.SPIN_COUNT, None, "7"]
    assert os.environ["GOMP_SPINCOUNT"] == "7"
