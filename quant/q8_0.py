"""Q8_0: 32 weights as signed bytes under one f16 scale.

Production packs with NumPy: the same bytes on every machine, at a speed like ggml's.
Source: llama.cpp:ggml/src/ggml-quants.c quantize_row_q8_0_ref, ggml-common.h block_q8_0.
"""

from __future__ import annotations

import numpy as np

from mimo_edge.quant.base import F32, U8, Format


class Q8_0(Format):
    """f16 scale, then 32 signed bytes. ggml has no importance-weighted form of it."""

    name = "Q8_0"
    ggml_type = 8
    block_size = 32
    block_bytes = 34
    scale_offsets = (0,)

    def _pack(self, x: F32, importance: F32 | None, out: U8) -> None:
        blocks = x.reshape(-1, 32)
        scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
            levels = blocks * inverse
            if not np.isfinite(inverse).all():
                # 1 / a subnormal scale is infinite; the scale is 0 in f16 and ggml's cast of
                # infinity and NaN to a byte gives 0.
                levels = np.where(np.isfinite(levels), levels, np.float32(0))
            scale16 = scale.astype("<f2")  # overflow is found by the scale check
        # roundf: half away from zero. Adding 0.5 would round 0.49999997 up; truncating first
        # and looking at the exact remainder does not.
        codes = np.trunc(levels)
        codes += np.trunc((levels - codes) * np.float32(2))
        packed = out.reshape(-1, 34)
        packed[:, :2] = scale16.view(np.uint8)
        packed[:, 2:] = codes.astype(np.int8).view(np.uint8)

    def _unpack(self, raw: U8, out: F32) -> None:
        packed = raw.reshape(-1, 34)
        scale = np.ascontiguousarray(packed[:, :2]).view("<f2").astype(np.float32)
        np.multiply(packed[:, 2:].view(np.int8), scale, out=out.reshape(-1, 32))
