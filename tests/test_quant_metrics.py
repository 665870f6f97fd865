"""Tensor errors against plain NumPy over the whole tensor."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from mimo_edge.errors import QuantError
from mimo_edge.quant import base
from mimo_edge.quant.base import FORMATS, Format, get_format
from mimo_edge.quant.metrics import ErrorMeter, tensor_error

F32 = NDArray[np.float32]


def sample(rows: int, cols: int, seed: int = 0) -> F32:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


@pytest.mark.parametrize(
    "fmt", [f for f in FORMATS.values() if not f.requires_importance], ids=lambda f: f.name
)
def test_equal_to_numpy_over_the_whole_tensor(fmt: Format) -> None:
    x = sample(6, 512)
    raw = fmt.quantize(x)
    d = fmt.dequantize(raw, 512).astype(np.float64)
    result = tensor_error(fmt, x, raw)
    assert result.elements == x.size
    assert result.max_abs == np.abs(x - d).max()
    expected = np.linalg.norm(x - d) / np.linalg.norm(x.astype(np.float64))
    assert result.relative_rms == pytest.approx(expected, rel=1e-12, abs=0)
    size = fmt.block_size if fmt.block_size > 1 else 32
    blocks = (x - d).reshape(6, -1, size), x.astype(np.float64).reshape(6, -1, size)
    relative = np.linalg.norm(blocks[0], axis=2) / np.linalg.norm(blocks[1], axis=2)
    assert result.worst is not None
    assert result.worst.relative_rms == pytest.approx(relative.max(), rel=1e-12, abs=0)
    assert (result.worst.row, result.worst.block) == np.unravel_index(
        relative.argmax(), relative.shape
    )


def test_pieces_and_row_groups_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = get_format("Q4_0")
    x = sample(40, 64)
    x[33, 32:] *= 1000
    x[33, 40] = 0.4e-3  # lost beside its neighbours; the block is still a good one
    x[21, :32] = 0.1
    x[21, 5] = -1.55  # a worst case for 4 bits: everything else falls between two levels
    raw = fmt.quantize(x)
    whole = tensor_error(fmt, x, raw)
    monkeypatch.setattr(base, "GROUP_ELEMENTS", 128)
    meter = ErrorMeter(fmt)
    for start, stop in ((0, 1), (1, 1), (1, 30), (30, 40)):
        meter.add(x[start:stop], raw[start:stop])
    pieces = meter.result()
    assert pieces.worst == whole.worst
    assert (pieces.elements, pieces.max_abs) == (whole.elements, whole.max_abs)
    assert pieces.relative_rms == pytest.approx(whole.relative_rms, rel=1e-12)


def test_the_worst_block_is_found_by_place() -> None:
    fmt = get_format("Q8_0")
    x = sample(9, 96)
    raw = fmt.quantize(x)
    raw[7, 34 + 2 : 34 + 34] ^= 0x40  # damage the codes of one block
    worst = tensor_error(fmt, x, raw).worst
    assert worst is not None
    assert (worst.row, worst.block) == (7, 1)
    assert worst.relative_rms > 0.1


def test_zero_tensors_have_no_error_and_made_up_values_an_infinite_one() -> None:
    fmt = get_format("Q8_0")
    x = np.zeros((2, 64), dtype=np.float32)
    raw = fmt.quantize(x)
    assert tensor_error(fmt, x, raw).relative_rms == 0
    made_up = tensor_error(fmt, x, fmt.quantize(x + 1))
    assert made_up.relative_rms == math.inf
    assert made_up.worst is not None
    assert (made_up.worst.row, made_up.worst.block) == (0, 0)


def test_nothing_measured() -> None:
    result = ErrorMeter(get_format("Q4_0")).result()
    assert (result.elements, result.relative_rms, result.max_abs, result.worst) == (0, 0, 0, None)


def test_partial_last_block_of_plain_formats() -> None:
    x = sample(3, 41)
    fmt = get_format("BF16")
    result = tensor_error(fmt, x, fmt.quantize(x))
    assert result.elements == 123
    assert 0 < result.relative_rms < 0.004


def test_what_cannot_be_compared_is_an_error() -> None:
    fmt = get_format("Q8_0")
    x = sample(2, 64)
    raw = fmt.quantize(x)
    with pytest.raises(QuantError, match=r"\[2, 64\] values against packed \[1, 68\]"):
        tensor_error(fmt, x, raw[:1])
    with pytest.raises(QuantError, match="against"):
        ErrorMeter(fmt).add_values(x, x[:, :32])
    bad = x.copy()
    bad[0, 0] = np.nan
    with pytest.raises(QuantError, match="NaN"):
        ErrorMeter(fmt).add_values(bad, x)
