"""What a writer of NPU graphs and a runtime that feeds them agree on, beyond mimo_edge.onnx_io.

NPU graphs have static shapes and the "append" form of caches: rows of the cache go in, only new
rows come out, and the host owns rings, masks and rollback. A graph is named by its tokens T and the
rows of its global layers' caches; passes of other lengths are padded behind, longer ones cut.

`npu.json` in the ONNX folder lists, per target, every component with its compiled graphs: what it
was compiled as, and why not as asked where that is so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from mimo_edge.config import MimoConfig
from mimo_edge.errors import BundleError
from mimo_edge.runtimes.base import VERIFY_ROWS

INDEX_NAME = "npu.json"
NORMS_NAME = "npu_norms.bin"
"""The final norms f32 [1 + MTP blocks, M]: the host applies them."""
DECODE_TOKENS, VERIFY_TOKENS, PREFILL_TOKENS = 1, VERIFY_ROWS, 64
MASKED = -100.0
"""What an NPU's mask says of a column that is not seen: exp(-100) is 0 next to any score, and a
larger number would coarsen the u16 scale of the scores it is added to."""


class Shape(NamedTuple):
    """New tokens of a graph, and rows of its global layers' caches (0: it has no such layer)."""

    tokens: int
    rows: int

    @property
    def label(self) -> str:
        """As in file names."""
        return f"t{self.tokens}_k{self.rows}" if self.rows else f"t{self.tokens}"


ANY_SHAPE = Shape(0, 0)
"""Of graphs on the CPU, which take any number of tokens and rows."""

Compiled = Literal["int4", "fp16", "cpu"]


@dataclass(frozen=True)
class NpuComponent:
    """One component for one target. `layers`: its decoder layers or MTP block, none for the head.

    `precision` is what it was compiled as, "cpu" when the NPU refuses it; `reason` says why it is
    not what was asked for. `files` are the compiled graph and its binary, by shape, in
    NAME/VARIANT. `single`: tokens of the graph in which a single token has the bits it has in a
    verify; 0 when there is none, and a verify has to run row by row."""

    name: str
    layers: tuple[int, ...]
    precision: Compiled
    files: Mapping[Shape, tuple[str, ...]]
    reason: str = ""
    single: int = DECODE_TOKENS


@dataclass(frozen=True)
class NpuVariant:
    """Everything compiled for one target; `buckets`: cache lengths of global layers, ascending."""

    target: str
    arch: int
    soc_model: int
    buckets: tuple[int, ...]
    components: tuple[NpuComponent, ...]

    @property
    def name(self) -> str:
        """As the package calls it."""
        return f"qnn-{self.target}"

    @property
    def single(self) -> int:
        """Tokens of the graphs that single tokens run in; 0: those of one, and verifies too."""
        kinds = {component.single for component in self.components}
        return 0 if 0 in kinds else max(kinds)


def write_index(variants: Mapping[str, NpuVariant]) -> bytes:
    """`npu.json`: the same bytes for the same variants."""
    raw = {
        name: {
            "target": v.target,
            "htp_arch": v.arch,
            "soc_model": v.soc_model,
            "buckets": list(v.buckets),
            "components": [
                {
                    "name": c.name,
                    "layers": list(c.layers),
                    "precision": c.precision,
                    "reason": c.reason,
                    "single": c.single,
                    "files": [
                        {"tokens": s.tokens, "rows": s.rows, "names": list(names)}
                        for s, names in sorted(c.files.items())
                    ],
                }
                for c in v.components
            ],
        }
        for name, v in sorted(variants.items())
    }
    return (json.dumps({"schema": 1, "variants": raw}, indent=1) + "\n").encode()


def read_index(data: bytes, where: str) -> dict[str, NpuVariant]:
    """Inverse of `write_index`. Raises BundleError on anything else."""
    try:
        raw = json.loads(data)
        if raw["schema"] != 1:
            raise BundleError(f"{where} has schema {raw['schema']!r}", "export the model again")
        return {name: _variant(v) for name, v in raw["variants"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{where} is malformed: {error!r}", "export the model again") from error


def _variant(raw: Any) -> NpuVariant:
    parts = []
    for c in raw["components"]:
        if c["precision"] not in ("int4", "fp16", "cpu"):
            raise ValueError(f"precision {c['precision']!r}")
        files = {
            Shape(int(f["tokens"]), int(f["rows"])): tuple(_plain(n) for n in f["names"])
            for f in c["files"]
        }
        layers = tuple(int(layer) for layer in c["layers"])
        parts.append(
            NpuComponent(
                _plain(c["name"]), layers, c["precision"], files, str(c["reason"]), int(c["single"])
            )
        )
    buckets_ = tuple(int(rows) for rows in raw["buckets"])
    return NpuVariant(
        _plain(raw["target"]), int(raw["htp_arch"]), int(raw["soc_model"]), buckets_, tuple(parts)
    )


def _plain(name: Any) -> str:
    if not isinstance(name, str) or not name or "/" in name or "\\" in name or name[0] == ".":
        raise ValueError(f"{name!r} is not the name of a file")
    return name


def ring_rows(config: MimoConfig) -> int:
    """Rows of a sliding layer's ring: what a verify can undo, and the window before it."""
    return config.sliding_window - 1 + VERIFY_ROWS


def mtp_ring_rows(config: MimoConfig) -> int:
    """Rows of an MTP block's ring: only its newest row queries."""
    return config.sliding_window


def buckets(context: int, least: int = 1024) -> tuple[int, ...]:
    """Cache lengths of global layers for contexts up to `context`: each four times the last."""
    found, rows = [], min(least, context)
    while rows < context:
        found.append(rows)
        rows *= 4
    return (*found, context)
