"""What one server takes on."""

from __future__ import annotations

from dataclasses import dataclass

from mimo_edge.errors import UsageError


@dataclass(frozen=True)
class Limits:
    """Bounds of a server; requests beyond them are answered 413, 400, 429 or 503.

    `concurrent` generations run, taking turns token by token; `queued` more wait, `queue_wait_s`
    seconds at most. `conversations` is how many processed conversations are held in memory, the
    running ones among them. `prompt_tokens` None is the context. `body_wait_s` is the time a client
    has to send its request, `keep_alive_s` how often a stream shows that it is alive.
    Raises UsageError.
    """

    body_bytes: int = 2 << 20
    prompt_tokens: int | None = None
    concurrent: int = 4
    queued: int = 16
    conversations: int = 8
    queue_wait_s: float = 60.0
    body_wait_s: float = 30.0
    keep_alive_s: float = 10.0

    def __post_init__(self) -> None:
        for name, least in (
            ("body_bytes", 1),
            ("prompt_tokens", 1),
            ("concurrent", 1),
            ("queued", 0),
            ("conversations", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} = {value}", f"use {least} or more")
        for name in ("queue_wait_s", "body_wait_s", "keep_alive_s"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} = {getattr(self, name)}", "use more than 0")
        if self.conversations < self.concurrent:
            raise UsageError(
                f"{self.concurrent} concurrent requests, but {self.conversations} conversations",
                "every running request needs one",
            )
