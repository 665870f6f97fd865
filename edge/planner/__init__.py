"""Whether a model runs on a device, how fast, and what to change: `plan` decides it from sizes."""

from __future__ import annotations

from mimo_edge.planner.planning import Plan, plan

__all__ = ["Plan", "plan"]
