"""A phone assistant: alarms, timers, messages, calls. The model runs on this machine.

    python examples/phone_assistant.py [BUNDLE] [COMMAND ...]

Without arguments the built-in model answers a few commands. The functions below are the tools:
name, types and docstring are all the model is told.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Literal

import mimo_edge as me

COMMANDS = (
    "ok, at nine fifteen pm i need an alarm",
    "please put on a timer for 7 minutes",
    "Send a text to Martin: build find",
    "给罗经理写个消息:面包披萨了",
    "place a call to Lanfi, please",
)


@dataclass
class Phone:
    """What would be the phone's own services."""

    alarms: list[tuple[str, str | None]] = field(default_factory=list)
    timers: list[tuple[int, str]] = field(default_factory=list)
    sent: list[tuple[str, str]] = field(default_factory=list)
    called: list[str] = field(default_factory=list)

    def set_alarm(self, time: str, label: str | None = None) -> None:
        """Set an alarm"""
        self.alarms.append((time, label))

    def set_timer(self, duration: int, unit: Literal["seconds", "minutes", "hours"]) -> None:
        """Start a countdown"""
        self.timers.append((duration, unit))

    def send_message(self, contact: str, text: str) -> None:
        """Send a text message"""
        self.sent.append((contact, text))

    def call_contact(self, contact: str) -> None:
        """Call someone"""
        self.called.append(contact)


def main(arguments: list[str]) -> Phone:
    """Answer the commands; what the phone was made to do."""
    phone = Phone()
    tools = [phone.set_alarm, phone.set_timer, phone.send_message, phone.call_contact]
    with me.Runtime.open(arguments[0] if arguments else "mimo-nano") as runtime:
        for command in arguments[1:] or COMMANDS:
            # A conversation for each command: a phone is told unrelated things.
            agent = runtime.agent(tools, enable_thinking=False)
            result = agent.run(command)
            print(f"> {command}")
            for step in result.steps:
                print(f"  {step.call} -> {step.result}")
            print(f"  {result.text}")
    return phone


if __name__ == "__main__":
    print(main(sys.argv[1:]))
