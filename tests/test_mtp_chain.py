"""All MTP blocks in one call give what one call each gives, and drafts the drafter keeps account
of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tiny
from stopping import stopped_after
from test_ggml_backend import ids_of, packed

from mimo_edge.cancel import Cancel
from mimo_edge.engine import Engine
from mimo_edge.errors import CacheError, Cancelled, GenerationError, UsageError
from mimo_edge.runtimes.base import F32, ChainingBackend
from mimo_edge.runtimes.ggml import resident
from mimo_edge.runtimes.ggml.backend import GgmlBackend
from mimo_edge.runtimes.ggml.cache import GgmlCache
from mimo_edge.sampling import Sampler, SamplingParams

CONFIG = tiny.tiny_config(eos_token_ids=())
PROMPT = [5, 17, 3, 40, 2, 9, 33, 8] * 3


@pytest.fixture
def backend() -> Iterator[GgmlBackend]:
    made = GgmlBackend(packed(CONFIG, "F32"), threads=1)
    yield made
    made.close()


def prepared(backend: GgmlBackend, length: int) -> tuple[GgmlCache, list[int], F32]:
    """A cache of `length` tokens whose blocks hold all rows but the last four; tokens, H."""
    ids = ids_of(CONFIG, length + 4, seed=1)
    cache = backend.new_cache(120)
    hidden = backend.forward(ids[:length], cache, hidden_rows=length).hidden
    for depth in range(3):
        backend.mtp_forward(
            depth, ids[1 + depth : length - 3 + depth], hidden[: length - 4], 0, cache
        )
    return cache, ids.tolist(), hidden


def one_by_one(
    backend: GgmlBackend, cache: GgmlCache, ids: list[int], hidden: F32, count: int
) -> tuple[list[int], list[F32]]:
    end = cache.length
    known, logits = ids[: end + 1], []
    for depth in range(count):
        shifted = np.array(known[end - 3 + depth : end + 1 + depth], np.int32)
        logits.append(backend.mtp_forward(depth, shifted, hidden[-4:], end - 4, cache))
        known.append(int(logits[-1].argmax()))
    return known[end + 1 :], logits


@pytest.mark.parametrize("fmt", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("length", [6, 30])
def test_a_chain_is_its_blocks_one_by_one(fmt: str, count: int, length: int) -> None:
    made = GgmlBackend(packed(CONFIG, fmt), threads=1)
    assert isinstance(made, ChainingBackend)
    assert made.chains
    cache, ids, hidden = prepared(made, length)
    want = one_by_one(made, cache, ids, hidden, count)
    last = np.array(ids[length - 3 : length + 1], np.int32)
    for _ in range(2):  # in new memory, and where the rows are written already
        tokens, logits = made.mtp_chain(count, last, hidden[-4:], length - 4, cache)
        assert tokens == want[0]
        # the same operations on the same numbers
        assert np.array_equal(np.stack(logits).view(np.int32), np.stack(want[1]).view(np.int32))
        cache, ids, hidden = prepared(made, length)
    made.close()


def answer(backend: Any, draft: int, count: int, **params: Any) -> tuple[list[int], Any]:
    engine = Engine(backend, 200, draft)
    generation = engine.generate(
        engine.sequence(), PROMPT, Sampler(SamplingParams(**params)), max_tokens=count
    )
    return [t for step in generation for t in step], generation.stats


class Guided:
    """A backend whose blocks draft what plain decoding gave, in part: through `mtp_chain` the last
    layer's logits are replaced, and the tokens chosen with them."""

    def __init__(self, inner: GgmlBackend, truth: list[int], chain: bool) -> None:
        self.inner, self.truth = inner, truth
        self.config, self.name = inner.config, inner.name
        self.new_cache, self.forward, self.close = inner.new_cache, inner.forward, inner.close
        self.rng = np.random.default_rng(0)
        self.calls: list[tuple[int, int]] = []
        self.chains = chain

    def _choice(self, target: int) -> int:
        right = self.truth[target] if target < len(self.truth) else 0
        return right if self.rng.random() < 0.75 else (right + 1) % CONFIG.vocab_size

    def mtp_forward(self, depth: int, ids: Any, hidden: F32, at: int, cache: Any, **kw: Any) -> F32:
        logits = self.inner.mtp_forward(depth, ids, hidden, at, cache, **kw)
        logits[self._choice(at + len(ids) + 1 + depth)] = logits.max() + 1
        self.calls.append((1, len(ids)))
        return logits

    def mtp_chain(
        self, count: int, ids: Any, hidden: F32, at: int, cache: Any, **kw: Any
    ) -> tuple[list[int], list[F32]]:
        # As the graph would: each block sees the choice of the one before.
        known, rows = list(ids), []
        for depth in range(count):
            shifted = np.array(known[depth : depth + len(ids)], np.int32)
            logits = self.inner.mtp_forward(depth, shifted, hidden, at, cache, **kw)
            choice = self._choice(at + len(ids) + 1 + depth)
            logits[choice] = logits.max() + 1
            known.append(choice)
            rows.append(logits)
        self.calls.append((count, len(ids)))
        return known[len(ids) :], rows


