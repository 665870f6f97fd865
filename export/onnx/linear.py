"""How a matrix multiplies: the one place that knows a weight format of ONNX graphs.

A `Linear` adds y = x W^T to a graph. Layers are built without knowing which; a new format is a new
class here or beside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from onnx import TensorProto

from mimo_edge.errors import ExportError
from mimo_edge.export.onnx.graph import CONTRIB, F32, U8, Chunk, Dim, Graph, Matrix
from mimo_edge.quant.base import row_groups

BLOCK = 64
WIDE_BLOCK = 128
ACCURACY_LEVEL = 4  # of MatMulNBits: activations in 8 bits, products in integers
# Scales tried around the one that maps the largest value of a block to the end of the range.
_SEARCH = tuple(1.0 + 0.02 * step for step in range(-8, 5))


def block_size(bits: int, cols: int) -> int:
    """Inputs that share a scale. Codes of 8 bits have precision to spare, and ONNX Runtime's
    kernel is half as fast again with 128 as with 64 where a pass has many rows."""
    return WIDE_BLOCK if bits == 8 and cols % WIDE_BLOCK == 0 else BLOCK


class Linear(Protocol):
    """Emits products with matrices of one format. Equal objects can share one product."""

    @property
    def label(self) -> str:
        """What the manifest calls this format."""
        ...

    def emit(self, graph: Graph, x: str, matrix: Matrix, name: str, tokens: Dim) -> str:
        """Add x f32 [T, in] times matrix [out, in], a value `name` f32 [T, out]; `tokens` is T."""
        ...


@dataclass(frozen=True)
class FloatLinear:
    """f32 weights, f32 products."""

    label: str = "f32"

    def emit(self, graph: Graph, x: str, matrix: Matrix, name: str, tokens: Dim) -> str:
        """See `Linear`. Rows are stored as the model has them, [out, in]; ONNX Runtime multiplies
        by the transpose without making it."""
        weight = graph.plain(f"{name}.weight", matrix, (matrix.rows, matrix.cols))
        turned = graph.node("Transpose", [weight], f"{name}.weight_t", perm=[1, 0])
        return graph.node("MatMul", [x, turned], name)


@dataclass(frozen=True)
class BlockLinear:
    """MatMulNBits: symmetric codes of `bits` bits, one f32 scale per block of inputs
    (`block_size`)."""

    bits: int = 4

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ExportError(f"MatMulNBits of {self.bits} bits", "use 4 or 8")

    @property
    def label(self) -> str:
        return f"int{self.bits}"

    def emit(self, graph: Graph, x: str, matrix: Matrix, name: str, tokens: Dim) -> str:
        """See `Linear`."""
        size = block_size(self.bits, matrix.cols)
        out, blocks = matrix.rows, -(-matrix.cols // size)
        width = size * self.bits // 8
        codes, scales = graph.store(
            f"{name}.weight",
            matrix,
            [
                ("", TensorProto.UINT8, (out, blocks, width), out * blocks * width),
                ("_scales", TensorProto.FLOAT, (out * blocks,), 4 * out * blocks),
            ],
            self.pack,
        )
        graph.node(
            "MatMulNBits",
            [x, codes, scales],
            name,
            domain=CONTRIB,
            K=matrix.cols,
            N=out,
            bits=self.bits,
            block_size=size,
            accuracy_level=ACCURACY_LEVEL,
        )
        return graph.typed(name, [tokens, out])

    def pack(self, rows: F32, first: int) -> list[Chunk]:
        """Codes and scales of rows [n, in]."""
        codes, scales = quantize_blocks(rows, self.bits)
        if self.bits == 4:
            codes = np.bitwise_or(codes[..., 0::2], codes[..., 1::2] << 4, dtype=np.uint8)
        data = np.ascontiguousarray(codes).reshape(-1)
        steps = scales.astype("<f4").view(np.uint8).reshape(-1)
        count = len(rows)
        return [
            Chunk(0, first * (len(data) // count), data),
            Chunk(1, first * (len(steps) // count), steps),
        ]


def quantize_blocks(rows: F32, bits: int) -> tuple[U8, F32]:
    """f32 [n, in] -> codes u8 [n, blocks, size] and scales f32 [n, blocks], size as `block_size`
    says: x = (code - zero) * scale with zero 8 or 128. Rows are padded with zeros to whole blocks.

    4 bits: of several scales the one with the least squared error. Its sign is the largest
    value's, so that this takes the one code the range has more on its negative side.
    """
    count, cols = rows.shape
    size = block_size(bits, cols)
    blocks = -(-cols // size)
    codes = np.empty((count, blocks, size), np.uint8)
    scales = np.empty((count, blocks), np.float32)
    for start, stop in row_groups(count, cols):  # so that temporaries stay small
        x = np.zeros((stop - start, blocks * size), np.float32)
        x[:, :cols] = rows[start:stop]
        x = x.reshape(stop - start, blocks, size)
        top = 2 ** (bits - 1)
        scale = _searched_scale(x) if bits == 4 else _largest(x)
        codes[start:stop] = _codes(x, scale, top - 1) + np.float32(top)
        scales[start:stop] = scale
    return codes, scales


def _largest(x: F32) -> F32:
    """Scales [n, blocks] that map the largest value of x [n, blocks, size] to code 127."""
    scale: F32 = np.divide(np.abs(x).max(axis=-1), 127, dtype=np.float32)
    return scale


def _searched_scale(x: F32) -> F32:
    """Scales [n, blocks] for 4-bit codes of x [n, blocks, 64] with the least squared error."""
    at = np.abs(x).argmax(axis=-1)[..., None]
    base: F32 = np.divide(np.take_along_axis(x, at, axis=-1)[..., 0], -8, dtype=np.float32)
    best, best_error = base.copy(), np.full(base.shape, np.inf, np.float32)
    for factor in _SEARCH:
        tried: F32 = base * np.float32(factor)
        error = np.square(_codes(x, tried, 7) * tried[..., None] - x).sum(axis=-1)
        better = error < best_error
        np.copyto(best, tried, where=better)
        np.copyto(best_error, error, where=better)
    return best


def _codes(x: F32, scale: F32, top: int) -> F32:
    """x / scale as whole numbers in -top - 1..top."""
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    codes: F32 = np.clip(np.rint(x * inverse[..., None]), -top - 1, top)
    return codes


@dataclass(frozen=True)
class TableFormat:
    """The embedding table: rows are gathered, not multiplied. 8 bits: codes and f32 scales in
    blocks, in standard operators only; else f32."""

    bits: int | None = 8

    @property
    def label(self) -> str:
        return "f32" if self.bits is None else f"int{self.bits}"

    def emit(self, graph: Graph, tokens: str, matrix: Matrix, name: str) -> str:
        """Add rows `tokens` i64 [T] of a matrix [V, M], a value `name` f32 [T, M]."""
        vocab, width = matrix.rows, matrix.cols
        if self.bits is None:
            table = graph.plain(f"{name}.table", matrix, (vocab, width))
            return graph.node("Gather", [table, tokens], name, axis=0)
        if self.bits != 8:
            raise ExportError(f"an embedding table of {self.bits} bits", "use 8 bits or f32")
        block = int(np.gcd(width, BLOCK))
        blocks = width // block
        codes, scales = graph.store(
            f"{name}.table",
            matrix,
            [
                ("", TensorProto.INT8, (vocab, blocks, block), vocab * width),
                ("_scales", TensorProto.FLOAT, (vocab, blocks, 1), 4 * vocab * blocks),
            ],
            self._pack,
        )
        found = graph.node("Gather", [codes, tokens], f"{name}.codes", axis=0)
        found = graph.node("Cast", [found], f"{name}.whole", to=TensorProto.FLOAT)
        steps = graph.node("Gather", [scales, tokens], f"{name}.scales", axis=0)
        rows = graph.node("Mul", [found, steps], f"{name}.blocks")
        return graph.node("Reshape", [rows, graph.constant([0, width])], name)

    def _pack(self, rows: F32, first: int) -> list[Chunk]:
        count, width = rows.shape
        block = int(np.gcd(width, BLOCK))
        blocks = width // block
        codes = np.empty((count, width), np.int8)
        scales = np.empty((count, blocks), "<f4")
        for start, stop in row_groups(count, width):
            x = rows[start:stop].reshape(stop - start, blocks, block)
            scale = _largest(x)
            codes[start:stop] = _codes(x, scale, 127).reshape(stop - start, width)
            scales[start:stop] = scale
        return [
            Chunk(0, first * width, codes.view(np.uint8).reshape(-1)),
            Chunk(1, first * blocks * 4, scales.view(np.uint8).reshape(-1)),
        ]
