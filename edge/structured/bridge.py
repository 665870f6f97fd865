"""Our tokenizer as llguidance sees one."""

from __future__ import annotations

from typing import Any

from mimo_edge.errors import ConstraintError
from mimo_edge.tokenizer import Tokenizer


class _Vocabulary:
    """What llguidance asks of a tokenizer: the bytes of every id, which ones are special, and a
    way to encode. An id without bytes (padding) is never allowed, a special one only where a
    grammar names it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_id: int) -> None:
        self._tokenizer = tokenizer
        self.tokens = [tokenizer.token_bytes(id_) for id_ in range(vocab_size)]
        self.special_token_ids = sorted(tokenizer.special.values())
        self.eos_token_id = eos_id

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def make_vocabulary(tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int]) -> Any:
    """An llguidance.LLTokenizer for a model with `vocab_size` logits.

    Raises ConstraintError when no token ends an answer.
    """
    import llguidance

    if not eos_ids:
        raise ConstraintError("the model has no end-of-text token: no answer could be complete")
    # The library looks for attributes; its own class would only pass them on.
    wrapper: Any = _Vocabulary(tokenizer, vocab_size, min(eos_ids))
    return llguidance.LLTokenizer(wrapper)
