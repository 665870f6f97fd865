"""LPBQ and int8 weights: the numbers against a scalar re-derivation, what the stored bytes mean
against ONNX Runtime's DequantizeLinear."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from mimo_edge.errors import QuantError
from mimo_edge.quant.npu import Lpbq, quantize_int8, quantize_lpbq
from mimo_edge.runtimes.base import F32


def matrix(out: int, width: int, seed: int = 0) -> F32:
    """Weights with outliers, a channel of zeros, a block of zeros and a tiny channel."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((out, width), dtype=np.float32)
    w[rng.random((out, width)) < 0.01] *= np.float32(8)
    w[1] = 0
    w[2, :64] = 0
    w[3] *= np.float32(1e-6)
    return w


def lpbq_scalar(w: F32, block: int) -> tuple[list[list[int]], list[list[int]], list[np.float32]]:
    """The rule, one number at a time: codes [N][K], block scales [N][B], channel scales [N]."""
    f = np.float32
    codes, block_scales, channels = [], [], []
    for row in w:
        blocks = [row[i : i + block] for i in range(0, len(row), block)]
        need = [max(abs(v) for v in b) / f(7) for b in blocks]
        channel = max(need) / f(16) if max(need) > 0 else f(1)
        row_codes: list[int] = []
        row_scales: list[int] = []
        for values, needed in zip(blocks, need, strict=True):
            exact = int(np.rint(needed / channel))
            tried = []
            for scale in range(exact - 3, exact + 2):
                scale = min(16, max(1, scale))
                step = f(scale) * channel
                found = [int(min(7, max(-8, np.rint(v / step)))) for v in values]
                error = sum(
                    (float(c) * float(step) - float(v)) ** 2
                    for c, v in zip(found, values, strict=True)
                )
                tried.append((error, scale, found))
            _, scale, found = min(tried, key=lambda t: (t[0], t[1]))
            row_scales.append(scale)
            row_codes += found
        codes.append(row_codes)
        block_scales.append(row_scales)
        channels.append(channel)
    return codes, block_scales, channels


def dequantized_by_ort(made: Lpbq) -> F32:
    """What ONNX Runtime reads from the stored bytes, in the form the exporter writes."""
    width, out = made.codes.shape
    one = np.zeros((), np.uint8)
    weight = helper.make_tensor(
        "w", TensorProto.INT4, (width, out), made.packed.tobytes(), raw=True
    )
    zero = helper.make_tensor(
        "wz",
        TensorProto.INT4,
        made.block_scales.shape,
        np.zeros((made.block_scales.size + 1) // 2, np.uint8).tobytes(),
        raw=True,
    )
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["s", "pc", "pz"], ["scale"], axis=1),
            helper.make_node(
                "DequantizeLinear", ["w", "scale", "wz"], ["y"], axis=0, block_size=made.block
            ),
        ],
        "g",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (width, out))],
        [
            weight,
            zero,
            numpy_helper.from_array(made.block_scales, "s"),
            numpy_helper.from_array(made.channel_scales, "pc"),
            numpy_helper.from_array(np.broadcast_to(one, (out,)).copy(), "pz"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: F32 = session.run(None, {})[0]
    return result


@pytest.mark.parametrize("block", [32, 64])
def test_lpbq_is_the_scalar_rule(block: int) -> None:
    w = matrix(7, 128)
    made = quantize_lpbq(w, block)
    codes, scales, channels = lpbq_scalar(w, block)
    assert made.codes.T.tolist() == codes
    assert made.block_scales.T.tolist() == scales
    assert made.channel_scales.tolist() == [float(c) for c in channels]
    assert made.block == block


def test_lpbq_groups_of_rows_change_nothing() -> None:
    w = matrix(300, 1024)  # more than one group of rows
    made, part = quantize_lpbq(w), quantize_lpbq(w[250:260])
    np.testing.assert_array_equal(made.codes[:, 250:260], part.codes)
    np.testing.assert_array_equal(made.block_scales[:, 250:260], part.block_scales)


def test_onnx_runtime_reads_the_lpbq_bytes_as_we_mean_them() -> None:
    made = quantize_lpbq(matrix(6, 192))
    np.testing.assert_array_equal(dequantized_by_ort(made), made.values())


def test_lpbq_packs_the_even_element_low() -> None:
    codes = np.array([[1, -1, 7], [-8, 0, 3]], np.int8)
    made = Lpbq(codes, np.ones((1, 3), np.uint8), np.ones(3, np.float32))
    assert made.packed.tobytes().hex() == "f18730"


def test_lpbq_error_is_that_of_int4() -> None:
    """Half a step of a block at most, except where clipping the largest weight pays."""
    w = matrix(16, 256, seed=3)
    made = quantize_lpbq(w)
    relative = np.linalg.norm(made.values().T - w) / np.linalg.norm(w)
    naive = np.abs(w).reshape(16, 4, 64).max(axis=2) / np.float32(7)
    step = np.repeat(naive, 64, axis=1).reshape(w.shape)
    step[step == 0] = 1
    plain = np.linalg.norm(np.clip(np.rint(w / step), -8, 7) * step - w) / np.linalg.norm(w)
    # Two levels of scale cost little against an exact scale per block, the search gains more.
    assert relative < plain


def test_importance_moves_error_to_where_it_matters_less() -> None:
    rng = np.random.default_rng(5)
    w = matrix(32, 128, seed=5)
    importance = np.exp(2 * rng.standard_normal(128)).astype(np.float32)

    def weighted(made: Lpbq) -> float:
        return float((np.square(made.values().T - w) * importance).sum())

    assert weighted(quantize_lpbq(w, importance=importance)) < weighted(quantize_lpbq(w))


def test_int8_is_absmax_per_channel() -> None:
    w = matrix(5, 96)
    made = quantize_int8(w)
    for n, row in enumerate(w):
        largest = max(abs(v) for v in row)
        scale = largest / np.float32(127) if largest > 0 else np.float32(1)
        assert made.scales[n] == scale
        assert made.codes[:, n].tolist() == [int(np.rint(v / scale)) for v in row]
    assert np.abs(made.values().T - w).max() <= 0.5001 * made.scales.max()


@pytest.mark.parametrize("quantize", [quantize_lpbq, quantize_int8])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(quantize: object, bad: float) -> None:
    w = matrix(4, 64)
    w[3, 9] = bad
    with pytest.raises(QuantError, match="row 3, column 9"):
        quantize(w)  # type: ignore[operator]


def test_widths_that_are_no_blocks_are_refused() -> None:
    with pytest.raises(QuantError, match="multiple"):
        quantize_lpbq(matrix(4, 96))


@pytest.mark.parametrize("importance", [np.ones(3, np.float32), np.full(64, -1, np.float32)])
def test_bad_importance_is_refused(importance: F32) -> None:
    with pytest.raises(QuantError, match="importance"):
        quantize_lpbq(matrix(4, 64), importance=importance)
