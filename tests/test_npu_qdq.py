"""Graphs in QDQ form: what they compute, and the rules that make an NPU compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from npu_models import random_reader, sample_of, tiny_npu_config
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from mimo_edge.errors import ExportError, UsageError
from mimo_edge.export.onnx.npu_graphs import Component, components, linear_of
from mimo_edge.export.onnx.npu_model import (
    activations,
    float_model,
    quantised_model,
    with_outputs,
    write_weights,
)
from mimo_edge.export.onnx.qdq import MARGIN, SIGMOID, Range, Scale
from mimo_edge.npu_io import Shape
from mimo_edge.runtimes.onnx.plain import PlainSession
from mimo_edge.runtimes.onnx.qnn_targets import target, targets

Arrays = dict[str, NDArray[Any]]
BUCKETS = (16,)
CONFIG = tiny_npu_config()
READER = random_reader(CONFIG)


def component(name: str) -> Component:
    return next(c for c in components(CONFIG, BUCKETS) if c.name == name)


def run(model: ModelProto, feed: Arrays, folder: Path) -> Arrays:
    onnx.save(model, folder / "m.onnx")
    return PlainSession(folder / "m.onnx").run(feed)


def both(
    name: str, shape: Shape, folder: Path, npu: str = "v73"
) -> tuple[Arrays, Arrays, ModelProto]:
    """Outputs of the float graph, of the quantised one, and the latter."""
    part = component(name)
    feed = sample_of(CONFIG, part).feed(CONFIG, part, shape)
    graph = part.build(shape, linear_of(CONFIG, "fp16"))
    write_weights(graph, READER, folder)
    model = float_model(graph)
    names = activations(model.graph)
    found = run(with_outputs(model, names), feed, folder)
    ranges = {n: Range.of((found | feed)[n]).widened(MARGIN) for n in names}
    graph = part.build(shape, linear_of(CONFIG, "int4"))
    weights = write_weights(graph, READER, folder)
    quantised = quantised_model(graph, weights, ranges, target(npu))
    have = run(quantised, feed, folder)
    onnx.checker.check_model(str(folder / "m.onnx"))
    return found, have, quantised


@pytest.mark.parametrize("name", ["layers_00", "layers_01", "mtp_0", "lm_head"])
def test_quantised_graphs_are_near_the_float_ones(name: str, tmp_path: Path) -> None:
    shape = component(name).shapes[0]
    want, have, model = both(name, shape, tmp_path)
    for output in model.graph.output:
        if output.name == "ids":
            continue
        off = np.linalg.norm(have[output.name] - want[output.name])
        # 4-bit weights of random numbers are off by 8 to 10 % (their own rounding), and a layer
        # has several in a row; activations in 16 bits add next to nothing.
        assert off < 0.3 * np.linalg.norm(want[output.name]), output.name


def test_activations_in_16_bits_add_next_to_nothing(tmp_path: Path) -> None:
    """Against the same 4-bit weights with float activations."""
    part, shape = component("layers_01"), Shape(4, 0)
    _, have, quantised = both("layers_01", shape, tmp_path)
    feed = sample_of(CONFIG, part).feed(CONFIG, part, shape)
    graph = part.build(shape, linear_of(CONFIG, "int4"))
    write_weights(graph, READER, tmp_path)
    want = run(float_model(graph), feed, tmp_path)
    for output in quantised.graph.output:
        if output.name != "ids":
            off = np.abs(have[output.name] - want[output.name]).max()
            assert off < 2e-3 * np.abs(want[output.name]).max(), output.name


def constants(model: ModelProto) -> dict[str, NDArray[Any]]:
    return {
        t.name: numpy_helper.to_array(t)
        for t in model.graph.initializer
        if t.data_location != onnx.TensorProto.EXTERNAL and t.data_type != onnx.TensorProto.INT4
    }


def test_sigmoid_has_the_scale_the_npu_takes_anyway(tmp_path: Path) -> None:
    _, _, model = both("layers_00", Shape(4, 16), tmp_path)
    found = constants(model)
    scales = [n for n in found if n.endswith("ffn.sigmoid.scale")]
    assert len(scales) == 1  # the dense layer's; the router's is no quantised one
    assert found[scales[0]] == np.float32(SIGMOID.scale) == np.float32(1 / 65536)
    assert found[scales[0].replace("scale", "zero")] == 0


@pytest.mark.parametrize(("npu", "islands"), [("v73", False), ("v69", True)])
def test_what_stays_float(npu: str, islands: bool, tmp_path: Path) -> None:
    """The router always, attention where the NPU has no int16 products."""
    _, _, model = both("layers_01", Shape(4, 0), tmp_path, npu)
    made_by = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        quantised = any(
            made_by[name].op_type == "DequantizeLinear" for name in node.input if name in made_by
        ) and all(f"{name.removesuffix('.f')}.q" in made_by for name in node.output)
        if node.name.startswith("L2.router.") and node.name != "L2.router.logits":
            assert not quantised, node.name
        if node.name in ("L2.attn.scores", "L2.attn.weights.all"):
            assert quantised is not islands, node.name


def test_second_factors_of_products_are_int16(tmp_path: Path) -> None:
    _, _, model = both("layers_01", Shape(4, 0), tmp_path)
    found = constants(model)
    for name in ("L2.attn.scores", "L2.attn.mixed"):
        assert found[f"{name}.second.zero"].dtype == np.int16
        assert found[f"{name}.second.zero"] == 0


def test_moved_data_keeps_its_scale(tmp_path: Path) -> None:
    _, _, model = both("layers_01", Shape(4, 0), tmp_path)
    found = constants(model)

    def scale(name: str) -> float:
        return float(found[f"{name}.scale"])

    assert scale("L2.attn.qkv.1") == scale("L2.attn.k.rows") == scale("L2.attn.k.heads")
    assert scale("kn_2") == scale("pk_2.dq") == scale("L2.attn.k.turned")
    assert scale("L2.attn.weights.all") == scale("L2.attn.weights")


def test_a_missing_range_is_an_error(tmp_path: Path) -> None:
    part = component("lm_head")
    graph = part.build(part.shapes[0], linear_of(CONFIG, "int4"))
    weights = write_weights(graph, READER, tmp_path)
    with pytest.raises(ExportError, match="no range for x"):
        quantised_model(graph, weights, {}, target("v73"))


def test_ranges_hold_zero_exactly() -> None:
    for low, high in ((-3.0, 5.0), (1.0, 2.0), (-2.0, -1.0), (0.0, 0.0)):
        made = Scale.of(Range(low, high))
        codes = np.array([low, 0, high]) / made.scale + made.zero_point
        assert codes[1] == made.zero_point
        assert codes.min() > -0.51
        assert codes.max() < 65535.51


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_ranges_of_no_numbers_are_refused(value: float) -> None:
    with pytest.raises(ExportError, match="calibration gave"):
        Range.of(np.array([0, value], np.float32))


def test_targets_name_architecture_and_chip() -> None:
    found = targets("v73, SA8255,v73")
    assert [(t.name, t.arch, t.soc_model) for t in found] == [("v73", 73, 43), ("sa8255", 73, 52)]
    assert found[1].variant == "qnn-sa8255"
    for bad in ("v66", "", ","):
        with pytest.raises(UsageError):
            targets(bad)
