"""The smallest models of tools/make_random_model.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from make_random_model import tiny_config, write_model


def random_model(path: Path, name: str, **options: Any) -> Path:
    """A GGUF of a few MiB with the structure of the released model `name`, written to `path`."""
    # The GGUF of a dense model has no place for MTP blocks.
    write_model(path, tiny_config(name, 0 if name == "MiMo-7B" else 3), **options)
    return path
