"""Byte-level BPE in plain Python: for models whose tokenizer exists only in GGUF metadata."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from mimo_edge.errors import TokenizerError
from mimo_edge.pretokenizer import split_words

_CACHED_WORDS = 50_000


def byte_symbols() -> tuple[str, ...]:
    """The printable character GPT-2 writes for each byte value, by byte value."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in symbols:
            symbols[byte] = chr(0x100 + len(symbols) - len(printable))
    return tuple(symbols[byte] for byte in range(256))


BYTE_SYMBOLS = byte_symbols()
SYMBOL_BYTES = {symbol: byte for byte, symbol in enumerate(BYTE_SYMBOLS)}


def token_bytes(token: str) -> bytes:
    """Bytes a byte-level token stands for. Raises TokenizerError on a foreign symbol."""
    try:
        return bytes(SYMBOL_BYTES[symbol] for symbol in token)
    except KeyError as error:
        raise TokenizerError(
            f"token {token!r} holds {error.args[0]!r}, which stands for no byte"
        ) from None


class BytePairEncoder:
    """Text without special tokens to ids: pre-tokenize, then merge the best pair first.

    `ids` maps token to id, `merges` lists pairs from best to worst. Raises TokenizerError
    when a merge or a byte has no token.
    """

    def __init__(self, ids: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> None:
        self._ids = ids
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        missing = next((a + b for a, b in merges if a + b not in ids), None)
        if missing is not None:
            raise TokenizerError(f"a merge makes {missing!r}, which is not in the vocabulary")
        absent = [byte for byte, symbol in enumerate(BYTE_SYMBOLS) if symbol not in ids]
        if absent:
            raise TokenizerError(
                f"{len(absent)} of 256 bytes have no token, first 0x{absent[0]:02x}"
            )
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, which must be valid Unicode and in the normal form wanted."""
        ids: list[int] = []
        for word in split_words(text):
            known = self._cache.get(word)
            if known is None:
                known = self._merge("".join(BYTE_SYMBOLS[byte] for byte in word.encode()))
                if len(self._cache) >= _CACHED_WORDS:
                    self._cache.clear()
                self._cache[word] = known
            ids += known
        return ids

    def _merge(self, word: str) -> list[int]:
        """Merge a word's symbols, best rank first and leftmost among equals.

        A heap over a linked list: long runs of letters cost n log n, not n squared.
        """
        parts: list[str] = list(word)
        after = [*range(1, len(parts)), -1]
        before = [-1, *range(len(parts) - 1)]
        heap: list[tuple[int, int, str, str]] = []

        def push(left: int) -> None:
            right = after[left]
            if right >= 0:
                rank = self._ranks.get((parts[left], parts[right]))
                if rank is not None:
                    heapq.heappush(heap, (rank, left, parts[left], parts[right]))

        for at in range(len(parts) - 1):
            push(at)
        while heap:
            _, left, a, b = heapq.heappop(heap)
            right = after[left]
            # A stale entry: one of its symbols was merged into another since.
            if right < 0 or parts[left] != a or parts[right] != b:
                continue
            parts[left], parts[right] = a + b, ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            after[right] = -1
            if before[left] >= 0:
                push(before[left])
            push(left)
        return [self._ids[part] for part in parts if part]
