"""Conversations that move between this device and a server, as a policy says.

Each place keeps its own session. Before an answer the chosen one gets the turns it did not see: the
local model finds its own earlier turns in its cache, the server gets all in OpenAI's form.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

from mimo_edge.agent import MAX_STEPS, Agent, Step, make_agent
from mimo_edge.api import Runtime
from mimo_edge.chat_template import check_messages
from mimo_edge.conversation import Conversation
from mimo_edge.errors import (
    DeviceError,
    MimoEdgeError,
    RemoteError,
)
from mimo_edge.remote.address import check_extra
from mimo_edge.remote.policy import Choice, Need, Place, Policy, Speed, choose
from mimo_edge.remote.request import to_openai
from mimo_edge.remote.runtime import RemoteRuntime
from mimo_edge.remote.session import RemoteSession
from mimo_edge.reply import DEFAULT_MAX_TOKENS, Piece, Prompt
from mimo_edge.session import Session
from mimo_edge.tool_functions import Tool

_log = logging.getLogger(__name__)


class RoutedRuntime:
    """What `Policy.open` gives: the API of a runtime over two places. `local` and `remote` are
    the runtimes themselves, None where there is none."""

    def __init__(self, policy: Policy, local: Runtime | None, remote: RemoteRuntime | None) -> None:
        self.policy = policy
        self.local = local
        self.remote = remote
        self.answers: Counter[Place] = Counter()

    @classmethod
    def open(cls, policy: Policy) -> RoutedRuntime:
        """See `Policy.open`."""
        remote = None
        if policy.where != "local-only":
            check_extra()
            assert policy.url is not None
            remote = RemoteRuntime(policy.url, policy.model, policy.api_key, policy.connection)
        local = None
        try:
            if policy.where != "remote-only":
                assert policy.bundle is not None
                local = Runtime.open(policy.bundle, **policy.local)
        except DeviceError as error:
            if remote is None:
                raise
            _log.warning("%s answers: %s", remote.wire.url, error)
        except BaseException:
            if remote is not None:
                remote.close()
            raise
        return cls(policy, local, remote)

    @property
    def name(self) -> str:
        """Name of the model that is asked first."""
        both = (self.local, self.remote)
        first, second = both if self.policy.where.startswith("local") else both[::-1]
        found = first or second
        assert found is not None
        return found.name

    def session(
        self,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        constrain_tools: bool = True,
    ) -> RoutedSession:
        """A new conversation, as `Runtime.session`."""
        return RoutedSession(self, system, tools or (), enable_thinking, constrain_tools)

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
        """As `Runtime.agent`; every answer of a run may come from another place."""
        session_options = {"enable_thinking": enable_thinking, "constrain_tools": constrain_tools}
        return make_agent(self, tools, system, max_steps, on_step, **session_options)

    def stats(self) -> dict[str, Any]:
        """JSON-ready: how many answers came from where, and the totals of both."""
        return {
            "policy": self.policy.where,
            "answers": {place: self.answers[place] for place in ("local", "remote")},
            "local": None if self.local is None else self.local.stats(),
            "remote": None if self.remote is None else self.remote.stats(),
        }

    def speed(self) -> Speed:
        """What was measured on this device so far."""
        if self.local is None:
            return Speed()
        stats = self.local.stats()
        answers = stats["generations"]
        mean = stats["tokens"] / answers if answers else 0.0
        return Speed(stats["prefill_tps"], stats["decode_tps"], mean)

    def close(self) -> None:
        """Close both."""
        if self.remote is not None:
            self.remote.close()
        if self.local is not None:
            self.local.close()

    def __enter__(self) -> RoutedRuntime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RoutedSession(Conversation):
    """A conversation in either place. `choice` is where the newest answer came from, and why."""

    def __init__(
        self,
        runtime: RoutedRuntime,
        system: str | None,
        tools: Sequence[Mapping[str, Any]],
        enable_thinking: bool | None,
        constrain_tools: bool = True,
    ) -> None:
        super().__init__(system)
        self._runtime = runtime
        self._tools = tuple(tools)
        self._local: Session | None = None
        self._remote: RemoteSession | None = None
        if runtime.local is not None:
            self._local = runtime.local.session(
                system, tools, enable_thinking, constrain_tools=constrain_tools
            )
        if runtime.remote is not None:
            self._remote = runtime.remote.session(system, tools, enable_thinking)
        self.choice: Choice | None = None

    def tool_result(self, text: str, name: str | None = None) -> None:
        """Add what a tool returned, as `Session.tool_result`."""
        message: dict[str, Any] = {"role": "tool", "content": text}
        if name is not None:
            message["name"] = name
        self.messages.extend(check_messages([message]))

    def stream(
        self, prompt: Prompt = None, *, timeout_s: float | None = None, **options: Any
    ) -> Iterator[Piece]:
        """Answer `prompt`, piece by piece; options and errors as `Session.stream`.

        A server that fails before anything of its answer came is replaced by the local model where
        that can answer; later the error is raised, because what was said cannot be taken back.
        """
        self.stop()
        end = None if timeout_s is None else time.monotonic() + timeout_s
        choice = self._choose(prompt, timeout_s, options)
        # Checks of the chosen place are made before this returns, like everywhere.
        begun = self._begin(choice.place, prompt, end, options)
        pieces = self._run(choice, prompt, end, options, begun)
        self._active = pieces
        return pieces

    def cancel(self) -> None:
        """End the running answer; from any thread or signal handler."""
        for session in (self._local, self._remote):
            if session is not None:
                session.cancel()

    def close(self) -> None:
        """End the conversation."""
        self.stop()
        for session in (self._local, self._remote):
            if session is not None:
                session.close()

    # --- inside -------------------------------------------------------------------------

    def _choose(
        self, prompt: Prompt, timeout_s: float | None, options: Mapping[str, Any]
    ) -> Choice:
        runtime, local = self._runtime, self._local
        if local is None:
            return choose(runtime.policy.where, None, Need(0, 0), Speed())
        self._bring(local)
        tokens, known = local.prompt_tokens(prompt)
        most = options.get("max_tokens", DEFAULT_MAX_TOKENS)
        need = Need(tokens, tokens - known, most, timeout_s)
        assert runtime.local is not None
        return choose(runtime.policy.where, runtime.local.context, need, runtime.speed())

    def _bring(self, session: Session | RemoteSession) -> None:
        """Let a place know the whole conversation."""
        if isinstance(session, RemoteSession):
            session.messages = to_openai(self.messages, self._tools)
        else:
            session.messages = list(self.messages)

    def _begin(
        self, place: Place, prompt: Prompt, end: float | None, options: Mapping[str, Any]
    ) -> Iterator[Piece]:
        session = self._local if place == "local" else self._remote
        assert session is not None
        self._bring(session)
        if end is not None:
            # What is left of the time; a little even when nothing is, so that it ends the same way.
            options = {**options, "timeout_s": max(1e-3, end - time.monotonic())}
        return session.stream(prompt, **options)

    def _run(
        self,
        choice: Choice,
        prompt: Prompt,
        end: float | None,
        options: Mapping[str, Any],
        pieces: Iterator[Piece],
    ) -> Generator[Piece, None, None]:
        came = False
        try:
            try:
                for piece in pieces:
                    came = True
                    yield piece
                self._keep(choice)
            except RemoteError as error:
                if came or choice.must or self._local is None:
                    raise
                _log.warning("answered here: %s", error)
                choice = Choice("local", f"the server could not answer: {error}", must=True)
                pieces = self._begin("local", prompt, end, options)
                for piece in pieces:
                    yield piece
                self._keep(choice)
        except GeneratorExit:
            pieces.close()  # type: ignore[attr-defined]
            self._keep(choice)
            raise
        except MimoEdgeError:
            self.choice = choice
            self._last = self._of(choice).last_reply if came else self._last
            raise

    def _keep(self, choice: Choice) -> None:
        """Take over what the place added to its conversation."""
        session = self._of(choice)
        self.choice = choice
        self._last = session.last_reply
        # Both forms have one message for one; earlier ones stay as their own place made them.
        self.messages = [*self.messages, *session.messages[len(self.messages) :]]
        self._runtime.answers[choice.place] += 1

    def _of(self, choice: Choice) -> Session | RemoteSession:
        session = self._local if choice.place == "local" else self._remote
        assert session is not None
        return session
