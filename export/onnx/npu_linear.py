"""Matrices as Hexagon NPUs multiply them: LPBQ int4 and int8 per channel, dequantised in the graph.

The provider recognises exactly these forms, MatMul with the weight as [in, out] behind
DequantizeLinear, and keeps the codes as they are in the compiled context.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto

from mimo_edge.export.onnx.graph import F32, Chunk, Dim, Graph, Matrix
from mimo_edge.quant.npu import quantize_int8, quantize_lpbq


@dataclass(frozen=True)
class LpbqLinear:
    """int4 codes, an integer scale per `block` inputs, a float scale per output.

    `importance` f32 [in]: mean square of each input, which the error is weighted by."""

    block: int
    importance: F32 | None = field(default=None, compare=False)

    @property
    def label(self) -> str:
        return f"lpbq{self.block}"

    def emit(self, graph: Graph, x: str, matrix: Matrix, name: str, tokens: Dim) -> str:
        """See `Linear`."""
        out, width = matrix.rows, matrix.cols
        blocks = width // self.block
        weight = f"{name}.weight"
        codes, scales, channels = graph.store(
            weight,
            matrix,
            [
                ("", TensorProto.INT4, (width, out), (width * out + 1) // 2),
                ("_scales", TensorProto.UINT8, (blocks, out), blocks * out),
                ("_channels", TensorProto.FLOAT, (out,), 4 * out),
            ],
            self.pack,
            whole=True,
        )
        zeros = graph.zeros(f"{weight}_scale_zeros", TensorProto.UINT8, (out,))
        step = graph.node("DequantizeLinear", [scales, channels, zeros], f"{weight}_step", axis=1)
        zeros = graph.zeros(f"{weight}_zeros", TensorProto.INT4, (blocks, out))
        values = graph.node(
            "DequantizeLinear", [codes, step, zeros], f"{weight}_values",
            axis=0, block_size=self.block,
        )  # fmt: skip
        return graph.node("MatMul", [x, values], name)

    def pack(self, rows: F32, first: int) -> list[Chunk]:
        """Codes and scales of all rows [out, in]."""
        assert first == 0
        made = quantize_lpbq(rows, self.block, self.importance)
        channels = np.ascontiguousarray(made.channel_scales, np.dtype("<f4"))
        return [
            Chunk(0, 0, made.packed),
            Chunk(1, 0, np.ascontiguousarray(made.block_scales).reshape(-1)),
            Chunk(2, 0, channels.view(np.uint8)),
        ]


@dataclass(frozen=True)
class Int8Linear:
    """int8 codes, a float scale per output."""

    label: str = "int8-channel"

    def emit(self, graph: Graph, x: str, matrix: Matrix, name: str, tokens: Dim) -> str:
        """See `Linear`."""
        out, width = matrix.rows, matrix.cols
        weight = f"{name}.weight"
        codes, scales = graph.store(
            weight,
            matrix,
            [
                ("", TensorProto.INT8, (width, out), width * out),
                ("_scales", TensorProto.FLOAT, (out,), 4 * out),
            ],
            self.pack,
            whole=True,
        )
        zeros = graph.zeros(f"{weight}_zeros", TensorProto.INT8, (out,))
        values = graph.node("DequantizeLinear", [codes, scales, zeros], f"{weight}_values", axis=1)
        return graph.node("MatMul", [x, values], name)

    def pack(self, rows: F32, first: int) -> list[Chunk]:
        """Codes and scales of all rows [out, in]."""
        assert first == 0
        made = quantize_int8(rows)
        scales = np.ascontiguousarray(made.scales, np.dtype("<f4"))
        return [
            Chunk(0, 0, made.codes.view(np.uint8).reshape(-1)),
            Chunk(1, 0, scales.view(np.uint8)),
        ]
