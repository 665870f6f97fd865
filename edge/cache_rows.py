"""What a KV cache holds, apart from how it lies in memory: for files, and for other backends.

A row is the keys and values of one position in one layer: G heads one after the other, D (or Dv)
numbers each, in the layer's format, little-endian. Rows go by position, whatever ring or block they
are kept in, so neither page sizes nor the room of a cache matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mimo_edge.config import LayerSpec, MimoConfig
from mimo_edge.errors import CacheError
from mimo_edge.kv_format import KV_FORMATS, ring_type

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]


@dataclass(frozen=True)
class RowFormat:
    """Rows of one layer: `kind` of kv_format.KV_FORMATS, G heads of D and Dv numbers, and the
    window W of a sliding layer (None: every row is kept)."""

    kind: str
    kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int | None

    @property
    def key_bytes(self) -> int:
        """Bytes of the keys of a row."""
        return KV_FORMATS[self.kind].row_bytes(self.kv_heads, self.head_dim)

    @property
    def value_bytes(self) -> int:
        """Bytes of the values of a row."""
        return KV_FORMATS[self.kind].row_bytes(self.kv_heads, self.v_head_dim)


@dataclass(frozen=True)
class CacheLayout:
    """Formats of the decoder layers and of the MTP blocks. `scaled_values`: values were multiplied
    by the model's attention_value_scale before they were cached.

    Rows of one cache mean the same in another exactly when their layouts are equal.
    """

    layers: tuple[RowFormat, ...]
    mtp: tuple[RowFormat, ...]
    scaled_values: bool

    @classmethod
    def of(cls, config: MimoConfig, kv_type: str, scaled_values: bool) -> CacheLayout:
        """The layout of a cache whose global layers are `kv_type`."""

        def row_format(spec: LayerSpec) -> RowFormat:
            return RowFormat(
                ring_type(kv_type) if spec.window is not None else kv_type,
                spec.num_key_value_heads,
                config.head_dim,
                config.v_head_dim,
                spec.window,
            )

        trunk = config.num_hidden_layers
        formats = [row_format(config.layer(i)) for i in range(trunk + config.num_mtp_layers)]
        # Without a scale both ways of caching values are one.
        scaled = scaled_values or config.attention_value_scale == 1.0
        return cls(tuple(formats[:trunk]), tuple(formats[trunk:]), scaled)

    @property
    def all(self) -> tuple[RowFormat, ...]:
        """Decoder layers, then MTP blocks."""
        return (*self.layers, *self.mtp)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready form; equal for equal layouts."""
        return {
            "layers": [_row_json(one) for one in self.layers],
            "mtp": [_row_json(one) for one in self.mtp],
            "scaled_values": self.scaled_values,
        }


class LayerRows(NamedTuple):
    """Rows of positions first, first + 1, ... of one layer: keys u8 [n, key_bytes], values
    u8 [n, value_bytes]. Views of the cache where that is possible: valid until its next change."""

    first: int
    keys: U8
    values: U8

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.first + len(self.keys)


def check_rows(layout: CacheLayout, length: int, rows: Sequence[tuple[int, int]]) -> None:
    """Raise CacheError unless a cache of `length` tokens can be made of rows `rows`, (first, count)
    of every layer and then of every MTP block."""
    if len(rows) != len(layout.all):
        raise CacheError(f"rows of {len(rows)} layers and blocks, the model has {len(layout.all)}")
    for index, (one, (first, count)) in enumerate(zip(layout.all, rows, strict=True)):
        end = first + count
        fits = first >= 0 and count >= 0 and end <= length
        if one.window is None:
            fits = fits and first == 0
        if index < len(layout.layers):
            # The next token sees W - 1 rows before itself, of a global layer all.
            seen = 0 if one.window is None else max(0, length - one.window + 1)
            fits = fits and end == length and first <= seen
        if not fits:
            raise CacheError(f"layer {index}: rows {first}..{end - 1} of {length} tokens")


def checked(layout: CacheLayout, rows: Iterable[LayerRows]) -> Iterable[LayerRows]:
    """`rows` as they come. Raises CacheError when one has not the shape its layer asks for."""
    formats = iter(layout.all)
    for one in rows:
        wanted = next(formats, None)
        if wanted is None:
            raise CacheError("rows of more layers than the model has")
        shapes = (len(one.keys), wanted.key_bytes), (len(one.keys), wanted.value_bytes)
        if (one.keys.shape, one.values.shape) != shapes:
            raise CacheError(f"rows of shape {one.keys.shape} and {one.values.shape}, not {shapes}")
        yield one
    if next(formats, None) is not None:
        raise CacheError("rows of fewer layers than the model has")


def pack_rows(values: F32, slots: NDArray[np.int64]) -> U8:
    """values f32 [G, S, D] at `slots` [n] as rows of an f32 layer: u8 [n, 4 * G * D]."""
    rows = np.ascontiguousarray(values[:, slots].transpose(1, 0, 2).astype("<f4"))
    return rows.view(np.uint8).reshape(len(slots), 4 * values.shape[0] * values.shape[2])


def unpack_rows(rows: U8, like: F32) -> F32:
    """Rows of an f32 layer as f32 [G, n, D], G and D those of `like` [G, S, D]."""
    groups, _, dim = like.shape
    values = np.ascontiguousarray(rows).view("<f4").reshape(len(rows), groups, dim)
    return values.transpose(1, 0, 2).astype(np.float32)


def _row_json(one: RowFormat) -> list[Any]:
    return [one.kind, one.kv_heads, one.head_dim, one.v_head_dim, one.window]
