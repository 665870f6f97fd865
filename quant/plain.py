"""F32, F16 and BF16: formats without blocks. Production packs them with NumPy."""

from __future__ import annotations

import numpy as np

from mimo_edge.errors import QuantError
from mimo_edge.quant.base import F32 as F32Array
from mimo_edge.quant.base import U8, Format


class F32(Format):
    """Little-endian float32, bit for bit."""

    name = "F32"
    ggml_type = 0
    block_size = 1
    block_bytes = 4

    def _pack(self, x: F32Array, importance: F32Array | None, out: U8) -> None:
        out.view("<f4")[...] = x

    def _unpack(self, raw: U8, out: F32Array) -> None:
        out[...] = raw.view("<f4")


class F16(Format):
    """IEEE half, rounded to nearest even; values above 65504 are refused, not made infinite."""

    name = "F16"
    ggml_type = 1
    block_size = 1
    block_bytes = 2
    scale_offsets = (0,)  # every element is its own scale: infinities and NaN are refused

    def _pack(self, x: F32Array, importance: F32Array | None, out: U8) -> None:
        with np.errstate(over="ignore"):  # found again, with its place, by the scale check
            out.view("<f2")[...] = x

    def _unpack(self, raw: U8, out: F32Array) -> None:
        out[...] = raw.view("<f2")


class BF16(Format):
    """The upper half of a float32, rounded to nearest even.

    Source: ggml_compute_fp32_to_bf16; finite values that round to infinity are refused.
    """

    name = "BF16"
    ggml_type = 30
    block_size = 1
    block_bytes = 2

    def _pack(self, x: F32Array, importance: F32Array | None, out: U8) -> None:
        bits = x.view(np.uint32)
        rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> (
            np.uint32(16)
        )
        out.view("<u2")[...] = rounded

    def _unpack(self, raw: U8, out: F32Array) -> None:
        out.view(np.uint32)[...] = raw.view("<u2").astype(np.uint32) << np.uint32(16)

    def _check_scales(self, raw: U8, first_row: int) -> None:
        bad = (raw.view("<u2") & 0x7F80) == 0x7F80
        if bad.any():
            row, col = (int(i) for i in np.argwhere(bad)[0])
            raise QuantError(f"BF16 value at row {first_row + row}, column {col} is not finite")
