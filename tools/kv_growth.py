"""How KV cache and attention grow with the context: hybrid layers against all of them global.

    python tools/kv_growth.py                       # 1K to 32K tokens, MiMo-V2-Flash's attention
    python tools/kv_growth.py --write               # into docs/benchmarks.md

Two models of MiMo-V2-Flash's attention geometry (64 heads of 192/128, a window of 129) are made:
one global layer to five sliding ones, and all layers global with the same 4 KV heads the hybrid's
global layers have. (Its sliding layers have 8: with those everywhere the ratio would be near 11.)
Caches are filled with random rows, because a real prefill of 32K tokens through six global layers
takes most of an hour on two cores; a token is then decoded at that length, again and again.

`attention` is the time of the attention operations of all layers for one token, measured as graphs
of their own; `token` is a whole decoded token. The last table processes 32K tokens for real through
sliding layers only and reads the memory of the process on the way.

`--part` picks one of growth, quality (answers of mimo-nano with every cache format) and sliding.
Each begins no row after `--minutes`, and takes a few on two idle cores. Models take 2 GiB in the
temporary folder (`--models`), memory stays below 4 GiB.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from make_random_model import scaled_config, write_model
from simulate_policies import export_nano
from tables import Deadline, add_minutes, command, markdown, show, write_section

from mimo_edge.api import Runtime
from mimo_edge.budget import resident_bytes
from mimo_edge.config import MimoConfig
from mimo_edge.errors import UsageError
from mimo_edge.evaluate import evaluate_commands
from mimo_edge.gguf_file import GgufFile
from mimo_edge.kv_format import KV_FORMATS
from mimo_edge.nano import commands as nano
from mimo_edge.quant.base import get_format
from mimo_edge.runtimes.ggml.backend import GgmlBackend
from mimo_edge.runtimes.ggml.bindings import TYPE_F16, TYPE_F32
from mimo_edge.runtimes.ggml.cache import GgmlCache
from mimo_edge.runtimes.ggml.cache_memory import KvTensors, kv_rows
from mimo_edge.runtimes.ggml.graph import Graph, Inputs
from mimo_edge.runtimes.ggml.raw import GgufTensors
from mimo_edge.session import Session
from mimo_edge.suites import spread
from mimo_edge.units import format_bytes

HYBRID, GLOBAL = "111110", "0"
CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)
FILL_ROWS = 256


@dataclass(frozen=True)
class Point:
    """One model at one length."""

    kv_bytes: int
    attention_ms: float
    token_ms: float


def opened(folder: Path, name: str, config: MimoConfig, threads: int, kv_type: str) -> GgmlBackend:
    """A random model of `config`, made if it is not there."""
    path = folder / f"{name}.gguf"
    if not path.exists():
        write_model(path, config)
    source = GgufTensors(config, [GgufFile.open(path)])
    return GgmlBackend(source, threads=threads, kv_type=kv_type)


def fill(cache: GgmlCache, kv_type: str, tokens: int) -> None:
    """Let a cache hold `tokens` tokens of random rows."""
    rng = np.random.default_rng(0)
    g = cache.device.ggml
    for spec, kv in zip(cache.config.layers, cache.layers, strict=True):
        fmt = get_format("F16" if spec.sliding else kv_type.upper())
        rows = kv.rows if spec.sliding else tokens
        for tensor in (kv.key, kv.value):
            values = rng.standard_normal((FILL_ROWS, tensor.ne[0]), dtype=np.float32)
            data = fmt.quantize(values)
            for start in range(0, rows, FILL_ROWS):
                part = data[: min(FILL_ROWS, rows - start)]
                at = start * tensor.nb[1]
                g.ggml_backend_tensor_set(tensor.pointer, part.ctypes.data, at, part.nbytes)
    cache.ring.store(0, tokens)
    cache.full.store(0, tokens)
    cache.commit(tokens)


def timed(run: Iterator[None], repeats: int) -> float:
    """Median milliseconds of a step of `run`; the first is left out."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        next(run)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[1:])


