"""How far a quantised tensor is from its source, gathered piece by piece."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mimo_edge.errors import QuantError
from mimo_edge.quant.base import F32, U8, Format, row_groups


@dataclass(frozen=True)
class WorstBlock:
    """The block with the largest relative error; `row` counts over everything measured."""

    row: int
    block: int
    relative_rms: float


@dataclass(frozen=True)
class TensorError:
    """Error of one tensor: x the source, d its dequantised form.

    `relative_rms` = sqrt(sum (x - d)^2 / sum x^2), infinite when only x is zero; `max_abs` = the
    largest |x - d|. `worst` is None for an empty tensor.
    """

    elements: int
    relative_rms: float
    max_abs: float
    worst: WorstBlock | None


class ErrorMeter:
    """Accumulates a `TensorError` over row groups or experts, in float64 sums.

    Blocks of `fmt`'s size are compared; formats without blocks use 32, so that one tiny weight
    is not the worst block of every tensor.
    """

    def __init__(self, fmt: Format) -> None:
        self._format = fmt
        self._block = fmt.block_size if fmt.block_size > 1 else 32
        self._rows = 0
        self._elements = 0
        self._error = 0.0
        self._power = 0.0
        self._max_abs = 0.0
        self._worst: WorstBlock | None = None

    def add(self, x: F32, raw: U8) -> None:
        """Compare x f32 [rows, cols] with its packed form u8 [rows, row_bytes].

        Rows are numbered on from the previous call. Raises QuantError when shapes differ or a
        value is not finite.
        """
        if x.ndim != 2 or raw.ndim != 2 or x.shape[0] != raw.shape[0]:
            raise QuantError(f"{list(x.shape)} values against packed {list(raw.shape)}")
        rows, cols = x.shape
        for start, stop in row_groups(rows, cols):
            self.add_values(x[start:stop], self._format.dequantize(raw[start:stop], cols))

    def add_values(self, x: F32, dequantized: F32) -> None:
        """Compare x f32 [rows, cols] with dequantised values of the same shape."""
        if x.ndim != 2 or x.shape != dequantized.shape:
            raise QuantError(f"{list(x.shape)} values against {list(dequantized.shape)}")
        rows, cols = x.shape
        if rows == 0 or cols == 0:
            return
        source = x.astype(np.float64)
        difference = source - dequantized
        starts = np.arange(0, cols, self._block)
        errors = np.add.reduceat(difference * difference, starts, axis=1)
        powers = np.add.reduceat(source * source, starts, axis=1)
        if not (np.isfinite(errors).all() and np.isfinite(powers).all()):
            raise QuantError("a value to compare is NaN or infinite")
        relative = _relative(errors, powers)
        row, block = (int(i) for i in np.unravel_index(int(relative.argmax()), relative.shape))
        worst = math.sqrt(float(relative[row, block]))
        if self._worst is None or worst > self._worst.relative_rms:
            self._worst = WorstBlock(self._rows + row, block, worst)
        self._rows += rows
        self._elements += rows * cols
        self._error += float(errors.sum())
        self._power += float(powers.sum())
        self._max_abs = max(self._max_abs, float(np.abs(difference).max()))

    def result(self) -> TensorError:
        """What was gathered so far."""
        relative = _relative(np.array([self._error]), np.array([self._power]))
        return TensorError(
            self._elements, math.sqrt(float(relative[0])), self._max_abs, self._worst
        )


def tensor_error(fmt: Format, x: F32, raw: U8) -> TensorError:
    """Error of one whole tensor: x f32 [rows, cols] against u8 [rows, row_bytes]."""
    meter = ErrorMeter(fmt)
    meter.add(x, raw)
    return meter.result()


def _relative(errors: NDArray[np.float64], powers: NDArray[np.float64]) -> NDArray[np.float64]:
    """errors / powers, where 0 / 0 is no error and e / 0 an infinite one."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = errors / powers
    ratio[errors == 0] = 0.0
    return ratio
