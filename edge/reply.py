"""What a conversation takes and gives: prompts, pieces of an answer, and the whole of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from mimo_edge.chat_template import Message, check_messages
from mimo_edge.engine import GenerationStats
from mimo_edge.errors import UsageError
from mimo_edge.logprobs import TokenLogprob
from mimo_edge.tool_calls import Malformed, ToolCall

FinishReason = Literal[
    "stop", "length", "tool_calls", "repetition", "deadline", "cancelled", "broken"
]
"""Why an answer ended; "broken" where a connection broke, see `Runtime.connect`."""
DEFAULT_MAX_TOKENS = 256

Prompt = str | Sequence[Message] | Sequence[int] | None
"""A user's text, several messages, raw token ids, or None to answer what is there."""


@dataclass(frozen=True)
class Piece:
    """A part of an answer. `text` is what to show: reasoning and tool calls come apart.

    The last piece of an answer, and only that, has a `finish_reason`.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Reply:
    """A whole answer. `malformed` lists tool calls that could not be read; their text is in
    `text`. `token_ids` holds every generated id, the stop token included; `logprobs`, when asked
    for, has one entry for each."""

    text: str
    token_ids: tuple[int, ...]
    tool_calls: tuple[ToolCall, ...]
    finish_reason: FinishReason
    stats: GenerationStats
    reasoning: str = ""
    malformed: tuple[Malformed, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


def messages_of(history: Sequence[dict[str, Any]], prompt: Prompt) -> list[dict[str, Any]]:
    """A conversation with this turn added. Raises UsageError, TokenizerError."""
    if are_ids(prompt):
        raise UsageError("token ids are for local models", "give a text or messages")
    if prompt is None:
        turn: Sequence[Message] = ()
    elif isinstance(prompt, str):
        turn = [{"role": "user", "content": prompt}]
    else:
        turn = prompt  # type: ignore[assignment]
    messages = [*history, *check_messages(turn)]
    if not any(message["role"] != "system" for message in messages):
        raise UsageError("there is no message to answer", "give a prompt")
    return messages


def are_ids(prompt: Prompt) -> TypeGuard[Sequence[int]]:
    """Whether a prompt is raw token ids. An empty list is neither and counts as messages."""
    if prompt is None or isinstance(prompt, (str, bytes, Mapping)):
        return False
    try:
        first = prompt[0]
    except (IndexError, TypeError, KeyError):
        return False
    return not isinstance(first, (str, Mapping)) and hasattr(first, "__index__")
