"""What every runtime offers, wherever its model runs: on this device, on a server, on either."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from mimo_edge.reply import Piece, Reply


class Conversation(Protocol):
    """A session: `mimo_edge.session.Session` says what each part means, and what options exist."""

    messages: list[dict[str, Any]]

    @property
    def last_reply(self) -> Reply | None:
        """The newest answer, complete or as far as it got."""
        ...

    def tool_result(self, text: str, name: str | None = None) -> None:
        """Add what a tool returned."""
        ...

    def stream(self, *prompt: Any, **options: Any) -> Iterator[Piece]:
        """Answer piece by piece."""
        ...

    def generate(self, *prompt: Any, **options: Any) -> Reply:
        """Answer at once."""
        ...

    def astream(self, *prompt: Any, **options: Any) -> AsyncIterator[Piece]:
        """`stream` for asyncio."""
        ...

    def cancel(self) -> None:
        """End the running answer, from any thread."""
        ...

    def stop(self) -> None:
        """Close the running stream."""
        ...

    def close(self) -> None:
        """End the conversation."""
        ...


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
