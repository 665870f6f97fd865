"""Answers of /v1/responses: output items, and the events that tell of them as they grow.

The whole answer is what the events built up, so both say the same.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

from mimo_edge.engine import GenerationStats
from mimo_edge.reply import Piece, Reply
from mimo_edge.serve.answers import to_json
from mimo_edge.serve.calls import Call
from mimo_edge.serve.refusal import Refusal
from mimo_edge.serve.responses import arguments_text
from mimo_edge.tool_calls import ToolCall

_Kind = Literal["reasoning", "message"]
_PART = {"reasoning": "reasoning_text", "message": "output_text"}
_PREFIX = {"reasoning": "rs", "message": "msg"}


class ResponseAnswer:
    """As `Answer`, for one response. `count` gives the tokens of a text."""

    def __init__(self, call: Call, count: Callable[[str], int]) -> None:
        self._call = call
        self._count = count
        self._id = "resp_" + secrets.token_hex(16)
        self._created = int(time.time())
        self._number = 0
        self._output: list[dict[str, Any]] = []
        self._open: _Kind | None = None
        self._blank = ""  # white space between calls is not worth a message

    def first(self) -> Iterator[bytes]:
        """What a stream begins with."""
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._response("in_progress", None))

    def see(self, piece: Piece) -> None:
        """Take note of a piece of a response that is told whole."""
        for _ in self.chunks(piece):
            pass

    def chunks(self, piece: Piece, progress: GenerationStats | None = None) -> Iterator[bytes]:
        """A piece as events."""
        if piece.reasoning:
            yield from self._grow("reasoning", piece.reasoning)
        if piece.text:
            text = self._blank + piece.text
            if self._open == "message" or text.strip():
                self._blank = ""
                yield from self._grow("message", text)
            else:
                self._blank = text
        for call in piece.tool_calls:
            yield from self._called(call)

    def last(self, reply: Reply) -> Iterator[bytes]:
        """What a stream ends with."""
        yield from self._close(_status(reply))
        whole = self.whole(reply)
        yield self._event(f"response.{whole['status']}", response=whole)

    def whole(self, reply: Reply) -> dict[str, Any]:
        """The response, after all its pieces."""
        status = _status(reply)
        for _ in self._close(status):
            pass
        if not self._output:  # an empty answer is one as well
            for _ in (*self._grow("message", ""), *self._close(status)):
                pass
        return self._response(status, reply)

    def error(self, refusal: Refusal) -> bytes:
        """What a stream says that cannot go on."""
        return self._event("error", code=refusal.code, message=refusal.message, param=refusal.param)

    # --- inside -------------------------------------------------------------------------

    def _event(self, kind: str, **content: Any) -> bytes:
        data = to_json({"type": kind, "sequence_number": self._number, **content})
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"

    def _at(self) -> dict[str, Any]:
        """Where the newest item is."""
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}

    def _grow(self, kind: _Kind, text: str) -> Iterator[bytes]:
        if self._open != kind:
            yield from self._close()
            yield from self._begin(kind)
        part = self._output[-1]["content"][0]
        part["text"] += text
        extra: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        yield self._event(
            f"response.{_PART[kind]}.delta", **self._at(), content_index=0, delta=text, **extra
        )

    def _begin(self, kind: _Kind) -> Iterator[bytes]:
        self._open = kind
        item: dict[str, Any] = {
            "id": f"{_PREFIX[kind]}_{secrets.token_hex(12)}",
            "type": kind,
            "status": "in_progress",
            "content": [],
        }
        if kind == "message":
            item["role"] = "assistant"
        else:
            item["summary"] = []
        self._output.append(item)
        yield self._event(
            "response.output_item.added", output_index=len(self._output) - 1, item=item
        )
        part: dict[str, Any] = {"type": _PART[kind], "text": ""}
        if kind == "message":
            part |= {"annotations": [], "logprobs": []}
        item["content"].append(part)
        yield self._event("response.content_part.added", **self._at(), content_index=0, part=part)

    def _close(self, status: str = "completed") -> Iterator[bytes]:
        kind, self._open = self._open, None
        if kind is None:
            return
        item = self._output[-1]
        (part,) = item["content"]
        extra: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        yield self._event(
            f"response.{_PART[kind]}.done",
            **self._at(),
            content_index=0,
            text=part["text"],
            **extra,
        )
        yield self._event("response.content_part.done", **self._at(), content_index=0, part=part)
        yield self._ended(item, status)

    def _called(self, call: ToolCall) -> Iterator[bytes]:
        yield from self._close()
        self._blank = ""
        item: dict[str, Any] = {
            "id": f"fc_{secrets.token_hex(12)}",
            "type": "function_call",
            "status": "in_progress",
            "call_id": f"call_{secrets.token_hex(12)}",
            "name": call.name,
            "arguments": "",
        }
        self._output.append(item)
        yield self._event(
            "response.output_item.added", output_index=len(self._output) - 1, item=item
        )
        arguments = item["arguments"] = arguments_text(call.arguments)
        kind = "response.function_call_arguments"
        yield self._event(f"{kind}.delta", **self._at(), delta=arguments)
        yield self._event(f"{kind}.done", **self._at(), arguments=arguments, name=call.name)
        yield self._ended(item)

    def _ended(self, item: dict[str, Any], status: str = "completed") -> bytes:
        item["status"] = status
        return self._event(
            "response.output_item.done", output_index=len(self._output) - 1, item=item
        )

    def _response(self, status: str, reply: Reply | None) -> dict[str, Any]:
        call, asked = self._call, self._call.asked
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": (
                {"reason": "max_output_tokens"} if status == "incomplete" else None
            ),
            "instructions": asked.get("instructions"),
            "max_output_tokens": call.options["max_tokens"],
            "metadata": asked.get("metadata", {}),
            "model": call.model,
            "output": self._output,
            "parallel_tool_calls": asked.get("parallel_tool_calls", True),
            "previous_response_id": None,
            "store": False,
            "temperature": call.options["temperature"],
            "text": {"format": {"type": "text"}} | asked.get("text", {}),
            "tool_choice": asked.get("tool_choice", "auto"),
            "tools": [_tool(tool) for tool in call.tools],
            "top_p": call.options["top_p"],
            "truncation": "disabled",
            "usage": None if reply is None else self._usage(reply),
        }

    def _usage(self, reply: Reply) -> dict[str, Any]:
        stats = reply.stats
        return {
            "input_tokens": stats.prompt_tokens,
            "input_tokens_details": {"cached_tokens": stats.reused_tokens},
            "output_tokens": stats.tokens,
            "output_tokens_details": {"reasoning_tokens": self._count(reply.reasoning)},
            "total_tokens": stats.prompt_tokens + stats.tokens,
        }


def _status(reply: Reply) -> str:
    cut = reply.finish_reason in ("length", "repetition", "deadline")
    return "incomplete" if cut else "completed"


def _tool(tool: Any) -> dict[str, Any]:
    function = tool.get("function", tool)
    return {
        "type": "function",
        "name": function["name"],
        "description": function.get("description"),
        "parameters": function.get("parameters"),
        "strict": function.get("strict"),
    }
