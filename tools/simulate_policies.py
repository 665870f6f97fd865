"""Hit rates of expert cache policies on recorded or synthetic routes, as a table or JSON.

    python tools/simulate_policies.py TRACE...                 # files of `--trace`
    python tools/simulate_policies.py --synthetic              # known statistics
    python tools/simulate_policies.py --synthetic --shares 0.125,0.5 --policies lru,ours --json

Slots are given as shares of all experts. The first third of a trace warms up and is not counted.
LRU, LFU and ours know the past, Belady the future: no policy can hit more.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mimo_edge.errors import MimoEdgeError, UsageError
from mimo_edge.experts.simulate import POLICIES, Replay, cyclic_trace, replay, synthetic_trace
from mimo_edge.experts.trace import Phase, Trace, read_trace

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)


def synthetic(layers: int, experts: int, chosen: int, tokens: int) -> dict[str, Trace]:
    """Routes from the worst case for any cache to the worst case for LRU."""

    def make(**statistics: float) -> Trace:
        return synthetic_trace(layers, experts, chosen, tokens, **statistics)  # type: ignore[arg-type]

    return {
        "uniform": make(),
        "repeats 28 %, Zipf 0.3": make(repeat=0.28, skew=0.3),
        "Zipf 1": make(skew=1.0),
        "Zipf 0.7, repeats 20 %, slow drift": make(skew=0.7, repeat=0.2, drift=10),
        "Zipf 1, fast drift": make(skew=1.0, drift=50),
        "same experts every token": cyclic_trace(layers, chosen, tokens, experts),
    }


def table(name: str, trace: Trace, results: list[list[Replay]]) -> str:
    """One Markdown table: a row per slot count, a column per policy."""
    h = trace.header
    total = len(h.layers) * h.experts
    policies = [result.policy for result in results[0]]
    lines = [
        f"{name}: {len(h.layers)} layers, {h.chosen} of {h.experts} experts, {trace.tokens} tokens",
        "",
        f"| slots | of all | {' | '.join(policies)} |",
        "|---" * (len(policies) + 2) + "|",
    ]
    for row in results:
        rates = " | ".join(f"{100 * result.hit_rate:.1f} %" for result in row)
        lines.append(f"| {row[0].slots} | {row[0].slots / total:.3f} | {rates} |")
    return "\n".join(lines) + "\n"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("traces", nargs="*", type=Path)
    parser.add_argument("--synthetic", action="store_true")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--chosen", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=240)
    parser.add_argument("--decode-only", action="store_true", help="leave prefill records out")
    parser.add_argument("--shares", default=",".join(map(str, SHARES)))
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    try:
        traces = {path.name: read_trace(path) for path in args.traces}
        if args.synthetic:
            traces |= synthetic(args.layers, args.experts, args.chosen, args.tokens)
        if not traces:
            raise UsageError("no trace to replay", "name files, or use --synthetic")
        try:
            shares = [float(share) for share in args.shares.split(",")]
        except ValueError:
            raise UsageError(f"--shares {args.shares!r} is not a list of numbers") from None
        collected = {}
        for name, whole in traces.items():
            trace = whole.only(Phase.DECODE, Phase.VERIFY) if args.decode_only else whole
            h = trace.header
            total = len(h.layers) * h.experts
            slots = sorted({max(h.chosen, round(share * total)) for share in shares})
            skip = len(trace.routes) // 3
            results = [
                [replay(trace, n, policy, skip=skip) for policy in args.policies.split(",")]
                for n in slots
            ]
            collected[name] = [result.to_dict() for row in results for result in row]
            if not args.json:
                print(table(name, trace, results), flush=True)
        if args.json:
            print(json.dumps(collected))
    except MimoEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
