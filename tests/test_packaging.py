"""The installed package holds what the source tree holds, under one namespace."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGING = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = {"edge": "mimo_edge"} | {
    name: f"mimo_edge.{name}" for name in ("export", "quant", "runtimes", "devices")
}


def source_packages() -> list[tuple[Path, str]]:
    found = []
    for folder, package in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            below = init.parent.relative_to(ROOT / folder).parts
            found.append((init.parent, ".".join([package, *below])))
    return found


def source_modules() -> list[str]:
    return sorted(
        f"{package}.{path.stem}"
        for folder, package in source_packages()
        for path in folder.glob("*.py")
        if path.stem not in ("__init__", "__main__")
    )


def test_every_package_is_listed() -> None:
    assert sorted(PACKAGING["packages"]) == sorted(package for _, package in source_packages())


@pytest.mark.parametrize("module", source_modules())
def test_every_module_is_installed(module: str) -> None:
    assert importlib.util.find_spec(module) is not None


def test_no_module_shadows_a_sibling_folder() -> None:
    siblings = set(FOLDERS) - {"edge"}
    assert not {p.stem for p in (ROOT / "edge").iterdir()} & siblings


def test_every_public_name_imports() -> None:
    package = importlib.import_module("mimo_edge")
    for name in package.__all__:
        assert getattr(package, name) is not None


def test_import_is_light() -> None:
    """Embedding applications import us at start-up: nothing heavy may come along."""
    heavy = {"numpy", "llama_cpp", "onnx", "onnxruntime", "tokenizers", "typer", "rich", "jinja2"}
    assert not heavy & loaded_by("import mimo_edge")


def test_a_session_loads_no_more_than_it_needs() -> None:
    """Ready to generate within a second: what other paths need is imported by them."""
    heavy = {"asyncio", "llama_cpp", "onnx", "onnxruntime", "gguf", "typer", "rich", "torch"}
    heavy |= {"mimo_edge.export.pipeline", "mimo_edge.experts.cache", "mimo_edge.evaluate"}
    code = "from mimo_edge import Runtime; Runtime.open('mimo-nano').session().messages"
    assert not heavy & loaded_by(code)


def loaded_by(code: str) -> set[str]:
    """Modules a fresh interpreter holds after `code`."""
    shown = [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"]
    return set(subprocess.run(shown, check=True, capture_output=True, text=True).stdout.split())


@pytest.mark.parametrize("word", ["pypi.org", "pythonhosted", "/work/"])
def test_the_repository_names_no_registry_or_machine(word: str) -> None:
    own = Path(__file__).name
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in tracked.stdout.split("\0"):
        path = ROOT / name
        if not name or path.name == own or path.suffix in {".png", ".safetensors", ".npz"}:
            continue
        if path.is_file():
            assert word not in path.read_text(encoding="utf-8", errors="replace"), name
