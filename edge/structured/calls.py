"""Free text in which calls of tools, once begun, keep to their grammar.

Free text costs next to nothing here: no mask is made, the answer's newest bytes are compared with
the opening tag. Wherever the reader of answers would see a call begin, by the tag's own token or
letter by letter, the grammar of calls takes over, and gives way to free text again at the end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from mimo_edge.answer_reader import THINK_CLOSE, THINK_OPEN
from mimo_edge.sampling import Mask
from mimo_edge.structured.follow import Follower
from mimo_edge.tokenizer import Tokenizer
from mimo_edge.tool_calls import CLOSE, OPEN

_OPEN, _CLOSE = OPEN.encode(), CLOSE.encode()
_THINK_OPEN, _THINK_CLOSE = THINK_OPEN.encode(), THINK_CLOSE.encode()
# More than the drafts of a verify, which are all that is ever taken back.
_UNDOABLE = 16


class TagTokens:
    """Which tokens complete the opening tag of a call, once per vocabulary.

    `past[k]` are the tokens that, after the tag's first k bytes, complete it and go on: the
    grammar of a call has to begin at a token. `complete[k]` are all that complete it.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        rests = tuple(_OPEN[k:] for k in range(1, len(_OPEN)))
        inside: list[int] = []
        self._past: list[list[int]] = [[] for _ in _OPEN]
        self._complete: list[list[int]] = [[] for _ in _OPEN]
        for token in range(vocab_size):
            data = b"" if token in tokenizer.control else tokenizer.token_bytes(token)
            if _OPEN in data:
                inside.append(token)
            elif data.startswith(rests):
                for k, rest in enumerate(rests, 1):
                    if data.startswith(rest):
                        self._complete[k].append(token)
                        if data != rest:
                            self._past[k].append(token)
        crossing = [t for t in inside if not tokenizer.token_bytes(t).endswith(_OPEN)]
        self.past = [np.array(crossing + tokens, np.int64) for tokens in self._past]
        self.complete = [np.array(inside + tokens, np.int64) for tokens in self._complete]


class _State(NamedTuple):
    phase: Literal["start", "thinking", "text", "call"]
    seen: bytes  # the newest visible bytes, as many as a tag may still be made of
    call: Follower | None = None
    calls: int = 0
    ended: bool = False


class FreeCalls:
    """A `sampling.Constraint`. `begin` gives the grammar of a call from after its opening tag;
    None: no call may begin. Without `several`, no second one.

    `thinking` says that the answer begins inside of its think block, where a tag is only text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        tags: TagTokens,
        vocab_size: int,
        eos_ids: frozenset[int],
        begin: Callable[[], Follower] | None,
        *,
        several: bool = True,
        thinking: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._tags = tags
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._begin = begin
        self._several = several
        self._state = _State("thinking" if thinking else "start", b"")
        self._before: deque[_State] = deque(maxlen=_UNDOABLE)

    @property
    def ended(self) -> bool:
        """Whether an end-of-text token was said."""
        return self._state.ended

    def allows(self, token: int) -> bool:
        """Whether `token` may come next."""
        if self._state.call is not None:
            return self._state.call.allows(token)
        return token not in self._forbidden()

    def mask(self) -> Mask | None:
        """bool [V] of what may come next; None in free text, nearly always."""
        if self._state.call is not None:
            return self._state.call.mask()
        forbidden = self._forbidden()
        if not len(forbidden):
            return None
        mask = np.ones(self._vocab_size, np.bool_)
        mask[forbidden] = False
        return mask

    def advance(self, token: int) -> None:
        """`token` was said."""
        state = self._state
        self._before.append(state)
        if state.call is not None:
            state.call.advance(token)
        if token in self._eos_ids:
            self._state = state._replace(ended=True)
        elif token not in self._tokenizer.control:
            self._state = self._after(state, self._tokenizer.token_bytes(token))

    def retract(self, count: int) -> None:
        """Take the newest `count` tokens back."""
        for _ in range(count):
            self._state = self._before.pop()
            if self._state.call is not None:
                self._state.call.retract(1)

    def _forbidden(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        state = self._state
        if state.phase == "thinking":
            return _NONE
        known = next((k for k in range(len(_OPEN) - 1, 0, -1) if state.seen.endswith(_OPEN[:k])), 0)
        may_begin = self._begin is not None and (self._several or not state.calls)
        return (self._tags.past if may_begin else self._tags.complete)[known]

    def _after(self, state: _State, data: bytes) -> _State:
        seen = state.seen + data
        if state.phase == "call":
            if seen.endswith(_CLOSE):
                return _State("text", b"", None, state.calls + 1)
            return state._replace(seen=seen[-len(_CLOSE) :])
        if state.phase == "start":
            # As the reader sees it: a think block counts at the very start only.
            text = seen.decode("utf-8", "replace").lstrip().encode()
            if _THINK_OPEN.startswith(text[: len(_THINK_OPEN)]) and len(text) < len(_THINK_OPEN):
                return state._replace(seen=seen)
            if text.startswith(_THINK_OPEN):
                state, seen = state._replace(phase="thinking"), text[len(_THINK_OPEN) :]
            else:
                state = state._replace(phase="text")
        if state.phase == "thinking":
            _, found, rest = seen.partition(_THINK_CLOSE)
            if not found:
                return state._replace(seen=seen[1 - len(_THINK_CLOSE) :])
            state, seen = state._replace(phase="text"), rest
        if _OPEN in seen:
            assert self._begin is not None  # or its last token had been forbidden
            return state._replace(phase="call", seen=b"", call=self._begin())
        return state._replace(seen=seen[1 - len(_OPEN) :])


_NONE = np.zeros(0, np.int64)
