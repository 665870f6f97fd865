"""A router that is told what to do: guest wifi, blocked devices, quality of service.

    python examples/router_guard.py [BUNDLE] [COMMAND ...]

The model proposes, the router decides: a device it does not know and a name that is too short
are errors, which the model reads and tells. An ArgumentError is such an answer; any other exception
would reach the model too, and the log with its traceback.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Literal

import mimo_edge as me
from mimo_edge.tool_functions import ArgumentError

COMMANDS = (
    "turn on guest wifi for 9 hours",
    "cut the internet for Owen's PC",
    "adjust the priority of vnug-09 to lowest",
    "please ban Duxan's console on the router, thanks",
    "不用访客网络了",
    "现在将wifi的名字换成Tu-5",
)
_SECONDS = {"seconds": 1, "minutes": 60, "hours": 3600}


@dataclass
class Router:
    """What would be the router's configuration."""

    name: str = "home"
    devices: tuple[str, ...] = ("Owen's PC", "vnug-09", "nursery laptop")
    blocked: set[str] = field(default_factory=set)
    priority: dict[str, str] = field(default_factory=dict)
    guests_until: float | None = None
    """When guest wifi ends, in seconds of the clock; infinity for never, None when it is off."""

    def set_guest_wifi(
        self,
        state: Literal["on", "off"],
        duration: int | None = None,
        unit: Literal["seconds", "minutes", "hours"] | None = None,
    ) -> None:
        """Switch guest wifi"""
        if state == "off":
            self.guests_until = None
        elif duration is None:
            self.guests_until = float("inf")
        else:
            self.guests_until = time.time() + duration * _SECONDS[unit or "minutes"]

    def block_device(self, device: str, action: Literal["block", "unblock"]) -> None:
        """Block or unblock a device"""
        self._check(device)
        if action == "block":
            self.blocked.add(device)
        else:
            self.blocked.discard(device)

    def set_priority(self, device: str, level: Literal["high", "normal", "low"]) -> None:
        """Set network priority"""
        self._check(device)
        self.priority[device] = level

    def rename_wifi(self, name: str) -> None:
        """Change the wifi name"""
        if not 1 <= len(name.encode()) <= 32:
            raise ArgumentError("a wifi name has 1 to 32 bytes")
        self.name = name

    def _check(self, device: str) -> None:
        if device not in self.devices:
            raise ArgumentError(f"there is no {device} here")


def main(arguments: list[str]) -> Router:
    """Answer the commands; the router afterwards."""
    router = Router()
    tools = [router.set_guest_wifi, router.block_device, router.set_priority, router.rename_wifi]
    with me.Runtime.open(arguments[0] if arguments else "mimo-nano") as runtime:
        for command in arguments[1:] or COMMANDS:
            agent = runtime.agent(tools, enable_thinking=False)
            result = agent.run(command)
            print(f"> {command}")
            for step in result.steps:
                print(f"  {step.call} -> {step.result}")
            print(f"  {result.text}")
    return router


if __name__ == "__main__":
    print(main(sys.argv[1:]))
