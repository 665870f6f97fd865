"""FP8 e4m3fn weights with block scales, as MiMo-V2 checkpoints store them.

A weight is `e4m3fn(code) * scale_inv` with one f32 scale per block of rows and columns; the
scale MULTIPLIES despite its name. From V2.5 on the fused qkv_proj is the concatenation of T
tensor-parallel shards whose block rows restart in every shard (`QkvLayout`).

Source: spec section 4.2; OCP FP8 e4m3 "fn" (no infinities, 0x7F and 0xFF are NaN).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mimo_edge.errors import CheckpointError, QuantError

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

MAX = 448.0
_OVERFLOW = 464.0  # halfway between 448 and the 480 that e4m3fn does not have
_LARGEST_SCALE = float(np.finfo(np.float32).max) / MAX


def _decode_table() -> F32:
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    value = np.where(
        exponent == 0, np.ldexp(mantissa / 1.0, -9), np.ldexp(1 + mantissa / 8, exponent - 7)
    )
    value = np.where(codes & 0x80, -value, value)
    value[[0x7F, 0xFF]] = np.nan
    return value.astype(np.float32)


E4M3FN: F32 = _decode_table()
"""Value of every code, f32 [256]."""


def decode(codes: U8) -> F32:
    """e4m3fn codes u8 [...] -> f32 of the same shape; 0x7F and 0xFF give NaN."""
    values: F32 = E4M3FN[codes]
    return values


def encode(values: F32) -> U8:
    """f32 [...] -> e4m3fn codes u8, rounded to nearest, ties to even.

    Raises QuantError on NaN, infinity or a magnitude that rounds beyond 448: this encoder
    neither saturates nor makes NaN codes.
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    magnitude = np.abs(values)
    if not bool(np.all(magnitude < _OVERFLOW)):  # also catches NaN
        worst = float(np.max(np.where(np.isnan(magnitude), np.inf, magnitude)))
        raise QuantError(f"value of magnitude {worst} does not fit e4m3fn (largest {MAX})")
    bits = magnitude.view(np.uint32)
    # Normal codes: keep 3 of the 23 mantissa bits; the add carries into the exponent.
    rounded = (bits + np.uint32(0x7FFFF) + ((bits >> 20) & 1)) >> 20
    normal = rounded - np.uint32((127 - 7) << 3)
    subnormal = np.rint(magnitude * np.float32(512)).astype(np.uint32)  # 8 is the first normal
    codes = np.where(magnitude < np.float32(2.0**-6), subnormal, normal)
    sign = (values.view(np.uint32) >> 24) & 0x80
    result: U8 = (codes | sign).astype(np.uint8)
    return result