@pytest.mark.parametrize("draft", [2, 3])
def test_the_drafter_goes_over_to_chains(backend: GgmlBackend, draft: int) -> None:
    """The first draft fills the window, every other one is on four rows: with one call, the drafts
    that calls of single blocks give."""
    plain, _ = answer(backend, 0, 60)
    found = {}
    for chain in (False, True):
        guided = Guided(backend, PROMPT + plain, chain)
        tokens, stats = answer(guided, draft, 60)
        assert tokens == plain
        found[chain] = (stats.verifies, stats.accepted_by_depth)
        blocks, calls = (draft, 1) if chain else (1, draft)
        first, rest = guided.calls[:calls], guided.calls[calls:]
        assert first == [(blocks, CONFIG.sliding_window)] * calls
        assert {rows for _, rows in rest} == {4}
        # the last step may want one draft only
        assert {count for count, _ in rest[:-1]} == {blocks}
        assert stats.tokens_per_verify > 1.7
    assert found[False] == found[True]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_answers_do_not_change(backend: GgmlBackend, temperature: float) -> None:
    params = {"temperature": temperature, "seed": 5}
    plain, _ = answer(backend, 0, 50, **params)
    for draft in (1, 2, 3):
        assert answer(backend, draft, 50, **params)[0] == plain


def test_a_token_that_is_never_drawn_ends_the_chain(backend: GgmlBackend) -> None:
    """The graph knows no banned ids: what it went on with is dropped."""
    engine = Engine(backend, 200, 3)
    free = engine.sequence()
    list(engine.generate(free, PROMPT, Sampler(SamplingParams()), max_tokens=20))
    assert free.drafter is not None
    tokens = [*free.tokens, 7]
    drafts = free.drafter.draft(tokens, 3, lambda row: int(row.argmax()))
    assert len(drafts) == 3
    banned = drafts[1]

    def best(row: F32) -> int:
        row = row.copy()
        row[banned] = -np.inf
        return int(row.argmax())

    kept = free.drafter.draft(tokens, 3, best)
    assert kept[0] == drafts[0] != banned
    assert len(kept) == 2
    assert kept[1] != banned
    # A sampler that knows them needs no logits, and proposes nothing in their place.
    sampler = Sampler(SamplingParams(), np.arange(CONFIG.vocab_size) == banned)
    assert sampler.propose_likeliest([*drafts]) == drafts[:1]

    def unseen(row: F32) -> int:
        raise AssertionError("nobody asks for the logits")

    found = free.drafter.draft(tokens, 3, unseen, likeliest=sampler.propose_likeliest)
    assert found == drafts[:1]
    # What counts tokens has to look.
    assert Sampler(SamplingParams(presence_penalty=0.5)).propose_likeliest(drafts) is None


def test_a_chain_cancelled_anywhere_is_done_again(backend: GgmlBackend) -> None:
    cache, ids, hidden = prepared(backend, 30)
    last = np.array(ids[27:31], np.int32)

    def chain(cancel: Cancel | None = None) -> tuple[list[int], F32]:
        tokens, logits = backend.mtp_chain(3, last, hidden[-4:], 26, cache, cancel=cancel)
        return tokens, np.stack(logits)

    want = chain()
    with stopped_after(backend, 1 << 60, Cancel()) as counted:
        chain(Cancel())
    for operations in range(1, counted(), 7):
        cancel = Cancel()
        with stopped_after(backend, operations, cancel), pytest.raises(Cancelled):
            chain(cancel)
        assert all(index.length == 26 for index in cache.mtp_index)
        found = chain()
        assert found[0] == want[0]
        assert np.array_equal(found[1], want[1])


def test_nan_in_a_block_is_an_error_that_names_it(backend: GgmlBackend) -> None:
    cache, ids, hidden = prepared(backend, 30)
    norm = backend._weights.model.mtp[1].ffn_norm
    norm.array()[3] = np.nan
    with pytest.raises(GenerationError, match="MTP block 1"):
        backend.mtp_chain(3, np.array(ids[27:31], np.int32), hidden[-4:], 26, cache)
    assert [index.length for index in cache.mtp_index] == [26] * 3


def test_wrong_calls(backend: GgmlBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, ids, hidden = prepared(backend, 30)
    last = np.array(ids[27:31], np.int32)
    wrong: list[tuple[type[Exception], Callable[[], Any]]] = [
        (UsageError, lambda: backend.mtp_chain(4, last, hidden[-4:], 26, cache)),
        (UsageError, lambda: backend.mtp_chain(0, last, hidden[-4:], 26, cache)),
        (UsageError, lambda: backend.mtp_chain(3, last[-1:], hidden[-1:], 29, cache)),
        (UsageError, lambda: backend.mtp_chain(3, last, hidden[-3:], 26, cache)),
        (UsageError, lambda: backend.mtp_chain(3, last - 500, hidden[-4:], 26, cache)),
        (CacheError, lambda: backend.mtp_chain(3, last, hidden[-4:], 27, cache)),
        (CacheError, lambda: backend.mtp_chain(3, last, hidden[-4:], 26, backend.new_cache(40))),
    ]
    for error, call in wrong:
        with pytest.raises(error):
            call()
    for other in (packed(tiny.tiny_mimo7b_config()), packed(tiny.tiny_config(num_mtp_layers=0))):
        without = GgmlBackend(other, threads=1)
        assert not without.chains
        without.close()
    monkeypatch.setattr(resident, "SMALL_TABLE_BYTES", 1000)
    large = GgmlBackend(packed(CONFIG), threads=1)
    assert not large.chains
    with pytest.raises(UsageError, match="chain"):
        large.mtp_chain(3, last, hidden[-4:], 26, large.new_cache(40))
    large.close()
