"""Where an answer is computed: on this device, on a server, or on whichever can do it in time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mimo_edge.errors import UsageError
from mimo_edge.remote.address import Connection

if TYPE_CHECKING:
    from mimo_edge.remote.routed import RoutedRuntime

Where = Literal["local-first", "local-only", "remote-first", "remote-only"]
Place = Literal["local", "remote"]
WHERE: tuple[Where, ...] = ("local-first", "local-only", "remote-first", "remote-only")


@dataclass(frozen=True)
class Policy:
    """Which model answers; `open` gives a runtime that keeps to it.

        policy = Policy("local-first", bundle="demo-bundle", url="http://192.168.1.2:8080")
        with policy.open() as runtime:
            runtime.session().generate("...")

    "local-first" answers on the device, and on the server what does not fit here (the model, or a
    prompt with the tokens asked for) or cannot be done here within its `timeout_s`, by the speed
    measured so far. "remote-first" goes to the server and answers here what it could not be reached
    for. "local-only" and "remote-only" use one of them. A program that is moved from a device to a
    serving cluster changes this object and nothing else.

    `local` holds options of `Runtime.open` (profile, ram, ...); `model`, `api_key` and `connection`
    are those of `Runtime.connect`. Raises UsageError when a place it may use is not named.
    """

    where: Where = "local-first"
    bundle: str | Path | None = None
    url: str | None = None
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    connection: Connection = field(default_factory=Connection)
    local: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.where not in WHERE:
            raise UsageError(f"where = {self.where!r}", f"use {', '.join(WHERE)}")
        if self.bundle is None and self.where != "remote-only":
            raise UsageError(f"the policy {self.where} needs a bundle", "name one")
        if self.url is None and self.where != "local-only":
            raise UsageError(f"the policy {self.where} needs the url of a server", "name one")

    def open(self) -> RoutedRuntime:
        """Open what the policy may use. The server is asked nothing before it is needed; a local
        model that does not fit is left closed where a server may answer.

        Raises what `Runtime.open` raises, and UsageError on a wrong url.
        """
        from mimo_edge.remote.routed import RoutedRuntime

        return RoutedRuntime.open(self)


@dataclass(frozen=True)
class Need:
    """What one answer needs: tokens of the prompt, those not processed yet, the most it may
    generate, and the time it has."""

    prompt_tokens: int
    new_tokens: int
    max_tokens: int | None = None
    timeout_s: float | None = None


@dataclass(frozen=True)
class Speed:
    """What was measured on this device so far; 0 is nothing yet. `answer_tokens` is the mean."""

    prefill_tps: float = 0.0
    decode_tps: float = 0.0
    answer_tokens: float = 0.0

    def seconds(self, need: Need) -> float | None:
        """How long an answer will take here; None before anything was measured. Its length is
        taken to be that of the answers so far."""
        if not self.prefill_tps or not self.decode_tps:
            return None
        tokens = self.answer_tokens
        if need.max_tokens is not None:
            tokens = min(tokens, need.max_tokens)
        return need.new_tokens / self.prefill_tps + tokens / self.decode_tps


@dataclass(frozen=True)
class Choice:
    """Where an answer is computed and why. `must` says that the other place could not do it."""

    place: Place
    why: str
    must: bool = False


def choose(where: Where, context: int | None, need: Need, speed: Speed) -> Choice:
    """The place for one answer; `context` is that of the local model, None when there is none."""
    if where == "local-only":
        return Choice("local", "the policy is local-only", must=True)
    if where == "remote-only":
        return Choice("remote", "the policy is remote-only", must=True)
    if context is None:
        return Choice("remote", "the model does not fit this device", must=True)
    if need.prompt_tokens > context:
        return Choice(
            "remote",
            f"the prompt has {need.prompt_tokens} tokens, the local context {context}",
            must=True,
        )
    if where == "remote-first":
        return Choice("remote", "the policy is remote-first")
    if need.prompt_tokens + (need.max_tokens or 0) > context:
        return Choice(
            "remote",
            f"{need.prompt_tokens} prompt tokens and {need.max_tokens} more are beyond the local "
            f"context of {context}",
        )
    seconds = speed.seconds(need)
    if need.timeout_s is not None and seconds is not None and seconds > need.timeout_s:
        return Choice(
            "remote",
            f"it would take {seconds:.1f} s here, the deadline is {need.timeout_s:g} s",
        )
    return Choice("local", "it fits")
