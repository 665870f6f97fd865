"""The chunks of a streamed chat completion, to what an answer is made of.

OpenAI's format, and what SGLang and vLLM add to it: reasoning apart, as `reasoning_content` or
`reasoning`. A call's arguments come in parts; it is released when the next one or the end follows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mimo_edge.answer_reader import Fragment
from mimo_edge.errors import RemoteProtocolError, RemoteStatusError
from mimo_edge.tool_calls import Malformed, ToolCall, is_sound, tool_schemas

DONE = "[DONE]"
# Of one answer, over all its events.
MAX_ANSWER_BYTES = 64 << 20
_SHOWN = 200


@dataclass
class Called:
    """One call as the server made it. `arguments` is JSON text, perhaps not whole."""

    id: str
    name: str
    arguments: str = ""

    def to_message(self, readable: bool) -> dict[str, Any]:
        """Its place in the history; what cannot be read is sent back as text, because servers
        refuse a history whose arguments are not JSON."""
        arguments = self.arguments or "{}"
        if not readable:
            arguments = json.dumps({"unreadable": self.arguments})
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": arguments},
        }


@dataclass(frozen=True)
class Usage:
    """Token counts as the server gives them."""

    prompt_tokens: int
    cached_tokens: int
    tokens: int


class ChunkReader:
    """Reads one streamed answer. `messages` of its calls and `usage` are there once it ended."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._names = set(tool_schemas(tools))
        self._open: dict[int, Called] = {}
        self._size = 0
        self.call_messages: list[dict[str, Any]] = []
        self.finish_reason: str | None = None
        self.usage: Usage | None = None
        self.began = False
        """Whether anything of the answer itself has come."""

    def feed(self, data: str) -> Fragment:
        """What became certain with one event. Raises RemoteProtocolError when it is no chunk of an
        answer, RemoteStatusError when it says that the server failed."""
        self._size += len(data)
        if self._size > MAX_ANSWER_BYTES:
            raise RemoteProtocolError(f"the answer is larger than {MAX_ANSWER_BYTES} bytes")
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError):
            raise _no_chunk(data) from None
        if not isinstance(chunk, dict):
            raise _no_chunk(data)
        if chunk.get("error") is not None:
            raise _failed(chunk["error"])
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            self.usage = _usage(usage) or self.usage
        choices = chunk.get("choices", [])
        if not isinstance(choices, list):
            raise _no_chunk(data)
        part = Fragment()
        for choice in choices:
            if not isinstance(choice, dict):
                raise _no_chunk(data)
            if choice.get("index", 0) == 0:  # one answer was asked for
                self._read(choice, part, data)
        self.began = self.began or bool(part.text or part.reasoning or self._open)
        return part

    def finish(self) -> Fragment:
        """The calls that were still open."""
        part = Fragment()
        for index in sorted(self._open):
            self._release(self._open[index], part)
        self._open.clear()
        return part

    def _read(self, choice: Mapping[str, Any], part: Fragment, data: str) -> None:
        delta = choice.get("delta") or {}
        if not isinstance(delta, dict):
            raise _no_chunk(data)
        reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
        text = delta.get("content") or ""
        calls = delta.get("tool_calls") or []
        if not (isinstance(text, str) and isinstance(reasoning, str) and isinstance(calls, list)):
            raise _no_chunk(data)
        part.text += text
        part.reasoning += reasoning
        for call in calls:
            self._grow(call, part, data)
        reason = choice.get("finish_reason")
        if reason is not None:
            if not isinstance(reason, str):
                raise _no_chunk(data)
            self.finish_reason = reason

    def _grow(self, call: Any, part: Fragment, data: str) -> None:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise _no_chunk(data)
        index = call.get("index", 0)
        name, arguments = function.get("name") or "", function.get("arguments") or ""
        if not (isinstance(index, int) and isinstance(name, str) and isinstance(arguments, str)):
            raise _no_chunk(data)
        known = self._open.get(index)
        if known is None:
            if not name:
                raise _no_chunk(data)
            for earlier in sorted(self._open):
                self._release(self._open.pop(earlier), part)
            given = call.get("id")
            made = f"call_{len(self.call_messages)}"
            known = self._open[index] = Called(given if isinstance(given, str) else made, name)
        known.arguments += arguments

    def _release(self, call: Called, part: Fragment) -> None:
        found = self._parsed(call)
        if isinstance(found, ToolCall):
            part.tool_calls.append(found)
        else:
            part.malformed.append(found)
            part.text += found.text
        self.call_messages.append(call.to_message(isinstance(found, ToolCall)))

    def _parsed(self, call: Called) -> ToolCall | Malformed:
        shown = f"{call.name}({call.arguments})"
        if call.name not in self._names:
            return Malformed(shown, f"unknown function {call.name!r}")
        try:
            arguments = json.loads(call.arguments or "{}")
        except (ValueError, RecursionError):
            return Malformed(shown, "its arguments are no JSON")
        if not isinstance(arguments, dict) or not is_sound(arguments):
            return Malformed(shown, "its arguments are no JSON object")
        return ToolCall(call.name, arguments)


def _usage(raw: Mapping[str, Any]) -> Usage | None:
    details = raw.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    counts = (raw.get("prompt_tokens"), cached or 0, raw.get("completion_tokens"))
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in counts):
        return None
    return Usage(*counts)  # type: ignore[arg-type]


def _no_chunk(data: str) -> RemoteProtocolError:
    shown = data if len(data) <= _SHOWN else f"{data[:_SHOWN]}..."
    return RemoteProtocolError(f"the server sent what is no part of an answer: {shown!r}")


def _failed(error: Any) -> RemoteStatusError:
    """An error inside a stream: the status line had been sent already."""
    inner = error if isinstance(error, dict) else {"message": str(error)}
    status, code = inner.get("code"), inner.get("code")
    message = " ".join(str(inner.get("message", "no reason given")).split())[:_SHOWN]
    return RemoteStatusError(
        f"the server failed half-way: {message}",
        status=status if isinstance(status, int) else 500,
        code=code if isinstance(code, str) else None,
    )
