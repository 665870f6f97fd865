"""What every session is, wherever its model runs: on this device, on a server, on either."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Generator, Iterator, Mapping, Sequence
from typing import Any, Protocol

from mimo_edge.chat_template import check_messages
from mimo_edge.errors import UsageError
from mimo_edge.reply import Piece, Prompt, Reply


class Conversation(ABC):
    """Messages, and one answer at a time. `mimo_edge.session.Session` says what each part means,
    and what options exist."""

    def __init__(self, system: str | None) -> None:
        self._active: Generator[Piece, None, None] | None = None
        self._last: Reply | None = None
        self.messages: list[dict[str, Any]] = []
        """The conversation so far, as the chat template sees it; with a server in OpenAI's form."""
        if system is not None:
            self.messages = check_messages([{"role": "system", "content": system}])

    @property
    def last_reply(self) -> Reply | None:
        """The newest answer, complete or as far as it got."""
        return self._last

    @abstractmethod
    def tool_result(self, text: str, name: str | None = None) -> None:
        """Add what a tool returned; `stream()` without a prompt goes on from there."""

    @abstractmethod
    def stream(self, *prompt: Any, **options: Any) -> Iterator[Piece]:
        """Answer a prompt, piece by piece."""

    def generate(self, prompt: Prompt = None, **options: Any) -> Reply:
        """Answer `prompt` at once. Options and errors as in `stream`."""
        for _ in self.stream(prompt, **options):
            pass
        assert self._last is not None
        return self._last

    def astream(self, prompt: Prompt = None, **options: Any) -> AsyncIterator[Piece]:
        """`stream` for asyncio: the model runs in a thread, the event loop stays free.

        Cancelling the task cancels the generation and waits until it has stopped.
        """
        from mimo_edge.async_stream import in_threads  # asyncio is only loaded where it is used

        return in_threads(self.stream(prompt, **options), self.cancel)

    @abstractmethod
    def cancel(self) -> None:
        """End the running answer; from any thread or signal handler."""

    def stop(self) -> None:
        """Close the running stream, if any: what came of its answer stays, in `last_reply` too.
        Raises UsageError while it runs in another thread."""
        active, self._active = self._active, None
        if active is None:
            return
        try:
            active.close()
        except ValueError:  # "generator already executing"
            self._active = active
            raise UsageError(
                "this session is generating in another thread", "cancel it or use another session"
            ) from None

    def close(self) -> None:
        """End the conversation: `stop`. May be repeated."""
        self.stop()


class Opened(Protocol):
    """A runtime, as far as agents need it."""

    def session(
        self,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        *options: Any,
        **more_options: Any,
    ) -> Conversation:
        """A new conversation."""
        ...
