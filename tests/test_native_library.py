"""A package that kills the process is found out in another process."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path

import pytest

from mimo_edge import native_library
from mimo_edge.errors import BackendError
from mimo_edge.native_library import check_import, try_import
from mimo_edge.runtimes.onnx import library as onnx_library


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that a child process finds as the module `frail`."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    try_import.cache_clear()
    return tmp_path / "frail.py"


@pytest.mark.parametrize("name", ["SIGILL", "SIGSEGV"])
def test_a_signal_becomes_an_error(module: Path, name: str) -> None:
    number = int(getattr(signal, name))
    module.write_text(f"import os, signal\nos.kill(os.getpid(), {number})\n")
    with pytest.raises(BackendError, match=rf"ends the process \({name}\).*--backend ggml"):
        try_import("frail")


def test_what_python_says_is_repeated(module: Path) -> None:
    module.write_text("raise ImportError('libfoo.so.1: cannot open')\n")
    with pytest.raises(BackendError, match=r"libfoo\.so\.1: cannot open"):
        try_import("frail")
    with pytest.raises(BackendError, match="No module named 'not_there_at_all'"):
        try_import("not_there_at_all")


def test_a_good_module_is_tried_once(module: Path) -> None:
    module.write_text(f"open({str(module.with_suffix('.log'))!r}, 'a').write('x')\n")
    try_import("frail")
    try_import("frail")
    assert module.with_suffix(".log").read_text() == "x"
    assert "frail" not in sys.modules


def test_a_module_that_never_ends(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(native_library, "_TIMEOUT_S", 0.2)
    with pytest.raises(BackendError, match="did not end"):
        try_import("frail")


def test_only_arm_pays_for_the_child(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module.write_text("import os\nos.abort()\n")
    monkeypatch.setattr(native_library, "hwcap_words", lambda: None)
    check_import("frail")
    monkeypatch.setattr(native_library, "hwcap_words", lambda: (2, 0))
    with pytest.raises(BackendError, match="SIGABRT"):
        check_import("frail")


def test_inside_an_app_there_is_no_child(
    module: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "")
    with caplog.at_level(logging.WARNING):
        try_import("frail")
    assert "untried" in caplog.text


def test_the_onnx_backend_without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device that has the kit alone."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match="onnxruntime cannot be imported"):
        onnx_library.onnxruntime()


def test_the_onnx_backend_tries_the_import_first(
    module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (module.parent / "onnxruntime").mkdir()
    dying = module.parent / "onnxruntime" / "__init__.py"
    dying.write_text(f"import os\nos.kill(os.getpid(), {int(signal.SIGILL)})\n")
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.setattr(native_library, "hwcap_words", lambda: (2, 0))
    with pytest.raises(BackendError, match=r"importing onnxruntime ends the process \(SIGILL\)"):
        onnx_library.onnxruntime()
