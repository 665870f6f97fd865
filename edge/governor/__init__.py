"""What a run does about heat, an empty battery and short memory, while it generates."""

from __future__ import annotations

from mimo_edge.governor.governor import Governor
from mimo_edge.governor.limits import Limits
from mimo_edge.governor.sensors import Battery, Bound, MemoryReading, Sensors, SystemSensors

__all__ = [
    "Battery",
    "Bound",
    "Governor",
    "Limits",
    "MemoryReading",
    "Sensors",
    "SystemSensors",
]
