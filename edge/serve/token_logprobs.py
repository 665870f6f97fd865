"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mimo_edge.logprobs import TokenLogprob
from mimo_edge.tokenizer import Tokenizer


def chat_logprobs(tokens: Sequence[TokenLogprob], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Of a chat completion; markup such as the end of the turn is left out, as in the text."""
    content = [
        {
            **_entry(one.token_id, one.logprob, tokenizer),
            "top_logprobs": [_entry(id_, logprob, tokenizer) for id_, logprob in one.top],
        }
        for one in _shown(tokens, tokenizer)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokens: Sequence[TokenLogprob], tokenizer: Tokenizer | None, offset: int
) -> dict[str, Any]:
    """Of a text completion whose tokens so far have `offset` characters."""
    shown = list(_shown(tokens, tokenizer))
    texts = [_text(one.token_id, tokenizer) for one in shown]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [one.logprob for one in shown],
        "top_logprobs": [
            {_text(id_, tokenizer): logprob for id_, logprob in reversed(one.top)} for one in shown
        ],
        "text_offset": offsets,
    }


def _shown(tokens: Sequence[TokenLogprob], tokenizer: Tokenizer | None) -> Iterable[TokenLogprob]:
    hidden = frozenset() if tokenizer is None else tokenizer.control
    return (one for one in tokens if one.token_id not in hidden)


def _entry(token: int, logprob: float, tokenizer: Tokenizer | None) -> dict[str, Any]:
    data = b"" if tokenizer is None else tokenizer.token_bytes(token)
    return {"token": _text(token, tokenizer), "logprob": logprob, "bytes": list(data)}


def _text(token: int, tokenizer: Tokenizer | None) -> str:
    """A token as text; a part of a character has none of its own."""
    if tokenizer is None:
        return str(token)
    return tokenizer.token_bytes(token).decode("utf-8", "replace")
