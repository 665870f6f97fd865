"""MXFP4: 32 E2M1 codes under one power-of-two scale (E8M0), and the checkpoint's own layout.

Production packs with NumPy (the same bytes on every machine, at a speed like ggml's), and moves
MXFP4 checkpoints code for code, without going through floats.
Source: llama.cpp:ggml/src/ggml-quants.c quantize_row_mxfp4_ref, ggml-impl.h ggml_e8m0_to_fp32_half;
checkpoint layout: spec section 4.2.
"""

from __future__ import annotations

import numpy as np

from mimo_edge.errors import QuantError
from mimo_edge.quant.base import F32, U8, Format, row_groups

# Twice the E2M1 values, as in ggml: the scale used with them is half the E8M0 scale.
_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=np.float32)

# Code of a magnitude by ceil(2 * |x| / half scale). Between two levels ggml keeps the lower at
# a tie, so each code owns an interval that is closed above: (0.5, 1.5] is code 1, and so on.
_CODE_OF = np.repeat(np.arange(8, dtype=np.uint8), [2, 2, 2, 2, 3, 4, 6, 44])

# 6 * 2^(252 - 127) is the largest value that fits f32; 255 is E8M0's NaN.
LARGEST_EXPONENT = 252


class MXFP4(Format):
    """E8M0 byte, then 16 bytes: byte j holds element j (low) and element j + 16 (high)."""

    name = "MXFP4"
    ggml_type = 39
    block_size = 32
    block_bytes = 17

    def _pack(self, x: F32, importance: F32 | None, out: U8) -> None:
        blocks = x.reshape(-1, 32)
        magnitude = np.abs(blocks)
        exponent = _scale_exponent(magnitude.max(axis=1))
        # magnitude * 2^(129 - E), in two exact steps because one factor may not be a float32.
        shift = 129 - exponent.astype(np.int32)
        half = shift // 2
        one = np.float32(1)
        magnitude *= np.ldexp(one, half)[:, None]
        magnitude *= np.ldexp(one, shift - half)[:, None]
        codes = _CODE_OF[np.ceil(magnitude, out=magnitude).astype(np.uint8)]
        # A zero has no sign: ggml finds +0 first.
        codes |= ((blocks < 0) & (codes != 0)).view(np.uint8) << np.uint8(3)
        packed = out.reshape(-1, 17)
        packed[:, 0] = exponent
        packed[:, 1:] = codes[:, :16] | (codes[:, 16:] << np.uint8(4))

    def _unpack(self, raw: U8, out: F32) -> None:
        packed = raw.reshape(-1, 17)
        scale = np.ldexp(np.float32(1), packed[:, 0].astype(np.int32) - 128)[:, None]
        values = out.reshape(-1, 32)
        values[:, :16] = _DOUBLED[packed[:, 1:] & np.uint8(15)]
        values[:, 16:] = _DOUBLED[packed[:, 1:] >> np.uint8(4)]
        values *= scale

    def _check_scales(self, raw: U8, first_row: int) -> None:
        _check_exponents(raw.reshape(raw.shape[0], -1, 17)[:, :, 0], first_row)


def _check_exponents(exponents: U8, first_row: int) -> None:
    """Raise QuantError at the first of exponents [rows, blocks] that is NaN or beyond f32."""
    bad = exponents > LARGEST_EXPONENT
    if bad.any():
        row, block = (int(i) for i in np.argwhere(bad)[0])
        exponent = int(exponents[row, block])
        what = "NaN" if exponent == 255 else f"2^{exponent - 127}, whose codes exceed f32"
        raise QuantError(
            f"the MXFP4 scale of row {first_row + row}, block {block} is {what}",
            "the source tensor is damaged",
        )


def _scale_exponent(largest: F32) -> U8:
    """E8M0 byte of blocks with these largest magnitudes: floor(log2f(largest)) - 2 + 127.

    The rounding of log2f is kept (just below a power of two it reaches it), through float64 so
    that no platform's float32 logarithm matters. Below 2^-125 the C code casts a negative
    number to a byte, which is undefined (x86 wraps around, even to the NaN code 255; ARM gives
    0): 0 is used, the nearest scale there is.
    """
    with np.errstate(divide="ignore"):
        log2 = np.log2(largest.astype(np.float64)).astype(np.float32)
    exponent = np.clip(np.floor(log2) + np.float32(125), 0, 255)
    result: U8 = exponent.astype(np.uint8)
    return result


def blocks_from_checkpoint(weight: U8, weight_scale: U8) -> U8:
    """Checkpoint MXFP4 to ggml blocks, code for code: no value changes.

    `weight` u8 [rows, cols / 2], low nibble = even column; `weight_scale` u8 E8M0
    [rows, cols / 32] -> u8 [rows, cols / 32 * 17]. Raises QuantError on a wrong dtype or shape
    and on a scale that is NaN (255) or beyond f32, naming row and block.
    """
    _check_pair(weight, weight_scale)
    _check_exponents(weight_scale, 0)
    rows, n_blocks = weight_scale.shape
    out: U8 = np.empty((rows, n_blocks * 17), dtype=np.uint8)
    for start, stop in row_groups(rows, n_blocks * 32):
        source = weight[start:stop].reshape(-1, 16)
        packed = out[start:stop].reshape(-1, 17)
        packed[:, 0] = weight_scale[start:stop].reshape(-1)
        codes = np.empty((source.shape[0], 32), dtype=np.uint8)
        codes[:, 0::2] = source & np.uint8(15)
        codes[:, 1::2] = source >> np.uint8(4)
        packed[:, 1:] = codes[:, :16] | (codes[:, 16:] << np.uint8(4))
    return out


def blocks_to_checkpoint(raw: U8, cols: int) -> tuple[U8, U8]:
    """Inverse of `blocks_from_checkpoint`: ggml blocks -> (weight, weight_scale)."""
    fmt = MXFP4()
    width = fmt.row_bytes(cols)
    if raw.dtype != np.uint8 or raw.ndim != 2 or raw.shape[1] != width:
        raise QuantError(f"MXFP4 blocks are {raw.dtype} {list(raw.shape)}, not u8 [rows, {width}]")
    packed = raw.reshape(-1, 17)
    codes = np.concatenate([packed[:, 1:] & np.uint8(15), packed[:, 1:] >> np.uint8(4)], axis=1)
    weight: U8 = codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))
    scale: U8 = packed[:, 0].reshape(raw.shape[0], -1).copy()
    return weight.reshape(raw.shape[0], cols // 2), scale


def _check_pair(weight: U8, weight_scale: U8) -> None:
    for name, x in (("weight", weight), ("weight_scale", weight_scale)):
        if x.dtype != np.uint8 or x.ndim != 2:
            raise QuantError(f"MXFP4 {name} is {x.dtype} {list(x.shape)}, not u8 in two dimensions")
    rows, n_blocks = weight_scale.shape
    if weight.shape != (rows, n_blocks * 16) or n_blocks == 0:
        raise QuantError(
            f"MXFP4 weight {list(weight.shape)} does not match weight_scale {[rows, n_blocks]}: "
            f"expected [{rows}, {n_blocks * 16}]"
        )
