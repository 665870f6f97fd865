"""The chat of `mimo-edge run`: what a line means, and the figures below an answer that grows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from mimo_edge.cli.output import Output
from mimo_edge.errors import MimoEdgeError, UsageError

if TYPE_CHECKING:
    from mimo_edge.api import Runtime
    from mimo_edge.session import Session

HELP = """/help            this list
/new             forget the conversation
/result TEXT     what the next tool call returned; the model goes on after the last one
/tools           the tools the model is shown
/set NAME VALUE  temperature, top_p, top_k, min_p, seed, max_tokens, stop_repeats
/stats           totals since the start
/memory          the memory plan
/save FILE       write the conversation, to go on with it later
/restore FILE    go on with a saved one
/quit            end; so does Ctrl-D"""
_WHOLE = ("top_k", "seed", "max_tokens", "stop_repeats")
_NUMBERS = ("temperature", "top_p", "min_p")


class Chat:
    """One conversation after another. `options` are those of `Session.stream`, `start` makes a new
    session, `tools` are what it was made with."""

    def __init__(
        self,
        out: Output,
        runtime: Runtime,
        start: Callable[[], Session],
        tools: list[Any],
        options: dict[str, Any],
    ) -> None:
        self._out = out
        self._runtime = runtime
        self._start = start
        self._tools = tools
        self.options = options
        self.session = start()
        self._waiting: list[str] = []  # names of calls without a result
        self.over = False

    def prompt_of(self, line: str) -> list[str | None]:
        """What a line asks the model: a text, None to go on, or nothing when it was a command or
        blank. Raises MimoEdgeError for a command that is none or failed."""
        if not line.strip():
            return []
        if not line.startswith("/"):
            return [line]
        name, _, rest = line[1:].partition(" ")
        command = getattr(self, f"_do_{name}", None) if name.isalpha() else None
        if command is None:
            raise UsageError(f"there is no /{name}", "/help lists the commands")
        going_on: bool | None = command(rest.strip())
        return [None] if going_on else []

    def answered(self) -> None:
        """Take note of the newest answer: its calls wait for their results."""
        reply = self.session.last_reply
        self._waiting = [] if reply is None else [call.name for call in reply.tool_calls]
        if self._waiting:
            self._out.note("calls are not carried out here; /result TEXT says what one returned")

    def _do_help(self, rest: str) -> None:
        self._out.note(HELP)

    def _do_quit(self, rest: str) -> None:
        self.over = True

    def _do_new(self, rest: str) -> None:
        self.session.close()
        self.session, self._waiting = self._start(), []

    def _do_result(self, rest: str) -> bool:
        if not self._waiting:
            raise UsageError("no call waits for a result")
        self.session.tool_result(rest or '{"status": "ok"}', self._waiting.pop(0))
        return not self._waiting

    def _do_tools(self, rest: str) -> None:
        for tool in self._tools:
            function = tool.get("function", tool)
            names = ", ".join(function.get("parameters", {}).get("properties", {}))
            self._out.note(f"{function['name']}({names})  {function.get('description', '')}")
        if not self._tools:
            self._out.note("none; --tools FILE gives some")

    def _do_set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        try:
            if name in _WHOLE:
                made: float = int(value)
            elif name in _NUMBERS:
                made = float(value)
            else:
                raise UsageError(f"/set {name}", f"use one of {', '.join((*_NUMBERS, *_WHOLE))}")
        except ValueError:
            raise UsageError(f"/set {name} {value!r} is no number") from None
        self.options[name] = made

    def _do_stats(self, rest: str) -> None:
        stats = self._runtime.stats()
        for name in ("generations", "prompt_tokens", "reused_tokens", "tokens", "verifies"):
            self._out.note(f"{name:<18}{stats[name]:>12}")
        for name in ("prefill_tps", "decode_tps", "tokens_per_verify"):
            self._out.note(f"{name:<18}{stats[name]:>12.2f}")

    def _do_memory(self, rest: str) -> None:
        for line in self._runtime.memory_plan() or ["no plan: --ram gives a bound"]:
            self._out.note(line)

    def _do_save(self, rest: str) -> None:
        if not rest:
            raise UsageError("/save needs a file")
        self.session.save(rest)
        self._out.note(f"saved to {rest}")

    def _do_restore(self, rest: str) -> None:
        if not rest:
            raise UsageError("/restore needs a file")
        session = self._runtime.restore(rest)
        self.session.close()
        self.session, self._waiting = session, []
        self._out.note(f"{len(session.messages)} messages")


def live_line(runtime: Runtime, session: Session) -> str:
    """Figures of the answer that grows: speed, drafts, experts, memory against its bound."""
    from mimo_edge.machine import peak_rss_bytes, rss_bytes
    from mimo_edge.units import format_bytes

    stats, found = session.progress, runtime.stats()
    parts = []
    if stats is not None:
        parts.append(f"{stats.tokens} tokens")
        if stats.verifies:
            parts.append(f"{stats.decode_tps:.1f} tok/s")
            accepted = sum(stats.accepted_by_depth) / stats.verifies
            parts.append(f"{accepted:.2f} accepted per verify")
    if found["experts"] is not None:
        parts.append(f"{100 * found['experts']['hit_rate']:.1f} % expert hits")
    memory = format_bytes(rss_bytes() or peak_rss_bytes())
    bound = None if found["budget"] is None else found["budget"]["ram"]
    parts.append(memory if bound is None else f"{memory} of {format_bytes(bound)}")
    return " | ".join(parts)


def lines(interactive: bool) -> Iterator[str]:
    """Lines of standard input, asked for when somebody sits there."""
    while True:
        if interactive:
            sys.stderr.write("> ")
            sys.stderr.flush()
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise UsageError(f"the input is not UTF-8 ({error.reason})") from error
        if not line:
            return
        yield line.rstrip("\r\n")


def report(out: Output, error: MimoEdgeError) -> None:
    """An error that does not end the chat."""
    out.note(f"error: {error}")
