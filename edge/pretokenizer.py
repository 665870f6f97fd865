"""Qwen2's pre-tokenizer without a regex engine that knows Unicode classes.

The pattern (spec section 1.3) needs \\p{L} and \\p{N}, which the standard library's `re`
lacks. Each character is mapped to one ASCII letter for its class, and the same pattern,
written over those letters, finds the same borders.
"""

from __future__ import annotations

import re
import unicodedata

# Unicode White_Space. str.isspace() also counts U+001C..U+001F, which \s does not.
_SPACES = frozenset(
    [*range(9, 14), 32, 133, 160, 5760, *range(8192, 8203), 8232, 8233, 8239, 8287, 12288]
)
_CONTRACTION_LETTERS = frozenset("strevmld")


class _Classes(dict[int, str]):
    """Code point -> class, filled as characters are met.

    L letter, N number, n line break, S the space itself, W other white space, P anything
    else; the apostrophe and the letters of English contractions stand for themselves.
    """

    def __missing__(self, code: int) -> str:
        kind = self[code] = _class_of(code)
        return kind


def _class_of(code: int) -> str:
    character = chr(code)
    if character == "'":
        return "'"
    if character == " ":
        return "S"
    if character in "\r\n":
        return "n"
    if code in _SPACES:
        return "W"
    category = unicodedata.category(character)
    if category[0] == "L":
        # (?i:) folds: U+017F, the long s, is an s as well.
        folded = character.casefold()
        return folded if folded in _CONTRACTION_LETTERS else "L"
    return "N" if category[0] == "N" else "P"


_CLASSES = _Classes()
_LETTER = "[Lstrevmld]"
_PATTERN = re.compile(
    "'(?:[stmd]|re|ve|ll)"
    f"|[^nN{_LETTER[1:-1]}]?{_LETTER}+"
    "|N"
    "|S?['P]+n*"
    "|[SWn]*n+"
    "|[SWn]+(?![^SWn])"
    "|[SWn]+"
)


def split_words(text: str) -> list[str]:
    """Cut `text` where Qwen2's pre-tokenizer does; the pieces join to the text again.

    Source: llama.cpp:src/llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_QWEN2.
    """
    classes = text.translate(_CLASSES)
    return [text[match.start() : match.end()] for match in _PATTERN.finditer(classes)]
