"""Reading GGUF v3 files: metadata, tensor table, read-only views of tensor bytes.

Written for files we did not write: every count, length and offset is checked against the file
before anything is allocated from it, and every malformation is a BundleError that names the
file. A split set ("x-00001-of-00003.gguf") opens as one model. Nothing is copied: `raw` is a
view of the mapped file, and big string arrays are decoded only when read.

Source: ggml docs/gguf.md; llama.cpp:ggml/src/gguf.cpp and src/llama-model-loader.cpp for the
split keys.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from mimo_edge.errors import BundleError

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
MAX_NAME_BYTES = 63  # GGML_MAX_NAME less the terminator
MAX_DIMS = 4

U8 = NDArray[np.uint8]


class GgufType(IntEnum):
    """Type of a metadata value."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


SCALAR_FORMATS: dict[GgufType, str] = {
    GgufType.UINT8: "B",
    GgufType.INT8: "b",
    GgufType.UINT16: "H",
    GgufType.INT16: "h",
    GgufType.UINT32: "I",
    GgufType.INT32: "i",
    GgufType.FLOAT32: "f",
    GgufType.BOOL: "B",
    GgufType.UINT64: "Q",
    GgufType.INT64: "q",
    GgufType.FLOAT64: "d",
}


class BlockSize(NamedTuple):
    """A ggml type: its name, weights per block and bytes per block."""

    name: str
    block: int
    block_bytes: int


GGML_TYPES: dict[int, BlockSize] = {
    0: BlockSize("F32", 1, 4),
    1: BlockSize("F16", 1, 2),
    2: BlockSize("Q4_0", 32, 18),
    3: BlockSize("Q4_1", 32, 20),
    6: BlockSize("Q5_0", 32, 22),
    7: BlockSize("Q5_1", 32, 24),
    8: BlockSize("Q8_0", 32, 34),
    9: BlockSize("Q8_1", 32, 40),
    10: BlockSize("Q2_K", 256, 84),
    11: BlockSize("Q3_K", 256, 110),
    12: BlockSize("Q4_K", 256, 144),
    13: BlockSize("Q5_K", 256, 176),
    14: BlockSize("Q6_K", 256, 210),
    15: BlockSize("Q8_K", 256, 292),
    16: BlockSize("IQ2_XXS", 256, 66),
    17: BlockSize("IQ2_XS", 256, 74),
    18: BlockSize("IQ3_XXS", 256, 98),
    19: BlockSize("IQ1_S", 256, 50),
    20: BlockSize("IQ4_NL", 32, 18),
    21: BlockSize("IQ3_S", 256, 110),
    22: BlockSize("IQ2_S", 256, 82),
    23: BlockSize("IQ4_XS", 256, 136),
    24: BlockSize("I8", 1, 1),
    25: BlockSize("I16", 1, 2),
    26: BlockSize("I32", 1, 4),
    27: BlockSize("I64", 1, 8),
    28: BlockSize("F64", 1, 8),
    29: BlockSize("IQ1_M", 256, 56),
    30: BlockSize("BF16", 1, 2),
    34: BlockSize("TQ1_0", 256, 54),
    35: BlockSize("TQ2_0", 256, 66),
    39: BlockSize("MXFP4", 32, 17),
}


