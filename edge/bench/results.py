"""From samples to figures: medians with their extremes, ratios per pair, rows for JSON and CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from mimo_edge.bench.cases import Case

SCHEMA = 1
OURS, THEIRS = "mimo-edge", "llama.cpp"

Sample = Mapping[str, Any]


@dataclass(frozen=True)
class Spread:
    """Median, least and most of some samples."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value or more."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class Row:
    """One engine on one case. Without samples `error` says why; `notes` are for people.

    Bytes per token are over generated tokens when decoding, prompt tokens in prefill.
    `planned_bytes` is the total of the memory plan, to be held against `kernel_peak_bytes` (a
    cgroup's own count, page cache included) or, without one, `peak_rss_bytes`.
    """

    engine: str
    case: Case
    cgroup: bool
    samples: tuple[Sample, ...] = ()
    runs: tuple[Mapping[str, Any], ...] = ()  # what each process said besides its samples
    kernel_peak_bytes: int | None = None
    cached_before_bytes: int | None = None
    error: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()
    forecast_tps: float | None = None  # what a plan said; None where there is none

    # --- speed ---

    @property
    def tps(self) -> Spread | None:
        """Tokens per second."""
        if not self.samples:
            return None
        return Spread.of([s["tokens"] / s["seconds"] for s in self.samples])

    @property
    def first_token_ms(self) -> Spread | None:
        """From the prompt to its first answer token."""
        if not self.samples:
            return None
        return Spread.of([1e3 * s["first_token_s"] for s in self.samples])

    @property
    def tokens_per_verify(self) -> float | None:
        """Tokens gained per pass of the target; None for prefill."""
        verifies = self._sum("verifies")
        return self._sum_of("tokens") / verifies if verifies else None

    @property
    def verify_ms(self) -> float | None:
        """Milliseconds per pass of the target with its drafts; None for prefill."""
        verifies = self._sum("verifies")
        return 1e3 * self._sum_of("seconds") / verifies if verifies else None

    # --- experts and flash ---

    @property
    def hit_rate(self) -> float | None:
        """Share of expert uses found in memory; None when experts are not streamed."""
        hits, misses = self._sum("hits"), self._sum("misses")
        if hits is None or misses is None or not hits + misses:
            return None
        return hits / (hits + misses)

    @property
    def flash_bytes_per_token(self) -> float | None:
        """Bytes of experts read per token; None when they are not streamed."""
        return self._per_token("flash_bytes")

    @property
    def read_bytes_per_token(self) -> float | None:
        """Bytes the disk delivered to the process per token, as the kernel counts them."""
        return self._per_token("read_bytes")

    @property
    def bound_tps(self) -> float | None:
        """Tokens per second if only the disk took time: its measured rate over bytes per token."""
        rates = [run["flash_bytes_per_s"] for run in self.runs if run.get("flash_bytes_per_s")]
        per_token = self.flash_bytes_per_token
        return median(rates) / per_token if rates and per_token else None

    # --- memory ---

    @property
    def peak_rss_bytes(self) -> int | None:
        """Most memory the process had resident."""
        return max((run["peak_rss_bytes"] for run in self.runs), default=None)

    @property
    def planned_bytes(self) -> int | None:
        """Total of the memory plan, where the backend plans."""
        budgets = [run["budget"] for run in self.runs if run.get("budget")]
        return max((int(budget["total"]) for budget in budgets), default=None)

    @property
    def measured_bytes(self) -> int | None:
        """What the plan is held against."""
        if self.case.ram is not None and self.kernel_peak_bytes is not None:
            return self.kernel_peak_bytes
        return self.peak_rss_bytes

    @property
    def backend(self) -> str:
        """What computed; empty when nothing did."""
        return str((self.runs[0] if self.runs else {}).get("backend") or "")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, samples included."""
        return {
            "engine": self.engine,
            "test": self.case.label,
            **self.case.to_dict(),
            **self._settings(),
            "tps": _spread(self.tps),
            "forecast_tps": self.forecast_tps,
            "first_token_ms": _spread(self.first_token_ms),
            "tokens_per_verify": self.tokens_per_verify,
            "verify_ms": self.verify_ms,
            "hit_rate": self.hit_rate,
            "flash_bytes_per_token": self.flash_bytes_per_token,
            "read_bytes_per_token": self.read_bytes_per_token,
            "bound_tps": self.bound_tps,
            "peak_rss_bytes": self.peak_rss_bytes,
            "kernel_peak_bytes": self.kernel_peak_bytes,
            "planned_bytes": self.planned_bytes,
            "cgroup": self.cgroup,
            "cached_before_bytes": self.cached_before_bytes,
            "error": None if self.error is None else dict(self.error),
            "notes": list(self.notes),
            "samples": [dict(sample) for sample in self.samples],
        }

    def _settings(self) -> dict[str, Any]:
        run = self.runs[0] if self.runs else {}
        names = ("backend", "context", "load_s", "draft_why", "slots", "flash_bytes_per_s")
        found = {name: run.get(name) for name in (*names, "settings")}
        return found | {"continued_with": run.get("tokens")}

    def _per_token(self, name: str) -> float | None:
        total = self._sum(name)
        return None if total is None else total / self._sum_of("tokens")

    def _sum(self, name: str) -> float | None:
        values = [sample.get(name) for sample in self.samples]
        if not values or any(value is None for value in values):
            return None
        return float(sum(value for value in values if value is not None))

    def _sum_of(self, name: str) -> float:
        return sum(float(sample[name]) for sample in self.samples)


@dataclass(frozen=True)
class Result:
    """A case: our row, the other engine's when asked for, and what they say together."""

    ours: Row
    theirs: Row | None = None
    same_choices: tuple[int, int] | None = None  # next tokens chosen alike, of how many compared

    @property
    def rows(self) -> tuple[Row, ...]:
        """One or two rows."""
        return (self.ours,) if self.theirs is None else (self.ours, self.theirs)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Our tokens per second over theirs, pair by pair."""
        if self.theirs is None or len(self.ours.samples) != len(self.theirs.samples):
            return ()
        pairs = zip(self.ours.samples, self.theirs.samples, strict=True)
        return tuple((a["tokens"] / a["seconds"]) / (b["tokens"] / b["seconds"]) for a, b in pairs)

    @property
    def ratio(self) -> Spread | None:
        """The ratios together; more than 1 means we are faster."""
        return Spread.of(self.ratios) if self.ratios else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "rows": [row.to_dict() for row in self.rows],
            "ratio": _spread(self.ratio),
            "ratios": list(self.ratios),
            "same_choices": None if self.same_choices is None else list(self.same_choices),
        }


def same_choices(ours: Sequence[int], theirs: Sequence[int], forced: bool) -> tuple[int, int]:
    """How many next tokens two engines chose alike, of how many that can be compared.

    With forced ids both saw the same text throughout; otherwise only up to the first difference.
    """
    compared = alike = 0
    for a, b in zip(ours, theirs, strict=False):
        compared += 1
        alike += a == b
        if a != b and not forced:
            break
    return alike, compared


def _spread(spread: Spread | None) -> dict[str, float] | None:
    if spread is None:
        return None
    return {"median": spread.median, "min": spread.min, "max": spread.max}


# --- CSV ---------------------------------------------------------------------------------------

COLUMNS = (
    "engine", "test", "kind", "tokens", "depth", "draft", "ram", "threads", "backend",
    "tps", "tps_min", "tps_max", "forecast_tps", "first_token_ms", "tokens_per_verify", "verify_ms",
    "hit_rate",
    "flash_bytes_per_token", "read_bytes_per_token", "bound_tps", "peak_rss_bytes",
    "kernel_peak_bytes", "planned_bytes", "cgroup", "ratio", "ratio_min", "ratio_max", "error",
)  # fmt: skip


def csv_rows(results: Sequence[Result]) -> list[list[object]]:
    """The lines below COLUMNS; what does not apply is empty."""
    lines = []
    for result in results:
        for row in result.rows:
            fields = row.to_dict()
            fields |= _flat("tps", row.tps)
            fields["first_token_ms"] = row.first_token_ms and row.first_token_ms.median
            fields |= _flat("ratio", result.ratio if row.engine == OURS else None)
            error = row.error
            fields["error"] = None if error is None else f"{error['type']}: {error['message']}"
            lines.append(["" if fields[name] is None else fields[name] for name in COLUMNS])
    return lines


def _flat(name: str, spread: Spread | None) -> dict[str, float | None]:
    values = (None, None, None) if spread is None else (spread.median, spread.min, spread.max)
    return dict(zip((name, f"{name}_min", f"{name}_max"), values, strict=True))
