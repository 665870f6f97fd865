"""A conversation with a server: the API of a local session."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from mimo_edge.answer_options import AnswerKeywords, AnswerOptions
from mimo_edge.answer_reader import Fragment
from mimo_edge.cancel import Cancel
from mimo_edge.chat_template import check_messages
from mimo_edge.conversation import Conversation
from mimo_edge.engine import GenerationStats
from mimo_edge.errors import Cancelled, RemoteBrokenError, UsageError
from mimo_edge.remote.chunks import DONE, ChunkReader
from mimo_edge.remote.request import request_body, to_openai
from mimo_edge.remote.wire import Late
from mimo_edge.repetition import check_stop_repeats
from mimo_edge.reply import FinishReason, Piece, Prompt, Reply, messages_of
from mimo_edge.tool_calls import tool_schemas

if TYPE_CHECKING:
    from mimo_edge.remote.runtime import RemoteRuntime

_PATH = "/chat/completions"
# What servers say, in our words.
_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
}


class RemoteSession(Conversation):
    """As `mimo_edge.session.Session`. What differs: replies have no token ids, and the server
    processes the whole conversation again unless it keeps what it knows (mimo-edge does).

    When a connection breaks inside an answer, the error is raised, `last_reply` holds what arrived
    with the finish reason "broken", and the history stays as before, so that the same prompt can
    be given again.
    """

    def __init__(
        self,
        runtime: RemoteRuntime,
        system: str | None,
        tools: Sequence[Mapping[str, Any]],
        enable_thinking: bool | None,
    ) -> None:
        tool_schemas(tools)
        super().__init__(system)
        self._runtime = runtime
        self._tools = tuple(tools)
        self._enable_thinking = enable_thinking
        self._cancel = Cancel()

    def tool_result(self, text: str, name: str | None = None) -> None:
        """Add what a tool returned: the result of the next call that has none, or of the next with
        this `name`. Raises UsageError when no call waits for it."""
        for call in self._unanswered():
            if name is None or call["function"]["name"] == name:
                (message,) = check_messages([{"role": "tool", "content": text}])
                self.messages.append({**message, "tool_call_id": call["id"]})
                return
        raise UsageError(f"no call{f' of {name}' if name else ''} waits for a result")

    def stream(
        self,
        prompt: Prompt = None,
        *,
        timeout_s: float | None = None,
        **answer_options: Unpack[AnswerKeywords],
    ) -> Iterator[Piece]:
        """Answer `prompt`, piece by piece; options as those of `Session.stream`. `logprobs` are
        for local models; whether a schema, a regular expression or a choice of tools is kept to is
        the server's affair.

        Options are checked before this returns; RemoteError, and ContextLengthError when the
        server says so, come with the pieces. `timeout_s` seconds after this call the answer ends,
        with the finish reason "deadline".
        """
        options = AnswerOptions(**answer_options)
        max_tokens = options.max_tokens
        if max_tokens is not None and (
            isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1
        ):
            raise UsageError(f"max_tokens = {max_tokens!r}", "ask for at least one")
        check_stop_repeats(options.stop_repeats)
        if timeout_s is not None and not timeout_s > 0:
            raise UsageError(f"timeout_s = {timeout_s!r}", "use more than 0 seconds, or None")
        end = None if timeout_s is None else time.monotonic() + timeout_s
        self._runtime.wire.check_open()
        self.stop()
        messages = to_openai(messages_of(self.messages, prompt), self._tools)
        body = request_body(messages, self._tools, self._enable_thinking, options)
        self._cancel.clear()
        pieces = self._run(body, end)
        self._active = pieces
        return pieces

    def cancel(self) -> None:
        """Give up the running request; from any thread or signal handler."""
        self._cancel.set()

    # --- inside -------------------------------------------------------------------------

    def _run(self, body: dict[str, Any], end: float | None) -> Generator[Piece, None, None]:
        before = self.messages
        self.messages = list(body["messages"])
        reader, whole, times = ChunkReader(self._tools), Fragment(), _Times()
        reason: FinishReason = "broken"
        failed = True
        rest = Fragment()
        try:
            try:
                body["model"] = self._runtime.resolve(self._cancel, end)
                for data in self._runtime.wire.stream(_PATH, body, self._cancel, end):
                    if data == DONE:
                        break
                    part = reader.feed(data)
                    times.mark(reader.began)
                    whole.add(part)
                    if part.text or part.reasoning or part.tool_calls:
                        yield _piece(part, None)
                reason = _ended(reader)
                rest = reader.finish()
                whole.add(rest)
            except Late:
                reason = "deadline"
            except Cancelled:
                self._runtime.wire.check_open()  # closed under us is no wish of the caller
                reason = "cancelled"
            failed = False
        except (GeneratorExit, KeyboardInterrupt):
            reason, failed = "cancelled", False
            raise
        finally:
            if failed:
                self.messages = before
            elif reader.began:
                self.messages.append(_message(whole, reader))
            if reader.began or not failed:
                self._last = _reply(whole, reason, times.stats(reader))
                self._runtime.count(self._last.stats)
        yield _piece(rest, reason)

    def _unanswered(self) -> list[dict[str, Any]]:
        """Calls of the last answer without a result."""
        calls: list[dict[str, Any]] = []
        for message in self.messages:
            if message["role"] == "tool":
                calls = [call for call in calls if call["id"] != message.get("tool_call_id")]
            else:
                calls = list(message.get("tool_calls") or ())
        return calls


class _Times:
    """When a request was sent, and when something of its answer came first."""

    def __init__(self) -> None:
        self._sent = time.perf_counter()
        self._first: float | None = None

    def mark(self, began: bool) -> None:
        if began and self._first is None:
            self._first = time.perf_counter()

    def stats(self, reader: ChunkReader) -> GenerationStats:
        """Times as they are here, the network included. Without the server's counts of tokens
        there are none, and no speed."""
        now = time.perf_counter()
        stats = GenerationStats(prefill_ms=1e3 * ((self._first or now) - self._sent))
        if self._first is not None:
            stats.first_token_ms = stats.prefill_ms
        if reader.usage is not None:
            stats.prompt_tokens = reader.usage.prompt_tokens
            stats.reused_tokens = reader.usage.cached_tokens
            stats.tokens = reader.usage.tokens
            if self._first is not None:
                stats.decode_ms = 1e3 * (now - self._first)
        return stats


def _ended(reader: ChunkReader) -> FinishReason:
    """Why a stream that closed in order ended. Raises RemoteBrokenError when it does not say."""
    given = reader.finish_reason
    if given is None:
        raise RemoteBrokenError("the stream ended before the answer did")
    if given not in _REASONS:
        raise RemoteBrokenError(f"the server gave the answer up: {given[:80]}")
    return _REASONS[given]


def _message(whole: Fragment, reader: ChunkReader) -> dict[str, Any]:
    text = whole.text
    for malformed in whole.malformed:  # they are among the calls
        text = text.replace(malformed.text, "", 1)
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if whole.reasoning:
        message["reasoning_content"] = whole.reasoning
    if reader.call_messages:
        message["tool_calls"] = list(reader.call_messages)
    return message


def _reply(whole: Fragment, reason: FinishReason, stats: GenerationStats) -> Reply:
    return Reply(
        whole.text,
        (),
        tuple(whole.tool_calls),
        reason,
        stats,
        whole.reasoning,
        tuple(whole.malformed),
    )


def _piece(part: Fragment, reason: FinishReason | None) -> Piece:
    return Piece(part.text, (), reason, part.reasoning, tuple(part.tool_calls))
