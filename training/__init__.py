"""Training of mimo-nano (not part of the installed package)."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("mimo_edge") is None:  # run from a checkout without installing
    import types

    _root = types.ModuleType("mimo_edge")
    _root.__path__ = [str(Path(__file__).parent.parent / "edge")]
    sys.modules["mimo_edge"] = _root
