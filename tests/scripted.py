"""A runtime whose model says what a script says, behind the Backend contract."""

from __future__ import annotations

from typing import Any

import numpy as np
import tiny
import tokenizers_made as made
from fake_backend import FakeBackend

from mimo_edge.api import Runtime
from mimo_edge.chat_template import ChatTemplate
from mimo_edge.model_source import Model
from mimo_edge.tokenizer import Tokenizer

END = "<|im_end|>"


class Scripted(FakeBackend):
    """Answers each prompt that ends in the generation prompt with the next scripted text."""

    def __init__(
        self, tokenizer: Tokenizer, vocab: int, answers: list[str], **options: Any
    ) -> None:
        super().__init__(tiny.tiny_config(vocab_size=vocab, eos_token_ids=()), **options)
        self.tokenizer = tokenizer
        self.script = [tokenizer.encode(answer, allow_special=True) for answer in answers]
        self.start = tokenizer.encode("<|im_start|>assistant\n", allow_special=True)

    def next_logits(self, tokens: list[int]) -> Any:
        starts = [
            i + len(self.start)
            for i in range(len(tokens) - len(self.start) + 1)
            if tokens[i : i + len(self.start)] == self.start
        ]
        logits = np.zeros(self.config.vocab_size, np.float32)
        logits[-1] = 99  # a padding id: must never come out
        answer = self.script[min(len(starts), len(self.script)) - 1] if starts else []
        at = len(tokens) - starts[-1] if starts else 0
        logits[answer[at] if at < len(answer) else 7] = 50
        return logits


def runtime(
    answers: list[str], draft: Any = "auto", context: int = 2000, **options: Any
) -> tuple[Runtime, Scripted]:
    tokenizer = Tokenizer.from_gguf(made.gguf_metadata())
    backend = Scripted(tokenizer, tokenizer.size + 5, answers, **options)
    model = Model("scripted", backend, tokenizer, ChatTemplate(), tokenizer.eos_ids)
    return Runtime(model, context, draft), backend
