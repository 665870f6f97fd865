"""Home control, piece by piece: lights, curtains, vacuum, a door that wants a yes.

    python examples/home_control.py [BUNDLE or http://SERVER] [COMMAND ...]

The loop that an agent runs by itself, written out: what is streamed, where a call comes, how its
result goes back. Given the address of a server (`mimo-edge serve` on the router) the model runs
there and the house is still switched here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import mimo_edge as me
from mimo_edge.tool_functions import ArgumentError

COMMANDS = (
    "lights on in the guest room",
    "Adjust the closet brightness to 49 percent",
    "Have the closet curtain closed",
    "帮我叫扫地机回充",
    "可以帮我将包门解锁",
)


@dataclass
class House:
    """What would be the hub. `may_unlock` is asked before a door is opened."""

    may_unlock: Callable[[str], bool] = field(default=lambda door: False, repr=False)
    lights: dict[str, str | int] = field(default_factory=dict)
    curtains: dict[str, str] = field(default_factory=dict)
    vacuum: str = "dock"
    doors: dict[str, str] = field(default_factory=dict)

    def switch_light(self, room: str, state: Literal["on", "off"]) -> None:
        """Switch a light"""
        self.lights[room] = state

    def set_brightness(self, room: str, percent: int) -> None:
        """Set light brightness in percent"""
        self.lights[room] = max(0, min(100, percent))

    def set_curtain(self, room: str, action: Literal["open", "close"]) -> None:
        """Open or close a curtain"""
        self.curtains[room] = action

    def control_vacuum(
        self, action: Literal["start", "stop", "dock"], room: str | None = None
    ) -> None:
        """Robot vacuum"""
        self.vacuum = action if room is None else f"{action} {room}"

    def lock_door(self, door: str, action: Literal["lock", "unlock"]) -> None:
        """Lock or unlock a door"""
        if action == "unlock" and not self.may_unlock(door):
            raise ArgumentError("nobody said yes")
        self.doors[door] = action


def main(arguments: list[str], may_unlock: Callable[[str], bool] | None = None) -> House:
    """Answer the commands; the house afterwards."""
    house = House() if may_unlock is None else House(may_unlock)
    tools = {
        made.name: made
        for made in map(
            me.tool,
            (
                house.switch_light,
                house.set_brightness,
                house.set_curtain,
                house.control_vacuum,
                house.lock_door,
            ),
        )
    }
    where = arguments[0] if arguments else "mimo-nano"
    remote = where.startswith(("http://", "https://"))
    with me.Runtime.connect(where) if remote else me.Runtime.open(where) as runtime:
        for command in arguments[1:] or COMMANDS:
            print(f"> {command}")
            session = runtime.session(
                tools=[made.spec for made in tools.values()], enable_thinking=False
            )
            prompt: str | None = command
            while prompt is not None or session.messages[-1]["role"] == "tool":
                _answer(session, prompt, tools)
                prompt = None
    return house


def _answer(session: Any, prompt: str | None, tools: dict[str, me.Tool]) -> None:
    """Stream one answer; calls are made as they come, their results follow the answer."""
    results: list[tuple[str, str]] = []
    for piece in session.stream(prompt):
        print(piece.text, end="", flush=True)
        for call in piece.tool_calls:
            try:
                tools[call.name].call(call.arguments)
                result = {"status": "ok"}
            except ArgumentError as error:
                result = {"status": "error", "reason": str(error)}
            print(f"  {call.name}({call.arguments}) -> {result}")
            results.append((call.name, json.dumps(result, ensure_ascii=False)))
    print()
    for name, result_text in results:
        session.tool_result(result_text, name)


def _asked_here(door: str) -> bool:
    """Ask whoever sits at the terminal; nobody there means no."""
    try:
        return input(f"unlock {door}? ") == "yes"
    except EOFError:
        return False


if __name__ == "__main__":
    print(main(sys.argv[1:], _asked_here))
