"""What drafting gains: tokens per second of every draft setting, side by side, greedy.

    python tools/draft_table.py BUNDLE                      # mimo-nano: held-out commands
    python tools/draft_table.py MODEL.gguf --tokens 128     # no tokenizer: random prompts
    python tools/draft_table.py MODEL.gguf --ram 4GiB --accept 0.8,0.7,0.6

Every prompt is answered once per setting and round, in an order that turns from prompt to
prompt, so drift of the machine hits all settings alike; a round's speed is all its tokens over
all its decode time, and ratios are medians of those within rounds. `--accept` replaces proposals
by the right token with the given chance per depth, which a random model needs to accept anything:
the work done stays that of real drafts.
Exits 1 when a setting's tokens differ from those of plain decoding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from mimo_edge.cancel import Cancel
from mimo_edge.engine import Engine, GenerationStats
from mimo_edge.errors import MimoEdgeError
from mimo_edge.model_source import Model, open_model
from mimo_edge.nano import commands as nano
from mimo_edge.runtimes.base import F32, Backend, Cache, ForwardResult, TokenIds
from mimo_edge.sampling import Sampler, SamplingParams
from mimo_edge.speculative import MAX_DRAFT, DraftSetting, max_draft
from mimo_edge.suites import spread
from mimo_edge.units import format_bytes, parse_bytes


class WithLuck:
    """A backend whose MTP blocks propose the token plain decoding gave, with a chance per depth,
    and a wrong one otherwise. The blocks still run: only their choice is replaced."""

    def __init__(self, inner: Backend, chances: Sequence[float]) -> None:
        self.inner, self.chances = inner, chances
        self.name, self.config = inner.name, inner.config
        self.truth: list[int] = []  # prompt and answer
        self.rng = np.random.default_rng(0)

    def new_cache(self, context: int, verify_rows: int = MAX_DRAFT + 1) -> Cache:
        return self.inner.new_cache(context, verify_rows)

    def forward(
        self,
        token_ids: TokenIds,
        cache: Cache,
        *,
        logits_rows: int = 1,
        hidden_rows: int = 0,
        cancel: Cancel | None = None,
    ) -> ForwardResult:
        return self.inner.forward(
            token_ids, cache, logits_rows=logits_rows, hidden_rows=hidden_rows, cancel=cancel
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
        logits = self.inner.mtp_forward(depth, token_ids, hidden, position, cache, cancel=cancel)
        target = position + len(token_ids) + 1 + depth
        right = self.truth[target] if target < len(self.truth) else 0
        lucky = self.rng.random() < self.chances[depth]
        choice = right if lucky else (right + 1) % len(logits)
        logits[:] = -1
        logits[choice] = 1
        return logits

    def close(self) -> None:
        self.inner.close()


def prompts_of(model: Model, limit: int, tokens: int, seed: int) -> list[tuple[list[int], int]]:
    """(prompt, most tokens of the answer) of every question asked."""
    if model.tokenizer is not None:
        found = []
        for command in spread(nano.held_out(), limit):
            listed = [nano.TOOLS[name] for name in command["tools"]]
            messages = [{"role": "user", "content": command["text"]}]
            ids = model.template.encode(model.tokenizer, messages, listed, enable_thinking=False)
            found.append((ids, tokens))
        return found
    rng = np.random.default_rng(seed)
    vocab = model.backend.config.vocab_size
    return [(rng.integers(0, vocab, 64).tolist(), tokens) for _ in range(limit)]


def answer(
    engine: Engine, prompt: list[int], draft: DraftSetting, tokens: int, eos: frozenset[int]
) -> tuple[list[int], GenerationStats]:
    """One greedy answer in a new sequence."""
    generation = engine.generate(
        engine.sequence(),
        prompt,
        Sampler(SamplingParams()),
        max_tokens=tokens,
        is_last=lambda token: token in eos,
        draft=draft,
    )
    return [token for step in generation for token in step], generation.stats


def by_round(speeds: Sequence[float], others: Sequence[float]) -> float:
    """What these are to the others, each to that of its own round: the machine's speed differs
    from round to round by more than settings do."""
    return statistics.median(a / b for a, b in zip(speeds, others, strict=True))


def measure(args: argparse.Namespace) -> int:
    ram = None if args.ram is None else parse_bytes(args.ram)
    model = open_model(args.model, args.backend, ram, args.context, args.threads)
    backend = model.backend
    lucky = None
    if args.accept:
        lucky = backend = WithLuck(backend, [float(x) for x in args.accept.split(",")])
    limit = max_draft(backend.config)
    settings: list[DraftSetting] = [*range(limit + 1), "auto"]
    engine = Engine(backend, args.context)
    questions = prompts_of(model, args.limit, args.tokens, args.seed)
    eos = model.eos_ids if model.tokenizer is not None else frozenset()
    speeds: dict[DraftSetting, list[float]] = {setting: [] for setting in settings}
    sums: dict[DraftSetting, list[Any]] = {}
    differing = 0
    try:
        for number in range(-1, args.rounds):  # round -1 warms up and is not counted
            gained = dict.fromkeys(settings, 0)
            spent = dict.fromkeys(settings, 0.0)
            sums = {s: [0, 0, [0] * limit, [0] * limit, ""] for s in settings}
            asked = questions if number >= 0 else questions[:1]
            for index, (prompt, tokens) in enumerate(asked):
                if lucky is not None:
                    lucky.truth = prompt + answer(engine, prompt, 0, tokens, eos)[0]
                plain: list[int] | None = None
                for turn in range(len(settings)):
                    setting = settings[(turn + index + number) % len(settings)]
                    ids, stats = answer(engine, prompt, setting, tokens, eos)
                    plain = ids if plain is None else plain
                    differing += ids != plain
                    gained[setting] += stats.tokens - 1
                    spent[setting] += stats.decode_ms
                    total = sums[setting]
                    total[0] += stats.tokens - 1
                    total[1] += stats.verifies
                    for depth, count in enumerate(stats.drafted_by_depth):
                        total[2][depth] += count
                        total[3][depth] += stats.accepted_by_depth[depth]
                    total[4] = stats.draft_why
            if number >= 0:
                for setting in settings:
                    speeds[setting].append(gained[setting] / spent[setting] * 1e3)
    finally:
        engine.close()
    tps = {setting: statistics.median(found) for setting, found in speeds.items()}
    best = max(range(limit + 1), key=lambda count: tps[count])
    rows = []
    for setting in settings:
        count, verifies, drafted, accepted, why = sums[setting]
        rows.append(
            {
                "draft": setting,
                "tps": tps[setting],
                "against_0": by_round(speeds[setting], speeds[0]),
                "against_best": by_round(speeds[setting], speeds[best]),
                "tokens_per_verify": count / verifies if verifies else 0.0,
                "accepted": [a / d if d else 0.0 for a, d in zip(accepted, drafted, strict=True)],
                "spread": [min(speeds[setting]), max(speeds[setting])],
                "why": why,
            }
        )
    if args.json:
        print(json.dumps({"model": model.name, "ram": ram, "rows": rows, "differing": differing}))
    else:
        cap = "" if ram is None else f", {format_bytes(ram)}"
        print(
            f"{model.name}{cap}: {len(questions)} prompts, {args.rounds} rounds, {differing} differ"
        )
        print("draft    tok/s  to 0  to best  tokens/verify  accepted by depth")
        for row in rows:
            kept = " ".join(f"{100 * x:.0f} %" for x in row["accepted"] if x)
            print(
                f"{row['draft']!s:<5}{row['tps']:>9.1f}{row['against_0']:>6.2f}"
                f"{row['against_best']:>9.3f}{row['tokens_per_verify']:>15.2f}  {kept}"
            )
        print(f"auto: {rows[-1]['why']}")
    return 1 if differing else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--limit", type=int, default=24, help="prompts")
    parser.add_argument("--tokens", type=int, default=256, help="most tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--ram", help="bound on memory")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--backend", default="ggml")
    parser.add_argument("--accept", help="chance per depth of a right proposal, as 0.8,0.7,0.6")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    try:
        return measure(parser.parse_args())
    except MimoEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
