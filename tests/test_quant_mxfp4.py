"""MXFP4 checkpoints to ggml blocks and back, code for code."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_edge.errors import QuantError
from mimo_edge.quant.base import U8, get_format
from mimo_edge.quant.mxfp4 import blocks_from_checkpoint, blocks_to_checkpoint

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def random_pair(rows: int, blocks: int, seed: int = 0) -> tuple[U8, U8]:
    rng = np.random.default_rng(seed)
    weight = rng.integers(0, 256, (rows, blocks * 16), dtype=np.uint8)
    return weight, rng.integers(0, 253, (rows, blocks), dtype=np.uint8)


def checkpoint_values(weight: U8, scale: U8) -> list[list[float]]:
    """The specification, one weight at a time in Python numbers."""
    values: list[list[float]] = []
    for row in range(weight.shape[0]):
        values.append([])
        for col in range(weight.shape[1] * 2):
            code = int(weight[row, col // 2]) >> (4 * (col % 2)) & 15
            sign = -1.0 if code & 8 else 1.0
            values[-1].append(sign * E2M1[code & 7] * 2.0 ** (int(scale[row, col // 32]) - 127))
    return values


def test_values_are_those_of_the_specification_and_of_gguf_py() -> None:
    weight, scale = random_pair(4, 3)
    raw = blocks_from_checkpoint(weight, scale)
    assert raw.shape == (4, 51)
    expected = np.array(checkpoint_values(weight, scale), dtype=np.float32)
    ours = get_format("MXFP4").dequantize(raw, 96)
    np.testing.assert_array_equal(ours, expected)
    theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.MXFP4)
    # gguf-py reads scale bytes 0 and 1 as 2^-128 and 2^-127 too: nothing is left out.
    np.testing.assert_array_equal(theirs, expected)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_round_trip_is_exact(rows: int, blocks: int, seed: int) -> None:
    weight, scale = random_pair(rows, blocks, seed)
    back, back_scale = blocks_to_checkpoint(blocks_from_checkpoint(weight, scale), blocks * 32)
    np.testing.assert_array_equal(back, weight)
    np.testing.assert_array_equal(back_scale, scale)


def test_every_code_keeps_its_place() -> None:
    """The even column is the low nibble there; ggml puts element j beside element j + 16."""
    weight = np.arange(16, dtype=np.uint8)[None] * 16 + 15 - np.arange(16, dtype=np.uint8)[None]
    raw = blocks_from_checkpoint(weight, np.full((1, 1), 127, np.uint8))
    codes = [code for byte in weight[0] for code in (byte & 15, byte >> 4)]
    assert raw[0, 0] == 127
    assert list(raw[0, 1:] & 15) == codes[:16]
    assert list(raw[0, 1:] >> 4) == codes[16:]


def test_requantising_passed_through_codes_changes_no_value() -> None:
    """Blocks whose largest code is 4 or 6 are what our own quantiser would choose."""
    weight, scale = random_pair(8, 4, seed=3)
    weight[:, ::16] |= 0x06  # the first weight of each block is +-4 or +-6
    scale = np.clip(scale, 2, 252).astype(np.uint8)
    fmt = get_format("MXFP4")
    values = fmt.dequantize(blocks_from_checkpoint(weight, scale), 128)
    again = fmt.dequantize(fmt.quantize(values), 128)
    np.testing.assert_array_equal(again, values)


@pytest.mark.parametrize(("byte", "what"), [(255, "NaN"), (253, "exceed f32"), (254, "exceed f32")])
def test_scales_without_values_are_errors(byte: int, what: str) -> None:
    weight, scale = random_pair(5, 3)
    raw = blocks_from_checkpoint(weight, scale)
    scale[4, 2] = byte
    with pytest.raises(QuantError, match=f"row 4, block 2 is .*{what}"):
        blocks_from_checkpoint(weight, scale)
    raw[4, 34] = byte
    with pytest.raises(QuantError, match=f"row 4, block 2 is .*{what}"):
        get_format("MXFP4").dequantize(raw, 96)


def test_shapes_and_dtypes_that_do_not_match_are_errors() -> None:
    weight, scale = random_pair(4, 3)
    with pytest.raises(
        QuantError, match=r"\[4, 48\] does not match .*\[4, 2\]: expected \[4, 32\]"
    ):
        blocks_from_checkpoint(weight, scale[:, :2])
    with pytest.raises(QuantError, match="does not match"):
        blocks_from_checkpoint(weight[:3], scale)
    with pytest.raises(QuantError, match="weight_scale is uint8"):
        blocks_from_checkpoint(weight, scale[0])
    with pytest.raises(QuantError, match="weight is int8"):
        blocks_from_checkpoint(weight.view(np.int8), scale)
    with pytest.raises(QuantError, match=r"u8 \[rows, 51\]"):
        blocks_to_checkpoint(blocks_from_checkpoint(weight, scale)[:, :50], 96)


def test_strided_views_of_a_mapped_file_work() -> None:
    weight, scale = random_pair(6, 2)
    wide = np.zeros((12, 40), np.uint8)
    wide[::2, 4:36] = weight
    raw = blocks_from_checkpoint(wide[::2, 4:36], scale)
    assert raw.tobytes() == blocks_from_checkpoint(weight, scale).tobytes()
