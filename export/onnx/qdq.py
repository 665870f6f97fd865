"""Quantised activations: a float graph of static shapes becomes one in QDQ form, u16 throughout.

Every float tensor gets a QuantizeLinear and a DequantizeLinear behind it, with the scale of the
range that calibration found (activations.py). Four rules make the numbers those of the NPU:

- Nodes that only move data (Reshape, Concat, ...) have one scale on all sides.
- The output of Sigmoid has scale 1/65536: Qualcomm's provider computes it so whatever the graph
  says, and what follows would read other numbers than were written.
- The second factor of a product of two activations is int16 around 0. As u16 the NPU multiplies
  its upper 8 bits alone, without a word: an error of 1 % where int16 has 0.01 %.
- Nodes of an island stay float, which the NPU computes in fp16: the router, in which a small error
  chooses another expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from mimo_edge.errors import ExportError
from mimo_edge.runtimes.base import F32

LEVELS = 65535
# What a range measured on a text is widened by, to either side: other texts go further, and a
# third of a bit of 16 is all it costs.
MARGIN = 1.25
# exp(-100) is 0 next to any score, and a wider range would coarsen the scores it is added to.
MASKED = -100.0


class Range(NamedTuple):
    """Least and largest value of a tensor."""

    low: float
    high: float

    def union(self, other: Range) -> Range:
        """The range of both."""
        return Range(min(self.low, other.low), max(self.high, other.high))

    def widened(self, factor: float) -> Range:
        """This range, each end `factor` times as far from 0."""
        return Range(self.low * factor, self.high * factor)

    @classmethod
    def of(cls, x: F32) -> Range:
        """The range of an array. Raises ExportError when it holds NaN or infinity."""
        low, high = float(x.min()), float(x.max())
        if not np.isfinite([low, high]).all():
            raise ExportError(f"calibration gave values from {low} to {high}")
        return cls(low, high)


class Scale(NamedTuple):
    """u16 quantisation: value = (code - zero_point) * scale."""

    scale: float
    zero_point: int

    @classmethod
    def of(cls, range_: Range) -> Scale:
        """The finest scale that holds the range and 0 exactly."""
        low, high = min(range_.low, 0.0), max(range_.high, 0.0)
        step = float(np.float32(max((high - low) / LEVELS, 1e-12)))
        return cls(step, int(np.clip(round(-low / step), 0, LEVELS)))


SIGMOID = Scale(1 / 65536, 0)
SOFTMAX = Scale.of(Range(0, 1))
_FIXED = {"Sigmoid": SIGMOID, "Softmax": SOFTMAX}
# Nodes that compute nothing: inputs (None: all) that have the scale of the outputs.
_MOVES: dict[str, int | None] = dict.fromkeys(
    (
        "Expand", "Flatten", "Gather", "GatherElements", "Identity", "Reshape", "Slice", "Split",
        "Squeeze", "Tile", "Transpose", "Unsqueeze",
    ),
    1,
) | {"Concat": None}  # fmt: skip


def quantize_activations(
    graph: GraphProto,
    ranges: Mapping[str, Range],
    floats: Iterable[str],
    island: Callable[[NodeProto], bool] = lambda _: False,
    *,
    int16_products: bool = True,
) -> None:
    """Put `graph` into QDQ form, in place.

    `floats` are the names of its float tensors (inputs, constants and outputs of nodes), `ranges`
    what calibration found for those that are not constant. Outputs of DequantizeLinear nodes that
    are there already, quantised weights, stay as they are. `island` says which nodes stay float;
    without `int16_products` the second factors of products stay u16, for NPUs that take no other.
    Raises ExportError when a range is missing.
    """
    _Pass(graph, ranges, set(floats), island, int16_products).run()


class _Pass:
    def __init__(
        self,
        graph: GraphProto,
        ranges: Mapping[str, Range],
        floats: set[str],
        island: Callable[[NodeProto], bool],
        int16_products: bool,
    ) -> None:
        self._graph = graph
        self._int16_products = int16_products
        self._ranges = ranges
        self._inputs = {value.name for value in graph.input}
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        weights = {
            name for node in graph.node if node.op_type == "DequantizeLinear"
            for name in (*node.input, *node.output)
        }  # fmt: skip
        self._outside = [
            node for node in graph.node
            if node.op_type != "DequantizeLinear" and not island(node)
        ]  # fmt: skip
        touched = dict.fromkeys(
            name for node in self._outside for name in (*node.input, *node.output)
        )
        self._quantized = [name for name in touched if name in floats and name not in weights]
        self._scales = self._choose()

    # --- scales ---

    def _choose(self) -> dict[str, Scale]:
        """The scale of every quantised tensor: tensors that are only moved share theirs."""
        parent = {name: name for name in self._quantized}

        def root(name: str) -> str:
            while parent[name] != name:
                name = parent[name]
            return name

        fixed: dict[str, Scale] = {}
        for node in self._outside:
            if node.op_type in _FIXED:
                fixed[node.output[0]] = _FIXED[node.op_type]
            if node.op_type not in _MOVES:
                continue
            tied = [*node.input[: _MOVES[node.op_type]], *node.output]
            tied = [name for name in tied if name in parent]
            for name in tied[1:]:
                parent[root(name)] = root(tied[0])
        groups: dict[str, list[str]] = {}
        for name in self._quantized:
            groups.setdefault(root(name), []).append(name)
        scales: dict[str, Scale] = {}
        for names in groups.values():
            # A group of a fixed output and what is moved from it; joined with others (Concat) the
            # range decides, and it holds the fixed one's.
            alone = [n for n in names if n in fixed or self._is_moved(n)]
            first = next((fixed[n] for n in names if n in fixed), None)
            if first is not None and len(alone) == len(names):
                scale = first
            else:
                whole = self._range(names[0])
                for name in names[1:]:
                    whole = whole.union(self._range(name))
                scale = Scale.of(whole)
            scales |= dict.fromkeys(names, scale)
        return scales

    def _is_moved(self, name: str) -> bool:
        return any(name in n.output and n.op_type in _MOVES for n in self._outside)

    def _range(self, name: str) -> Range:
        if name in self._constants:
            return Range.of(numpy_helper.to_array(self._constants[name]).astype(np.float32))
        if name not in self._ranges:
            raise ExportError(f"calibration gave no range for {name}")
        return self._ranges[name]

    # --- the graph ---

    def run(self) -> None:
        before: list[NodeProto] = []  # of inputs and constants
        after: dict[str, list[NodeProto]] = {}
        renamed: dict[str, str] = {}
        for name in self._quantized:
            scale = self._scales[name]
            if name in self._constants:
                before += self._constant(name, scale)
            elif name in self._inputs:
                renamed[name] = f"{name}.dq"
                before += self._pair(name, renamed[name], scale)
            else:  # what an island made, too, is quantised where it is made
                after[name] = self._pair(f"{name}.f", name, scale)
        nodes = [*before]
        outside = {node.name for node in self._outside}
        for node in list(self._graph.node):
            for index, name in enumerate(node.input):
                node.input[index] = renamed.get(name, name)
            if self._int16_products and node.op_type == "MatMul" and node.name in outside:
                nodes += self._second_factor(node)
            follow: list[NodeProto] = []
            for index, name in enumerate(node.output):
                if name in after:
                    node.output[index] = f"{name}.f"
                    follow += after[name]
            nodes += [node, *follow]
        del self._graph.node[:]
        self._graph.node.extend(nodes)

    def _constant(self, name: str, scale: Scale) -> list[NodeProto]:
        """Replace a float constant by its codes; whoever reads it reads them dequantised."""
        tensor = self._constants[name]
        values = numpy_helper.to_array(tensor).astype(np.float64)
        codes = np.clip(np.rint(values / scale.scale) + scale.zero_point, 0, LEVELS)
        tensor.CopyFrom(numpy_helper.from_array(codes.astype(np.uint16), f"{name}.q"))
        node = helper.make_node(
            "DequantizeLinear", [f"{name}.q", *self._parameters(name, scale)], [name],
            name=f"{name}.DequantizeLinear",
        )  # fmt: skip
        return [node]

    def _pair(
        self, source: str, target: str, scale: Scale, dtype: type = np.uint16
    ) -> list[NodeProto]:
        parameters = self._parameters(target, scale, dtype)
        return [
            helper.make_node(
                "QuantizeLinear", [source, *parameters], [f"{target}.q"],
                name=f"{target}.QuantizeLinear",
            ),
            helper.make_node(
                "DequantizeLinear", [f"{target}.q", *parameters], [target],
                name=f"{target}.DequantizeLinear",
            ),
        ]  # fmt: skip

    def _second_factor(self, node: NodeProto) -> list[NodeProto]:
        """int16 for the second factor of a MatMul, when it is an activation."""
        source = node.input[1]
        scale = self._scales.get(source) or self._scales.get(source.removesuffix(".dq"))
        if scale is None:  # a weight
            return []
        low, high = -scale.zero_point, LEVELS - scale.zero_point
        symmetric = Scale(scale.scale * max(-low, high) / 32767, 0)
        target = f"{node.name}.second"
        node.input[1] = target
        return self._pair(source, target, symmetric, np.int16)

    def _parameters(self, name: str, scale: Scale, dtype: type = np.uint16) -> list[str]:
        made = [f"{name}.scale", f"{name}.zero"]
        self._graph.initializer.extend(
            [
                helper.make_tensor(made[0], TensorProto.FLOAT, (), [scale.scale]),
                numpy_helper.from_array(np.asarray(scale.zero_point, dtype), made[1]),
            ]
        )
        return made
