"""Q4_0: 32 weights as 4-bit codes under one f16 scale; the value is (code - 8) * scale.

Production packs with NumPy: the same bytes on every machine, where a compiler may contract ggml's
multiply-add (GCC does on ARM). Measured 0.9 GB/s of f32 per core, ggml 3.2. Importance-weighted
packing goes through ggml.
Source: llama.cpp:ggml/src/ggml-quants.c quantize_row_q4_0_ref, ggml-common.h block_q4_0.
"""

from __future__ import annotations

import numpy as np

from mimo_edge.quant.base import F32, U8, Format
from mimo_edge.runtimes.ggml import library


class Q4_0(Format):
    """f16 scale, then 16 bytes: byte j holds element j (low) and element j + 16 (high)."""

    name = "Q4_0"
    ggml_type = 2
    block_size = 32
    block_bytes = 18
    scale_offsets = (0,)
    uses_importance = True

    def _pack(self, x: F32, importance: F32 | None, out: U8) -> None:
        if importance is not None:
            library.load().quantize(self.ggml_type, x, out, importance)
            return
        blocks = x.reshape(-1, 32)
        # The element of largest magnitude, the first of equals, keeps its sign and becomes
        # code 0: that end of the range reaches -8, the other only +7.
        largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
        # ggml starts from +0, so a block of negative zeros has it too: adding it loses the sign.
        scale = (largest + np.float32(0)) / np.float32(-8)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
            # Truncation after +8.5 rounds half up. 1 / a subnormal scale is infinite: the scale
            # itself is 0 in f16, and the C cast of infinity and NaN gives code 0.
            levels = blocks * inverse + np.float32(8.5)
            if not np.isfinite(inverse).all():
                levels = np.where(np.isfinite(levels), levels, np.float32(0))
            codes = np.minimum(levels.astype(np.uint8), np.uint8(15))
            scale16 = scale.astype("<f2")  # overflow is found by the scale check
        packed = out.reshape(-1, 18)
        packed[:, :2] = scale16.view(np.uint8)
        packed[:, 2:] = codes[:, :16] | (codes[:, 16:] << np.uint8(4))

    def _unpack(self, raw: U8, out: F32) -> None:
        packed = raw.reshape(-1, 18)
        scale = np.ascontiguousarray(packed[:, :2]).view("<f2").astype(np.float32)
        values = out.reshape(-1, 32)
        values[:, :16] = packed[:, 2:] & np.uint8(15)
        values[:, 16:] = packed[:, 2:] >> np.uint8(4)
        values -= np.float32(8)
        values *= scale
