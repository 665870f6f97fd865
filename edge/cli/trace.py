"""`mimo-edge trace`: replay recorded routes against cache policies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mimo_edge.cli.output import Output
from mimo_edge.errors import UsageError

if TYPE_CHECKING:
    from mimo_edge.experts.simulate import PolicyMaker, Replay
    from mimo_edge.experts.trace import Trace

DEFAULT_SHARES = "0.0625,0.125,0.25,0.5"
DEFAULT_POLICIES = "lru,lfu,ours,belady"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("trace")(trace)


def trace(
    files: Annotated[list[Path], typer.Argument(help="Files written by `run --trace`.")],
    shares: Annotated[
        str, typer.Option(help="Slots as shares of all experts, separated by commas.")
    ] = DEFAULT_SHARES,
    slots: Annotated[
        str | None, typer.Option(help="Slots as numbers, separated by commas; instead of shares.")
    ] = None,
    policies: Annotated[
        str, typer.Option(help="Policies to compare; ours+heat needs --heat.")
    ] = DEFAULT_POLICIES,
    heat: Annotated[
        Path | None, typer.Option(help="Bundle whose heat starts the policy ours+heat.")
    ] = None,
    decode_only: Annotated[
        bool, typer.Option("--decode-only", help="Leave the prompts' passes out.")
    ] = False,
    tokens: Annotated[int | None, typer.Option(help="Replay only the first tokens.")] = None,
    warm_up: Annotated[
        float, typer.Option(help="Share of the records that fill the cache, uncounted.")
    ] = 1 / 3,
    partial: Annotated[
        bool, typer.Option("--partial", help="Accept a trace that was cut off, up to the cut.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Hit rates of cache policies on recorded routes. Belady knows the future: none can beat it."""
    from mimo_edge.experts.simulate import POLICIES, compare, frequency_maker, slots_of_shares
    from mimo_edge.experts.trace import Phase, read_trace

    output = Output(json=json)
    if not 0 <= warm_up < 1:
        raise UsageError(f"--warm-up {warm_up}", "give a share from 0 to below 1")
    if tokens is not None and tokens < 1:
        raise UsageError(f"--tokens {tokens}", "use 1 or more")
    names = policies.split(",")
    makers: dict[str, PolicyMaker] = dict(POLICIES)
    if heat is not None:
        makers["ours+heat"] = frequency_maker(_heat(heat))
        names += [] if "ours+heat" in names else ["ours+heat"]
    counts = None if slots is None else _numbers("--slots", slots, int)
    fractions = _numbers("--shares", shares, float)
    collected: dict[str, Any] = {}
    for path in files:
        routes = read_trace(path, partial=partial)
        if decode_only:
            routes = routes.only(Phase.DECODE, Phase.VERIFY)
        if tokens is not None:
            routes = routes.first(tokens)
        if not routes.routes:
            raise UsageError(f"{path} holds no routes to replay")
        wanted = counts or slots_of_shares(routes, fractions)
        skip = int(len(routes.routes) * warm_up)
        results = compare(routes, wanted, names, makers, skip=skip)
        _print(output, path, routes, results)
        collected[str(path)] = {
            "source": routes.header.source,
            "tokens": routes.tokens,
            "results": [result.to_dict() for row in results for result in row],
        }
    output.result(collected)


def _print(output: Output, path: Path, routes: Trace, results: list[list[Replay]]) -> None:
    h = routes.header
    total = len(h.layers) * h.experts
    output.text(
        f"{path}: {h.source}, {len(h.layers)} layers, {h.chosen} of {h.experts} experts, "
        f"{routes.tokens} tokens"
    )
    output.table(
        [
            [row[0].slots, f"{row[0].slots / total:.3f}", *(_percent(r) for r in row)]
            for row in results
        ],
        ["slots", "of all", *(result.policy for result in results[0])],
    )


def _percent(result: Replay) -> str:
    return f"{100 * result.hit_rate:.1f}%"


def _heat(path: Path) -> dict[int, Any]:
    """The heat of a bundle by model layer. Raises UsageError when it has none."""
    import numpy as np

    from mimo_edge.bundle import Bundle

    with Bundle.open(path) as bundle:
        found = bundle.heat
    if found is None:
        raise UsageError(f"{path} has no heat", "export it with --calibrate")
    return {layer: counts.astype(np.float64) for layer, counts in found.counts.items()}


def _numbers(option: str, text: str, kind: type[int] | type[float]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a list of numbers") from None
