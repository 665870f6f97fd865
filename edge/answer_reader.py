"""Generated ids to an answer: reasoning, text, tool calls, and where it stops.

Fed one token at a time in the order of generation, so drafting, which gains several at once,
changes nothing: the reader says after each token whether the answer ends with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mimo_edge.tokenizer import Tokenizer
from mimo_edge.tool_calls import OPEN, Malformed, ToolCall, ToolCallParser, held_back

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


@dataclass
class Fragment:
    """What became certain: visible text, reasoning, finished and malformed tool calls."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    malformed: list[Malformed] = field(default_factory=list)

    def add(self, other: Fragment) -> None:
        """Append what came later."""
        self.text += other.text
        self.reasoning += other.reasoning
        self.tool_calls += other.tool_calls
        self.malformed += other.malformed


class AnswerReader:
    """Reads one answer. `stop` strings end it and are cut off, wherever tokens split them;
    they are looked for in everything the model writes. `thinking` says that the prompt
    already opened the think block. With `calls_first` the answer is calls from its start on or
    holds none: what looks like one inside of other text is text."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        eos_ids: frozenset[int],
        stop: Sequence[str] = (),
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: bool = False,
        calls_first: bool = False,
    ) -> None:
        self._eos_ids = eos_ids
        self._decoder = tokenizer.stream_decoder(skip_control=True) if tokenizer else None
        self._stop = tuple(stop)
        self._held = ""
        self._calls = ToolCallParser(tools) if tools else None
        self._calls_first = calls_first
        # A think block counts at the very start only; later it is text like any other.
        self._state = "thinking" if thinking else "start"
        self._pending = ""
        self._ready = Fragment()
        self.content = ""  # the answer as written, tool calls included, reasoning not
        self.hit_stop = False

    def add(self, token: int) -> bool:
        """Read one token; True if the answer ends with it."""
        if token in self._eos_ids:
            return True
        if self._decoder is not None:
            self._add_text(self._decoder.feed([token]))
        return self.hit_stop

    def take(self) -> Fragment:
        """What became certain since the last call."""
        ready, self._ready = self._ready, Fragment()
        return ready

    def finish(self) -> Fragment:
        """The rest, once generation ended."""
        if not self.hit_stop:
            if self._decoder is not None:
                self._add_text(self._decoder.finish())
            if not self.hit_stop:
                self._release(self._held)
        self._held = ""
        self._end_think()
        if self._calls is not None:
            self._sort(self._calls.finish())
        return self.take()

    def _add_text(self, text: str) -> None:
        if not text:
            return
        self._held += text
        found = min(((at, s) for s in self._stop if (at := self._held.find(s)) >= 0), default=None)
        if found is not None:
            self.hit_stop = True
            self._release(self._held[: found[0]])
            self._held = ""
            return
        free = len(self._held) - held_back(self._held, self._stop)
        self._release(self._held[:free])
        self._held = self._held[free:]

    def _release(self, text: str) -> None:
        if not text:
            return
        if self._state == "text":
            self._visible(text)
            return
        self._pending += text
        if self._state == "start":
            stripped = self._pending.lstrip()
            if THINK_OPEN.startswith(stripped[: len(THINK_OPEN)]) and len(stripped) < len(
                THINK_OPEN
            ):
                return  # may still become the tag
            if not stripped.startswith(THINK_OPEN):
                self._end_think()
                return
            self._pending = stripped[len(THINK_OPEN) :]
            self._state = "thinking"
        close = self._pending.find(THINK_CLOSE)
        if close < 0:
            free = len(self._pending) - held_back(self._pending, (THINK_CLOSE,))
            self._ready.reasoning += self._pending[:free]
            self._pending = self._pending[free:]
            return
        self._ready.reasoning += self._pending[:close]
        rest, self._pending = self._pending[close + len(THINK_CLOSE) :], ""
        self._state = "text"
        self._visible(rest)

    def _end_think(self) -> None:
        """What is pending is what it looks like: open reasoning, or text after all."""
        rest, self._pending = self._pending, ""
        if self._state == "thinking":
            self._ready.reasoning += rest
        else:
            self._state = "text"
            self._visible(rest)

    def _visible(self, text: str) -> None:
        if not text:
            return
        self.content += text
        if self._calls is not None and self._calls_first:
            start = self.content.lstrip()[: len(OPEN)]
            if not OPEN.startswith(start):
                self._sort(self._calls.finish())
                self._calls = None
            elif start == OPEN:
                self._calls_first = False
        if self._calls is None:
            self._ready.text += text
        else:
            self._sort(self._calls.feed(text))

    def _sort(self, events: Sequence[str | ToolCall | Malformed]) -> None:
        for event in events:
            if isinstance(event, ToolCall):
                self._ready.tool_calls.append(event)
            elif isinstance(event, Malformed):
                self._ready.malformed.append(event)
                self._ready.text += event.text
            else:
                self._ready.text += event
