"""Time to the first token of a prompt with a long shared beginning: processed, kept, and found.

    python tools/snapshot_gains.py                  # mimo-nano and a random model of middle size
    python tools/snapshot_gains.py BUNDLE --prefix 512,2048
    python tools/snapshot_gains.py --write          # into docs/benchmarks.md

A prompt is `--prefix` tokens that all prompts share, as system text and tools are, and 24 of its
own. Three ways by turns, each with a new conversation: without snapshots; with snapshots and none
there, so that it is processed and written; with one there. `cold` also drops the file from the page
cache before, as after a restart of the device. Medians, in milliseconds from the call to the first
piece of the answer.

The random model has MiMo-V2-Flash's attention at its real width (64 heads of 192/128, window 129,
one global layer in six), 8 layers with 16 small experts; it takes about 1 GiB in the temporary
folder.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from simulate_policies import export_nano
from tables import command, markdown, write_section

from mimo_edge.api import Runtime
from mimo_edge.bench.random_model import scaled_config, write_model
from mimo_edge.errors import SnapshotError
from mimo_edge.units import format_bytes

OWN_TOKENS = 24


def first_token_ms(runtime: Runtime, prompt: list[int], prefix: int) -> float:
    """From the call to the first piece, in a conversation of its own."""
    session = runtime.session()
    start = time.perf_counter()
    stream = session.stream(prompt, max_tokens=2, prefix_tokens=prefix)
    next(stream)
    found = (time.perf_counter() - start) * 1e3
    stream.close()  # type: ignore[attr-defined]
    return found


def forget(folder: Path) -> None:
    """Drop the snapshots from the page cache."""
    for path in folder.glob("*.snap"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(model: Path, prefixes: list[int], repeat: int, context: int) -> Iterator[list[str]]:
    """Rows of the table for one model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Runtime.open(model, context=context, snapshots=folder) as runtime:
            rng = random.Random(0)
            vocab = min(runtime.config.vocab_size, 2000)
            ids = [rng.randrange(vocab // 8, vocab) for _ in range(OWN_TOKENS)]
            first_token_ms(runtime, ids, 0)  # graphs and experts of a first pass
            for prefix in prefixes:
                found: dict[str, list[float]] = {}
                size = 0
                for _ in range(repeat):
                    shared = [rng.randrange(vocab // 8, vocab) for _ in range(prefix)]
                    for way, border in (("without", 0), ("kept", prefix), ("found", prefix)):
                        # Another end each time: only the beginning is the same.
                        prompt = [*shared, *rng.sample(ids, OWN_TOKENS)]
                        took = first_token_ms(runtime, prompt, border)
                        found.setdefault(way, []).append(took)
                    forget(folder)
                    prompt = [*shared, *rng.sample(ids, OWN_TOKENS)]
                    found.setdefault("cold", []).append(first_token_ms(runtime, prompt, prefix))
                    for path in folder.glob("*.snap"):
                        size = path.stat().st_size
                        path.unlink()
                stats = runtime.stats()["snapshots"]
                if not stats["hits"] or stats["damaged"] or stats["failed_writes"]:
                    raise SnapshotError(f"snapshots were not used as they should be: {stats}")
                middle = {way: statistics.median(times) for way, times in found.items()}
                yield [
                    runtime.name,
                    f"{prefix}",
                    *(f"{middle[way]:.0f}" for way in ("without", "kept", "found", "cold")),
                    f"{middle['without'] / middle['found']:.1f}x",
                    format_bytes(size),
                ]


@contextmanager
def models(given: list[Path]) -> Iterator[list[Path]]:
    """The models to measure; without any, the two that are made here."""
    if given:
        yield given
        return
    folder = Path(tempfile.mkdtemp())
    try:
        middle = folder / "middle.gguf"
        config = replace(
            scaled_config("MiMo-V2-Flash", 8, 16, 4096, 0, "111110"),
            moe_intermediate_size=512,
            intermediate_size=2048,
        )
        write_model(middle, config, experts="Q4_0", dense="Q8_0", head="Q6_K")
        yield [export_nano(folder), middle]
    finally:
        shutil.rmtree(folder)


@command
def main(argv: list[str] | None = None) -> None:
    """Measure and print, or write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--prefix", default="256,1024", help="tokens, with commas")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    args = parser.parse_args(argv)
    prefixes = [int(part) for part in args.prefix.split(",")]
    head = ["model", "shared", "without", "kept", "found", "cold", "gain", "file"]
    rows: list[list[str]] = [head]
    with models(args.models) as paths:
        for path in paths:
            for row in measure(path, prefixes, args.repeat, args.context):
                rows.append(row)
                print(" | ".join(row), flush=True)
    if args.write:
        write_section("snapshots", markdown(rows), "Prompts processed once")


if __name__ == "__main__":
    sys.exit(main())
