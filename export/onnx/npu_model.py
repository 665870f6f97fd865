"""From a graph of static shapes to the files a compiler reads: weights packed, activations
quantised.

The graphs of a component differ in shapes alone, so they share one weight file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from mimo_edge.errors import ExportError
from mimo_edge.export.onnx.graph import F32, Graph, RowReader
from mimo_edge.export.onnx.qdq import Range, quantize_activations
from mimo_edge.onnx_io import DATA_NAME
from mimo_edge.runtimes.onnx.qnn_targets import Target

# Vectors, and what a router holds, become part of the graph when activations are quantised.
_INLINE_BYTES = 64 << 20
_ATTENTION = re.compile(
    r"\.attn\.(q\.scaled|q\.grouped|[kv]\.columns|k\.turned|scores|weights|mixed|sinks)"
)
_FOLDED = ("Reshape", "Expand", "Transpose", "Identity")


class CentredBias:
    """A `RowReader` whose router biases lie around what keeps scores plus bias near 0.

    A constant added to the bias of every expert changes no choice, but fp16 has few digits far from
    0: at 6, where a trained bias may lie, its steps are wider than many a gap between experts."""

    def __init__(self, reader: RowReader) -> None:
        self._reader = reader

    def rows(self, name: str, start: int, stop: int) -> F32:
        """See `RowReader`."""
        found = self._reader.rows(name, start, stop)
        if not name.endswith(".exp_probs_b.bias"):
            return found
        # Scores lie from 0 to 1.
        return found - np.float32(found.mean(dtype=np.float64) + 0.5)


def write_weights(graph: Graph, reader: RowReader, folder: Path) -> Path:
    """Pack every matrix of a graph into the weight file of `folder`. One matrix is in memory at a
    time. Raises what the reader raises, ExportError on NaN or Inf."""
    path = folder / DATA_NAME
    with path.open("wb") as file:
        file.truncate(graph.data.size)
        for stored in graph.data.stored:
            rows = stored.matrix.read(reader, 0, stored.matrix.rows)
            for chunk in stored.pack(rows, 0):
                file.seek(stored.parts[chunk.part].offset + chunk.offset)
                file.write(np.ascontiguousarray(chunk.data).data)
    return path


def float_model(graph: Graph) -> ModelProto:
    """The graph as it is, its weights in the weight file beside it."""
    return onnx.load_model_from_string(graph.to_bytes())


def quantised_model(
    graph: Graph, weights: Path, ranges: Mapping[str, Range], target: Target
) -> ModelProto:
    """The graph in QDQ form for one NPU; `ranges` of its activations by value name.

    Routers stay float, and so does attention on NPUs that multiply no int16 by int16. Raises
    ExportError when a range is missing."""
    model = float_model(graph)
    inline_floats(model.graph, weights)
    fold_constants(model.graph)

    def island(node: NodeProto) -> bool:
        return in_router(node) or (not target.int16_products and in_attention(node))

    quantize_activations(
        model.graph,
        ranges,
        float_values(model.graph),
        island,
        int16_products=target.int16_products,
    )
    return model


def in_router(node: NodeProto) -> bool:
    """Whether a node belongs to a router."""
    return ".router." in node.name or node.output[0] in ("ids", "weights")


def in_attention(node: NodeProto) -> bool:
    """Whether a node is between the projections of an attention: scores, softmax, mixing."""
    return _ATTENTION.search(node.name) is not None


def float_values(graph: GraphProto) -> list[str]:
    """Names of the float tensors of a layer, MTP or head graph: all but ids."""
    names = [value.name for value in graph.input if _is_float(value)]
    names += [t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT]
    for node in graph.node:
        names += node.output[:1] if node.op_type == "TopK" else node.output
    return names


def activations(graph: GraphProto) -> list[str]:
    """Float tensors that depend on the inputs: what calibration measures."""
    constant = {t.name for t in graph.initializer}
    for node in graph.node:
        if all(name in constant for name in node.input):
            constant |= set(node.output)
    return [name for name in float_values(graph) if name not in constant]


def with_outputs(model: ModelProto, names: Iterable[str]) -> ModelProto:
    """A copy of the model that also gives `names`."""
    made = ModelProto()
    made.CopyFrom(model)
    have = {value.name for value in (*made.graph.output, *made.graph.input)}
    made.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        for name in names
        if name not in have
    )
    return made


def inline_floats(graph: GraphProto, weights: Path) -> None:
    """Move float constants from the weight file into the graph: they are small there."""
    data: NDArray[np.uint8] = np.memmap(weights, np.uint8, "r")
    for tensor in graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL or tensor.data_type != TensorProto.FLOAT:
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        offset, length = int(entry["offset"]), int(entry["length"])
        if length > _INLINE_BYTES:
            raise ExportError(f"{tensor.name} holds {length} bytes in f32", "quantise it")
        values = data[offset : offset + length].view("<f4").reshape(tuple(tensor.dims))
        tensor.CopyFrom(numpy_helper.from_array(np.array(values), tensor.name))


def fold_constants(graph: GraphProto) -> None:
    """Compute what only rearranges constants, so that no NPU has to."""
    constants = {t.name: t for t in graph.initializer if t.data_location != TensorProto.EXTERNAL}
    kept: list[NodeProto] = []
    for node in graph.node:
        if node.op_type not in _FOLDED or any(name not in constants for name in node.input):
            kept.append(node)
            continue
        values = [numpy_helper.to_array(constants[name]) for name in node.input]
        made = numpy_helper.from_array(_folded(node, values), node.output[0])
        graph.initializer.append(made)
        constants[made.name] = graph.initializer[-1]
    del graph.node[:]
    graph.node.extend(kept)
    used = {name for node in kept for name in node.input}
    left = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(left)


def _folded(node: NodeProto, values: list[NDArray[np.generic]]) -> NDArray[np.generic]:
    x = values[0]
    if node.op_type == "Reshape":
        shape = [x.shape[i] if n == 0 else int(n) for i, n in enumerate(values[1].tolist())]
        return np.ascontiguousarray(x.reshape(shape))
    if node.op_type == "Expand":
        shape = list(np.broadcast_shapes(x.shape, tuple(values[1].tolist())))
        return np.ascontiguousarray(np.broadcast_to(x, shape))
    if node.op_type == "Transpose":
        perm = next(list(a.ints) for a in node.attribute if a.name == "perm")
        return np.ascontiguousarray(x.transpose(perm))
    return x


def _is_float(value: onnx.ValueInfoProto) -> bool:
    return bool(value.type.tensor_type.elem_type == TensorProto.FLOAT)