def blocks(size: int, block: int) -> int:
    """Blocks needed for `size` rows or columns; the last may be partial."""
    return -(-size // block)


def quantise(weight: F32, block: tuple[int, int] = (128, 128)) -> tuple[U8, F32]:
    """f32 [out, in] -> (codes u8 [out, in], scale_inv f32 [blocks(out), blocks(in)]).

    The scale is absmax / 448 of its block, or 1 for a block of zeros.
    Raises QuantError on values that are not finite.
    """
    if not bool(np.all(np.isfinite(weight))):
        raise QuantError("weight holds NaN or infinite values")
    out, width = weight.shape
    scale = np.ones((blocks(out, block[0]), blocks(width, block[1])), dtype=np.float32)
    codes = np.empty((out, width), dtype=np.uint8)
    for i in range(scale.shape[0]):
        rows = slice(i * block[0], (i + 1) * block[0])
        for j in range(scale.shape[1]):
            columns = slice(j * block[1], (j + 1) * block[1])
            tile = weight[rows, columns]
            peak = np.float32(np.max(np.abs(tile)))
            # A subnormal scale would lose the ratio, so such a block keeps the smallest normal.
            if peak > 0:
                scale[i, j] = max(peak / np.float32(MAX), np.finfo(np.float32).tiny)
            codes[rows, columns] = encode(tile / scale[i, j])
    return codes, scale


def check_scales(scale_inv: F32, name: str) -> None:
    """Raise CheckpointError naming the first scale that is NaN, infinite, negative, zero or so
    large that a weight would overflow f32."""
    good = (scale_inv > 0) & (scale_inv <= _LARGEST_SCALE)  # false for NaN too
    if not bool(np.all(good)):
        row, column = (int(x) for x in np.argwhere(~good)[0])
        raise CheckpointError(
            f"{name}: scale of block [{row}, {column}] is {scale_inv[row, column]!s}",
            "every block scale must be a positive finite number; download the file again",
        )


def check_codes(codes: U8, name: str, first_row: int = 0) -> None:
    """Raise CheckpointError naming the first NaN code (0x7F, 0xFF) of codes [rows, cols]."""
    bad = (codes & 0x7F) == 0x7F
    if bool(np.any(bad)):
        row, column = (int(x) for x in np.argwhere(bad)[0])
        raise CheckpointError(
            f"{name}: element [{first_row + row}, {column}] is the NaN code "
            f"0x{int(codes[row, column]):02X}",
            "the tensor is damaged; download the file again",
        )


def apply_scales(
    values: F32, scale_inv: F32, block: tuple[int, int], first_row: int = 0, shards_of: int = 0
) -> None:
    """Multiply decoded rows [rows, cols] by their block scales in place.

    `first_row` is the row of the whole tensor that values[0] is. `shards_of` is the rows of
    one tensor-parallel shard, 0 for a tensor that is not sharded: block rows restart there.
    """
    columns = np.repeat(np.arange(scale_inv.shape[1]), block[1])[: values.shape[1]]
    rows = np.arange(first_row, first_row + values.shape[0])
    index = scale_rows(rows, block[0], shards_of)
    starts = np.flatnonzero(np.diff(index, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(index)], strict=True):
        values[start:stop] *= scale_inv[index[start]][columns]


def scale_rows(rows: NDArray[np.int64], block_rows: int, shards_of: int = 0) -> NDArray[np.int64]:
    """Scale row of each weight row; see apply_scales for `shards_of`."""
    if not shards_of:
        return rows // block_rows
    shard, inside = np.divmod(rows, shards_of)
    result: NDArray[np.int64] = shard * blocks(shards_of, block_rows) + inside // block_rows
    return result


@dataclass(frozen=True)
class QkvLayout:
    """Rows of a fused qkv_proj: T shards, each [Q of H/T heads | K of G/T | V of G/T].

    q_rows, k_rows, v_rows count the whole tensor. Source: spec section 4.2.
    """

    shards: int
    q_rows: int
    k_rows: int
    v_rows: int

    @property
    def rows(self) -> int:
        return self.q_rows + self.k_rows + self.v_rows

    @property
    def shard_rows(self) -> int:
        return self.rows // self.shards

    def scale_rows(self, block_rows: int) -> int:
        """Scale rows the checkpoint must hold: every shard rounds up on its own."""
        return self.shards * blocks(self.shard_rows, block_rows)

    def regrouped(self) -> list[tuple[int, int]]:
        """Stored row ranges (start, stop) that, concatenated, give plain [Q | K | V]."""
        parts = [n // self.shards for n in (self.q_rows, self.k_rows, self.v_rows)]
        offsets = [0, parts[0], parts[0] + parts[1]]
        return [
            (t * self.shard_rows + offset, t * self.shard_rows + offset + size)
            for offset, size in zip(offsets, parts, strict=True)
            for t in range(self.shards)
        ]


def possible_shards(
    q_heads: int, kv_heads: int, head_dim: int, v_head_dim: int, scale_rows: int, block_rows: int
) -> list[int]:
    """Every shard count T that explains `scale_rows` scale rows of one fused qkv_proj.

    T must divide the query and the KV heads. Often more than one does: with 128-row blocks a
    sliding layer of V2.5 has 116 scale rows for T = 1, 2 and 4, a global one 108 only for 4.
    """
    found = []
    for shards in range(1, kv_heads + 1):
        if q_heads % shards or kv_heads % shards:
            continue
        layout = QkvLayout(shards, q_heads * head_dim, kv_heads * head_dim, kv_heads * v_head_dim)
        if layout.scale_rows(block_rows) == scale_rows:
            found.append(shards)
    return found


def agree_on_shards(candidates: Iterable[tuple[str, list[int]]], stated: int | None) -> int:
    """The one T that every fused global layer allows.

    `candidates` are (tensor name, possible_shards of it) of the global layers; `stated` is
    `tp_size` of the index metadata, or None. Raises CheckpointError when the layers rule out
    every T, contradict `stated`, or leave several and nothing is stated.
    """
    remaining: set[int] | None = None
    names = []
    for name, shards in candidates:
        if not shards:
            raise CheckpointError(
                f"{name}: no tensor-parallel shard count explains its number of scale rows",
                "the tensor and its scale are from different files or damaged",
            )
        names.append(name)
        before = remaining
        remaining = set(shards) if remaining is None else remaining & set(shards)
        if not remaining:
            raise CheckpointError(
                f"{name} is stored in {sorted(shards)} shards, the global layers before it in "
                f"{sorted(before or ())}"
            )
    if stated is not None:
        if remaining is not None and stated not in remaining:
            raise CheckpointError(
                f"the index says tp_size {stated}, but {names[0]} is stored in "
                f"{' or '.join(map(str, sorted(remaining)))} shards"
            )
        return stated
    if remaining is None or len(remaining) > 1:
        what = "no shard count" if remaining is None else f"shard counts {sorted(remaining)}"
        raise CheckpointError(
            f"the layout of the fused qkv_proj cannot be told: {what} follows from the global "
            "layers' scales and the index states no tp_size",
            "add the right tp_size to the metadata of model.safetensors.index.json",
        )
    return next(iter(remaining))
