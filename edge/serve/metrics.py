"""What a server counts, as Prometheus text (exposition format 0.0.4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from mimo_edge.machine import rss_bytes
from mimo_edge.serve.work import Workshop

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "mimo_edge_"


class Metrics:
    """Counts of answered requests by route and status, and of those whose client left."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.abandoned = 0

    def text(self, workshop: Workshop) -> str:
        """The page for Prometheus."""
        stats = workshop.runtime.stats()
        gate, pool = workshop.gate, workshop.pool
        lines: list[str] = []

        def add(name: str, kind: str, help_: str, value: Any) -> None:
            lines.extend(_metric(name, kind, help_, value))

        add(
            "requests_total",
            "counter",
            "Answered HTTP requests.",
            [
                ({"route": route, "status": str(status)}, count)
                for (route, status), count in sorted(self.requests.items())
            ],
        )
        add("abandoned_total", "counter", "Requests whose client went away.", self.abandoned)
        add("requests_running", "gauge", "Generations that run.", gate.running)
        add("requests_queued", "gauge", "Requests that wait for a place.", gate.waiting)
        add("conversations_idle", "gauge", "Processed conversations kept.", pool.idle)
        add("conversations_idle_bytes", "gauge", "Bytes of their caches.", pool.nbytes())
        for name, help_ in (
            ("generations", "Generations that ended."),
            ("prompt_tokens", "Tokens of prompts."),
            ("reused_tokens", "Tokens of prompts that were processed before."),
            ("tokens", "Generated tokens."),
            ("verifies", "Passes of the model after prefill."),
        ):
            add(f"{name}_total", "counter", help_, stats[name])
        for name in ("prefill", "decode"):
            add(
                f"{name}_seconds_total",
                "counter",
                f"Time spent in {name}.",
                stats[f"{name}_ms"] / 1e3,
            )
        for name in ("drafted", "accepted"):
            add(
                f"{name}_tokens_total",
                "counter",
                f"Tokens {name} by MTP, by depth.",
                [
                    ({"depth": str(depth)}, count)
                    for depth, count in enumerate(stats[f"{name}_by_depth"], 1)
                ],
            )
        for name, help_ in (
            ("put_away", "Idle conversations whose cache was given up for others."),
            ("restored", "Of those, brought back from disk."),
            ("recomputed", "Of those, processed again."),
        ):
            add(f"conversations_{name}_total", "counter", help_, stats["idle"][name])
        snapshots = stats["snapshots"]
        if snapshots is not None:
            for name, help_ in (
                ("hits", "Prompts whose beginning was processed before and kept."),
                ("misses", "Prompts whose beginning was not."),
                ("written", "Snapshots written."),
                ("evicted", "Snapshots deleted to keep the bound."),
                ("damaged", "Snapshots that were damaged or foreign."),
                ("failed_writes", "Snapshots that could not be written."),
            ):
                add(f"snapshot_{name}_total", "counter", help_, snapshots[name])
            add("snapshot_bytes", "gauge", "Bytes of all snapshots.", snapshots["bytes"])
        experts = stats["experts"]
        if experts is not None:
            for name, help_ in (
                ("hits", "Experts found in memory."),
                ("misses", "Experts read from flash."),
                ("flash_bytes", "Bytes read from flash."),
            ):
                add(f"expert_{name}_total", "counter", help_, experts[name])
            add("expert_slots", "gauge", "Slots of experts in memory.", experts["slots"])
        governor = stats["governor"]
        if governor is not None:
            if governor["threads"] is not None:
                add("threads", "gauge", "Threads that compute.", governor["threads"])
            add("draft_limit", "gauge", "Most tokens drafted per step.", governor["drafts"])
            if governor["temperature_c"] is not None:
                celsius = governor["temperature_c"]
                add("temperature_celsius", "gauge", "The hottest sensor.", celsius)
        add(
            "events_total",
            "counter",
            "Actions of the governor and trims, by cause.",
            [({"cause": cause}, n) for cause, n in sorted(stats["events"]["counts"].items())],
        )
        resident = rss_bytes()
        if resident is not None:
            add("resident_bytes", "gauge", "Memory of the process.", resident)
        add("peak_resident_bytes", "gauge", "Most it ever was.", stats["peak_rss_bytes"])
        return "\n".join(lines) + "\n"


def _metric(
    name: str, kind: str, help_: str, value: Iterable[tuple[Mapping[str, str], float]] | float
) -> Iterable[str]:
    yield f"# HELP {_PREFIX}{name} {help_}"
    yield f"# TYPE {_PREFIX}{name} {kind}"
    if isinstance(value, (int, float)):
        yield f"{_PREFIX}{name} {value}"
        return
    for labels, count in value:
        # Values of labels are routes, statuses and depths: nothing in them needs an escape.
        shown = ",".join(f'{key}="{text}"' for key, text in labels.items())
        yield f"{_PREFIX}{name}{{{shown}}} {count}"
