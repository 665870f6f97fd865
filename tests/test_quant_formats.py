"""Bytes of the NumPy formats against ggml, values of all formats against gguf-py.

ggml_quantize_chunk and gguf.quants are two independent oracles; every comparison is exact.
"""

from __future__ import annotations

import platform
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from mimo_edge.errors import QuantError
from mimo_edge.quant.base import FORMATS, U8, Format, get_format
from mimo_edge.runtimes.ggml import library

F32 = NDArray[np.float32]
NUMPY_FORMATS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "MXFP4"]
BLOCK_FORMATS = ["Q8_0", "Q4_0", "MXFP4"]

# What a block can hold before its scale leaves f16 (or its codes f32): above, we refuse.
LARGEST = {"F32": 3e38, "F16": 6e4, "BF16": 3e38, "Q8_0": 8.3e6, "Q4_0": 5.2e5, "MXFP4": 1e38}

# The inverse of a scale this small is infinite, and C leaves open what code that gives: processors
# differ. The scale itself is 0 in f16, so whatever the codes are, the values are 0.
SCALE_IS_0 = {"Q8_0": 127 * 2.0**-127, "Q4_0": 8 * 2.0**-127}


def ggml_bytes(fmt: Format, x: F32) -> U8:
    out = np.empty((x.shape[0], fmt.row_bytes(x.shape[1])), dtype=np.uint8)
    library.load().quantize(fmt.ggml_type, np.ascontiguousarray(x), out)
    return out


def same_bytes(fmt: Format, x: F32) -> None:
    if platform.machine() != "x86_64" and fmt.name in SCALE_IS_0:
        blocks = x.reshape(len(x), -1, fmt.block_size)
        largest = np.abs(blocks).max(axis=-1, keepdims=True)
        x = np.where(largest < SCALE_IS_0[fmt.name], np.float32(0), blocks).reshape(x.shape)
    ours, theirs = fmt.quantize(x), ggml_bytes(fmt, x)
    if ours.tobytes() != theirs.tobytes():
        row, byte = np.argwhere(ours != theirs)[0]
        block = byte // fmt.block_bytes
        values = x[row, block * fmt.block_size : (block + 1) * fmt.block_size]
        raise AssertionError(f"{fmt.name}: row {row}, block {block}, byte {byte} of {values!r}")


def hard_cases(fmt: Format) -> dict[str, F32]:
    rng = np.random.default_rng(5)
    n, top = 64, LARGEST[fmt.name]
    # Below 2^-125 ggml's MXFP4 scale is undefined behaviour: a test of its own.
    tiny = 1e-37 if fmt.name == "MXFP4" else 1e-45
    normal = rng.standard_normal((n, 64))
    levels = rng.integers(-16, 17, (n, 64)) / 2
    one = np.zeros((n, 64))
    one[np.arange(n), np.arange(n)] = 1
    cases = {
        "normal": normal,
        "zero": np.zeros((n, 64)),
        "negative zero": -np.zeros((n, 64)),
        "mixed zeros": np.where(rng.random((n, 64)) < 0.5, 0.0, -0.0),
        "huge": np.clip(normal, -4, 4) / 4 * top,
        "largest": np.where(rng.random((n, 64)) < 0.5, top, -top),
        "small": normal * 1e-6,
        "tiny": np.sign(normal) * np.maximum(np.abs(normal) * tiny * 8, tiny * 2),
        "wide range": normal * 10.0 ** rng.uniform(-30, 4, (n, 64)),
        "ties": levels,
        "scaled ties": levels * rng.random((n, 1)),
        "eighths": rng.integers(-64, 65, (n, 64)) / 8,
        "equal magnitudes": np.where(rng.random((n, 64)) < 0.5, 1.5, -1.5),
        "single": one,
        "single negative": -one,
        "constant": np.repeat(normal[:, :1], 64, axis=1),
    }
    if fmt.name != "MXFP4":
        cases["subnormal"] = normal * 1e-40
        cases["one subnormal"] = one * 1.4e-45
        cases["subnormal scale"] = normal * 2.0**-125
        cases["inverse overflows"] = normal * 2.0**-126.5
    if platform.machine() != "x86_64" and fmt.name == "Q4_0":
        # There GCC contracts ggml's multiply-add, which rounds once where we round twice.
        del cases["scaled ties"]
    return {name: np.asarray(x, dtype=np.float32) for name, x in cases.items()}


@pytest.mark.parametrize("name", NUMPY_FORMATS)
def test_bytes_equal_ggml_on_hard_cases(name: str) -> None:
    fmt = get_format(name)
    for x in hard_cases(fmt).values():
        same_bytes(fmt, x)


@pytest.mark.parametrize("name", NUMPY_FORMATS)
def test_bytes_equal_ggml_on_a_million_weights(name: str) -> None:
    fmt = get_format(name)
    rng = np.random.default_rng(11)
    spread = (10.0 ** rng.uniform(-8, 2, (1024, 1))).astype(np.float32)
    same_bytes(fmt, rng.standard_normal((1024, 1024), dtype=np.float32) * spread)


