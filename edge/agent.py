"""A small agent: the model calls tools, reads what they return, and goes on until it answers.

    agent = runtime.agent([set_volume, play_music])
    result = agent.run("a little louder please", timeout_s=10)
    result.text, result.steps

Nothing a tool does ends the loop: an exception, wrong arguments or a tool that does not exist are
told to the model, which may try again within the limits on steps and time.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mimo_edge.errors import UsageError
from mimo_edge.tool_calls import Malformed, ToolCall
from mimo_edge.tool_functions import ArgumentError, Tool, tool

if TYPE_CHECKING:
    from mimo_edge.conversation import Conversation, Opened
    from mimo_edge.reply import Reply

_log = logging.getLogger(__name__)

MAX_STEPS = 8
"""Answers the model may give in one run, calls of tools included."""

AgentEnd = Literal["stop", "length", "repetition", "cancelled", "steps", "time"]


@dataclass(frozen=True)
class Step:
    """One call and what came of it: `result` is what the model read, `failed` whether it is an
    error. `call` is the text of a call that could not be read."""

    call: ToolCall | Malformed
    result: str
    failed: bool
    seconds: float


@dataclass(frozen=True)
class AgentResult:
    """How a run ended: "stop" with an answer, or at a limit, with the work done so far."""

    text: str
    finish_reason: AgentEnd
    steps: tuple[Step, ...]
    reply: Reply | None
    """The newest answer; None when time was over before the first."""


class Agent:
    """A conversation that acts. `session` is an ordinary session: its history stays between
    runs."""

    def __init__(
        self,
        session: Conversation,
        tools: Sequence[Tool],
        max_steps: int = MAX_STEPS,
        on_step: Callable[[Step], None] | None = None,
    ) -> None:
        if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
            raise UsageError(f"max_steps = {max_steps!r}: at least one")
        self.session = session
        self._tools = {t.name: t for t in tools}
        self._max_steps = max_steps
        self._on_step = on_step

    def run(self, prompt: str, *, timeout_s: float | None = None, **options: Any) -> AgentResult:
        """Answer `prompt`, calling tools in between. `options` are those of `Session.stream`; a
        `tool_choice` is for the first answer, or none could ever be the last.

        `timeout_s` ends a generation within a layer; a tool that runs is waited for. Raises what
        `Session.stream` raises; an error of a tool goes to the model instead.
        """
        if timeout_s is not None and not timeout_s > 0:
            raise UsageError(f"timeout_s = {timeout_s!r}: more than 0")
        end = None if timeout_s is None else time.monotonic() + timeout_s
        steps: list[Step] = []
        reply: Reply | None = None
        turn: str | None = prompt
        for _ in range(self._max_steps):
            if _is_over(end):
                return AgentResult("" if reply is None else reply.text, "time", tuple(steps), reply)
            reply = self._answer(turn, end, options)
            if reply.finish_reason != "tool_calls" and not (
                reply.finish_reason == "stop" and reply.malformed
            ):
                ended = reply.finish_reason
                assert ended != "broken"  # raised as an error
                reason: AgentEnd = "time" if ended == "deadline" else ended
                return AgentResult(reply.text, reason, tuple(steps), reply)
            turn = None
            options.pop("tool_choice", None)
            calls: list[ToolCall | Malformed] = [*reply.tool_calls, *reply.malformed]
            for call in calls:
                step = self._call(call)
                steps.append(step)
                name = call.name if isinstance(call, ToolCall) else None
                self.session.tool_result(step.result, name)
                if self._on_step is not None:
                    self._on_step(step)
        assert reply is not None
        return AgentResult(reply.text, "steps", tuple(steps), reply)

    def cancel(self) -> None:
        """End the running generation; from any thread."""
        self.session.cancel()

    def _answer(self, turn: str | None, end: float | None, options: Mapping[str, Any]) -> Reply:
        """One generation, ended within a layer when its time is over."""
        if end is not None:
            options = {**options, "timeout_s": max(end - time.monotonic(), 1e-9)}
        return self.session.generate(turn, **options)

    def _call(self, call: ToolCall | Malformed) -> Step:
        start = time.monotonic()
        if isinstance(call, Malformed):
            return Step(call, _failure(f"this call cannot be read: {call.why}"), True, 0.0)
        failed = False
        known = self._tools.get(call.name)
        try:
            if known is None:
                raise ArgumentError(f"there is no tool {call.name}")
            result = _as_text(known.call(call.arguments))
        except ArgumentError as error:
            result, failed = _failure(str(error)), True
        except Exception as error:  # the model may know another way
            _log.warning("tool %s failed", call.name, exc_info=True)
            result, failed = _failure(f"{type(error).__name__}: {error}"), True
        return Step(call, result, failed, time.monotonic() - start)


def make_agent(
    runtime: Opened,
    tools: Sequence[Tool | Callable[..., Any]],
    system: str | None,
    max_steps: int,
    on_step: Callable[[Step], None] | None,
    **session_options: Any,
) -> Agent:
    """An agent in a new conversation of `runtime`. Raises UsageError."""
    made = make_tools(tools)
    session = runtime.session(system, [t.spec for t in made], **session_options)
    return Agent(session, made, max_steps, on_step)


def make_tools(tools: Sequence[Tool | Callable[..., Any]]) -> list[Tool]:
    """Functions as tools. Raises UsageError when two have the same name."""
    made = [t if isinstance(t, Tool) else tool(t) for t in tools]
    names = [t.name for t in made]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two tools are named {name!r}")
    return made


def _failure(reason: str) -> str:
    return json.dumps({"status": "error", "reason": reason}, ensure_ascii=False)


def _as_text(value: Any) -> str:
    """What the model reads of a result. Raises TypeError or ValueError when it has no JSON form."""
    if isinstance(value, str):
        return value
    return json.dumps({"status": "ok"} if value is None else value, ensure_ascii=False)


def _is_over(end: float | None) -> bool:
    return end is not None and time.monotonic() >= end
