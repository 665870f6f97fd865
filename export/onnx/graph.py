"""One ONNX graph under construction, and the layout of the weight file beside it.

Nodes are added in the order they run. Weights go to an external file whose layout follows from
shapes alone, so a graph's bytes are known before any weight is read; the file is filled piece by
piece afterwards (`DataLayout`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import mimo_edge
from mimo_edge.errors import ExportError
from mimo_edge.onnx_io import CONTRIB_OPSET, DATA_NAME, IR_VERSION, OPSET

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
Dim = int | str
CONTRIB = "com.microsoft"
# Large weights start on a page, so that each can be mapped by itself; small ones on a cache line.
_PAGE, _LINE = 4096, 64


class RowReader(Protocol):
    """Where weights come from: any model by canonical (GGUF) tensor names."""

    def rows(self, name: str, start: int, stop: int) -> F32:
        """Rows start..stop of a tensor, f32 [n, in]; a vector is one row. Raises a typed error."""
        ...


@dataclass(frozen=True)
class Source:
    """Rows of one tensor of the model, multiplied by `factor`."""

    name: str
    rows: int
    factor: float = 1.0


@dataclass(frozen=True)
class Matrix:
    """Rows of several tensors below each other, [out, in]; `flat`: laid end to end as one vector
    [1, in]."""

    sources: tuple[Source, ...]
    cols: int
    flat: bool = False

    @property
    def rows(self) -> int:
        return 1 if self.flat else sum(source.rows for source in self.sources)

    def read(self, reader: RowReader, start: int, stop: int) -> F32:
        """Rows start..stop, f32 [stop - start, in]. Raises ExportError on NaN or Inf."""
        parts, first = [], 0
        for source in self.sources:
            low, high = max(start - first, 0), min(stop - first, source.rows)
            if self.flat:
                low, high = 0, source.rows
            if low < high:
                part = reader.rows(source.name, low, high)
                if not np.isfinite(part).all():
                    raise ExportError(f"{source.name} holds NaN or Inf", "the model is damaged")
                parts.append(part * np.float32(source.factor) if source.factor != 1.0 else part)
            first += 0 if self.flat else source.rows
        if self.flat:
            return np.concatenate([part.reshape(1, -1) for part in parts], axis=1)
        return np.ascontiguousarray(np.concatenate(parts))


class Chunk(NamedTuple):
    """Bytes of one stored tensor, `offset` counting from its start."""

    part: int
    offset: int
    data: U8


Pack = Callable[[F32, int], list[Chunk]]
"""(rows f32 [n, in], number of the first) -> their bytes in every part."""


@dataclass(frozen=True)
class Part:
    """One tensor of the weight file."""

    name: str
    data_type: int
    dims: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Stored:
    """A matrix and how it lies in the weight file. `whole`: packed from all rows at once."""

    matrix: Matrix
    parts: tuple[Part, ...]
    pack: Pack
    whole: bool = False


class DataLayout:
    """The weight file of one graph: what is stored where."""

    def __init__(self) -> None:
        self.stored: list[Stored] = []
        self.size = 0

    def place(self, nbytes: int) -> int:
        """Reserve bytes; where they start."""
        unit = _PAGE if nbytes >= _PAGE else _LINE
        offset = -(-self.size // unit) * unit
        self.size = offset + nbytes
        return offset


class Graph:
    """A graph in the making. Values are named by the node that makes them: names are stable, so a
    later pass (quantisation of activations, say) can find them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.data = DataLayout()
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._infos: list[onnx.ValueInfoProto] = []
        self._made: set[str] = set()

    # --- values ---

    def input(self, name: str, shape: Sequence[Dim], data_type: int = TensorProto.FLOAT) -> str:
        """A graph input; asking again for one that is there gives it back."""
        if not any(info.name == name for info in self._inputs):
            self._claim(name)
            self._inputs.append(helper.make_tensor_value_info(name, data_type, list(shape)))
        return name

    def output(self, name: str, shape: Sequence[Dim], data_type: int = TensorProto.FLOAT) -> None:
        """Make a value an output."""
        self._outputs.append(helper.make_tensor_value_info(name, data_type, list(shape)))

    def typed(self, name: str, shape: Sequence[Dim], data_type: int = TensorProto.FLOAT) -> str:
        """State the shape of a value whose operator shape inference does not know."""
        self._infos.append(helper.make_tensor_value_info(name, data_type, list(shape)))
        return name

    def node(
        self, op: str, inputs: Sequence[str], name: str, *, domain: str = "", **attributes: Any
    ) -> str:
        """Add an operator with one output, called `name`."""
        return self.nodes(op, inputs, [name], domain=domain, **attributes)[0]

    def nodes(
        self,
        op: str,
        inputs: Sequence[str],
        names: Sequence[str],
        *,
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Add an operator with several outputs."""
        for name in names:
            self._claim(name)
        made = helper.make_node(
            op, list(inputs), list(names), name=names[0], domain=domain, **attributes
        )
        self._nodes.append(made)
        return list(names)

    def constant(self, values: Any, dtype: Any = np.int64) -> str:
        """A small constant inside the graph; equal ones are one."""
        array = np.asarray(values, dtype)
        label = "_".join(map(str, array.reshape(-1).tolist())).replace("-", "m")
        name = f"const.{array.dtype.name}.{'x'.join(map(str, array.shape))}.{label}"
        if name not in self._initializers:
            self._claim(name)
            self._initializers[name] = numpy_helper.from_array(array, name)
        return name

    def zeros(self, name: str, data_type: int, dims: tuple[int, ...]) -> str:
        """A constant of zeros inside the graph: zero points, of types NumPy may not have."""
        self._claim(name)
        count = int(np.prod(dims))
        nbytes = (count + 1) // 2 if data_type == TensorProto.INT4 else count
        self._initializers[name] = helper.make_tensor(
            name, data_type, dims, bytes(nbytes), raw=True
        )
        return name

    def store(
        self,
        name: str,
        matrix: Matrix,
        parts: Sequence[tuple[str, int, tuple[int, ...], int]],
        pack: Pack,
        *,
        whole: bool = False,
    ) -> list[str]:
        """Put a matrix into the weight file as one or more tensors (suffix, type, dims, bytes);
        their names."""
        made = []
        for suffix, data_type, dims, nbytes in parts:
            part = Part(name + suffix, data_type, dims, self.data.place(nbytes), nbytes)
            self._claim(part.name)
            self._initializers[part.name] = _external(part)
            made.append(part)
        self.data.stored.append(Stored(matrix, tuple(made), pack, whole))
        return [part.name for part in made]

    def plain(self, name: str, matrix: Matrix, dims: tuple[int, ...]) -> str:
        """Put a matrix or vector into the weight file as f32."""
        nbytes = 4 * int(np.prod(dims))
        return self.store(name, matrix, [("", TensorProto.FLOAT, dims, nbytes)], pack_f32)[0]

    def _claim(self, name: str) -> None:
        if name in self._made:
            raise ExportError(f"graph {self.name}: the value {name!r} is made twice")
        self._made.add(name)

    # --- the file ---

    def to_bytes(self, metadata: Mapping[str, str] | None = None) -> bytes:
        """The model file: the same bytes for the same graph."""
        graph = helper.make_graph(
            self._nodes,
            self.name,
            self._inputs,
            self._outputs,
            list(self._initializers.values()),
            value_info=self._infos,
        )
        imports = [helper.make_opsetid("", OPSET)]
        if any(node.domain == CONTRIB for node in self._nodes):
            imports.append(helper.make_opsetid(CONTRIB, CONTRIB_OPSET))
        model = helper.make_model(
            graph,
            opset_imports=imports,
            producer_name="mimo-edge",
            producer_version=mimo_edge.__version__,
        )
        model.ir_version = IR_VERSION
        helper.set_model_props(model, dict(metadata or {}))
        data: bytes = model.SerializeToString(deterministic=True)
        return data


def pack_f32(rows: F32, first: int) -> list[Chunk]:
    """Rows as they are, little-endian."""
    data = np.ascontiguousarray(rows, np.dtype("<f4")).view(np.uint8).reshape(-1)
    return [Chunk(0, first * rows.shape[1] * 4, data)]


def _external(part: Part) -> onnx.TensorProto:
    tensor = TensorProto(name=part.name, data_type=part.data_type, dims=part.dims)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", DATA_NAME), ("offset", part.offset), ("length", part.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