@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q4_0", "MXFP4"])
def test_bytes_equal_gguf_py(name: str) -> None:
    fmt = get_format(name)
    rng = np.random.default_rng(12)
    x = rng.standard_normal((512, 256), dtype=np.float32)
    theirs = gguf.quants.quantize(x, gguf.GGMLQuantizationType(fmt.ggml_type))
    assert fmt.quantize(x).tobytes() == theirs.tobytes()


def finite(largest: float, smallest: float = 0.0) -> st.SearchStrategy[float]:
    top = float(np.float32(largest))
    numbers = st.floats(-top, top, width=32, allow_nan=False)
    if smallest:
        return numbers.map(lambda v: v if v == 0 or abs(v) >= smallest else np.sign(v) * smallest)
    return numbers


@pytest.mark.parametrize("name", NUMPY_FORMATS)
def test_bytes_equal_ggml_property(name: str) -> None:
    fmt = get_format(name)
    smallest = 2.0**-125 if name == "MXFP4" else 0.0
    numbers = finite(LARGEST[name], smallest)

    @settings(max_examples=150, deadline=None)
    @given(arrays(np.float32, (2, 64), elements=numbers, fill=numbers))
    def check(x: F32) -> None:
        same_bytes(fmt, x)

    check()


def test_float_formats_round_every_half_like_ggml() -> None:
    """All 65,536 f16 and bf16 values, the midpoints above them and their float32 neighbours."""
    halves = np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):  # signalling NaNs, which are left out below
        f16 = halves.view(np.float16).astype(np.float32)
    for name, values in (
        ("F16", f16),
        ("BF16", (halves.astype(np.uint32) << 16).view(np.float32)),
    ):
        fmt = get_format(name)
        values = values[np.isfinite(values) & (np.abs(values) < LARGEST[name])]
        packed = fmt.quantize(values[:, None])
        assert fmt.dequantize(packed, 1).tobytes() == values.tobytes()  # exact both ways
        step = 0x1000 if name == "F16" else 0x8000
        bits = values.view(np.uint32)
        for offset in (-1, 1, step - 1, step, step + 1):
            near = (bits + np.uint32(offset % (1 << 32))).view(np.float32)
            near = near[np.isfinite(near) & (np.abs(near) < LARGEST[name])]
            same_bytes(fmt, near[: near.size // 8 * 8].reshape(-1, 8))


def test_mxfp4_scale_at_every_power_of_two() -> None:
    """ggml rounds log2 to float32, so the scale steps up some floats before a power of two."""
    fmt = get_format("MXFP4")
    powers = np.ldexp(1.0, np.arange(-124, 127)).astype(np.float32).view(np.uint32)
    for step in range(-100, 101):
        largest = (powers + np.uint32(step % (1 << 32))).view(np.float32)
        x = np.zeros((largest.size, 32), dtype=np.float32)
        x[:, 5], x[:, 20], x[:, 31] = -largest, largest / 3, largest / 7
        same_bytes(fmt, x)


def test_mxfp4_below_ggmls_defined_range_keeps_the_value() -> None:
    """Under 2^-125 the C code casts a negative number to a byte. x86 wraps around, so ggml stores
    a scale like 2^105 with all codes zero; we store the smallest scale and keep the values."""
    fmt = get_format("MXFP4")
    for largest in (2.0**-126, 2.0**-127, 2.0**-130, 1e-45):
        x = np.zeros((1, 32), dtype=np.float32)
        x[0, :3] = largest, -largest / 2, largest / 4
        raw = fmt.quantize(x)
        assert raw[0, 0] == 0
        error = np.abs(fmt.dequantize(raw, 32) - x).max()
        assert error <= 2.0**-129  # half the step of the smallest scale, 2^-128


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_scale_overflow_is_an_error_exactly_where_ggml_writes_infinity(name: str) -> None:
    fmt = get_format(name)
    x = np.zeros((3, 64), dtype=np.float32)
    divisor = 127 if name == "Q8_0" else 8
    for largest, fits in ((65519.0, True), (65521.0, False)):
        x[1, 40] = largest * divisor
        assert library.load().validate(fmt.ggml_type, ggml_bytes(fmt, x)) == fits
        if fits:
            same_bytes(fmt, x)
        else:
            with pytest.raises(QuantError, match="row 1, block 1"):
                fmt.quantize(x)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_values_equal_gguf_py(fmt: Format) -> None:
    """Bit for bit on real packed data. F32 is the identity."""
    rng = np.random.default_rng(21)
    x = rng.standard_normal((32, 512), dtype=np.float32)
    importance = rng.random(512, dtype=np.float32) if fmt.requires_importance else None
    rows = 2 if fmt.requires_importance else 32
    raw = fmt.quantize(x[:rows], importance)
    ours = fmt.dequantize(raw, 512)
    if fmt.name == "F32":
        assert ours.tobytes() == x.tobytes()
        return
    theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(fmt.ggml_type))
    # Exact on x86; a compiler may contract ggml's d * q - m elsewhere, one rounding less.
    exact = fmt.name in {*NUMPY_FORMATS, "IQ4_NL"}
    np.testing.assert_allclose(ours, theirs, rtol=0 if exact else 1e-6, atol=0 if exact else 1e-6)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_any_bytes_dequantise_like_ggml(name: str) -> None:
    """Every code under every kind of scale, against ggml's to_float, bit for bit."""
    fmt = get_format(name)
    rng = np.random.default_rng(22)
    raw = rng.integers(0, 256, (512, 4, fmt.block_bytes), dtype=np.uint8)
    if name == "MXFP4":
        raw[:, :, 0] = np.arange(2048).reshape(512, 4) % 253
    else:
        scale = rng.integers(0, 0x7C00, (512, 4), dtype=np.uint16)  # finite, subnormals too
        scale |= rng.integers(0, 2, (512, 4), dtype=np.uint16) << np.uint16(15)
        raw[:, :, :2] = scale[:, :, None].view(np.uint8)
    packed = raw.reshape(512, -1)
    expected = np.empty((512, 128), dtype=np.float32)
    library.load().dequantize(fmt.ggml_type, packed, expected)
    assert fmt.dequantize(packed, 128).tobytes() == expected.tobytes()


# Largest relative RMS on a normal sample: a property of each code, measured once with ggml and
# rounded up in the second figure. A packing bug (swapped nibbles, lost minimum) is far above.
RELATIVE_RMS = {
    "F32": 0.0, "F16": 0.00022, "BF16": 0.0018, "Q8_0": 0.0056, "Q6_K": 0.019, "Q5_K": 0.038,
    "Q4_K": 0.074, "IQ4_NL": 0.079, "IQ4_XS": 0.079, "Q4_0": 0.089, "MXFP4": 0.12, "Q3_K": 0.16,
    "IQ3_XXS": 0.23, "Q2_K": 0.31, "IQ2_XXS": 0.42,
}  # fmt: skip


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_error_is_that_of_the_format(fmt: Format) -> None:
    rng = np.random.default_rng(31)
    rows = 4 if fmt.name.startswith(("IQ2", "IQ3")) else 64
    x = rng.standard_normal((rows, 1024), dtype=np.float32)
    importance = np.ones(1024, dtype=np.float32) if fmt.requires_importance else None
    d = fmt.dequantize(fmt.quantize(x, importance), 1024)
    error = float(np.sqrt(np.square(d - x).mean() / np.square(x).mean()))
    assert RELATIVE_RMS[fmt.name] * 0.8 <= error <= RELATIVE_RMS[fmt.name]


@pytest.mark.parametrize(
    "fmt", [f for f in FORMATS.values() if f.uses_importance], ids=lambda f: f.name
)
def test_importance_lowers_the_weighted_error(fmt: Format) -> None:
    rng = np.random.default_rng(41)
    rows = 8 if fmt.name.startswith(("IQ2", "IQ3")) else 64
    x = rng.standard_normal((rows, 512), dtype=np.float32)
    importance = (10.0 ** rng.uniform(-2, 1, 512)).astype(np.float32)
    flat = np.ones(512, dtype=np.float32) if fmt.requires_importance else None

    def weighted(raw: U8) -> float:
        difference = (fmt.dequantize(raw, 512) - x).astype(np.float64)
        return float((difference**2 * importance).sum())

    assert weighted(fmt.quantize(x, importance)) < 0.95 * weighted(fmt.quantize(x, flat))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "fmt", [f for f in FORMATS.values() if f.uses_importance], ids=lambda f: f.name
)
def test_ggml_survives_what_we_let_through(fmt: Format, seed: int) -> None:
    """An abort of ggml would end the test run: extreme but finite inputs give finite values."""
    rng = np.random.default_rng(seed)
    rows: list[Any] = [np.zeros(256), np.full(256, -0.0)]
    for scale in (1e-45, 1e-40, 1e-38, 1e-20, 1e-5, 1.0, 6e4):
        rows.append(np.clip(rng.standard_normal(256) * scale, -65504, 65504))
        rows.append(np.full(256, scale))
        rows.append(np.where(np.arange(256) == seed, scale, 0))
    x = np.asarray(rows, dtype=np.float32)
    importances = [
        10.0 ** rng.uniform(-38, 20, 256),
        np.full(256, 1e20),
        np.eye(256)[seed],
        np.where(np.arange(256) < 128, 0, 1.0),
        rng.random(256) * 1e-40,
    ]
    for importance in (None, *importances):
        if importance is None and fmt.requires_importance:
            continue
        raw = fmt.quantize(x, None if importance is None else importance.astype(np.float32))
        assert library.load().validate(fmt.ggml_type, raw)
        assert np.isfinite(fmt.dequantize(raw, 256)).all()


def test_weights_beyond_half_precision_never_reach_ggml() -> None:
    for fmt in FORMATS.values():
        if fmt.block_size != 256:
            continue
        x = np.full((1, 256), 70000, dtype=np.float32)
        with pytest.raises(QuantError, match=r"70000.*65504"):
            fmt.quantize(x, np.ones(256, dtype=np.float32))
