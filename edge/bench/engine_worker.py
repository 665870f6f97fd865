"""One case on this runtime, in the process it has to itself."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from mimo_edge.api import Runtime
from mimo_edge.bench.cases import Case, Settings, context_for
from mimo_edge.bench.flash_rate import flash_rate
from mimo_edge.chat_template import ChatTemplate
from mimo_edge.engine import Engine
from mimo_edge.errors import TokenizerError, UsageError
from mimo_edge.machine import peak_rss_bytes, storage_read_bytes
from mimo_edge.nano.commands import DEMO_TOOLS, is_nano_template
from mimo_edge.runtimes.base import F32
from mimo_edge.sampling import Mask, Sampler, SamplingParams

WARMUP_PROMPT = 512


class ChosenTokens(Sampler):
    """Greedy choice, remembered; goes on with `forced` ids instead where there are any."""

    def __init__(self, banned: Mask | None, forced: list[int] | None) -> None:
        super().__init__(SamplingParams(), banned)
        self.choices: list[int] = []
        self._forced = forced

    def sample(self, logits: F32) -> int:
        choice = super().sample(logits)
        self.choices.append(choice)
        if self._forced is None:
            return choice
        return self._forced[len(self.choices) - 1]


def drawn_ids(seed: int, stream: int, count: int, vocab: int) -> list[int]:
    """`count` token ids, uniform over the vocabulary, the same for the same seed and stream."""
    ids: list[int] = np.random.default_rng((seed, stream)).integers(0, vocab, count).tolist()
    return ids


def measure(case: Case, settings: Settings, repetitions: int, first: int) -> dict[str, Any]:
    """Open the model, warm up, measure repetitions `first`, `first` + 1, ...

    Returns samples and settings, JSON-ready. Raises MimoEdgeError.
    """
    began = time.perf_counter()
    with Runtime.open(
        settings.model,
        profile=settings.profile,
        ram=case.ram,
        context=context_for(case, settings, repetitions),
        backend=settings.backend,
        ep=settings.ep,
        ep_library=settings.ep_library,
        ep_options=settings.ep_options,
        threads=case.threads,
        draft=case.draft,
        kv_type=settings.kv_type,
        governor=False,  # what is measured must not change half-way
    ) as runtime:
        load_s = time.perf_counter() - began
        source = settings.tokens
        if source == "auto":
            source = "drawn" if runtime.tokenizer is None else "greedy"
        run = _Run(runtime, case, settings, source == "drawn")
        found = (
            run.prefill(repetitions, first)
            if case.kind == "prefill"
            else (run.decode(repetitions, first))
        )
        stats = runtime.stats()
        found |= {
            "model": runtime.name,
            "backend": stats["backend"],
            "load_s": load_s,
            "context": runtime.context,
            "tokens": source,
            "budget": stats["budget"],
            "draft_why": run.draft_why,
            "peak_rss_bytes": peak_rss_bytes(),
        }
        experts = stats["experts"]
    # The disk's own speed, close to the run in time but not beside it.
    if experts is not None:
        found["flash_bytes_per_s"] = flash_rate(settings.model)
        found["slots"] = experts["slots"]
    return found


class _Run:
    """Measurements on one open runtime."""

    def __init__(self, runtime: Runtime, case: Case, settings: Settings, drawn: bool) -> None:
        self._runtime = runtime
        self._case = case
        self._settings = settings
        self._drawn = drawn
        self._vocab = runtime.config.vocab_size
        self.draft_why = ""

    def prefill(self, repetitions: int, first: int) -> dict[str, Any]:
        case = self._case
        warmup_prompt = self._ids(-1, min(case.tokens, WARMUP_PROMPT))
        self._prefill_once(warmup_prompt)
        prompts, samples, choices = [], [], []
        for index in range(first, first + repetitions):
            ids = self._ids(index, case.tokens)
            before = self._counters()
            seconds, choice = self._prefill_once(ids)
            samples.append(
                {"seconds": seconds, "tokens": case.tokens, "first_token_s": seconds}
                | self._difference(before)
            )
            prompts.append(ids)
            choices.append(choice)
        return {
            "prompts": prompts,
            "warmup_prompt": warmup_prompt,
            "forced": None,
            "samples": samples,
            "choices": choices,
        }

    def _prefill_once(self, ids: list[int]) -> tuple[float, int]:
        engine = self._runtime.engine
        sampler = ChosenTokens(self._banned, None)
        began = time.perf_counter()
        steps = iter(engine.generate(engine.sequence(), ids, sampler))
        next(steps)
        seconds = time.perf_counter() - began
        steps.close()  # type: ignore[attr-defined]
        return seconds, sampler.choices[0]

    def decode(self, repetitions: int, first: int) -> dict[str, Any]:
        """From drawn ids one long generation, measured piece after piece; a prompt is answered
        anew each time, because an answer has a beginning and an end."""
        case, engine = self._case, self._runtime.engine
        prompt = self._settings.prompt
        ids = self._ids(0, case.depth) if prompt is None else self._prompt_ids(prompt)
        room = engine.context - len(ids)
        if room < 1:
            raise UsageError(f"a prompt of {len(ids)} tokens fills the context of {engine.context}")
        forced = drawn_ids(self._settings.seed, 1 << 20, room + 1, self._vocab)
        answer = _Answer(engine, ids, self._sampler(forced))
        answer.advance(self._settings.warmup)
        samples = []
        for _ in range(repetitions):
            if prompt is not None:
                answer.close()
                answer = _Answer(engine, ids, self._sampler(forced))
            before, verifies = self._counters(), answer.counts()
            start = time.perf_counter()
            gained = answer.advance(case.tokens)
            seconds = time.perf_counter() - start
            samples.append(
                {"seconds": seconds, "tokens": gained, "first_token_s": answer.first_token_s}
                | _minus(answer.counts(), verifies)
                | self._difference(before)
            )
        answer.close()
        self.draft_why = answer.generation.stats.draft_why
        choices = answer.sampler.choices
        return {
            "prompts": [ids],
            "warmup_prompt": [],
            "forced": forced[: len(choices)] if self._drawn else None,
            "samples": samples,
            "choices": choices,
        }

    def _sampler(self, forced: list[int]) -> ChosenTokens:
        return ChosenTokens(self._banned, forced if self._drawn else None)

    def _prompt_ids(self, prompt: str) -> list[int]:
        """The prompt as its chat template puts it; mimo-nano gets the tools it knows."""
        tokenizer = self._runtime.tokenizer
        if tokenizer is None:
            raise TokenizerError(
                f"{self._runtime.name} has no tokenizer for --prompt", "leave the prompt out"
            )
        source = self._runtime.chat_template
        nano = is_nano_template(source)
        return ChatTemplate(source).encode(
            tokenizer,
            [{"role": "user", "content": prompt}],
            DEMO_TOOLS if nano else (),
            enable_thinking=False if nano else None,
        )

    @property
    def _banned(self) -> Mask | None:
        tokenizer = self._runtime.tokenizer
        return None if tokenizer is None else tokenizer.padding_mask(self._vocab)

    def _ids(self, stream: int, count: int) -> list[int]:
        return drawn_ids(self._settings.seed, stream + 1, count, self._vocab)

    def _counters(self) -> dict[str, Any]:
        experts = self._runtime.stats()["experts"] or {}
        names = ("hits", "misses", "flash_bytes", "wait_ms")
        counters = {name: experts[name] for name in names if name in experts}
        return counters | {"read_bytes": storage_read_bytes()}

    def _difference(self, before: dict[str, Any]) -> dict[str, Any]:
        return _minus(self._counters(), before)


class _Answer:
    """One generation, its first token there."""

    def __init__(self, engine: Engine, ids: list[int], sampler: ChosenTokens) -> None:
        self.sampler = sampler
        self.generation = engine.generate(engine.sequence(), ids, sampler)
        self._context = engine.context
        self._steps = iter(self.generation)
        began = time.perf_counter()
        next(self._steps)
        self.first_token_s = time.perf_counter() - began

    def advance(self, count: int) -> int:
        """Decode until `count` tokens or more are gained; how many were."""
        gained = 0
        while gained < count:
            step = next(self._steps, None)
            if step is None:
                raise UsageError(
                    f"the context of {self._context} ended after {gained} of {count} tokens",
                    "use a larger --context",
                )
            gained += len(step)
        return gained

    def counts(self) -> dict[str, Any]:
        """Passes of the target, and drafts by depth, so far."""
        stats = self.generation.stats
        return {
            "verifies": stats.verifies,
            "drafted": list(stats.drafted_by_depth),
            "accepted": list(stats.accepted_by_depth),
        }

    def close(self) -> None:
        """End it."""
        self._steps.close()  # type: ignore[attr-defined]


def _minus(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Differences of counters, lists element by element; None stays None."""
    found: dict[str, Any] = {}
    for name, value in after.items():
        was = before[name]
        if value is None or was is None:
            found[name] = None
        elif isinstance(value, list):
            found[name] = [a - b for a, b in zip(value, was, strict=True)]
        else:
            found[name] = value - was
    return found
