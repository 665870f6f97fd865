"""Reading and quantising one piece of an export: a group of rows, or one routed expert."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import numpy as np

from mimo_edge.export.job import EXPERT_PARTS, Export, Piece, follows_experts, stack_name
from mimo_edge.export.mapping import TensorPlan
from mimo_edge.quant.base import F32, U8
from mimo_edge.quant.imatrix import Imatrix
from mimo_edge.quant.metrics import ErrorMeter
from mimo_edge.quant.mxfp4 import blocks_from_checkpoint


class Chunk(NamedTuple):
    """Bytes to be written: file index, offset and CRC-32."""

    file: int
    offset: int
    data: memoryview
    crc32: int


Computed = tuple[list[Chunk], dict[str, Any]]


def compute(export: Export, piece: Piece) -> Computed:
    """Read and quantise one piece. The journal entry keeps each chunk's place and CRC-32, and
    per tensor the sums its error is made of."""
    chunks: list[Chunk] = []
    errors: dict[str, list[float]] = {}
    unweighted: list[str] = []
    if export.onnx is not None and piece.key in export.onnx.pieces:
        first_file = len(export.layouts) - len(export.onnx.files)
        for placed in export.onnx.compute(piece.key):
            chunks.append(Chunk(first_file + placed.file, *placed[1:]))
    elif piece.expert < 0:
        plan = export.mapping[piece.tensor]
        values = _resident_rows(export, plan, piece)
        _quantise(export, plan, values, piece.start, None, chunks, errors, unweighted)
    else:
        moved = export.permutation.get(piece.layer)
        expert = moved[piece.expert] if moved else piece.expert
        for part in EXPERT_PARTS:
            plan = export.mapping[stack_name(piece.layer, part)]
            first_row = piece.expert * plan.shape[1]
            if plan.mxfp4 and export.formats[plan.name].name == "MXFP4":
                raw = blocks_from_checkpoint(*plan.expert_mxfp4(export.checkpoint, expert))
                chunks.append(_chunk(export, plan, raw, first_row))
                continue
            values = plan.load_expert(export.checkpoint, expert)
            _quantise(export, plan, values, first_row, expert, chunks, errors, unweighted)
    entry: dict[str, Any] = {
        "piece": piece.key,
        "chunks": [[c.file, c.offset, len(c.data), c.crc32] for c in chunks],
    }
    if piece.expert >= 0:
        crc = 0
        for chunk in chunks:
            crc = zlib.crc32(chunk.data, crc)
        entry["crc"] = crc
    if errors:
        entry["errors"] = errors
    if unweighted:
        entry["unweighted"] = unweighted
    return chunks, entry


def _resident_rows(export: Export, plan: TensorPlan, piece: Piece) -> F32:
    """f32 [rows, cols] of a piece; vectors are one row."""
    moved = export.permutation.get(plan.layer) if plan.layer is not None else None
    if moved is not None and follows_experts(plan):
        values: F32 = plan.load(export.checkpoint)[np.array(moved)]
    elif len(plan.shape) == 1:
        values = plan.load(export.checkpoint)
    else:
        values = plan.load_rows(export.checkpoint, piece.start, piece.stop)
    return values.reshape(-1, plan.shape[-1])


def _quantise(
    export: Export,
    plan: TensorPlan,
    values: F32,
    first_row: int,
    expert: int | None,
    chunks: list[Chunk],
    errors: dict[str, list[float]],
    unweighted: list[str],
) -> None:
    fmt = export.formats[plan.name]
    importance = None
    if export.imatrix is not None and fmt.uses_importance:
        importance = _importance(export.imatrix, plan.name, expert)
        if importance is None:
            unweighted.append(plan.name if expert is None else f"{plan.name}[{expert}]")
            if fmt.requires_importance:
                importance = np.ones(plan.shape[-1], np.float32)
    raw = fmt.quantize(values, importance)
    chunks.append(_chunk(export, plan, raw, first_row))
    if fmt.name != "F32":
        meter = ErrorMeter(fmt)
        meter.add(values, raw)
        result = meter.result()
        # NumPy's own summation, not BLAS: the same sum on every run, whatever the threads.
        power = float(np.square(values, dtype=np.float64).sum())
        worst = result.worst.relative_rms if result.worst else 0.0
        if not np.isfinite(worst):
            worst = -1.0  # JSON has no infinity; an all-zero block that became something
        errors[plan.name] = [power, result.relative_rms, worst]


def _importance(imatrix: Imatrix, name: str, expert: int | None) -> F32 | None:
    """Importance of a tensor; a fused q/k/v has the inputs of its q."""
    known = set(imatrix.names)
    if name not in known and name.replace(".attn_qkv.", ".attn_q.") in known:
        name = name.replace(".attn_qkv.", ".attn_q.")
    return imatrix.importance(name, expert)


def _chunk(export: Export, plan: TensorPlan, raw: U8, first_row: int) -> Chunk:
    file = export.file_of[plan.name]
    offset = export.layouts[file].offsets[plan.name] + first_row * raw.shape[1]
    data = np.ascontiguousarray(raw).reshape(-1).data
    return Chunk(file, offset, data, zlib.crc32(data))
