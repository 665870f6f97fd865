"""Weights in the two integer forms Hexagon NPUs multiply: LPBQ int4 and int8 per channel.

Both are for MatMul with the weight as [K, N] (in, out), K being what is summed over. LPBQ (low
power block quantisation) is int4 with two levels of scale: one f32 per output channel, times an
integer from 1 to 16 per block of a channel. The value of a weight is

    code[k, n] * (block_scale[k // block, n] * channel_scale[n])

computed in f32 in this order, which is what ONNX DequantizeLinear does with the scale itself
dequantised.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mimo_edge.errors import QuantError
from mimo_edge.quant.base import F32, U8, row_groups

I8 = NDArray[np.int8]

BLOCK = 64
MAX_BLOCK_SCALE = 16
# Block scales tried below and above the one that just holds the largest weight of a block. A
# smaller one clips that weight and rounds all others more finely.
_BELOW, _ABOVE = 3, 1


class Lpbq(NamedTuple):
    """codes i8 [K, N] from -8 to 7, block_scales u8 [K / block, N] from 1 to 16, channel_scales
    f32 [N]."""

    codes: I8
    block_scales: U8
    channel_scales: F32

    @property
    def block(self) -> int:
        """Weights of a channel that share a block scale."""
        return len(self.codes) // len(self.block_scales)

    @property
    def packed(self) -> U8:
        """The codes as ONNX stores int4: row-major, two to a byte, the even element low."""
        flat = self.codes.reshape(-1).view(np.uint8) & np.uint8(15)
        if len(flat) % 2:
            flat = np.append(flat, np.uint8(0))
        packed: U8 = flat[::2] | (flat[1::2] << np.uint8(4))
        return packed

    def values(self) -> F32:
        """The weights f32 [K, N] these numbers stand for."""
        scales = self.block_scales.astype(np.float32) * self.channel_scales
        values: F32 = self.codes.astype(np.float32) * np.repeat(scales, self.block, axis=0)
        return values


class Int8Channel(NamedTuple):
    """codes i8 [K, N] from -127 to 127, scales f32 [N]: the value is code * scale."""

    codes: I8
    scales: F32

    def values(self) -> F32:
        """The weights f32 [K, N] these numbers stand for."""
        values: F32 = self.codes.astype(np.float32) * self.scales
        return values


def quantize_lpbq(weight: F32, block: int = BLOCK, importance: F32 | None = None) -> Lpbq:
    """Quantise weight f32 [N, K] (out, in, as checkpoints have it) to LPBQ.

    Of each block the scale with the smallest squared error is taken, weighted by `importance`
    f32 [K] (mean square of each input) when there is one. Works on groups of output channels, so
    extra memory is bounded. Raises QuantError when K is not whole blocks, on NaN or infinity.
    """
    _check(weight, "LPBQ")
    out, width = weight.shape
    if block < 1 or width % block:
        raise QuantError(
            f"LPBQ in blocks of {block} needs inputs of a multiple of it, got {width}",
            "use int8 per channel for this matrix",
        )
    weights = None if importance is None else _importance(importance, width).reshape(-1, block)
    codes = np.empty((width, out), np.int8)
    block_scales = np.empty((width // block, out), np.uint8)
    channel_scales = np.empty(out, np.float32)
    for start, stop in row_groups(out, width):
        x = np.ascontiguousarray(weight[start:stop]).reshape(stop - start, -1, block)
        found, scales, channel = _lpbq_rows(x, weights)
        codes[:, start:stop] = found.reshape(stop - start, width).T
        block_scales[:, start:stop] = scales.T
        channel_scales[start:stop] = channel
    return Lpbq(codes, block_scales, channel_scales)


def _lpbq_rows(x: F32, importance: F32 | None) -> tuple[I8, U8, F32]:
    """x [n, blocks, block] -> codes of that shape, block scales [n, blocks], channel scales [n]."""
    largest = np.abs(x).max(axis=2) / np.float32(7)
    channel = _scale(largest.max(axis=1), MAX_BLOCK_SCALE)
    exact = np.rint(largest / channel[:, None])
    best_error = np.full(largest.shape, np.inf, np.float32)
    best_codes = np.zeros(x.shape, np.int8)
    best_scales = np.ones(largest.shape, np.uint8)
    for offset in range(-_BELOW, _ABOVE + 1):
        scales = np.clip(exact + np.float32(offset), 1, MAX_BLOCK_SCALE).astype(np.float32)
        step = (scales * channel[:, None])[:, :, None]
        codes = np.clip(np.rint(x / step), -8, 7)
        squares = np.square(codes * step - x)
        if importance is not None:
            squares *= importance
        error = squares.sum(axis=2)
        better = error < best_error  # of equals the first, the smallest scale, stays
        best_error[better] = error[better]
        best_codes[better] = codes[better].astype(np.int8)
        best_scales[better] = scales[better].astype(np.uint8)
    return best_codes, best_scales, channel


def quantize_int8(weight: F32) -> Int8Channel:
    """Quantise weight f32 [N, K] (out, in) to int8 with one scale per output channel.

    Raises QuantError on NaN or infinity."""
    _check(weight, "int8")
    out, width = weight.shape
    codes = np.empty((width, out), np.int8)
    scales = np.empty(out, np.float32)
    for start, stop in row_groups(out, width):
        x = weight[start:stop]
        scale = _scale(np.abs(x).max(axis=1), 127)
        codes[:, start:stop] = np.clip(np.rint(x / scale[:, None]), -127, 127).astype(np.int8).T
        scales[start:stop] = scale
    return Int8Channel(codes, scales)


def _scale(largest: F32, steps: int) -> F32:
    """The step that reaches `largest` in `steps`; 1 for channels of zeros, whose codes are 0, and
    never so small that dividing by it overflows."""
    scale = np.maximum(largest / np.float32(steps), np.float32(1e-30))
    result: F32 = np.where(largest > 0, scale, np.float32(1)).astype(np.float32)
    return result


def _check(weight: F32, form: str) -> None:
    if weight.ndim != 2 or weight.dtype != np.float32 or not weight.size:
        raise QuantError(f"{form} quantises f32 [out, in], got {weight.dtype} {list(weight.shape)}")
    finite = np.isfinite(weight)
    if not finite.all():
        row, col = (int(i) for i in np.argwhere(~finite)[0])
        raise QuantError(
            f"{weight[row, col]} at row {row}, column {col} cannot be quantised to {form}",
            "the source tensor is damaged",
        )


def _importance(importance: F32, width: int) -> F32:
    if importance.shape != (width,) or not np.isfinite(importance).all() or importance.min() < 0:
        raise QuantError(f"importance is not {width} finite numbers, none negative")
    # The mean is 1, so that sums of squares neither overflow nor vanish.
    mean = float(importance.mean(dtype=np.float64))
    if mean == 0:
        return np.ones(width, np.float32)
    return (importance / np.float32(mean)).astype(np.float32)
