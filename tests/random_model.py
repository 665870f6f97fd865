"""tools/make_random_model.py as a module, and its smallest models."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]


def load_tool(name: str) -> ModuleType:
    """A script of tools/."""
    label = f"tool_{name}"
    if label not in sys.modules:
        spec = importlib.util.spec_from_file_location(label, ROOT / "tools" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[label] = module
        spec.loader.exec_module(module)
    return sys.modules[label]


def random_model(path: Path, name: str, **options: Any) -> Path:
    """A GGUF of a few MiB with the structure of the released model `name`, written to `path`."""
    tool = load_tool("make_random_model")
    # The GGUF of a dense model has no place for MTP blocks.
    tool.write_model(path, tool.tiny_config(name, 0 if name == "MiMo-7B" else 3), **options)
    return path
