"""Byte-level BPE tokenizers trained on the spot, as tokenizer.json and as GGUF metadata."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from mimo_edge.bpe import BYTE_SYMBOLS

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKUP = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
CORPUS = [
    "system\nYou are MiMo, a helpful AI assistant engineered by Xiaomi. user assistant tool",
    "turn on the light in the living room, please; it's dark and we'll need it. I'd say they're",
    "把客厅的灯调暗一点，打开访客网络两个小时。明天早上七点半叫我起床！",
    "<function=set_light>\n<parameter=room>客厅</parameter>\n</function>\nresponse parameters name",
    "def f(x):\n    return x ** 2  # 12345\n\n\n\ttabs\t and  spaces   ",
]


@cache
def library_json() -> str:
    """tokenizer.json text: 256 bytes, merges, special and markup tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = Sequence(
        [Split(Regex(PATTERN), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=480, initial_alphabet=list(BYTE_SYMBOLS), show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in MARKUP])
    text: str = tokenizer.to_str()
    return text


def write_json(folder: Path) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(library_json(), "utf-8")
    return path


def gguf_metadata(padding: int = 0) -> dict[str, Any]:
    """The same tokenizer as GGUF values, with padding tokens at the end."""
    raw = json.loads(library_json())
    by_id = {id_: (token, 1) for token, id_ in raw["model"]["vocab"].items()}
    for token in raw["added_tokens"]:
        by_id[token["id"]] = (token["content"], 3 if token["special"] else 4)
    size = len(by_id)
    for id_ in range(size, size + padding):
        by_id[id_] = (f"[PAD{id_}]", 5)
    merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [by_id[i][0] for i in range(len(by_id))],
        "tokenizer.ggml.token_type": [by_id[i][1] for i in range(len(by_id))],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": raw["added_tokens"][2]["id"],
    }
