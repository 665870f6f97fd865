"""Reading GGUF v3 files: metadata, tensor table, bytes of tensors.

Written for files we did not write: every count, length and offset is checked against the file
before anything is allocated from it, and every malformation is a BundleError that names the
file. A split set ("x-00001-of-00003.gguf") opens as one model. The header is kept in memory, its
big string arrays are decoded only when read; tensors are read from the open files when asked for.

Source: ggml docs/gguf.md; llama.cpp:ggml/src/gguf.cpp and src/llama-model-loader.cpp for the
split keys.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from mimo_edge.errors import BundleError
from mimo_edge.flash_file import FlashFile

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
MAX_NAME_BYTES = 63  # GGML_MAX_NAME less the terminator
MAX_DIMS = 4
# A tokenizer of 150,000 tokens takes some 10 MB: more than this is a mistake or an attack.
MAX_HEADER_BYTES = 256 << 20
_FIRST_BYTES = 64 << 10
_PIECE_BYTES = 4 << 20

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
    """A GGUF array of strings, decoded item by item from the header.

    Reading an item that is not UTF-8 raises BundleError."""

    def __init__(self, data: memoryview, starts: NDArray[np.int64], where: str) -> None:
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
    """A position in the file that never leaves it; the header is read as far as it is needed."""

    def __init__(self, file: FlashFile) -> None:
        self.path = file.path
        self.size = file.size
        self.position = 0
        self._file = file
        self._view = memoryview(b"")
        self._arrays: list[StringArray] = []

    def fail(self, message: str, hint: str = "") -> BundleError:
        return BundleError(f"{self.path}: {message}", hint)

    def _load(self, end: int) -> memoryview:
        """Have the bytes up to `end`, which the file must reach, in memory."""
        have = len(self._view)
        if end > have:
            if end > MAX_HEADER_BYTES:
                raise self.fail(f"its header has more than {MAX_HEADER_BYTES} bytes")
            grown = bytearray(min(self.size, max(end, 2 * have, _FIRST_BYTES)))
            grown[:have] = self._view
            with memoryview(grown) as whole, whole[have:] as new:
                self._file.read(have, [new])
            self._view = memoryview(grown).toreadonly()
        return self._view

    def skip(self, count: int, what: str) -> int:
        """Advance by `count` bytes and return where they start."""
        start = self.position
        if count > self.size - start:
            raise self.fail(
                f"truncated: {what} needs {count} bytes at {start}, the file has {self.size}",
                "download or export it again",
            )
        self._load(start + count)
        self.position = start + count
        return start

    def scalar(self, code: str, what: str) -> Any:
        start = self.skip(struct.calcsize("<" + code), what)
        return struct.unpack_from("<" + code, self._view, start)[0]

    def take(self, count: int, what: str) -> memoryview:
        start = self.skip(count, what)
        return self._view[start : start + count]

    def string(self, what: str) -> str:
        length = self.scalar("Q", f"length of {what}")
        try:
            return str(self.take(length, what), "utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8 ({error.reason})") from error

    def count(self, what: str, least_bytes: int) -> int:
        """A count of items of at least `least_bytes` each, checked against what is left."""
        value = int(self.scalar("Q", f"count of {what}"))
        left = self.size - self.position
        if value > left // least_bytes:
            raise self.fail(f"truncated or damaged: claims {value} {what} with {left} bytes left")
        return value

    def strings(self, key: str, count: int) -> StringArray:
        if count > (self.size - self.position) // 8:
            raise self.fail(f"truncated: {key} claims {count} strings")
        if count > MAX_HEADER_BYTES // 8:
            raise self.fail(f"{key} claims {count} strings, more than any header holds")
        starts = np.empty(count + 1, np.int64)
        position, end = self.position, self.size
        view, loaded = self._view, len(self._view)
        unpack = struct.Struct("<Q").unpack_from
        for i in range(count):
            starts[i] = position
            if position + 8 > loaded and position + 8 <= end:
                view = self._load(position + 8)
                loaded = len(view)
            if position + 8 > end or unpack(view, position)[0] > end - position - 8:
                raise self.fail(f"truncated: item {i} of {key} passes the end of the file")
            position += 8 + unpack(view, position)[0]
        starts[count] = position
        self._load(position)
        self.position = position
        array = StringArray(self._view, starts, f"{self.path}: {key}")
        self._arrays.append(array)
        return array

    def settle(self) -> None:
        """The header is complete: keep one copy of it, in the size it has."""
        whole = memoryview(bytes(self._view[: self.position]))
        self._view = whole
        for array in self._arrays:
            array._data = whole


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
        dtype = np.dtype("<" + code)
        values = np.frombuffer(cursor.take(count * dtype.itemsize, key), dtype).copy()
        values.flags.writeable = False
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
    file: FlashFile
    metadata: dict[str, Any]
    alignment: int
    tensors: dict[str, TensorInfo]
    data_start: int


def _parse(path: Path) -> _Part:
    try:
        path.stat()
        if not path.is_file():  # opening a pipe would wait for somebody to write to it
            raise BundleError(f"{path} is not a file")
    except FileNotFoundError:
        raise BundleError(f"there is no file {path}") from None
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    file = FlashFile(path, direct=False, keep_pages=True)
    try:
        return _parse_open(file)
    except BaseException:
        file.close()
        raise


def _parse_open(file: FlashFile) -> _Part:
    cursor, path = _Cursor(file), file.path
    magic = bytes(cursor.take(min(4, file.size), "magic"))
    if magic != MAGIC:
        raise cursor.fail(f"not a GGUF file (starts with {magic!r})")
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
    cursor.settle()
    return _Part(path, file, metadata, alignment, tensors, data_start)


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
    if start + nbytes > cursor.size:
        raise cursor.fail(
            f"truncated: tensor {name} ends at {start + nbytes}, the file has {cursor.size} bytes",
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
    NumPy arrays, string arrays as `StringArray`. `tensors` covers every part. Close it, or use it
    as a context manager.
    """

    def __init__(self, parts: Sequence[_Part]) -> None:
        self._parts = {part.path: part for part in parts}
        self._files = {part.path: part.file for part in parts}
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
        """Bytes of a tensor: read-only u8 [nbytes], read now.

        This and every other method that reads raises BundleError when the file is damaged or no
        longer the one that was opened.
        """
        data: U8 = np.empty(self.info(name).nbytes, np.uint8)
        self.read_into(name, 0, data)
        data.flags.writeable = False
        return data

    def raw_rows(self, name: str, start: int, stop: int) -> U8:
        """Rows start..stop of a tensor, all leading axes flattened: read-only u8 [rows, row
        bytes], read now."""
        size = self.row_bytes(name)
        rows = self.info(name).nbytes // size
        if not 0 <= start <= stop <= rows:
            raise BundleError(f"rows {start}..{stop} of {name}, which has {rows}")
        data: U8 = np.empty((stop - start, size), np.uint8)
        self.read_into(name, start * size, data.reshape(-1))
        data.flags.writeable = False
        return data

    def row_bytes(self, name: str) -> int:
        """Bytes of one row of a tensor."""
        info = self.info(name)
        return row_bytes(info.ggml_type, info.shape[-1])

    def read_into(self, name: str, start: int, out: U8) -> None:
        """Fill out u8 [n], contiguous, with the tensor's bytes from `start` on."""
        info = self.info(name)
        if not 0 <= start <= start + out.size <= info.nbytes:
            raise BundleError(
                f"bytes {start}..{start + out.size} of {name}, which has {info.nbytes}"
            )
        if not out.size:
            return
        self._part(info.file)
        file = self._files[info.file]
        try:
            with out.data as target:
                file.load(info.offset + start, target)
        except BundleError:
            file.check()  # truncated or replaced says more than short
            raise
        file.check()

    def crc32(self, name: str, start: int = 0, nbytes: int | None = None, crc: int = 0) -> int:
        """CRC-32 of a tensor's bytes, or of `nbytes` of them from `start` on, going on from
        `crc`; a few MiB in memory at a time."""
        left = self.info(name).nbytes - start if nbytes is None else nbytes
        piece: U8 = np.empty(min(left, _PIECE_BYTES), np.uint8)
        while left:
            step = piece[: min(left, piece.size)]
            self.read_into(name, start, step)
            crc = zlib.crc32(step.data, crc)
            start, left = start + step.size, left - step.size
        return crc

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
        return self._part(file).data_start

    def _part(self, file: Path) -> _Part:
        if file not in self._parts:
            raise BundleError(f"{file} was closed")
        return self._parts[file]

    def drop_pages(self) -> None:
        """Give back what reading left in the page cache, and read past it from now on: it counts
        where memory is bounded. Raises BundleError when a file is not the one it was."""
        for path, part in self._parts.items():
            # Whoever reads experts says whether direct reads are to be had.
            self._files[path] = FlashFile(path, announce=False)
            part.file.drop_pages()
            part.file.check()

    def close(self) -> None:
        """Close the files; what was read stays valid. Twice is harmless."""
        for file in (*self._files.values(), *(part.file for part in self._parts.values())):
            file.close()
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