def row_bytes(ggml_type: int, columns: int) -> int:
    """Bytes of one row of `columns` weights. Raises BundleError when they fill no whole block."""
    kind = GGML_TYPES.get(ggml_type)
    if kind is None:
        raise BundleError(f"ggml type {ggml_type} is unknown")
    if columns % kind.block:
        raise BundleError(f"{columns} columns are not a multiple of {kind.name}'s {kind.block}")
    return columns // kind.block * kind.block_bytes


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. `shape` is in NumPy order ([out, in], experts [E, out, in]);
    `offset` counts from the start of `file`."""

    name: str
    ggml_type: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    file: Path

    @property
    def type_name(self) -> str:
        """Name of the ggml type, e.g. "Q4_0"."""
        return GGML_TYPES[self.ggml_type].name


class StringArray(Sequence[str]):
    """A GGUF array of strings, decoded item by item from the mapped file.

    Reading an item that is not UTF-8 raises BundleError."""

    def __init__(self, data: U8, starts: NDArray[np.int64], where: str) -> None:
        self._data = data
        self._starts = starts  # [n + 1]; item i is data[starts[i] + 8 : starts[i + 1]]
        self._where = where

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = index + len(self) if index < 0 else index
        if not 0 <= i < len(self):
            raise IndexError(index)
        text = self._data[self._starts[i] + 8 : self._starts[i + 1]].tobytes()
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BundleError(f"{self._where}: item {i} is not UTF-8 ({error.reason})") from error

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


class _Cursor:
    """A position in the mapped file that never leaves it."""

    def __init__(self, data: U8, path: Path) -> None:
        self.data = data
        self.path = path
        self.position = 0
        self._view = data.data

    def fail(self, message: str, hint: str = "") -> BundleError:
        return BundleError(f"{self.path}: {message}", hint)

    def skip(self, count: int, what: str) -> int:
        """Advance by `count` bytes and return where they start."""
        start = self.position
        if count > len(self.data) - start:
            raise self.fail(
                f"truncated: {what} needs {count} bytes at {start}, the file has {len(self.data)}",
                "download or export it again",
            )
        self.position = start + count
        return start

    def scalar(self, code: str, what: str) -> Any:
        start = self.skip(struct.calcsize("<" + code), what)
        return struct.unpack_from("<" + code, self._view, start)[0]

    def string(self, what: str) -> str:
        length = self.scalar("Q", f"length of {what}")
        start = self.skip(length, what)
        try:
            return bytes(self._view[start : start + length]).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8 ({error.reason})") from error

    def count(self, what: str, least_bytes: int) -> int:
        """A count of items of at least `least_bytes` each, checked against what is left."""
        value = int(self.scalar("Q", f"count of {what}"))
        if value > (len(self.data) - self.position) // least_bytes:
            raise self.fail(
                f"truncated or damaged: claims {value} {what} with "
                f"{len(self.data) - self.position} bytes left"
            )
        return value

    def strings(self, key: str, count: int) -> StringArray:
        if count > (len(self.data) - self.position) // 8:
            raise self.fail(f"truncated: {key} claims {count} strings")
        starts = np.empty(count + 1, np.int64)
        view, position, end = self._view, self.position, len(self.data)
        unpack = struct.Struct("<Q").unpack_from
        for i in range(count):
            starts[i] = position
            if position + 8 > end or unpack(view, position)[0] > end - position - 8:
                raise self.fail(f"truncated: item {i} of {key} passes the end of the file")
            position += 8 + unpack(view, position)[0]
        starts[count] = position
        self.position = position
        return StringArray(self.data, starts, f"{self.path}: {key}")


def _read_value(cursor: _Cursor, key: str) -> tuple[Any, GgufType]:
    raw_type = cursor.scalar("I", f"type of {key}")
    if raw_type == GgufType.ARRAY:
        item_type = cursor.scalar("I", f"item type of {key}")
        count = cursor.scalar("Q", f"length of {key}")
        if item_type == GgufType.STRING:
            return cursor.strings(key, count), GgufType.ARRAY
        code = SCALAR_FORMATS.get(item_type)
        if code is None:
            raise cursor.fail(f"{key} is an array of items of type {item_type}")
        size = struct.calcsize("<" + code)
        start = cursor.skip(count * size, key)
        values = np.frombuffer(cursor.data, np.dtype("<" + code), count, start)
        return (values != 0 if item_type == GgufType.BOOL else values), GgufType.ARRAY
    if raw_type == GgufType.STRING:
        return cursor.string(key), GgufType.STRING
    code = SCALAR_FORMATS.get(raw_type)
    if code is None:
        raise cursor.fail(f"{key} has the unknown value type {raw_type}")
    value = cursor.scalar(code, key)
    return (value != 0 if raw_type == GgufType.BOOL else value), GgufType(raw_type)


@dataclass(frozen=True)
class _Part:
    path: Path
    data: U8
    metadata: dict[str, Any]
    alignment: int
    tensors: dict[str, TensorInfo]
    data_start: int


def _parse(path: Path) -> _Part:
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise BundleError(f"{path} is not a file")
        data: U8 = np.memmap(path, np.uint8, mode="r") if size else np.empty(0, np.uint8)
    except FileNotFoundError:
        raise BundleError(f"there is no file {path}") from None
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    cursor = _Cursor(data, path)
    if bytes(data[:4]) != MAGIC:
        raise cursor.fail(f"not a GGUF file (starts with {bytes(data[:4])!r})")
    cursor.skip(4, "magic")
    version = cursor.scalar("I", "version")
    if version != VERSION:
        swapped = struct.unpack(">I", struct.pack("<I", version))[0] == VERSION
        raise cursor.fail(
            "big-endian GGUF is not supported" if swapped else f"GGUF version {version}, not 3"
        )
    tensor_count = cursor.count("tensors", 8 + 1 + 4 + 8 + 4 + 8)
    key_count = cursor.count("metadata keys", 8 + 1 + 4 + 1)
    metadata: dict[str, Any] = {}
    alignment = DEFAULT_ALIGNMENT
    for _ in range(key_count):
        key = cursor.string("a metadata key")
        if not key:
            raise cursor.fail("empty metadata key")
        if key in metadata:
            raise cursor.fail(f"metadata key {key} occurs twice")
        metadata[key], kind = _read_value(cursor, key)
        if key == "general.alignment":
            alignment = metadata[key]
            if kind != GgufType.UINT32 or alignment < 1 or alignment & (alignment - 1):
                raise cursor.fail(f"general.alignment = {alignment!r} is not a power of two")
    rows = [_read_tensor_row(cursor) for _ in range(tensor_count)]
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, ggml_type, shape, offset in rows:
        if name in tensors:
            raise cursor.fail(f"tensor {name} occurs twice")
        tensors[name] = _place(cursor, name, ggml_type, shape, offset, data_start, alignment)
    _check_overlap(cursor, tensors)
    return _Part(path, data, metadata, alignment, tensors, data_start)


def _read_tensor_row(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    name = cursor.string("a tensor name")
    if not 0 < len(name.encode()) <= MAX_NAME_BYTES:
        raise cursor.fail(f"tensor name of {len(name.encode())} bytes, at most {MAX_NAME_BYTES}")
    dims = cursor.scalar("I", f"dimensions of {name}")
    if not 1 <= dims <= MAX_DIMS:
        raise cursor.fail(f"tensor {name} has {dims} dimensions, not 1 to {MAX_DIMS}")
    innermost_first = [cursor.scalar("Q", f"shape of {name}") for _ in range(dims)]
    ggml_type = cursor.scalar("I", f"type of {name}")
    offset = cursor.scalar("Q", f"offset of {name}")
    return name, ggml_type, tuple(reversed(innermost_first)), offset


def _place(
    cursor: _Cursor,
    name: str,
    ggml_type: int,
    shape: tuple[int, ...],
    offset: int,
    data_start: int,
    alignment: int,
) -> TensorInfo:
    kind = GGML_TYPES.get(ggml_type)
    if kind is None:
        raise cursor.fail(f"tensor {name} has the unknown ggml type {ggml_type}")
    if min(shape) < 1:
        raise cursor.fail(f"tensor {name} has the empty shape {list(shape)}")
    if shape[-1] % kind.block:
        raise cursor.fail(
            f"tensor {name}: rows of {shape[-1]} are not whole {kind.name} blocks of {kind.block}"
        )
    nbytes = shape[-1] // kind.block * kind.block_bytes
    for extent in shape[:-1]:  # Python integers: absurd extents cannot overflow
        nbytes *= extent
    if offset % alignment:
        raise cursor.fail(f"tensor {name}: offset {offset} is not a multiple of {alignment}")
    start = data_start + offset
    if start + nbytes > len(cursor.data):
        raise cursor.fail(
            f"truncated: tensor {name} ends at {start + nbytes}, "
            f"the file has {len(cursor.data)} bytes",
            "download or export it again",
        )
    return TensorInfo(name, ggml_type, shape, start, nbytes, cursor.path)


def _check_overlap(cursor: _Cursor, tensors: dict[str, TensorInfo]) -> None:
    end, previous = 0, ""
    for info in sorted(tensors.values(), key=lambda t: t.offset):
        if info.offset < end:
            raise cursor.fail(f"tensors {previous} and {info.name} overlap")
        end, previous = info.offset + info.nbytes, info.name


_SPLIT_NAME = re.compile(r"^(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf$", re.DOTALL)


def split_name(stem: str, number: int, count: int) -> str:
    """File name of part `number` (from 0) of a split set, as llama.cpp spells it."""
    return f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"


class GgufFile:
    """An open GGUF model: one file, or all parts of a split set.

    `metadata` is that of the first part: scalars as Python values, number arrays as read-only
    NumPy views, string arrays as `StringArray`. `tensors` covers every part.
    """

    def __init__(self, parts: Sequence[_Part]) -> None:
        self._parts = {part.path: part for part in parts}
        self.files: tuple[Path, ...] = tuple(self._parts)
        self.metadata: dict[str, Any] = parts[0].metadata
        self.tensors: dict[str, TensorInfo] = {}
        for part in parts:
            for name, info in part.tensors.items():
                if name in self.tensors:
                    raise BundleError(
                        f"tensor {name} is in both {self.tensors[name].file} and {part.path}"
                    )
                self.tensors[name] = info

    @classmethod
    def open(cls, path: str | Path, side_files: Sequence[Path] = ()) -> GgufFile:
        """Open a GGUF file, or the whole split set that `path` is a part of.

        `side_files` add their tensors; the metadata stays that of the main file.
        Raises BundleError on anything damaged, missing or inconsistent.
        """
        return cls([*cls._open_set(Path(path)), *(_parse(side) for side in side_files)])

    @classmethod
    def _open_set(cls, path: Path) -> list[_Part]:
        first = _parse(path)
        count = _split_number(first, "split.count", default=1)
        if count <= 1:
            return [first]
        match = _SPLIT_NAME.match(path.name)
        if match is None or int(match["count"]) != count:
            raise BundleError(
                f"{path} is one of {count} parts but its name does not say so",
                f"name the parts {split_name('model', 0, count)} and so on",
            )
        names = [split_name(match["stem"], i, count) for i in range(count)]
        if missing := [name for name in names if not (path.parent / name).is_file()]:
            raise BundleError(
                f"{path.parent} lacks {len(missing)} of {count} parts: {', '.join(missing[:8])}"
            )
        parts = [first if name == path.name else _parse(path.parent / name) for name in names]
        for number, part in enumerate(parts):
            found = _split_number(part, "split.no"), _split_number(part, "split.count")
            if found != (number, count):
                raise BundleError(
                    f"{part.path} says it is part {found[0] + 1} of {found[1]}, "
                    f"its name says {number + 1} of {count}"
                )
        declared = _split_number(parts[0], "split.tensors.count")
        found_tensors = sum(len(part.tensors) for part in parts)
        if declared != found_tensors:
            raise BundleError(
                f"{path}: the set should hold {declared} tensors, it holds {found_tensors}"
            )
        return parts

    def info(self, name: str) -> TensorInfo:
        """The tensor's place, or BundleError when there is none of that name."""
        try:
            return self.tensors[name]
        except KeyError:
            raise BundleError(f"{self.files[0]} has no tensor {name!r}") from None

    def raw(self, name: str) -> U8:
        """Bytes of a tensor: a read-only u8 view [nbytes] of the mapped file."""
        info = self.info(name)
        return self._bytes(info.file, info.offset, info.nbytes)

    def raw_rows(self, name: str, start: int, stop: int) -> U8:
        """Rows start..stop of a tensor, all leading axes flattened: u8 view [rows, row bytes]."""
        info = self.info(name)
        size = row_bytes(info.ggml_type, info.shape[-1])
        if not 0 <= start <= stop <= info.nbytes // size:
            raise BundleError(f"rows {start}..{stop} of {name}, which has {info.nbytes // size}")
        view = self._bytes(info.file, info.offset + start * size, (stop - start) * size)
        return view.reshape(stop - start, size)

    def expert_slice(self, name: str, expert: int) -> tuple[Path, int, int]:
        """(file, offset, bytes) of one expert of a stacked tensor [E, out, in]."""
        info = self.info(name)
        if len(info.shape) != 3:
            raise BundleError(f"{name} of shape {list(info.shape)} stacks no experts")
        if not 0 <= expert < info.shape[0]:
            raise BundleError(f"expert {expert} of {name}, which has {info.shape[0]}")
        stride = info.nbytes // info.shape[0]
        return info.file, info.offset + expert * stride, stride

    def data_start(self, file: Path) -> int:
        """Where the tensor data of a part begins; the header lies before it."""
        return self._parts[file].data_start

    def _bytes(self, file: Path, offset: int, size: int) -> U8:
        if file not in self._parts:
            raise BundleError(f"{file} was closed")
        return self._parts[file].data[offset : offset + size]

    def release_pages(self) -> None:
        """Unmap what was read so far; views stay valid and read again.

        What was read from a mapped file counts as this process's memory. The system keeps it
        cached as long as nobody needs the room.
        """
        for part in self._parts.values():
            mapped = getattr(part.data, "_mmap", None)
            if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Drop the maps. Views handed out earlier stay valid until they are dropped too."""
        self._parts.clear()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _split_number(part: _Part, key: str, default: int | None = None) -> int:
    value = part.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise BundleError(f"{part.path}: {key} = {value!r} is not a count")
    return value
