"""The compilers of the kit's libraries: targets, and GCC's words for architectures in Zig's."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from arm import toolchain
from arm.paths import ProgramError
from arm.toolchain import Toolchain


@pytest.mark.parametrize("target", ["x86_64-linux-musl", "aarch64-linux-gnu.2", "aarch64", ""])
def test_unknown_targets_are_refused(target: str) -> None:
    with pytest.raises(SystemExit, match="known are"):
        Toolchain(target)


def test_wheels_are_those_of_the_target_s_c_library() -> None:
    assert Toolchain().platforms()[0] == "manylinux_2_28_aarch64"
    assert Toolchain("aarch64-linux-gnu.2.27").platforms()[0] == "manylinux_2_27_aarch64"
    assert all("musl" in tag for tag in Toolchain("aarch64-linux-musl").platforms())


def test_zig_is_told_what_gcc_would_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "WORK", tmp_path)
    monkeypatch.setattr(toolchain, "_zig_package", lambda: tmp_path)
    monkeypatch.setattr(sys, "executable", "echo")
    options = Toolchain("aarch64-linux-musl").options()

    def said(*words: str) -> str:
        return subprocess.run(
            [options["CMAKE_C_COMPILER"], *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    start = "-m ziglang cc -target aarch64-linux-musl"
    assert said("-march=armv8-a", "-c", "a b.c") == f"{start} -mcpu=generic -c a b.c"
    wanted = "-mcpu=generic+v8_6a+dotprod+fullfp16+i8mm+sve+sve2 -O3"
    assert said("-march=armv8.6-a+dotprod+fp16+i8mm+sve+sve2", "-O3") == f"{start} {wanted}"


def test_without_zig(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ProgramError, match="pip install ziglang"):
        Toolchain("aarch64-linux-musl").options()
