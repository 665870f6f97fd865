"""The real models by name: their configs ship with us, their weights do not."""

from __future__ import annotations

import json
from importlib import resources

from mimo_edge.config import MimoConfig
from mimo_edge.errors import UsageError

KNOWN_MODELS = ("MiMo-V2-Flash", "MiMo-V2.5", "MiMo-V2.6-Flash", "MiMo-7B")


def known_model(name: str) -> MimoConfig:
    """Config of a released model, MTP blocks included. Raises UsageError on another name."""
    if name not in KNOWN_MODELS:
        raise UsageError(f"no model named {name!r}", f"known: {', '.join(KNOWN_MODELS)}")
    file = resources.files("mimo_edge") / "configs" / f"{name}.json"
    return MimoConfig.from_hf(json.loads(file.read_text(encoding="utf-8")))