def decode(backend: GgmlBackend, cache: GgmlCache) -> Iterator[None]:
    """The same token at the same place, again and again."""
    token = np.array([7], np.int32)
    while True:
        backend.forward(token, cache)
        cache.rollback(1)
        yield


def attention_ms(backend: GgmlBackend, cache: GgmlCache, tokens: int, repeats: int) -> float:
    """Attention of one query over the rows it sees, summed over the layers."""
    total = 0.0
    for sliding in (True, False):
        layers = [s.index for s in cache.config.layers if s.sliding == sliding]
        if not layers:
            continue
        rows = cache.layers[layers[0]].rows if sliding else kv_rows(tokens)
        # As many layers as the caches of one model, so that rows come from memory, as they do.
        total += timed(_attention(backend, [cache.layers[i] for i in layers], rows), repeats)
    return total


def _attention(backend: GgmlBackend, layers: list[KvTensors], rows: int) -> Iterator[None]:
    c = backend.config
    graph, inputs = Graph(backend.device, 16 * len(layers)), Inputs(backend.device)
    query = inputs.new(TYPE_F32, c.head_dim, c.num_attention_heads, 1)
    mask = inputs.new(TYPE_F16, rows, 1)
    inputs.allocate()
    query.array()[...] = np.random.default_rng(1).standard_normal(query.array().shape)
    mask.array()[...] = 0
    for kv in layers:
        keys, values = (
            graph.view(
                tensor,
                (dim, rows, tensor.ne[0] // dim),
                (tensor.nb[1], tensor.nb[1] * dim // tensor.ne[0]),
            )
            for tensor, dim in ((kv.key, c.head_dim), (kv.value, c.v_head_dim))
        )
        graph.output(graph.attention(query, keys, values, mask, c.head_dim**-0.5, None))
    graph.finish()
    try:
        while True:
            graph.compute()
            yield
    finally:
        graph.close()
        inputs.close()


def measure(backend: GgmlBackend, kv_type: str, tokens: int, repeats: int) -> Point:
    """A model that holds `tokens` tokens and decodes one more."""
    cache = backend.new_cache(tokens + 1)
    try:
        fill(cache, kv_type, tokens)
        token_ms = timed(decode(backend, cache), repeats)
        ops = attention_ms(backend, cache, tokens, repeats)
        return Point(cache.nbytes(), ops, token_ms)
    finally:
        cache.close()


def _columns(what: str) -> list[str]:
    return [f"{what} hybrid", f"{what} all global", "ratio"]


def growth(args: argparse.Namespace, folder: Path) -> str:
    """The table of both models at every length."""
    text, deadline = "", Deadline(args.minutes)
    for kv_type in args.kv_types:
        backends = []
        for name, pattern in (("hybrid", HYBRID), ("global", GLOBAL)):
            config = scaled_config("MiMo-V2-Flash", args.layers, args.experts, 1024, 0, pattern)
            backends.append(opened(folder, name, config, args.threads, kv_type))
        rows = [
            ["tokens", *_columns("KV"), *_columns("attention"), "token hybrid", "token all global"]
        ]
        for tokens in args.contexts:
            if not deadline.allows(f"{kv_type} at {tokens:,} tokens"):
                continue
            a, b = (measure(backend, kv_type, tokens, args.repeats) for backend in backends)
            rows.append(
                [
                    f"{tokens:,}",
                    *(format_bytes(one.kv_bytes) for one in (a, b)),
                    f"{b.kv_bytes / a.kv_bytes:.2f}",
                    *(f"{one.attention_ms:.2f} ms" for one in (a, b)),
                    f"{b.attention_ms / a.attention_ms:.2f}",
                    *(f"{one.token_ms:.1f} ms" for one in (a, b)),
                ]
            )
            show(rows[-1])
        for backend in backends:
            backend.close()
        text += f"{kv_type} cache, {args.layers} layers:\n\n{markdown(rows)}\n"
    return text + deadline.note()


def sliding_memory(args: argparse.Namespace, folder: Path) -> str:
    """Memory of the process while sliding layers process more and more tokens."""
    config = scaled_config("MiMo-V2-Flash", args.layers, 8, 1024, 0, "1")
    config = replace(
        config, hidden_size=512, intermediate_size=512, moe_intermediate_size=256
    )  # the attention's geometry stays
    backend = opened(folder, "sliding", config, args.threads, "f16")
    most = max(args.contexts)
    cache = backend.new_cache(most)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, most).astype(np.int32)
    rows = [["tokens processed", "KV cache", "memory of the process", "since the first"]]
    first = None
    deadline = Deadline(args.minutes)
    for tokens in args.contexts:
        if not deadline.allows(f"{tokens:,} tokens"):
            continue
        backend.forward(ids[cache.length : tokens], cache)
        held = resident_bytes()
        if held is None:
            raise UsageError("this system does not tell the memory of a process")
        first = held if first is None else first
        rows.append(
            [
                f"{tokens:,}",
                *(format_bytes(size) for size in (cache.nbytes(), held)),
                f"{(held - first) / 1024:+.0f} KiB",
            ]
        )
        show(rows[-1])
    backend.close()
    title = f"Sliding layers only, {args.layers} of them, processed for real"
    return f"{title}:\n\n{markdown(rows)}{deadline.note()}"


class Kept:
    """A runtime that remembers the sessions it made."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._made: list[Session] = []

    def session(self, *, tools: Sequence[Mapping[str, Any]], enable_thinking: bool) -> Session:
        """See `Runtime.session`."""
        self._made.append(self._runtime.session(tools=tools, enable_thinking=enable_thinking))
        return self._made[-1]

    def replies(self) -> list[tuple[int, ...]]:
        """The token ids of every session's last answer."""
        found = (session.last_reply for session in self._made)
        return [() if reply is None else reply.token_ids for reply in found]


def quality(args: argparse.Namespace, folder: Path) -> str:
    """Answers of mimo-nano with every cache format: right ones, and the same ones."""
    path = export_nano(folder)
    commands = spread(nano.held_out(), args.commands)
    rows = [["KV cache", "exact tool calls", "answers as with f16, token for token"]]
    first: list[tuple[int, ...]] | None = None
    deadline = Deadline(args.minutes)
    for kv_type in ("f16", *(kind for kind in args.kv_types if kind != "f16")):
        if not deadline.allows(kv_type):
            continue
        with Runtime.open(path, backend="ggml", kv_type=kv_type, threads=args.threads) as runtime:
            kept = Kept(runtime)
            exact = evaluate_commands(kept, commands, nano.TOOLS).total.exact
        replies = kept.replies()
        first = first or replies
        same = sum(a == b for a, b in zip(replies, first, strict=True))
        rows.append([kv_type, *(f"{n} of {len(commands)}" for n in (exact, same))])
        show(rows[-1])
    return f"mimo-nano (Q4_0), held-out commands:\n\n{markdown(rows)}{deadline.note()}\n"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def formats(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--contexts", type=numbers, default=list(CONTEXTS))
    parser.add_argument("--kv-types", type=formats, default=["f16", "q8_0"])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--part", choices=("growth", "sliding", "quality"), action="append")
    parser.add_argument("--commands", type=int, default=60, help="held-out commands of quality")
    parser.add_argument("--models", type=Path, help="keep the models in this folder")
    add_minutes(parser, 6)
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    args = parser.parse_args(argv)
    if min(args.contexts, default=0) < 1 or args.repeats < 1:
        raise UsageError(f"--contexts {args.contexts}, --repeats {args.repeats}", "use 1 or more")
    if unknown := [kind for kind in args.kv_types if kind not in KV_FORMATS]:
        raise UsageError(f"--kv-types {unknown[0]!r}", f"known: {', '.join(KV_FORMATS)}")
    args.contexts.sort()
    return args


@command
def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    with tempfile.TemporaryDirectory() as made:
        folder = made if args.models is None else args.models
        parts = {"growth": growth, "quality": quality, "sliding": sliding_memory}
        text = "\n".join(
            parts[part](args, Path(folder)) for part in parts if part in (args.part or parts)
        )
    if args.write:
        write_section("kv growth", text, "KV cache and attention by context")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
