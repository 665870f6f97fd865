"""The environment tests run in: the emulated Python with aarch64 wheels and our own.

It looks like a virtual environment, so that Python started from it finds the same packages.
Releases are those of the environment this script runs in, which are the ones tested natively.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from arm import libggml
from arm.paths import WORK, fresh, is_made, run
from arm.root import interpreter, make_root
from arm.wheel import unpack
from arm.wheels import full_wheel, libggml_wheel

ENVIRONMENT = WORK / "env"
# What the tests import that has wheels for aarch64; torch, onnxruntime and llama-cpp-python
# are left out: docs/arm.md says what that leaves untested.
PACKAGES = (
    "numpy", "jinja2", "llguidance", "tokenizers", "sentencepiece", "gguf", "typer", "pillow",
    "pytest", "hypothesis", "starlette", "uvicorn", "httpx", "openai",
)  # fmt: skip
_PLATFORMS = [f"manylinux_2_{minor}_aarch64" for minor in (34, 31, 28, 27, 17)]


def make_environment(full: Path) -> Path:
    """Path of the environment's `python`; our own package, the wheel `full`, is installed anew
    every time."""
    make_root()
    version = interpreter().name.removeprefix("python")
    site = ENVIRONMENT / "lib" / f"python{version}" / "site-packages"
    constraints = run([sys.executable, "-m", "pip", "freeze", "--exclude-editable"], capture=True)
    key = f"{version} {PACKAGES} {constraints}"
    if not is_made(ENVIRONMENT / ".made", key):
        fresh(ENVIRONMENT)
        site.mkdir(parents=True)
        pinned = ENVIRONMENT / "constraints.txt"
        pinned.write_text(
            "".join(f"{line}\n" for line in constraints.splitlines() if "==" in line), "utf-8"
        )
        install(PACKAGES, site, version, ["--constraint", str(pinned)])
        _link_interpreter()
        (ENVIRONMENT / ".made").write_text(key, "utf-8")
    for old in site.glob("mimo_edge*"):
        shutil.rmtree(old)
    unpack(full, site)
    unpack(libggml_wheel(libggml.build(), fresh(WORK / "dist-libggml")), site)
    return ENVIRONMENT / "bin" / "python"


def install(packages: tuple[str, ...], site: Path, version: str, more: list[str]) -> None:
    """Unpack the wheels of `packages` for aarch64 and what they require into `site`."""
    run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--target", site, *more]
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
