"""What heat and speculative prefetch change in real runs with few expert slots.

    python tools/cache_gains.py                                   # mimo-nano, held-out commands
    python tools/cache_gains.py MODEL --slots 200 --tokens 32     # a bundle, or a .gguf file
    python tools/cache_gains.py --write                           # into docs/benchmarks.md

Two tables. Start: the share of experts found in memory up to the 50th token of the first answer,
each time in a newly opened model, with nothing known, with the bundle's heat, and with the hottest
experts read at load. Speculative reads: decoding without any, with those that the next layer used
last time, and with those its router names on the residual stream as it is (what the runtime does
while enough of them come true), by turns in one process.

Each table begins no row after `--minutes`, and takes a few on two idle cores; of mimo-nano it takes
about 30 MiB in the temporary folder.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from simulate_policies import export_nano, nano_session
from tables import Deadline, add_minutes, command, markdown, show, write_section

from mimo_edge.api import Runtime
from mimo_edge.bundle import Bundle
from mimo_edge.chat_template import ChatTemplate
from mimo_edge.errors import UsageError
from mimo_edge.experts.stats import CacheStats
from mimo_edge.experts.table import ExpertTable
from mimo_edge.model_source import Model, open_tokenizer
from mimo_edge.nano import commands as nano
from mimo_edge.runtimes.ggml.backend import GgmlBackend
from mimo_edge.runtimes.ggml.device import Device
from mimo_edge.runtimes.ggml.expert_source import CachedExperts
from mimo_edge.runtimes.ggml.raw import GgufTensors
from mimo_edge.runtimes.ggml.slots import ExpertGroup, Ids
from mimo_edge.suites import spread

CONTEXT = 1024
PROMPT_TOKENS = 64


Guess = Literal["none", "last route", "router", "measured"]


@dataclass(frozen=True)
class Way:
    """How a model is opened."""

    title: str
    heat: bool = True
    warm: bool = True
    guess: Guess = "measured"


@dataclass(frozen=True)
class Found:
    """One answer: hits and requests of the prompt and of the answer, bytes read and speed of the
    answer."""

    prompt: tuple[int, int]
    answer: tuple[int, int]
    tokens: int
    nbytes: int
    tps: float


class Guessing(CachedExperts):
    """Experts with a choice of what is read on a guess."""

    def __init__(self, device: Device, table: ExpertTable, slots: int, way: Way) -> None:
        super().__init__(device, table, slots)
        self._way = way
        self._last: dict[int, Ids] = {}  # experts of the last pass by layer

    def guesses(self, rows: int) -> bool:
        """Whether the router is asked: always, or when the measured time says so."""
        measured = self._way.guess == "measured" and super().guesses(rows)
        return measured or self._way.guess == "router"

    def groups(self, layer: int, experts: Ids, counts: Ids) -> Generator[ExpertGroup, None, None]:
        """As always; with "last route" the experts the next layer used in the last pass are read
        on the side."""
        told = self._way.guess != "last route"
        with closing(super().groups(layer, experts, counts)) as groups:
            for group in groups:
                if not told:
                    self._expect_last(layer, experts)
                    told = True
                yield group

    def _expect_last(self, layer: int, experts: Ids) -> None:
        self._last[layer] = experts
        layers = sorted(self.slots.layouts)
        following = layers[(layers.index(layer) + 1) % len(layers)]
        if following in self._last:
            self.cache.expect(following, self._last[following])


def opened(path: Path, slots: int, way: Way, threads: int) -> tuple[Runtime, CachedExperts]:
    """A model with `slots` slots, whatever memory there is."""
    bundle = Bundle.open(path)
    table = ExpertTable.from_bundle(bundle)
    if not way.heat:
        table = replace(table, heat=None)
    made: list[Guessing] = []

    def experts(device: Device) -> CachedExperts:
        made.append(Guessing(device, table, slots, way))
        return made[0]

    source = GgufTensors(bundle.config, [bundle.gguf])
    backend = GgmlBackend(source, threads=threads, experts=experts)
    if way.warm and table.heat is not None:
        made[0].cache.warm()
    tokenizer = None if bundle.tokenizer_path is None else open_tokenizer(bundle.tokenizer_path)
    template = ChatTemplate(bundle.chat_template)
    eos = frozenset() if tokenizer is None else tokenizer.eos_ids
    context = min(CONTEXT, bundle.config.max_position_embeddings)
    model = Model("m", backend, tokenizer, template, eos, made[0])
    return Runtime(model, context, 0), made[0]


def answer(runtime: Runtime, experts: CachedExperts, number: int, tokens: int) -> Found:
    """Answer command `number` with at most `tokens` tokens."""
    before = experts.stats()
    if runtime.tokenizer is None:
        ids = np.random.default_rng(number).integers(0, runtime.config.vocab_size, PROMPT_TOKENS)
        session = runtime.session()
        pieces = session.stream(ids.tolist(), max_tokens=tokens)
    else:
        record = nano.held_out()[number]
        session = nano_session(runtime, record)
        pieces = session.stream(record["text"], max_tokens=tokens)
    middle: CacheStats | None = None
    for _ in pieces:
        middle = middle or experts.stats()  # the first token comes from the prompt
    after = experts.stats()
    assert middle is not None
    assert session.last_reply is not None
    count = len(session.last_reply.token_ids)
    return Found(
        _requests(before, middle),
        _requests(middle, after),
        count - 1,
        after.flash_bytes - middle.flash_bytes,
        session.last_reply.stats.decode_tps,
    )


def _requests(before: CacheStats, after: CacheStats) -> tuple[int, int]:
    """Hits and all requests between two moments."""
    a, b = before.total(), after.total()
    return b.hits - a.hits, b.hits + b.misses - a.hits - a.misses


def _rate(pairs: Sequence[tuple[int, int]]) -> str:
    requests = sum(pair[1] for pair in pairs)
    return f"{100 * sum(pair[0] for pair in pairs) / requests:.1f} %" if requests else "-"


def start_table(args: argparse.Namespace, path: Path, numbers: Sequence[int]) -> str:
    """Hit rates of first answers."""
    ways = (
        Way("nothing known", heat=False, warm=False),
        Way("heat", warm=False),
        Way("heat, hot experts read at load"),
    )
    rows = [["slots", "start", "prompt", "answer", "both"]]
    deadline = Deadline(args.minutes)
    for slots in args.slots:
        for way in ways:
            if not deadline.allows(f"{slots} slots, {way.title}"):
                continue
            found = []
            for number in numbers:
                runtime, experts = opened(path, slots, way, args.threads)
                with runtime:
                    found.append(answer(runtime, experts, number, args.tokens))
            rates = [_rate([f.prompt for f in found]), _rate([f.answer for f in found])]
            both = _rate([pair for f in found for pair in (f.prompt, f.answer)])
            rows.append([str(slots), way.title, *rates, both])
            show(rows[-1])
    return markdown(rows) + deadline.note()


def prefetch_table(args: argparse.Namespace, path: Path, numbers: Sequence[int]) -> str:
    """Speed of decoding, with and without, by turns."""
    rows = [["slots", "guess", "hits", "KiB read per token", "tok/s", "against none"]]
    deadline = Deadline(args.minutes)
    for slots in args.slots:
        if not deadline.allows(f"{slots} slots"):
            continue
        ways = [Way(g, guess=g) for g in get_args(Guess)]
        models = [opened(path, slots, way, args.threads) for way in ways]
        results: list[list[Found]] = [[] for _ in ways]
        try:
            for number in numbers:
                for (runtime, experts), found in zip(models, results, strict=True):
                    found.append(answer(runtime, experts, number, args.tokens))
        finally:
            for runtime, _ in models:
                runtime.close()
        plain = [f.tps for f in results[0]]
        for way, found in zip(ways, results, strict=True):
            read = sum(f.nbytes for f in found) / max(1, sum(f.tokens for f in found))
            ratio = statistics.median(f.tps / p for f, p in zip(found, plain, strict=True))
            rows.append(
                [
                    str(slots),
                    way.guess,
                    _rate([f.answer for f in found]),
                    f"{read / 1024:,.0f}",
                    f"{statistics.median(f.tps for f in found):.1f}",
                    f"{ratio:.2f}x",
                ]
            )
            show(rows[-1])
    return markdown(rows) + deadline.note()


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", nargs="?", type=Path, help="default: mimo-nano, exported")
    parser.add_argument("--slots", type=numbers, default=[10, 20, 40])
    parser.add_argument("--tokens", type=int, default=50)
    parser.add_argument("--answers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", choices=("start", "prefetch", "all"), default="all")
    add_minutes(parser, 5)
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    args = parser.parse_args(argv)
    if min(args.tokens, args.answers, *args.slots) < 1:
        raise UsageError(f"{args.tokens} tokens, {args.answers} answers, {args.slots} slots")
    return args


@command
def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    numbers = spread(range(len(nano.held_out())), args.answers)
    with tempfile.TemporaryDirectory() as made:
        path = args.model or export_nano(Path(made))
        text = ""
        if args.part != "prefetch":
            text += f"First answers:\n\n{start_table(args, path, numbers)}\n"
        if args.part != "start":
            text += f"Speculative reads:\n\n{prefetch_table(args, path, numbers)}"
    if args.write:
        write_section("cache gains", text, "What heat and guesses gain")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
