"""Make mimo_prompt.json: the part of Qwen2's vocabulary that the published prompt needs.

    python tests/golden/make_mimo_prompt.py models/ggml-vocab-qwen2.gguf

The vocabulary file is llama.cpp's. The ids are those published for MiMo-V2.5 (spec section
1.3), not computed here: the test computes them. The merges kept are all that any word of the
prompt uses, so merging with them alone takes the same steps as with all.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

from gguf import GGUFReader

from mimo_edge.bpe import BYTE_SYMBOLS
from mimo_edge.pretokenizer import split_words

TEXTS = (
    "system\nYou are MiMo, a helpful AI assistant engineered by Xiaomi.",
    "user\nHello",
    "assistant\n",
)
# fmt: off
IDS = [
    151644, 8948, 198, 2610, 525, 20740, 25612, 11, 264, 10950, 15235, 17847, 44936, 553, 71449,
    13, 151645, 151644, 872, 198, 9707, 151645, 151644, 77091, 198, 151667, 151668,
]
# fmt: on
SPECIAL = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<think>": 151667,
    "</think>": 151668,
}


def main(vocabulary: Path) -> None:
    fields = GGUFReader(str(vocabulary)).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    ids = {token: i for i, token in enumerate(tokens) if i < SPECIAL["<|endoftext|>"]}
    rank = {pair: i for i, pair in enumerate(merges)}
    used = set()
    for word in (word for text in TEXTS for word in split_words(text)):
        parts = [BYTE_SYMBOLS[byte] for byte in word.encode()]
        while known := [(rank[p], i) for i, p in enumerate(pairwise(parts)) if p in rank]:
            _, at = min(known)
            used.add((parts[at], parts[at + 1]))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
    needed = set(BYTE_SYMBOLS) | {a + b for a, b in used}
    golden = {
        "vocab": {token: ids[token] for token in sorted(needed, key=lambda token: ids[token])},
        "merges": [list(pair) for pair in sorted(used, key=lambda pair: rank[pair])],
        "special": SPECIAL,
        "user": "Hello",
        "ids": IDS,
    }
    Path(__file__).with_name("mimo_prompt.json").write_text(json.dumps(golden))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
