"""A car's head unit: climate, windows, navigation. No network, and every command has a deadline.

    python examples/car_head_unit.py [BUNDLE] [COMMAND ...]

A driver who waits looks at the screen, so a command that cannot be understood in time is given up
and says so. The policy is what a car without a contract has; with "local-first" and a url, what is
late here would be answered there, and nothing else in this file changes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Literal

import mimo_edge as me
from mimo_edge.tool_functions import ArgumentError

DEADLINE_S = 5.0
COMMANDS = (
    "could you please change the climate for the driver to 22",
    "get the left rear window open",
    "ok, let's go to Present Street",
    "把车载空调设为26度。",
    "将后窗的除雾打开。",
)
Zone = Literal["driver", "passenger", "rear"]
Window = Literal["driver", "passenger", "rear_left", "rear_right", "all"]


@dataclass
class Car:
    """What would be the car's bus."""

    climate: dict[str, int] = field(default_factory=dict)
    windows: dict[str, str] = field(default_factory=dict)
    defrost: dict[str, str] = field(default_factory=dict)
    route: tuple[str, str | None] | None = None

    def set_temperature(self, degrees: int, zone: Zone | None = None) -> None:
        """Set the car climate"""
        if not 16 <= degrees <= 30:
            raise ArgumentError(f"the climate goes from 16 to 30 degrees, not {degrees}")
        self.climate[zone or "all"] = degrees

    def set_window(self, window: Window, action: Literal["open", "close"]) -> None:
        """Open or close a car window"""
        self.windows[window] = action

    def navigate_to(
        self, destination: str, avoid: Literal["tolls", "highways"] | None = None
    ) -> None:
        """Start navigation"""
        self.route = (destination, avoid)

    def set_defrost(self, side: Literal["front", "rear"], state: Literal["on", "off"]) -> None:
        """Switch defrost"""
        self.defrost[side] = state


def main(arguments: list[str], deadline_s: float = DEADLINE_S) -> tuple[Car, list[str]]:
    """Answer the commands; the car afterwards, and how each command ended."""
    car = Car()
    tools = [car.set_temperature, car.set_window, car.navigate_to, car.set_defrost]
    policy = me.Policy("local-only", bundle=arguments[0] if arguments else "mimo-nano")
    ends = []
    with policy.open() as runtime:
        for command in arguments[1:] or COMMANDS:
            agent = runtime.agent(tools, enable_thinking=False)
            result = agent.run(command, timeout_s=deadline_s)
            late = result.finish_reason == "time"
            print(f"> {command}")
            for step in result.steps:
                print(f"  {step.call} -> {step.result} ({step.seconds * 1e3:.1f} ms)")
            print(f"  {'Sorry, that took too long.' if late else result.text}")
            ends.append(result.finish_reason)
    return car, ends


if __name__ == "__main__":
    print(main(sys.argv[1:])[0])
