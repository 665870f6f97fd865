"""A deterministic toy language model behind the Backend contract, for engine logic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np

from mimo_edge.cache_rows import CacheLayout, LayerRows, RowFormat, check_rows, checked
from mimo_edge.cancel import Cancel
from mimo_edge.config import MimoConfig
from mimo_edge.errors import CacheError, ContextLengthError
from mimo_edge.runtimes.base import F32, Cache, ForwardResult, TokenIds


class FakeCache:
    """Tokens instead of rows; undoes at most `verify_rows - 1` of the last call.

    As rows, a token is the keys of its position, in one layer and in every MTP block."""

    def __init__(self, capacity: int, undoable: int) -> None:
        self.tokens: list[int] = []
        self.capacity = capacity
        self.undoable = undoable
        self.highest = 0
        self.mtp: dict[tuple[int, int], int] = {}  # (depth, row) -> token it was computed from
        self.begins = [0, 0, 0]  # rows of every block before which none is missed
        self.closed = False
        one = RowFormat("f32", 1, 1, 1, None)
        self.layout = CacheLayout((one,), (replace(one, window=1),) * 3, True)

    @property
    def length(self) -> int:
        return len(self.tokens)

    def rollback(self, n: int) -> None:
        if self.length - n < self.highest - self.undoable:
            raise CacheError(f"cannot undo {n}")
        del self.tokens[self.length - n :]

    def rows(self) -> Iterator[LayerRows]:
        assert not self.closed
        yield token_rows(0, self.tokens)
        for depth in range(3):
            end = max(
                (row + 1 for k, row in self.mtp if k == depth and row < self.length), default=0
            )
            first = end
            while (depth, first - 1) in self.mtp:  # what lies before a hole is of no use
                first -= 1
            yield token_rows(first, [self.mtp[depth, row] for row in range(first, end)])

    def restore(self, length: int, rows: Iterable[LayerRows]) -> None:
        assert not self.closed
        assert not self.tokens
        taken = list(checked(self.layout, rows))
        check_rows(self.layout, length, [(one.first, len(one.keys)) for one in taken])
        trunk, *blocks = [(one.first, one.keys.view("<i4")[:, 0].tolist()) for one in taken]
        self.tokens, self.highest = trunk[1], length
        self.begins = [first for first, _ in blocks]
        for depth, (first, tokens) in enumerate(blocks):
            self.mtp.update({(depth, first + i): token for i, token in enumerate(tokens)})

    def begin_mtp(self, depth: int, position: int) -> None:
        self.mtp = {place: token for place, token in self.mtp.items() if place[0] != depth}
        self.begins[depth] = position

    def nbytes(self) -> int:
        return 0 if self.closed else 8 * len(self.tokens)

    def held_bytes(self) -> int:
        return self.nbytes()

    def close(self) -> None:
        self.closed = True


def token_rows(first: int, tokens: list[int]) -> LayerRows:
    keys = np.array(tokens, "<i4").reshape(-1, 1).view(np.uint8)
    return LayerRows(first, keys, np.zeros((len(tokens), 4), np.uint8))


class FakeBackend:
    """Next-token logits are a hash of the last three tokens. MTP block k proposes the right
    token for most rows (`skill` per depth) by looking at the same rule.

    Every call is checked against the contract: H rows must be the target's own, MTP rows must
    reach back over the window without a hole, and their tokens must be those that stand.
    """

    name = "fake"

    def __init__(
        self,
        config: MimoConfig,
        skill: tuple[float, ...] = (0.8, 0.7, 0.6),
        seed: int = 0,
        on_call: Callable[[str, int], None] = lambda kind, rows: None,
        sharpness: float = 4.0,
    ) -> None:
        self.config = config
        self.skill = skill
        self.seed = seed
        self.on_call = on_call
        self.sharpness = sharpness
        self.closed = False
        self._logits: dict[tuple[int, ...], F32] = {}
        self.forwards: list[int] = []
        self.fail_after: int | None = None

    def new_cache(self, context: int, verify_rows: int = 4) -> FakeCache:
        return FakeCache(context, verify_rows - 1)

    def next_logits(self, tokens: list[int]) -> F32:
        key = (self.seed, *tokens[-3:])
        if key not in self._logits:
            values = np.random.default_rng(key).normal(0, self.sharpness, self.config.vocab_size)
            self._logits[key] = values.astype(np.float32)
        return self._logits[key]

    def hidden(self, tokens: list[int]) -> F32:
        row = np.zeros(self.config.hidden_size, np.float32)
        row[:3] = len(tokens) - 1, tokens[-1], sum(tokens[-4:]) % 9973
        return row

    def forward(
        self,
        token_ids: TokenIds,
        cache: Cache,
        *,
        logits_rows: int = 1,
        hidden_rows: int = 0,
        cancel: Cancel | None = None,
    ) -> ForwardResult:
        assert isinstance(cache, FakeCache)
        assert not self.closed
        assert not cache.closed
        assert token_ids.dtype == np.int32
        assert len(token_ids) > 0
        self.on_call("forward", len(token_ids))
        self.forwards.append(len(token_ids))
        if self.fail_after is not None and len(self.forwards) > self.fail_after:
            raise RuntimeError("the device went away")
        if cache.length + len(token_ids) > cache.capacity:
            raise ContextLengthError("the engine must have checked")
        logits, hidden = [], []
        for token in token_ids.tolist():
            cache.tokens.append(token)
            logits.append(self.next_logits(cache.tokens))
            hidden.append(self.hidden(cache.tokens))
        cache.highest = max(cache.highest, cache.length)
        none = np.zeros((0, self.config.hidden_size), np.float32)
        return ForwardResult(
            np.stack(logits[len(logits) - logits_rows :]) if logits_rows else none[:, :1],
            np.stack(hidden[len(hidden) - hidden_rows :]) if hidden_rows else none,
        )

    def mtp_forward(
        self,
        depth: int,
        token_ids: TokenIds,
        hidden: F32,
        position: int,
        cache: Cache,
        *,
        cancel: Cancel | None = None,
    ) -> F32:
        assert isinstance(cache, FakeCache)
        self.on_call("mtp", len(token_ids))
        end = position + len(token_ids)
        assert len(hidden) == len(token_ids)
        assert end <= cache.length
        for row in range(position, end):
            assert (hidden[row - position] == self.hidden(cache.tokens[: row + 1])).all()
            cache.mtp[depth, row] = int(token_ids[row - position])
        window = self.config.layer(self.config.num_hidden_layers + depth).window
        first = 0 if window is None else max(cache.begins[depth], end - window)
        known = [*cache.tokens, *([0] * (depth + 1))]
        for row in range(first, end):  # every row the newest one sees, with the token that stands
            assert (depth, row) in cache.mtp, f"row {row} of block {depth} was never written"
            if row + 1 + depth < cache.length:
                assert cache.mtp[depth, row] == known[row + 1 + depth], (depth, row)
        drafts = [cache.mtp[k, end - 1] for k in range(depth + 1)]
        sequence = cache.tokens[:end] + drafts
        logits = self.next_logits(sequence)
        chance = (end * 2654435761 + depth * 40503 + self.seed * 97) % 4096 / 4096
        if chance >= self.skill[depth]:
            logits = np.roll(logits, 1)
        return logits

    def close(self) -> None:
        self.closed = True
