"""A model behind an OpenAI-compatible server, used like a local one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mimo_edge.agent import MAX_STEPS, Agent, Step, make_agent
from mimo_edge.cancel import Cancel
from mimo_edge.engine import GenerationStats
from mimo_edge.errors import RemoteProtocolError, UsageError
from mimo_edge.remote.address import Connection
from mimo_edge.remote.session import RemoteSession
from mimo_edge.remote.wire import Wire
from mimo_edge.tool_functions import Tool
from mimo_edge.totals import Totals

# How many names an error lists.
_SHOWN_MODELS = 8


class RemoteRuntime:
    """One model of one server. Made by `Runtime.connect`; a context manager; `close` may be
    repeated. Sessions may be used from several threads, and their requests run side by side."""

    def __init__(
        self,
        url: str,
        model: str | None = None,
        api_key: str | None = None,
        connection: Connection | None = None,
    ) -> None:
        """Asks the server nothing yet: it may come within reach later. Raises UsageError."""
        self.wire = Wire(url, api_key, connection or Connection())
        self._wanted = model
        self._model: str | None = None
        self._context: int | None = None
        self._totals = Totals()
        self._lock = threading.Lock()

    @classmethod
    def connect(
        cls,
        url: str,
        model: str | None = None,
        api_key: str | None = None,
        connection: Connection | None = None,
    ) -> RemoteRuntime:
        """A runtime whose server was there and has the model. Raises as `Runtime.connect`."""
        made = cls(url, model, api_key, connection)
        try:
            made.resolve(Cancel())
        except BaseException:
            made.close()
            raise
        return made

    def resolve(self, cancel: Cancel, end: float | None = None) -> str:
        """The model's name, asked of the server the first time. Raises RemoteError, UsageError when
        it has another or several, and what the wire raises."""
        if self._model is None:
            found = _models(self.wire.get("/models", cancel, end))
            names = list(found)
            wanted = self._wanted or (names[0] if len(names) == 1 else None)
            shown = ", ".join(names[:_SHOWN_MODELS]) or "none"
            if wanted is None:
                raise UsageError(f"{self.wire.url} has these models: {shown}", "name one of them")
            if wanted not in found:
                raise UsageError(f"{self.wire.url} has no model {wanted!r}", f"it has {shown}")
            self._context, self._model = found[wanted], wanted
        return self._model

    @property
    def name(self) -> str:
        """Name of the model."""
        return self._model or self._wanted or "unknown"

    @property
    def context(self) -> int | None:
        """Most tokens of a conversation; None where the server does not say."""
        return self._context

    def session(
        self,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        constrain_tools: bool = True,
    ) -> RemoteSession:
        """A new conversation, as `Runtime.session`. `constrain_tools` is there for programs that
        run on either: what a server does is its own choice. Raises UsageError on malformed tools.
        """
        self.wire.check_open()
        return RemoteSession(self, system, tools or (), enable_thinking)

    def agent(
        self,
        tools: Sequence[Tool | Callable[..., Any]],
        system: str | None = None,
        *,
        max_steps: int = MAX_STEPS,
        enable_thinking: bool | None = None,
        on_step: Callable[[Step], None] | None = None,
        constrain_tools: bool = True,
    ) -> Agent:
        """As `Runtime.agent`: the model runs there, the tools run here."""
        return make_agent(self, tools, system, max_steps, on_step, enable_thinking=enable_thinking)

    def stats(self) -> dict[str, Any]:
        """JSON-ready totals as seen from here: times include the network, tokens are those the
        server counted."""
        with self._lock:
            totals = Totals(**asdict(self._totals))
        return {
            "model": self.name,
            "backend": "remote",
            "url": self.wire.url,
            "context": self.context,
            "generations": totals.generations,
            "prompt_tokens": totals.prompt_tokens,
            "reused_tokens": totals.reused_tokens,
            "tokens": totals.tokens,
            "prefill_ms": totals.prefill_ms,
            "decode_ms": totals.decode_ms,
            "decode_tps": totals.decode_tps,
        }

    def count(self, stats: GenerationStats) -> None:
        """Add an answer to the totals."""
        with self._lock:
            self._totals.add(stats)

    def close(self) -> None:
        """End every request and the connections."""
        self.wire.close()

    def __enter__(self) -> RemoteRuntime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _models(answer: Mapping[str, Any]) -> dict[str, int | None]:
    """Names and contexts (None: not said) from a list of models."""
    listed = answer.get("data")
    if not isinstance(listed, list):
        raise RemoteProtocolError("the server's list of models is none")
    found: dict[str, int | None] = {}
    for model in listed:
        name = model.get("id") if isinstance(model, dict) else None
        if not isinstance(name, str):
            raise RemoteProtocolError("the server's list of models has one without a name")
        # Ours, and what vLLM calls it; SGLang says nothing.
        context = model.get("context_length", model.get("max_model_len"))
        found[name] = context if isinstance(context, int) and context > 0 else None
    return found
