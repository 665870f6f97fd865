"""How often each routed expert was used on a calibration text: `experts.json` of a bundle.

The runtime starts its cache from it, and the exporter may order experts by it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimo_edge.errors import BundleError
from mimo_edge.text_file import read_json

SCHEMA = 1
_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Heat:
    """Use of the routed experts, per MoE layer: `counts` i64 [E] (times chosen) and `mass`
    f64 [E] (sum of router weights), over `tokens` tokens of `source`."""

    tokens: int
    counts: Mapping[int, NDArray[np.int64]]
    mass: Mapping[int, NDArray[np.float64]]
    source: str = ""

    def __post_init__(self) -> None:
        if self.tokens < 0 or set(self.counts) != set(self.mass):
            raise BundleError("expert heat: counts and mass cover different layers")
        for layer, counts in self.counts.items():
            mass = self.mass[layer]
            if counts.ndim != 1 or counts.shape != mass.shape or layer < 0:
                raise BundleError(
                    f"expert heat of layer {layer}: {list(counts.shape)} counts, "
                    f"{list(mass.shape)} masses"
                )
            if (counts < 0).any() or not np.isfinite(mass).all() or (mass < 0).any():
                raise BundleError(f"expert heat of layer {layer} is negative or not finite")

    def order(self, layer: int) -> NDArray[np.int64]:
        """Experts of a layer, hottest first; equal counts by mass, then by index. i64 [E]."""
        counts, mass = self.counts[layer], self.mass[layer]
        order: NDArray[np.int64] = np.lexsort((np.arange(len(counts)), -mass, -counts))
        return order

    def unseen(self) -> list[tuple[int, int]]:
        """(layer, expert) never chosen; `expert_names` puts them into words."""
        return [
            (layer, int(e))
            for layer in sorted(self.counts)
            for e in np.flatnonzero(self.counts[layer] == 0)
        ]

    def permuted(self, permutation: Mapping[int, Sequence[int]]) -> Heat:
        """The heat after expert permutation[layer][i] moved to place i."""
        index = {layer: np.asarray(p, dtype=np.int64) for layer, p in permutation.items()}
        return Heat(
            self.tokens,
            {n: c[index[n]] if n in index else c for n, c in self.counts.items()},
            {n: m[index[n]] if n in index else m for n, m in self.mass.items()},
            self.source,
        )

    def to_bytes(self) -> bytes:
        """The content of `experts.json`: the same bytes for the same heat."""
        layers = {
            str(layer): {
                "counts": self.counts[layer].tolist(),
                "mass": [float(f"{m:.7g}") for m in self.mass[layer].tolist()],
            }
            for layer in sorted(self.counts)
        }
        raw = {"schema": SCHEMA, "tokens": self.tokens, "source": self.source, "layers": layers}
        return (json.dumps(raw, separators=(",", ":"), ensure_ascii=False) + "\n").encode()

    @classmethod
    def read(cls, path: Path) -> Heat:
        """Read `experts.json`. Raises BundleError on anything malformed."""
        raw = read_json(path, _MAX_BYTES, BundleError)
        try:
            if raw["schema"] != SCHEMA:
                raise BundleError(
                    f"{path} has schema {raw['schema']!r}, this version reads {SCHEMA}"
                )
            counts, mass = {}, {}
            for key, layer in raw["layers"].items():
                counts[int(key)] = _numbers(layer["counts"], np.int64)
                mass[int(key)] = _numbers(layer["mass"], np.float64)
            return cls(int(raw["tokens"]), counts, mass, str(raw["source"]))
        except BundleError:
            raise
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            raise BundleError(f"{path} is no expert heat: {error!r}") from error


def expert_names(experts: Iterable[tuple[int, int]]) -> list[str]:
    """What (layer, expert) pairs are called wherever people read them: "blk.3 expert 7"."""
    return [f"blk.{layer} expert {expert}" for layer, expert in experts]


def _numbers(values: Any, dtype: type) -> NDArray[Any]:
    kinds = (int,) if dtype is np.int64 else (int, float)
    if not isinstance(values, list) or any(type(v) not in kinds for v in values):
        raise ValueError("not a list of numbers")
    try:
        return np.array(values, dtype=dtype)
    except OverflowError as error:
        raise ValueError("number out of range") from error
