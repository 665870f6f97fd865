"""A model that says anything, with a liking for what ends things: so that answers under a grammar
come to an end although nobody taught the model the grammar."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import tiny
import tokenizers_made as made
from fake_backend import FakeBackend

from mimo_edge.api import Runtime
from mimo_edge.chat_template import ChatTemplate
from mimo_edge.model_source import Model
from mimo_edge.tokenizer import Tokenizer

ENDINGS = ["</parameter>\n", "</function>\n", '"', "}", "]", "\n", "</think>", "</tool_call>"]


class Babbler(FakeBackend):
    """Random logits, a bonus for tokens of `ENDINGS`, and a large one for the token that goes on
    with an ending already begun."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, **options: Any) -> None:
        super().__init__(tiny.tiny_config(vocab_size=vocab, eos_token_ids=()), **options)
        self.sharpness = 2.0
        self.starts = np.zeros(vocab, np.float32)
        self.follows: dict[int, list[int]] = {}
        for ending in ENDINGS:
            ids = tokenizer.encode(ending, allow_special=True)
            self.starts[ids[0]] = 5
            for a, b in pairwise(ids):
                self.follows.setdefault(a, []).append(b)
        for eos in tokenizer.eos_ids:
            self.starts[eos] = 6

    def next_logits(self, tokens: list[int]) -> Any:
        logits = super().next_logits(tokens) + self.starts
        logits[self.follows.get(tokens[-1], [])] += 12
        return logits


def tokenizer_of(padding: int = 5) -> tuple[Tokenizer, int]:
    """A small tokenizer and a vocabulary of that much padding more."""
    tokenizer = Tokenizer.from_gguf(made.gguf_metadata())
    return tokenizer, tokenizer.size + padding


def babbling(seed: int = 0, draft: Any = 0, **options: Any) -> Runtime:
    """A runtime whose model babbles."""
    tokenizer, vocab = tokenizer_of()
    backend = Babbler(tokenizer, vocab, seed=seed, **options)
    model = Model("babbler", backend, tokenizer, ChatTemplate(), tokenizer.eos_ids)
    return Runtime(model, 3000, draft)
