"""The grammars of one model, each compiled once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from mimo_edge.errors import ConstraintError
from mimo_edge.sampling import Constraint
from mimo_edge.structured.answers import Thinking, Value, answer_grammar, call_grammar
from mimo_edge.structured.bridge import make_vocabulary
from mimo_edge.structured.calls import FreeCalls, TagTokens
from mimo_edge.structured.follow import Follower, first_line
from mimo_edge.tokenizer import Tokenizer

_KEPT = 32


def can_compile() -> bool:
    """Whether llguidance is installed; small devices may do without it."""
    return find_spec("llguidance") is not None


class Grammars:
    """Makes the constraint of each answer. From any thread.

    The tokens of the vocabulary are indexed when the first grammar is compiled; the newest
    grammars stay.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._tags: TagTokens | None = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def of_answer(
        self,
        thinking: Thinking,
        value: Value | None,
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        several: bool = True,
    ) -> Constraint:
        """An answer that is `value` or calls `tools`, as in `answer_grammar`."""
        return self._follow(answer_grammar(self._tokenizer, thinking, value, tools, several))

    def of_calls(
        self,
        thinking: Thinking,
        tools: Sequence[Mapping[str, Any]],
        *,
        allowed: bool = True,
        several: bool = True,
    ) -> Constraint:
        """Free text with calls of `tools` in it, or with none where they are not `allowed`."""
        grammar = call_grammar(self._tokenizer, tools) if allowed else None
        if grammar is not None:
            self._matcher(grammar)  # what is wrong with it is said before the answer begins
        with self._lock:
            if self._tags is None:
                self._tags = TagTokens(self._tokenizer, self._vocab_size)
        return FreeCalls(
            self._tokenizer,
            self._tags,
            self._vocab_size,
            self._eos_ids,
            None if grammar is None else lambda: self._follow(grammar),
            several=several,
            thinking=thinking == "open",
        )

    def _follow(self, grammar: str) -> Follower:
        return Follower(self._matcher(grammar), self._vocab_size, self._eos_ids)

    def _matcher(self, grammar: str) -> Any:
        """A matcher at the beginning of `grammar`. Raises ConstraintError when it is too complex,
        nothing fits it, or llguidance is not installed."""
        if not can_compile():
            raise ConstraintError(
                "llguidance is not installed: answers cannot be held to a form",
                "pip install llguidance",
            )
        import llguidance

        with self._lock:
            found = self._compiled.get(grammar)
            if found is None:
                if self._vocabulary is None:
                    self._vocabulary = make_vocabulary(
                        self._tokenizer, self._vocab_size, self._eos_ids
                    )
                limits = llguidance.LLParserLimits(verbose_errors=False)
                found = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
                probe = found.deep_copy()
                probe.compute_bitmask()  # the beginning is what shows that nothing can fit
                for one in (found, probe):
                    if one.is_error():
                        raise ConstraintError(
                            f"this cannot be enforced: {first_line(one.get_error())}",
                            "use a simpler schema or regular expression",
                        )
                self._compiled[grammar] = found
                while len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            return found.deep_copy()
