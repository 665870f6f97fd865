"""Hit rates of expert cache policies on recorded and synthetic routes, for docs/benchmarks.md.

    python tools/simulate_policies.py TRACE...              # files of `mimo-edge run --trace`
    python tools/simulate_policies.py --synthetic           # known statistics
    python tools/simulate_policies.py --nano --synthetic --write     # the tables in the document

`--nano` exports mimo-nano with calibration, records it while it answers held-out commands, and adds
what heat saves at the start and what speculative prefetch would do. Slots are given as shares of
all experts. The first third of a trace warms up and is not counted, except at the start.
LRU, LFU and ours know the past, Belady the future: no policy can hit more. A few minutes, most of
them for mimo-nano's answers (`--commands`), and a few MiB of disk.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tables import DOCUMENT, command, markdown, write_section

from mimo_edge.api import Runtime
from mimo_edge.bundle import Bundle
from mimo_edge.errors import UsageError
from mimo_edge.experts.simulate import (
    POLICIES,
    Replay,
    compare,
    cyclic_trace,
    frequency_maker,
    replay,
    slots_of_shares,
    synthetic_trace,
)
from mimo_edge.experts.trace import Phase, Trace, read_trace
from mimo_edge.export.pipeline import export_bundle
from mimo_edge.heat import Heat
from mimo_edge.nano import commands as nano
from mimo_edge.session import Session
from mimo_edge.suites import spread

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
COMMANDS = 60
START_TOKENS = 50


def synthetic(layers: int, experts: int, chosen: int, tokens: int) -> dict[str, Trace]:
    """Routes from the worst case for any cache to the worst case for LRU."""

    def make(**statistics: float) -> Trace:
        return synthetic_trace(layers, experts, chosen, tokens, **statistics)  # type: ignore[arg-type]

    return {
        "Zipf 1": make(skew=1.0),
        "repeats 28 %, Zipf 0.3": make(repeat=0.28, skew=0.3),
        "Zipf 0.7, repeats 20 %, slow drift": make(skew=0.7, repeat=0.2, drift=10),
        "Zipf 1, fast drift": make(skew=1.0, drift=50),
        "uniform": make(),
        "same experts every token": cyclic_trace(layers, chosen, tokens, experts),
    }


def export_nano(folder: Path) -> Path:
    """mimo-nano as an int4 bundle with heat."""
    calibration = folder / "calibration.txt"
    calibration.write_text(nano.calibration_text(), "utf-8")
    export_bundle("mimo-nano", folder / "nano", calibration=calibration).close()
    return folder / "nano"


def nano_session(runtime: Runtime, record: Mapping[str, Any]) -> Session:
    """A session with the tools of a held-out command."""
    tools = [nano.TOOLS[name] for name in record["tools"]]
    return runtime.session(tools=tools, enable_thinking=False)


def record_nano(folder: Path, commands: int) -> tuple[Trace, Heat]:
    """Record mimo-nano while it answers held-out commands, not drafting; its trace and heat."""
    bundle, file = export_nano(folder), folder / "nano.routes"
    with Bundle.open(bundle) as made:
        heat = made.heat
    assert heat is not None
    with Runtime.open(bundle, backend="ggml", draft=0, trace=file) as runtime:
        for record in spread(nano.held_out(), commands):
            nano_session(runtime, record).generate(record["text"], max_tokens=128)
    return read_trace(file), heat


def conversations(trace: Trace) -> Iterator[Trace]:
    """A trace cut where a prompt follows an answer: every part starts with an empty cache."""
    start, last = 0, Phase.PREFILL
    for index, route in enumerate(trace.routes):
        if route.phase == Phase.PREFILL and last != Phase.PREFILL:
            yield Trace(trace.header, trace.routes[start:index])
            start = index
        last = route.phase
    yield Trace(trace.header, trace.routes[start:])


# --- tables -----------------------------------------------------------------------------------


def policy_table(traces: Mapping[str, Trace], results: Mapping[str, list[list[Replay]]]) -> str:
    """A row per trace, a column per share, in every cell the rates of all policies."""
    names = [result.policy for result in next(iter(results.values()))[0]]
    rows = [["routes", *(f"1/{round(1 / share)}" for share in SHARES)]]
    for name, by_slots in results.items():
        h = traces[name].header
        size = f"{len(h.layers)} layers, {h.chosen} of {h.experts}"
        cells = [" / ".join(f"{100 * r.hit_rate:.1f}" for r in row) for row in by_slots]
        rows.append([f"{name} ({size})", *cells])
    return f"Hit rate in %: {' / '.join(names)}.\n\n{markdown(rows)}"


def start_table(trace: Trace, heat: Heat) -> str:
    """The first tokens of every answer, from an empty cache: nothing known, heat, heat and warm."""
    use = {layer: counts.astype(np.float64) for layer, counts in heat.counts.items()}
    makers = {**POLICIES, "ours+heat": frequency_maker(use)}
    ways = (
        ("empty", "ours", False),
        ("heat", "ours+heat", False),
        ("heat, hot experts read at load", "ours+heat", True),
    )
    slots = slots_of_shares(trace, SHARES)
    rows = [["start", "counted", *(f"{n} slots" for n in slots)]]
    parts = list(conversations(trace))
    for counted in ("prompt and answer", "answer"):
        for title, policy, warm in ways:
            cells = []
            for count in slots:
                found = []
                for part in parts:
                    answer = part.only(Phase.DECODE, Phase.VERIFY).first(START_TOKENS).routes
                    prompt = part.only(Phase.PREFILL).routes
                    whole = Trace(trace.header, prompt + answer)
                    skip = 0 if counted == "prompt and answer" else len(prompt)
                    found.append(replay(whole, count, policy, makers, skip=skip, warm=warm))
                cells.append(_rate(found))
            rows.append([title, counted, *cells])
    return markdown(rows)


def prefetch_table(traces: Mapping[str, Trace]) -> str:
    """Reading ahead what the next layer used last time: misses saved, reads added."""
    rows = [["routes", "slots", "misses", "misses with prefetch", "reads with prefetch"]]
    for name, trace in traces.items():
        decode = trace.only(Phase.DECODE, Phase.VERIFY)
        skip = len(decode.routes) // 3
        for slots in slots_of_shares(decode, SHARES[:3]):
            plain = replay(decode, slots, "ours", skip=skip)
            ahead = replay(decode, slots, "ours", skip=skip, ahead=2)
            misses = plain.requests - plain.hits
            if misses:
                saved = (ahead.requests - ahead.hits) / misses - 1
                more = ahead.reads / misses - 1
                rows.append(
                    [name, str(slots), str(misses), f"{100 * saved:+.1f} %", f"{100 * more:+.1f} %"]
                )
    return markdown(rows)


def _rate(found: list[Replay]) -> str:
    hits, requests = sum(r.hits for r in found), sum(r.requests for r in found)
    return f"{100 * hits / requests:.1f}"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("traces", nargs="*", type=Path)
    parser.add_argument("--nano", action="store_true", help="record mimo-nano")
    parser.add_argument(
        "--commands", type=int, default=COMMANDS, help="held-out commands of --nano"
    )
    parser.add_argument("--synthetic", action="store_true")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--chosen", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=240)
    parser.add_argument("--write", action="store_true", help=f"into {DOCUMENT.name}")
    parser.add_argument("--json", action="store_true", help="print the replays as JSON")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    traces = {path.name: read_trace(path) for path in args.traces}
    heat: Heat | None = None
    if args.nano:
        with tempfile.TemporaryDirectory() as folder:
            whole, heat = record_nano(Path(folder), args.commands)
        traces["mimo-nano, answers"] = whole.only(Phase.DECODE)
    if args.synthetic:
        traces |= synthetic(args.layers, args.experts, args.chosen, args.tokens)
    if not traces:
        raise UsageError("no trace to replay", "name files, or use --nano or --synthetic")
    results: dict[str, list[list[Replay]]] = {}
    for name, trace in traces.items():
        slots = slots_of_shares(trace, SHARES)
        results[name] = compare(trace, slots, list(POLICIES), skip=len(trace.routes) // 3)
    if args.json:
        collected: dict[str, Any] = {
            name: [result.to_dict() for row in rows for result in row]
            for name, rows in results.items()
        }
        print(json.dumps(collected))
        return
    text = policy_table(traces, results)
    if heat is not None:
        text += (
            "\nmimo-nano from an empty cache, hit rate in % up to token "
            f"{START_TOKENS} of an answer:\n\n{start_table(whole, heat)}"
        )
    text += (
        "\nSpeculative prefetch, replayed (up to 2 experts the next layer used last time, read "
        f"while this layer runs):\n\n{prefetch_table(traces)}"
    )
    if args.write:
        write_section("policies", text)
    print(text)


if __name__ == "__main__":
    sys.exit(main())
