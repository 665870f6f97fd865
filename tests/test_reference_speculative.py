"""Speculative decoding over the reference, exactly as the docstring of reference.py prescribes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny import random_weights, tiny_config, tiny_mimo7b_config

from mimo_edge.runtimes.reference import ReferenceBackend, full_logits, mtp_full_logits
from mimo_edge.runtimes.weights import DictWeights

TOLERANCE = 1e-5  # f32 sums in another order


def greedy(weights: DictWeights, prompt: Any, count: int) -> list[int]:
    """Plain decoding, recomputing everything from position 0 now and then to stay honest."""
    backend = ReferenceBackend(weights)
    cache = backend.new_cache(len(prompt) + count)
    out = [int(t) for t in prompt]
    logits = backend.forward(prompt, cache).logits
    while len(out) < len(prompt) + count:
        out.append(int(logits[0].argmax()))
        logits = backend.forward(np.array(out[-1:]), cache).logits
    teacher = full_logits(weights, np.array(out)).argmax(-1)
    assert teacher[len(prompt) - 1 : -1].tolist() == out[len(prompt) :]
    return out


class Drafter:
    """The prescribed loop; a share `luck` of the drafts is replaced by the right answer, so
    that random models accept some (the blocks then see right and wrong tokens)."""

    def __init__(self, weights: DictWeights, prompt: Any, plain: list[int], luck: float) -> None:
        self.weights, self.plain, self.luck = weights, plain, luck
        self.rng = np.random.default_rng(0)
        self.backend = ReferenceBackend(weights)
        self.cache = self.backend.new_cache(len(plain) + 4)
        got = self.backend.forward(prompt, self.cache, hidden_rows=len(prompt))
        self.hidden = list(got.hidden)
        self.x = [*(int(t) for t in prompt), int(got.logits[0].argmax())]
        self.old: dict[int, int] = {}
        self.accepted: list[int] = []

    def draft(self, count: int) -> list[int]:
        c, p = self.backend.config, self.cache.length - 1
        drafts: list[int] = []
        for k in range(count):
            known = [*self.x, *drafts]
            window = c.layer(c.num_hidden_layers + k).window
            first = max(0, self.old[k] - k + 1 if k in self.old else 0)
            if window is not None:
                first = max(first, p - window + 1)
            logits = self.backend.mtp_forward(
                k,
                np.array(known[first + 1 + k : p + 2 + k]),
                np.stack(self.hidden[first : p + 1]),
                first,
                self.cache,
            )
            self.old[k] = p
            # as if the block had been run from position 0 on these very tokens
            fresh = mtp_full_logits(self.weights, np.array(known), k)
            assert fresh.shape[0] == p + 1
            assert np.abs(logits - fresh[p]).max() <= TOLERANCE * np.abs(fresh[p]).max()
            lucky = self.rng.random() < self.luck
            drafts.append(self.plain[len(known)] if lucky else int(logits.argmax()))
        return drafts

    def step(self, count: int) -> None:
        drafts = self.draft(count)
        batch = np.array([self.x[-1], *drafts])
        got = self.backend.forward(batch, self.cache, logits_rows=count + 1, hidden_rows=count + 1)
        best = got.logits.argmax(-1)
        a = 0
        while a < count and drafts[a] == best[a]:
            a += 1
        self.cache.rollback(count - a)
        self.hidden += list(got.hidden[: a + 1])
        self.x += [*drafts[:a], int(best[a])]
        self.accepted.append(a)


@pytest.mark.parametrize("prompt_length", [1, 7, 40])
@pytest.mark.parametrize("luck", [0.0, 0.6, 1.0])
def test_drafting_gives_the_plain_tokens_and_never_a_stale_row(
    luck: float, prompt_length: int
) -> None:
    config = tiny_config(
        hybrid_layer_pattern=(0, 1, 1), moe_layer_freq=(0, 1, 1), num_hidden_layers=3
    )
    weights = random_weights(config, seed=11)
    prompt = np.random.default_rng(1).integers(0, config.vocab_size, prompt_length)
    plain = greedy(weights, prompt, 44)
    drafter = Drafter(weights, prompt, plain, luck)
    while len(drafter.x) < len(plain) - 4:
        drafter.step(3)
    assert drafter.x == plain[: len(drafter.x)]
    if luck == 1.0:
        assert set(drafter.accepted) == {3}
    elif luck == 0.6:
        assert len(set(drafter.accepted)) >= 3, "the test no longer mixes accepts and rejects"


def test_draft_length_may_change_every_round() -> None:
    """A block skipped for some rounds catches up from where it stopped, or from the window."""
    config = tiny_config()
    weights = random_weights(config, seed=12)
    prompt = np.random.default_rng(2).integers(0, config.vocab_size, 25)
    plain = greedy(weights, prompt, 60)
    drafter = Drafter(weights, prompt, plain, 0.5)
    lengths = np.random.default_rng(3).integers(0, 4, 100).tolist()
    lengths[3:3] = [0] * 12  # longer than the window without any draft
    for count in lengths:
        if len(drafter.x) >= len(plain) - 4:
            break
        drafter.step(count)
    assert drafter.x == plain[: len(drafter.x)]


def test_mimo_7b_drafts_one_token_with_full_attention() -> None:
    config = tiny_mimo7b_config()
    weights = random_weights(config, seed=13)
    prompt = np.random.default_rng(4).integers(0, config.vocab_size, 20)
    plain = greedy(weights, prompt, 30)
    drafter = Drafter(weights, prompt, plain, 0.5)
    while len(drafter.x) < len(plain) - 4:
        drafter.step(1)
    assert drafter.x == plain[: len(drafter.x)]
    assert set(drafter.accepted) == {0, 1}
