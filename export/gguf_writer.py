"""Laying out a GGUF file before any of its data exists.

Sizes follow from shapes and formats, so the header, every tensor's offset and the file's size
are known first; the pipeline then writes pieces where they belong, in any order, and the same
input always gives the same bytes.

Source: ggml docs/gguf.md; llama.cpp:ggml/src/gguf.cpp (offsets must follow each other without
gaps), tools/gguf-split/gguf-split.cpp (split keys).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mimo_edge.errors import ExportError
from mimo_edge.gguf_file import (
    MAGIC,
    MAX_NAME_BYTES,
    SCALAR_FORMATS,
    VERSION,
    GgufType,
    row_bytes,
)
from mimo_edge.gguf_meta import Value, i32, u16, u32

# One page: experts can be read with O_DIRECT and mapped on their own.
ALIGNMENT = 4096


class PlannedTensor(NamedTuple):
    """A tensor to be written: `shape` in NumPy order ([out, in], [E, out, in])."""

    name: str
    ggml_type: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        size = row_bytes(self.ggml_type, self.shape[-1])
        for extent in self.shape[:-1]:
            size *= extent
        return size


class GgufLayout:
    """Header bytes and the place of every tensor of one file.

    `offsets[name]` counts from the start of the file; `size` is the whole file's, padded so that
    the last tensor ends on the alignment too.
    """

    def __init__(
        self,
        metadata: Mapping[str, Value],
        tensors: Sequence[PlannedTensor],
        alignment: int = ALIGNMENT,
    ) -> None:
        keys = {**metadata, "general.alignment": u32(alignment)}
        if len({t.name for t in tensors}) != len(tensors):
            raise ExportError("a tensor occurs twice in one GGUF file")
        self.tensors = {tensor.name: tensor for tensor in tensors}
        head = bytearray(MAGIC)
        head += struct.pack("<IQQ", VERSION, len(tensors), len(keys))
        for key, value in keys.items():
            try:
                head += _text(key) + _value(key, value)
            except UnicodeEncodeError as error:  # JSON can spell halves of characters
                raise ExportError(
                    f"{key}: {error.object[:80]!r} is not Unicode text", "correct it at the source"
                ) from None
        relative: dict[str, int] = {}
        end = 0
        for tensor in tensors:
            if len(tensor.name.encode()) > MAX_NAME_BYTES:
                raise ExportError(f"tensor name {tensor.name!r} is too long for GGUF")
            relative[tensor.name] = end
            head += _text(tensor.name)
            head += struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1])
            head += struct.pack("<IQ", tensor.ggml_type, end)
            end += _padded(tensor.nbytes, alignment)
        start = _padded(len(head), alignment)
        self.header = bytes(head.ljust(start, b"\0"))
        self.offsets = {name: start + offset for name, offset in relative.items()}
        self.size = start + end


def split_keys(number: int, count: int, tensors: int) -> dict[str, Value]:
    """The keys that tie part `number` (from 0) of `count` to the set of `tensors` in all."""
    return {
        "split.no": u16(number),
        "split.count": u16(count),
        "split.tensors.count": i32(tensors),
    }


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _text(value: str) -> bytes:
    data = value.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: Value) -> bytes:
    kind = struct.pack("<I", value.type)
    if value.type == GgufType.STRING:
        return kind + _text(value.value)
    if value.type != GgufType.ARRAY:
        return kind + _pack(key, SCALAR_FORMATS[value.type], [value.value])
    assert value.item is not None
    kind += struct.pack("<IQ", value.item, len(value.value))
    if value.item == GgufType.STRING:
        return kind + b"".join(map(_text, value.value))
    return kind + _pack(key, SCALAR_FORMATS[value.item], value.value)


def _pack(key: str, code: str, values: Sequence[float]) -> bytes:
    try:
        if code == "f" and not np.isfinite(np.array(values, np.float32)).all():
            raise ExportError(f"{key} = {values} does not fit single precision")
        return struct.pack(f"<{len(values)}{code}", *values)
    except struct.error as error:
        raise ExportError(f"{key} = {values} does not fit its GGUF type: {error}") from error
