"""Formats of the rows of a KV cache: their sizes, and which models they fit.

`kv_type` names the format of global layers, whose rows grow with the context. Rings of sliding
layers are small whatever the context, and ggml cannot append to quantised rows while a prefill
reads them: they are f16, or f32 beside an f32 cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from mimo_edge.config import MimoConfig
from mimo_edge.errors import UsageError
from mimo_edge.units import round_up


class KvFormat(NamedTuple):
    """`block` neighbouring numbers of a head take `block_bytes`."""

    block: int
    block_bytes: int

    def row_bytes(self, heads: int, dim: int) -> int:
        """Bytes of one row of `heads` heads of `dim` numbers."""
        return heads * dim // self.block * self.block_bytes


KV_FORMATS: Mapping[str, KvFormat] = MappingProxyType(
    {"f16": KvFormat(1, 2), "q8_0": KvFormat(32, 34), "f32": KvFormat(1, 4)}
)
DEFAULT_KV_TYPE = "f16"
# Up to this size a cache that nobody chose a format for is f32 (budget.usual_kv_type).
SMALL_KV_BYTES = 8 << 20


def ring_type(kv_type: str) -> str:
    """Format of sliding layers beside global layers of `kv_type`."""
    return "f32" if kv_type == "f32" else "f16"


def ring_slots(rows: int, kv_type: str, *, mtp: bool = False) -> int:
    """Slots of a ring that must hold `rows` rows. Where f32 rows are attended to as products, ggml
    gives out a few rows at a time unless they are whole groups of 16, and threads get in each
    other's way; one query of an MTP block multiplies f16 rows by fours, too."""
    if ring_type(kv_type) == "f32":
        return round_up(rows, 16)
    return round_up(rows, 4) if mtp else rows


def check_kv_type(kv_type: str, config: MimoConfig) -> None:
    """Raise UsageError for an unknown format, or when heads are not whole blocks of it."""
    if kv_type not in KV_FORMATS:
        raise UsageError(f"kv_type {kv_type!r}", f"choose one of {', '.join(KV_FORMATS)}")
    block = KV_FORMATS[kv_type].block
    for label, dim in (("head_dim", config.head_dim), ("v_head_dim", config.v_head_dim)):
        if dim % block:
            raise UsageError(
                f"{label} = {dim} is not whole blocks of {kv_type} ({block})",
                "use an f16 cache",
            )


def fitting_kv_type(wanted: str, config: MimoConfig) -> str:
    """`wanted` where heads are whole blocks of it, else the default, which fits every model.

    Raises UsageError on an unknown format."""
    if wanted not in KV_FORMATS:
        check_kv_type(wanted, config)
    block = KV_FORMATS[wanted].block
    fits = not (config.head_dim % block or config.v_head_dim % block)
    return wanted if fits else DEFAULT_KV_TYPE
