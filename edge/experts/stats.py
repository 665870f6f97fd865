"""What the expert cache did so far."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class LayerStats:
    """One layer: experts asked for that were in a slot (hits) or not (misses: read now, or on
    their way from a read-ahead), experts read, their bytes, experts given up, seconds its callers
    waited."""

    layer: int
    hits: int = 0
    misses: int = 0
    loads: int = 0
    nbytes: int = 0
    evictions: int = 0
    wait_s: float = 0.0


@dataclass(frozen=True)
class CacheStats:
    """All layers, and the reader's own count of bytes and busy lane seconds (which includes what
    alignment reads on top)."""

    layers: tuple[LayerStats, ...]
    slots: int
    slots_used: int
    flash_bytes: int
    lane_busy_s: float

    def total(self) -> LayerStats:
        """The sum over layers; its `layer` is -1."""
        sums = {
            f.name: sum(getattr(x, f.name) for x in self.layers)
            for f in fields(LayerStats)
            if f.name != "layer"
        }
        return LayerStats(-1, **sums)

    @property
    def hit_rate(self) -> float:
        """hits / (hits + misses), 0 before the first request."""
        total = self.total()
        requests = total.hits + total.misses
        return total.hits / requests if requests else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {**asdict(self), "hit_rate": self.hit_rate}
