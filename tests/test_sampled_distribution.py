"""Sampled answers with drafts have the distribution of plain sampling, and the test can tell.

Three tokens of one prompt, thousands of times, against the probability of each triple computed
from the model's own logits, by Pearson's chi-square. Seeds are fixed; the limit is where one of
10,000 honest samplers would fail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import tiny
from fake_backend import FakeBackend
from test_ggml_backend import packed

from mimo_edge import engine as engine_module
from mimo_edge.engine import Engine
from mimo_edge.runtimes.base import F32, Backend
from mimo_edge.runtimes.ggml.backend import GgmlBackend
from mimo_edge.sampling import Sampler, SamplingParams
from mimo_edge.structured.answers import Value
from mimo_edge.structured.grammars import Grammars
from mimo_edge.tokenizer import Tokenizer

VOCAB = 5
PROMPT = [1, 2, 3]
PARAMS = SamplingParams(temperature=1.3, top_k=4)
CONFIG = tiny.tiny_config(vocab_size=VOCAB, eos_token_ids=())


LETTERS = Tokenizer(
    None,  # type: ignore[arg-type]
    dict(enumerate((b"a", b"b", b"c", b"d"))),
    {"<|im_end|>": 4},
    ["<|im_end|>"],
)
GRAMMARS = Grammars(LETTERS, VOCAB, LETTERS.eos_ids)
# What may follow depends on all that came before, and no answer ends within three tokens.
FORM = Value(regex="((a|b)(a|c|d)(b|c|d)|c(a|b)(d|a)|d[a-d]a)[a-d]{3}")

MakeSampler = Callable[[int | None], Sampler]


def plain(seed: int | None) -> Sampler:
    return Sampler(replace(PARAMS, seed=seed))


def constrained(seed: int | None) -> Sampler:
    params = SamplingParams(temperature=1.3, top_p=0.95, seed=seed)
    return Sampler(params, constraint=GRAMMARS.of_answer("over", FORM))


def penalised(seed: int | None) -> Sampler:
    params = replace(PARAMS, seed=seed, repetition_penalty=1.5, frequency_penalty=1.0)
    return Sampler(params, prompt=PROMPT)


def both(seed: int | None) -> Sampler:
    params = SamplingParams(1.0, min_p=0.05, seed=seed, presence_penalty=1.5)
    return Sampler(params, prompt=PROMPT, constraint=GRAMMARS.of_answer("over", FORM))


def fake() -> Backend:
    return FakeBackend(CONFIG, skill=(1.0, 1.0, 1.0), sharpness=1.0)


def ggml() -> Backend:
    return GgmlBackend(packed(CONFIG, "F32", seed=3), threads=1)


def chi_square_limit(dof: int) -> float:
    """Exceeded with probability 1e-4 (Wilson and Hilferty's approximation)."""
    spread = 2 / (9 * dof)
    return float(dof * (1 - spread + 3.719 * spread**0.5) ** 3)


@dataclass
class Outcome:
    """`chi2` of triples seen against those expected, `accepted` drafts in all, `impossible`
    triples seen that have no probability."""

    chi2: float
    limit: float
    accepted: int
    impossible: int

    @property
    def honest(self) -> bool:
        return self.chi2 < self.limit and not self.impossible


def triples(
    backend: Backend, draft: int, trials: int, make_sampler: MakeSampler = plain
) -> Outcome:
    engine = Engine(backend, 32, draft)

    def after(*tokens: int) -> Any:
        sampler = make_sampler(None)
        for token in tokens:
            sampler.advance(token)
        return sampler.distribution(engine.logits([*PROMPT, *tokens])[-1])

    expected = np.zeros((VOCAB,) * 3)
    first = after()
    for a in np.flatnonzero(first).tolist():
        second = after(a)
        for b in np.flatnonzero(second).tolist():
            expected[a, b] = first[a] * second[b] * after(a, b) * trials
    seen, accepted = np.zeros_like(expected), 0
    sequence = engine.sequence()
    for seed in range(trials):
        generation = engine.generate(sequence, PROMPT, make_sampler(seed), max_tokens=3)
        a, b, c = (token for step in generation for token in step)
        seen[a, b, c] += 1
        accepted += sum(generation.stats.accepted_by_depth)
    likely = expected >= 5
    cells = [*zip(seen[likely], expected[likely], strict=True)]
    if expected[~likely].sum() >= 5:
        cells.append((seen[~likely].sum(), expected[~likely].sum()))
    chi2 = sum((s - e) ** 2 / e for s, e in cells)
    impossible = int(seen[expected == 0].sum())
    return Outcome(float(chi2), chi_square_limit(len(cells) - 1), accepted, impossible)


@pytest.mark.parametrize(("make", "trials"), [(fake, 4000), (ggml, 1500)], ids=["fake", "ggml"])
def test_drafted_samples_have_the_plain_distribution(
    make: Callable[[], Backend], trials: int
) -> None:
    backend = make()
    outcome = triples(backend, 2, trials)
    assert outcome.honest, outcome
    assert outcome.accepted > trials / 15  # drafts were in play
    backend.close()


@pytest.mark.parametrize("make_sampler", [constrained, penalised, both])
def test_grammar_and_penalties_leave_exactly_their_distribution(make_sampler: MakeSampler) -> None:
    """What is expected comes from the processed logits of every place; nothing else is seen."""
    outcome = triples(fake(), 2, 4000, make_sampler)
    assert outcome.honest, outcome
    assert outcome.accepted > 250


def test_proposals_that_are_counted_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: what was only drafted is penalised."""
    monkeypatch.setattr(Sampler, "retract", lambda self: self._proposed.clear())
    outcome = triples(fake(), 2, 4000, penalised)
    assert not outcome.honest
    assert outcome.chi2 > 2 * outcome.limit


def always_accept(
    logits: F32, drafts: Sequence[int], sample: Callable[[F32], int], *_: Any
) -> list[int]:
    """Wrong: a draft stands whatever its probability."""
    return [*drafts, sample(logits[len(drafts)])]


def draw_again(
    logits: F32, drafts: Sequence[int], sample: Callable[[F32], int], *_: Any
) -> list[int]:
    """Wrong: after a rejection the correction is drawn from the whole distribution."""
    gained: list[int] = []
    for row, draft in enumerate(drafts):
        if sample(logits[row]) != draft:
            return [*gained, sample(logits[row])]
        gained.append(draft)
    return [*gained, sample(logits[len(drafts)])]


def next_row(
    logits: F32, drafts: Sequence[int], sample: Callable[[F32], int], *_: Any
) -> list[int]:
    """Wrong by one: the correction comes from the row after the rejected draft."""
    gained: list[int] = []
    for row, draft in enumerate(drafts):
        if sample(logits[row]) != draft:
            return [*gained, sample(logits[row + 1])]
        gained.append(draft)
    return [*gained, sample(logits[len(drafts)])]


@pytest.mark.parametrize("wrong", [always_accept, draw_again, next_row])
def test_wrong_acceptance_rules_are_found_out(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def limited(*args: Any) -> list[int]:
        gained: list[int] = wrong(*args)
        return gained[: args[4]]

    monkeypatch.setattr(engine_module, "accept", limited)
    outcome = triples(fake(), 2, 4000)
    assert outcome.accepted > 500
    assert not outcome.honest, outcome
    assert outcome.chi2 > 2 * outcome.limit  # and not by a hair
