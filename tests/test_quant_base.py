"""What every format promises, whatever it packs: parametrised by the registry."""

from __future__ import annotations

import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gguf
import numpy as np
import pytest

from mimo_edge.errors import QuantError
from mimo_edge.quant import base
from mimo_edge.quant.base import FORMATS, Format, format_by_ggml_type, get_format
from mimo_edge.runtimes.ggml import library

ALL = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)


def sample(rows: int, cols: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def weights(fmt: Format, cols: int) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    if not fmt.requires_importance:
        return None
    return np.random.default_rng(9).random(cols, dtype=np.float32) + np.float32(0.1)


def test_registry_holds_the_formats_recipes_need() -> None:
    expected = "F32 F16 BF16 Q8_0 Q4_0 MXFP4 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS IQ3_XXS IQ2_XXS"
    assert set(FORMATS) == set(expected.split())


@ALL
def test_sizes_agree_with_ggml_and_gguf(fmt: Format) -> None:
    kind = gguf.GGMLQuantizationType(fmt.ggml_type)
    assert kind.name == fmt.name
    assert gguf.GGML_QUANT_SIZES[kind] == (fmt.block_size, fmt.block_bytes)
    info = library.TYPES[fmt.ggml_type]
    assert (info.blck_size, info.type_size) == (fmt.block_size, fmt.block_bytes)
    assert info.requires_imatrix == fmt.requires_importance
    assert fmt.row_bytes(512) == library.load().cdll.ggml_row_size(fmt.ggml_type, 512)
    assert fmt.bits_per_weight == 8 * fmt.row_bytes(512) / 512


@ALL
def test_lookup_by_name_and_number(fmt: Format) -> None:
    assert get_format(fmt.name) is get_format(fmt.name.lower()) is fmt
    assert format_by_ggml_type(fmt.ggml_type) is fmt


def test_unknown_formats_are_errors() -> None:
    with pytest.raises(QuantError, match=r"unknown weight format 'Q9_9'.*Q4_0"):
        get_format("Q9_9")
    with pytest.raises(QuantError, match=r"ggml type 3 .*Q4_0 \(2\)"):
        format_by_ggml_type(3)


def test_a_format_cannot_be_defined_twice() -> None:
    with pytest.raises(TypeError, match="Q4_0"):
        type("Again", (get_format("Q4_0").__class__,), {"name": "Q4_0", "ggml_type": 999})
    with pytest.raises(TypeError, match="type 2"):
        type("Again", (get_format("Q4_0").__class__,), {"name": "NEW", "ggml_type": 2})
    assert "NEW" not in FORMATS


@ALL
def test_row_groups_do_not_show_in_the_bytes(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    x = sample(7, 512)
    whole = fmt.quantize(x, weights(fmt, 512))
    values = fmt.dequantize(whole, 512)
    monkeypatch.setattr(base, "GROUP_ELEMENTS", 1024)
    pieces = fmt.quantize(x, weights(fmt, 512))
    assert whole.tobytes() == pieces.tobytes()
    assert values.tobytes() == fmt.dequantize(pieces, 512).tobytes()
    rows = [fmt.quantize(x[i : i + 1], weights(fmt, 512)) for i in range(7)]
    assert whole.tobytes() == np.concatenate(rows).tobytes()


@ALL
def test_any_strides_give_the_same_bytes(fmt: Format) -> None:
    x = sample(4, 512)
    wide = np.zeros((8, 600), dtype=np.float32)
    wide[::2, :512] = x
    imp = weights(fmt, 512)
    expected = fmt.quantize(x, imp)
    assert fmt.quantize(wide[::2, :512], imp).tobytes() == expected.tobytes()
    assert fmt.quantize(np.asfortranarray(x), imp).tobytes() == expected.tobytes()
    spread = np.zeros((8, expected.shape[1]), dtype=np.uint8)
    spread[::2] = expected
    assert fmt.dequantize(spread[::2], 512).tobytes() == fmt.dequantize(expected, 512).tobytes()


@ALL
def test_inputs_are_not_changed(fmt: Format) -> None:
    x = sample(2, 512)
    x.flags.writeable = False
    raw = fmt.quantize(x, weights(fmt, 512))
    raw.flags.writeable = False
    fmt.dequantize(raw, 512)


@ALL
def test_no_rows(fmt: Format) -> None:
    raw = fmt.quantize(np.empty((0, 512), dtype=np.float32), weights(fmt, 512))
    assert raw.shape == (0, fmt.row_bytes(512))
    assert fmt.dequantize(raw, 512).shape == (0, 512)


@ALL
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_names_row_and_block(fmt: Format, value: float) -> None:
    x = sample(600, 512)
    x[599, 300] = value
    block = 300 // fmt.block_size
    with pytest.raises(QuantError, match=rf"row 599, column 300 \(block {block}\)"):
        fmt.quantize(x, weights(fmt, 512))


@ALL
def test_wrong_columns_are_errors_with_numbers(fmt: Format) -> None:
    if fmt.block_size == 1:
        with pytest.raises(QuantError, match="got 0"):
            fmt.row_bytes(0)
        return
    cols = fmt.block_size + 16
    message = rf"multiple of {fmt.block_size} elements, got {cols}"
    with pytest.raises(QuantError, match=message):
        fmt.quantize(sample(2, cols))
    with pytest.raises(QuantError, match=message):
        fmt.dequantize(np.zeros((2, 18), dtype=np.uint8), cols)
    assert not fmt.supports(cols)


@ALL
def test_wrong_dtype_and_shape_are_errors(fmt: Format) -> None:
    bad: list[Any] = [np.zeros(512, np.float32), np.zeros((1, 512)), [[1.0]]]
    for x in bad:
        with pytest.raises(QuantError, match="quantises f32"):
            fmt.quantize(x, weights(fmt, 512))
    width = fmt.row_bytes(512)
    for raw in (np.zeros(width, np.uint8), np.zeros((1, width), np.int8)):
        with pytest.raises(QuantError, match="dequantises u8"):
            fmt.dequantize(raw, 512)  # type: ignore[arg-type]
    with pytest.raises(QuantError, match=f"have {width} bytes, got {width - 1}"):
        fmt.dequantize(np.zeros((1, width - 1), np.uint8), 512)


@ALL
def test_bad_importance_is_an_error(fmt: Format) -> None:
    x = sample(2, 512)
    good = np.ones(512, dtype=np.float32)
    for col, value in ((0, np.nan), (511, np.inf), (7, -1.0), (8, 1e30)):
        bad = good.copy()
        bad[col] = value
        with pytest.raises(QuantError, match=f"importance of column {col}"):
            fmt.quantize(x, bad)
    with pytest.raises(QuantError, match=r"not f32 \[512\]"):
        fmt.quantize(x, good[:511])
    with pytest.raises(QuantError, match="not f32"):
        fmt.quantize(x, good.astype(np.float64))
    with pytest.raises(QuantError, match="importance is list"):
        fmt.quantize(x, good.tolist())  # type: ignore[arg-type]
    with pytest.raises(QuantError, match="zero everywhere"):
        fmt.quantize(x, np.zeros(512, dtype=np.float32))


@ALL
def test_importance_is_required_used_or_ignored_as_declared(fmt: Format) -> None:
    x = sample(4, 512)
    imp = (np.random.default_rng(3).random(512) ** 6 + 1e-3).astype(np.float32)
    if fmt.requires_importance:
        with pytest.raises(QuantError, match="importance matrix"):
            fmt.quantize(x)
        return
    changed = fmt.quantize(x, imp).tobytes() != fmt.quantize(x).tobytes()
    assert changed == fmt.uses_importance


@ALL
def test_values_beyond_the_format_are_errors_not_infinities(fmt: Format) -> None:
    x = sample(3, 512)
    x[2, 511] = np.float32(3.4028235e38)
    if fmt.name == "F32":
        assert fmt.quantize(x).tobytes() == x.tobytes()
        return
    with pytest.raises(QuantError):
        fmt.quantize(x, weights(fmt, 512))


@pytest.mark.parametrize(
    "fmt", [f for f in FORMATS.values() if f.scale_offsets], ids=lambda f: f.name
)
@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E00], ids=["inf", "-inf", "nan"])
def test_damaged_scales_are_found_where_ggml_finds_them(fmt: Format, bits: int) -> None:
    raw = fmt.quantize(sample(5, 512), weights(fmt, 512))
    assert library.load().validate(fmt.ggml_type, raw)
    blocks_per_row = 512 // fmt.block_size
    for offset in fmt.scale_offsets:
        damaged = raw.copy()
        at = (blocks_per_row - 1) * fmt.block_bytes + offset
        damaged[3, at : at + 2] = np.frombuffer(np.uint16(bits).tobytes(), np.uint8)
        assert not library.load().validate(fmt.ggml_type, damaged)
        with pytest.raises(QuantError, match=f"row 3, block {blocks_per_row - 1}"):
            fmt.dequantize(damaged, 512)


@ALL
def test_threads_do_not_disturb_each_other(fmt: Format) -> None:
    parts = [sample(2, 512, seed) for seed in range(8)]
    imp = weights(fmt, 512)
    expected = [fmt.quantize(x, imp).tobytes() for x in parts]
    with ThreadPoolExecutor(4) as pool:
        assert [r.tobytes() for r in pool.map(lambda x: fmt.quantize(x, imp), parts)] == expected


@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q4_0", "MXFP4", "Q6_K"])
def test_extra_memory_is_bounded(name: str) -> None:
    fmt = get_format(name)
    x = sample(2048, 2048)  # 16 MiB
    fmt.quantize(x[:1])
    tracemalloc.start()
    raw = fmt.quantize(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak - raw.nbytes < 8 << 20
