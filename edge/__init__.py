"""mimo-edge: MiMo-V2 models on phones, cars and routers.

Importing this package loads none of the heavy parts: every public name is
imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mimo_edge.agent import Agent, AgentResult
    from mimo_edge.api import Runtime
    from mimo_edge.bundle import Bundle
    from mimo_edge.config import MimoConfig
    from mimo_edge.errors import MimoEdgeError
    from mimo_edge.export.pipeline import export_bundle
    from mimo_edge.governor import Sensors, SystemSensors
    from mimo_edge.planner import Plan, plan
    from mimo_edge.remote.address import Connection
    from mimo_edge.remote.policy import Policy
    from mimo_edge.reply import Piece, Reply
    from mimo_edge.session import Session
    from mimo_edge.tool_functions import Tool, tool

__version__ = "0.1.0"

_PUBLIC = {
    "Agent": "mimo_edge.agent",
    "AgentResult": "mimo_edge.agent",
    "Bundle": "mimo_edge.bundle",
    "Connection": "mimo_edge.remote.address",
    "MimoConfig": "mimo_edge.config",
    "MimoEdgeError": "mimo_edge.errors",
    "Piece": "mimo_edge.reply",
    "Plan": "mimo_edge.planner",
    "Policy": "mimo_edge.remote.policy",
    "Reply": "mimo_edge.reply",
    "Runtime": "mimo_edge.api",
    "Sensors": "mimo_edge.governor",
    "Session": "mimo_edge.session",
    "SystemSensors": "mimo_edge.governor",
    "Tool": "mimo_edge.tool_functions",
    "export_bundle": "mimo_edge.export.pipeline",
    "plan": "mimo_edge.planner",
    "tool": "mimo_edge.tool_functions",
}

__all__ = [
    "Agent",
    "AgentResult",
    "Bundle",
    "Connection",
    "MimoConfig",
    "MimoEdgeError",
    "Piece",
    "Plan",
    "Policy",
    "Reply",
    "Runtime",
    "Sensors",
    "Session",
    "SystemSensors",
    "Tool",
    "__version__",
    "export_bundle",
    "plan",
    "tool",
]


def __getattr__(name: str) -> Any:
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module 'mimo_edge' has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
