"""Build mimo-nano's tokenizer: byte-level BPE with the Qwen2 pre-tokenizer, fitted for copying.

A small model copies names far better when a value is cut into the same tokens in the command and
in the call. So merges come in this order: Chinese characters (three bytes to one token, never
across characters), then pieces of words, and only then a leading space or punctuation mark onto a
piece. " Lucas" and ">Lucas" thus split alike but for the first mark.
"""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import regex
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mimo_edge.nano import commands as grammar
from mimo_edge.nano import phrasings, words

from . import data

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ADDED = (
    ("<|endoftext|>", True),
    ("<|im_start|>", True),
    ("<|im_end|>", True),
    ("<think>", False),
    ("</think>", False),
    ("<tool_call>", False),
    ("</tool_call>", False),
    ("<tool_response>", False),
    ("</tool_response>", False),
)
SIZE = 2040
"""Tokens with the added ones; the embedding has 2048 rows, the last 8 are padding."""


def _bytes_to_unicode() -> dict[int, str]:
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in keep}
    extra = (b for b in range(256) if b not in table)
    return table | {b: chr(256 + i) for i, b in enumerate(extra)}


def _corpus() -> str:
    """Text whose pieces deserve tokens: tool lists, phrasings, answers; values count little."""
    rng = random.Random(7)
    parts: list[str] = []
    for _ in range(300):
        parts.append(data.render_system(grammar.tool_list(rng, [])))
    for frame in phrasings.FRAMES:
        for phrasing in frame.train:
            parts += [
                regex.sub(r"\{\w+\}", " ", grammar.expand(rng, phrasing)).strip("~")
                for _ in range(6)
            ]
    for _ in range(2500):
        lang = rng.choice(grammar.LANGS)
        c = grammar.command(rng, rng.choice(list(grammar.TOOLS)), lang, False)
        parts += [c.text, grammar.answer(c)]
        parts += [grammar.REFUSAL[lang], grammar.DONE[lang]] if rng.random() < 0.05 else []
    return "\n".join(parts)


def build() -> Tokenizer:
    """Fit merges and return the tokenizer with `SIZE` tokens."""
    u = _bytes_to_unicode()
    text = _corpus()
    for token, _ in ADDED:
        text = text.replace(token, "\n")

    def enc(s: str) -> list[str]:
        return [u[b] for b in s.encode()]

    base = sorted(u.values(), key=lambda c: next(k for k, v in u.items() if v == c))
    vocab: dict[str, int] = {c: i for i, c in enumerate(base)}
    merges: list[tuple[str, str]] = []
    room = SIZE - len(ADDED)

    def merge(a: str, b: str) -> None:
        if a + b not in vocab and len(vocab) < room:
            merges.append((a, b))
            vocab[a + b] = len(vocab)

    # 1. Chinese: characters of the phrasings first, then the most common value characters.
    zh = Counter(regex.findall(r"\p{Han}", text))
    pool = "".join(words.ROOMS_ZH + words.WORDS_ZH) + words.CHARS_ZH
    zh.update(dict.fromkeys(pool, 1))
    chars = [c for c, _ in zh.most_common(700)] + list("\uff0c\u3002\uff1a")
    for c in chars:
        b = enc(c)
        merge(b[0], b[1])
    for lead in range(0x4E00, 0x9FA6, 64):  # any other character costs two tokens, not three
        b = enc(chr(lead))
        if len(vocab) < 256 + 290:
            merge(b[0], b[1])
    for c in chars:
        b = enc(c)
        merge(b[0] + b[1], b[2])

    # 2. Pieces of words, learned on the letters alone.
    counts: Counter[str] = Counter()
    heads: Counter[tuple[str, str]] = Counter()
    marks: Counter[str] = Counter()
    for piece in regex.findall(QWEN2_SPLIT, text):
        core = regex.search(r"[A-Za-z]+$", piece)
        if core:
            counts[core[0]] += 1
            if core.start():
                heads[piece[: core.start()], core[0]] += 1
        elif regex.fullmatch(r" ?[^\s\p{L}\p{N}]+[\r\n]*|[\r\n]+", piece):
            marks[piece] += 1
    split = {w: enc(w) for w in counts}
    target = room - 280
    while len(vocab) < target:
        pairs: Counter[tuple[str, str]] = Counter()
        for w, pieces in split.items():
            n = counts[w]
            for pair in pairwise(pieces):
                pairs[pair] += n
        if not pairs:
            break
        (a, b), n = max(pairs.items(), key=lambda kv: (kv[1], kv[0]))
        merge(a, b)
        for pieces in split.values():
            i = 0
            while i < len(pieces) - 1:
                if pieces[i] == a and pieces[i + 1] == b:
                    pieces[i : i + 2] = [a + b]
                i += 1

    # 3. Marks, then a leading space or mark onto a piece (never ">", which opens values).
    for mark, n in marks.most_common(40):
        pieces = enc(mark)
        while len(pieces) > 1 and n > 30:
            merge(pieces[0], pieces[1])
            pieces[:2] = [pieces[0] + pieces[1]]
    joined: Counter[tuple[str, str]] = Counter()
    for (head, word), n in heads.items():
        if head in " <=_":
            joined[enc(head)[0], split[word][0]] += n
    for (a, b), _ in joined.most_common():
        merge(a, b)

    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False, byte_fallback=False))
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    for token, special in ADDED:
        added = AddedToken(token, special=special, normalized=False)
        if special:
            tok.add_special_tokens([added])
        else:
            tok.add_tokens([added])
    return tok


def main(out: Path) -> None:
    """Write `tokenizer.json` into `out`."""
    build().save(str(out / "tokenizer.json"))
