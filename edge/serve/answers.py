"""Answers in OpenAI's shapes: whole, and as the chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mimo_edge.engine import GenerationStats
from mimo_edge.logprobs import TokenLogprob
from mimo_edge.reply import Piece, Reply
from mimo_edge.serve.calls import Call
from mimo_edge.serve.refusal import Refusal
from mimo_edge.serve.token_logprobs import chat_logprobs, completion_logprobs
from mimo_edge.tokenizer import Tokenizer
from mimo_edge.tool_calls import ToolCall

# OpenAI has no word for an answer that repeated itself or took too long: like one at its limit, it
# was cut off.
_REASONS: dict[str, str] = {"repetition": "length", "deadline": "length"}

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": still here\n\n"


def to_json(value: Any) -> bytes:
    """JSON in ASCII: whatever text it holds can be sent."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")


def event(value: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


class Answer:
    """One answer under one id: `whole`, or `first`, `chunks` of every piece and `last`."""

    def __init__(self, call: Call, tokenizer: Tokenizer | None) -> None:
        self._call = call
        self._tokenizer = tokenizer
        self._logprobs: list[TokenLogprob] = []  # of tokens that no chunk has shown yet
        self._written = 0  # characters of a completion's tokens so far
        self._chat = call.kind == "chat"
        self._id = ("chatcmpl-" if self._chat else "cmpl-") + secrets.token_hex(12)
        self._created = int(time.time())
        self._calls = 0
        self._tokens = 0
        self._progress: GenerationStats | None = None

    def whole(self, reply: Reply) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        self._logprobs += reply.logprobs
        choice: dict[str, Any] = {"index": 0, "logprobs": self._take_logprobs()}
        if self._chat:
            calls = [self._tool_call(call) for call in reply.tool_calls]
            message: dict[str, Any] = {
                "role": "assistant",
                "content": reply.text if reply.text or not calls else None,
                "refusal": None,
            }
            if reply.reasoning:
                message["reasoning_content"] = reply.reasoning
            if calls:
                message["tool_calls"] = calls
            choice["message"] = message
        else:
            choice["text"] = reply.reasoning + reply.text
        choice["finish_reason"] = _REASONS.get(reply.finish_reason, reply.finish_reason)
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head(kind), "choices": [choice], "usage": usage(reply.stats)}

    def first(self) -> Iterator[bytes]:
        """What a stream begins with."""
        if self._chat:
            yield self._chunk({"role": "assistant", "content": ""}, None)

    def see(self, piece: Piece) -> None:
        """Take note of a piece of an answer that is told whole: its reply says all."""

    def chunks(self, piece: Piece, progress: GenerationStats | None = None) -> Iterator[bytes]:
        """A piece as events; none when it shows nothing yet. `progress` is that of the generation,
        which may be ahead of the piece."""
        self._tokens += len(piece.token_ids)
        self._progress = progress
        self._logprobs += piece.logprobs
        if not self._chat:
            text = piece.reasoning + piece.text
            if text or piece.finish_reason:
                yield self._chunk(text, piece.finish_reason)
            return
        delta: dict[str, Any] = {}
        if piece.reasoning:
            delta["reasoning_content"] = piece.reasoning
        if piece.text:
            delta["content"] = piece.text
        if piece.tool_calls:
            delta["tool_calls"] = []
            for call in piece.tool_calls:
                delta["tool_calls"].append({"index": self._calls, **self._tool_call(call)})
                self._calls += 1
        if delta:
            yield self._chunk(delta, None)
        if piece.finish_reason:
            yield self._chunk({}, piece.finish_reason)

    def last(self, reply: Reply) -> Iterator[bytes]:
        """What a stream ends with."""
        if self._call.include_usage:
            yield event(
                {**self._head(self._chunk_kind), "choices": [], "usage": usage(reply.stats)}
            )
        yield DONE

    def error(self, refusal: Refusal) -> bytes:
        """What a stream says that cannot go on."""
        return event(refusal.body())

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._call.model,
        }

    def _chunk(self, content: dict[str, Any] | str, reason: str | None) -> bytes:
        reason = None if reason is None else _REASONS.get(reason, reason)
        choice: dict[str, Any] = {
            "index": 0,
            "logprobs": self._take_logprobs(),
            "finish_reason": reason,
        }
        choice["delta" if self._chat else "text"] = content
        chunk = {**self._head(self._chunk_kind), "choices": [choice]}
        if self._call.usage_so_far and self._progress is not None:
            chunk["usage"] = usage(replace(self._progress, tokens=self._tokens))
        elif self._call.include_usage:
            chunk["usage"] = None
        return event(chunk)

    def _take_logprobs(self) -> dict[str, Any] | None:
        """Log-probabilities of the tokens since the last call, when they were asked for."""
        taken, self._logprobs = self._logprobs, []
        if self._call.options.get("logprobs") is None:
            return None
        if self._chat:
            return chat_logprobs(taken, self._tokenizer)
        shown = completion_logprobs(taken, self._tokenizer, self._written)
        self._written += sum(map(len, shown["tokens"]))
        return shown

    @staticmethod
    def _tool_call(call: ToolCall) -> dict[str, Any]:
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        return {
            "id": "call_" + secrets.token_hex(12),
            "type": "function",
            "function": {"name": call.name, "arguments": arguments},
        }


def usage(stats: GenerationStats) -> dict[str, Any]:
    """Token counts; cached are those of the prompt that were processed before."""
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.tokens,
        "total_tokens": stats.prompt_tokens + stats.tokens,
        "prompt_tokens_details": {"cached_tokens": stats.reused_tokens},
    }
