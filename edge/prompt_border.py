"""Where prompts part: how many tokens at the start of a prompt come from system text and tools."""

from __future__ import annotations

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from mimo_edge.chat_template import ChatTemplate, Message
from mimo_edge.errors import MimoEdgeError
from mimo_edge.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

_PROBES = ("0", "x")  # two texts without a common beginning
_KEPT = 16


class PromptBorders:
    """Borders of the prompts of one template, found by rendering two short conversations: what they
    share does not depend on what is said. From any thread."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[int, ...]] = OrderedDict()

    def of(
        self,
        ids: Sequence[int],
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        enable_thinking: bool | None,
    ) -> int:
        """How many tokens of the prompt `ids`, rendered from the rest, every conversation with the
        same system text and tools begins with; 0 when that cannot be told."""
        head = []
        for message in messages:
            if message["role"] != "system":
                break
            head.append(message)
        key = json.dumps([head, list(tools), enable_thinking], default=repr)
        with self._lock:
            shared = self._known.get(key)
            if shared is not None:
                self._known.move_to_end(key)
        if shared is None:
            shared = self._find(head, tools, enable_thinking)
            with self._lock:
                self._known[key] = shared
                while len(self._known) > _KEPT:
                    self._known.popitem(last=False)
        return len(shared) if tuple(ids[: len(shared)]) == shared else 0

    def _find(
        self,
        head: list[Message],
        tools: Sequence[Mapping[str, Any]],
        enable_thinking: bool | None,
    ) -> tuple[int, ...]:
        try:
            one, other = (
                self._template.encode(
                    self._tokenizer,
                    [*head, {"role": "user", "content": text}],
                    tools,
                    enable_thinking=enable_thinking,
                )
                for text in _PROBES
            )
        except MimoEdgeError as error:  # a template may want other turns first
            _log.info("the beginning of prompts is not kept: %s", error)
            return ()
        same = 0
        while same < min(len(one), len(other)) and one[same] == other[same]:
            same += 1
        # Texts may melt into one token with what stands before them, special tokens never do.
        special = set(self._tokenizer.special.values())
        cut = next((i + 1 for i in reversed(range(same)) if one[i] in special), same)
        return tuple(one[:cut])
