"""The ONNX part of an export: weight files as layouts, their pieces, and what a piece computes.

A piece is a group of rows of one stored matrix, so memory stays at a few groups whatever the size
of the model, and the pipeline writes, journals, checks and resumes it like any other.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from mimo_edge.config import MimoConfig
from mimo_edge.export.onnx.graph import F32, DataLayout, RowReader, Stored
from mimo_edge.export.onnx.package import Component, Package, plan_cpu
from mimo_edge.gguf_meta import expected_shapes
from mimo_edge.manifest import OnnxComponent, OnnxEntry
from mimo_edge.quant.base import Format


class DataFile:
    """The weight file of a graph, as the pipeline sees a file it fills."""

    header = b""

    def __init__(self, layout: DataLayout) -> None:
        parts = [part for stored in layout.stored for part in stored.parts]
        self.offsets = {part.name: part.offset for part in parts}
        self.size = layout.size


class StoredRows(NamedTuple):
    """Rows start..stop of a stored matrix; `file` counts among the weight files."""

    file: int
    stored: Stored
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        total = sum(part.nbytes for part in self.stored.parts)
        return total * (self.stop - self.start) // self.stored.matrix.rows


class Placed(NamedTuple):
    """Bytes for a weight file: its number, offset, data and CRC-32."""

    file: int
    offset: int
    data: memoryview
    crc32: int


@dataclass(frozen=True)
class OnnxJob:
    """What an export writes in ONNX form: `files` are weight files by name in the bundle, `pieces`
    what fills them, `side_files` what is written whole."""

    package: Package
    reader: RowReader
    files: Mapping[str, DataFile]
    pieces: Mapping[str, StoredRows] = field(repr=False)

    @property
    def side_files(self) -> dict[str, bytes]:
        return self.package.side_files()

    def compute(self, key: str) -> list[Placed]:
        """Read and pack one piece. Raises what the source raises, ExportError on NaN or Inf."""
        found = self.pieces[key]
        rows = found.stored.matrix.read(self.reader, found.start, found.stop)
        placed = []
        for chunk in found.stored.pack(rows, found.start):
            part = found.stored.parts[chunk.part]
            data = np.ascontiguousarray(chunk.data).reshape(-1).data
            place = part.offset + chunk.offset
            placed.append(Placed(found.file, place, data, zlib.crc32(data)))
        return placed

    def manifest_entry(self, gguf: bool) -> OnnxEntry:
        """What the bundle's manifest says."""
        raw = self.package.manifest_entry()
        return OnnxEntry(
            raw["opset"],
            raw["ir_version"],
            {
                name: OnnxComponent(tuple(c["layers"]), tuple(c["variants"]))
                for name, c in raw["components"].items()
            },
            raw["formats"],
            gguf,
        )


def plan_job(
    config: MimoConfig,
    format_of: Callable[[str], Format],
    reader: RowReader,
    piece_bytes: int,
) -> OnnxJob:
    """Plan the ONNX form of a model; `format_of` gives the recipe's format of a matrix by canonical
    name, `piece_bytes` the f32 bytes of a piece. No tensor data is read."""
    package = plan_cpu(config, format_of)
    files = {c.data_file: DataFile(c.graph.data) for c in package.components}
    pieces = dict(_pieces(package.components, piece_bytes))
    return OnnxJob(package, reader, files, pieces)


def _pieces(
    components: tuple[Component, ...], piece_bytes: int
) -> Iterator[tuple[str, StoredRows]]:
    for number, component in enumerate(components):
        for stored in component.graph.data.stored:
            rows = stored.matrix.rows
            step = rows if stored.whole else max(1, piece_bytes // (4 * stored.matrix.cols))
            for start in range(0, rows, step):
                key = f"{component.folder}/{stored.parts[0].name}.{start}"
                yield key, StoredRows(number, stored, start, min(start + step, rows))


class _Weights(RowReader, Protocol):
    def has(self, name: str) -> bool: ...


class ModelRows:
    """A model's rows as graphs want them: experts in the bundle's order, and zeros for a router
    bias that the model leaves out."""

    def __init__(
        self, weights: _Weights, config: MimoConfig, permutation: Mapping[int, tuple[int, ...]]
    ) -> None:
        self._weights = weights
        self._shapes = expected_shapes(config)
        self._permutation = permutation

    def rows(self, name: str, start: int, stop: int) -> F32:
        """See `RowReader`."""
        bias = name.endswith(".exp_probs_b.bias")
        if bias and not self._weights.has(name):
            return np.zeros((1, *self._shapes[name]), np.float32)
        moved = self._permutation.get(int(name.split(".")[1])) if name.startswith("blk.") else None
        if moved is None or not (bias or name.endswith(".ffn_gate_inp.weight")):
            return self._weights.rows(name, start, stop)
        order = np.array(moved)
        if bias:
            return self._weights.rows(name, 0, 1)[:, order]
        whole = self._weights.rows(name, 0, len(order))  # a router is small
        found: F32 = whole[order[start:stop]]
        return found
