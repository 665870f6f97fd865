"""The environment tests run in: the emulated Python with aarch64 wheels and our own.

It looks like a virtual environment, so that Python started from it finds the same packages.
Releases are those of the environment this script runs in, which are the ones tested natively.
"""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from arm import libggml
from arm.emulator import newer_emulator
from arm.paths import WORK, fresh, is_made, run
from arm.root import interpreter, make_root
from arm.wheel import unpack
from arm.wheels import full_wheel, libggml_wheel

ENVIRONMENT = WORK / "env"
# What the tests import that has wheels for aarch64; torch and llama-cpp-python are left out:
# docs/arm.md says what that leaves untested.
PACKAGES = (
    "numpy", "jinja2", "llguidance", "tokenizers", "sentencepiece", "gguf", "typer", "pillow",
    "pytest", "hypothesis", "jsonschema", "starlette", "uvicorn", "httpx", "openai",
)  # fmt: skip
# With what these need beyond PACKAGES. They lie apart: the runtime must do without them.
ONNX = ("onnx", "onnxruntime", "ml-dtypes", "protobuf", "flatbuffers")
_PLATFORMS = [f"manylinux_2_{minor}_aarch64" for minor in (34, 31, 28, 27, 17)]


def make_environment(full: Path) -> Path:
    """Path of the environment's `python`; our own package, the wheel `full`, is installed anew
    every time."""
    make_root()
    version = interpreter().name.removeprefix("python")
    site = ENVIRONMENT / "lib" / f"python{version}" / "site-packages"
    constraints = _constraints()
    key = f"{version} {PACKAGES} {constraints}"
    if not is_made(ENVIRONMENT / ".made", key):
        fresh(ENVIRONMENT)
        site.mkdir(parents=True)
        install(PACKAGES, site, version, constraints)
        _link_interpreter()
        (ENVIRONMENT / ".made").write_text(key, "utf-8")
    for old in site.glob("mimo_edge*"):
        shutil.rmtree(old)
    unpack(full, site)
    unpack(libggml_wheel(libggml.build(), fresh(WORK / "dist-libggml")), site)
    return ENVIRONMENT / "bin" / "python"


def with_onnx() -> dict[str, str]:
    """Variables with which that environment's Python has ONNX and ONNX Runtime."""
    return {"PYTHONPATH": str(_make_onnx()), "MIMO_ARM_QEMU": newer_emulator()}


def _make_onnx() -> Path:
    version = interpreter().name.removeprefix("python")
    folder, constraints = WORK / "onnx", _constraints()
    key = f"{version} {ONNX} {constraints}"
    if not is_made(folder / ".made", key):
        install(ONNX, fresh(folder), version, constraints, "--no-deps")
        (folder / ".made").write_text(key, "utf-8")
    return folder


@functools.cache
def _constraints() -> str:
    """The releases installed here, as pip's constraints."""
    told = run([sys.executable, "-m", "pip", "freeze", "--exclude-editable"], capture=True)
    return "".join(f"{line}\n" for line in told.splitlines() if "==" in line)


def install(
    packages: Sequence[str], site: Path, version: str, constraints: str, *options: str
) -> None:
    """Unpack the wheels of `packages` for aarch64, and what they require, into `site`."""
    pinned = site.with_name(f"{site.name}-constraints.txt")
    pinned.write_text(constraints, "utf-8")
    run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--target", site, *options]
        + ["--constraint", pinned]
        + ["--only-binary", ":all:", "--implementation", "cp", "--python-version", version]
        + [word for platform in _PLATFORMS for word in ("--platform", platform)]
        + list(packages)
    )


def _link_interpreter() -> None:
    """What `python -m venv` would write."""
    python = interpreter()
    (ENVIRONMENT / "bin").mkdir()
    for name in ("python", "python3"):
        (ENVIRONMENT / "bin" / name).symlink_to(python)
    (ENVIRONMENT / "pyvenv.cfg").write_text(f"home = {python.parent}\n", "utf-8")


if __name__ == "__main__":
    print(make_environment(full_wheel()))
