"""The safetensors container, read without trust and in bounded memory.

A file is u64 little-endian N, N bytes of JSON header, then the tensors' bytes back to back
with neither holes nor overlaps. The header is checked completely before any tensor is read;
a read opens the file, takes the bytes asked for and closes it, so a checkpoint of any number
of shards holds no descriptors and may be read from several threads.

Source: the format description of huggingface/safetensors; its `safetensors` package is the
oracle of the tests.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimo_edge.errors import CheckpointError
from mimo_edge.export import strict_json

# Bits per element of every dtype of the format. Formats numpy lacks are read as raw integers
# of the same width; those of less than a byte can be listed but not read.
DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        "F4": 4,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "BOOL": 8,
        "U8": 8,
        "I8": 8,
        "F8_E4M3": 8,
        "F8_E5M2": 8,
        "F8_E8M0": 8,
        "F8_E4M3FNUZ": 8,
        "F8_E5M2FNUZ": 8,
        "I16": 16,
        "U16": 16,
        "F16": 16,
        "BF16": 16,
        "I32": 32,
        "U32": 32,
        "F32": 32,
        "I64": 64,
        "U64": 64,
        "F64": 64,
        "C64": 64,
    }
)
_NUMPY: dict[str, str] = {
    "BOOL": "?",
    "I8": "<i1",
    "I16": "<i2",
    "U16": "<u2",
    "I32": "<i4",
    "U32": "<u4",
    "I64": "<i8",
    "U64": "<u8",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "C64": "<c8",
    "BF16": "<u2",
}

# The whole of V2.5 in one file (73,081 tensors) needs about 11 MB of header. The limits keep
# the memory that a hostile header can cost near 300 MB.
HEADER_LIMIT_BYTES = 32 << 20
TENSOR_LIMIT = 1 << 18
_NAME_LIMIT = 1024
_RANK_LIMIT = 8
_BYTES_LIMIT = 1 << 56
_READ_BYTES = 1 << 30  # one read() moves less than 2 GiB


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: `file` is its plain name, `offset` counts from the file's start."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """A checked header; `read` and `read_rows` fetch bytes on demand.

    Raises CheckpointError on any damage, at opening for the header and at reading for the data
    (file shortened or replaced since it was opened).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _open(path) as file:
            info = os.fstat(file.fileno())
            self._identity = _identity(info)
            header = self._read_header(file, info.st_size)
        self.header_sha256 = hashlib.sha256(header).hexdigest()
        start = 8 + len(header)
        raw = strict_json.loads(header, f"header of {path.name}")
        self.metadata, self.tensors = _check_header(raw, path.name, start, info.st_size - start)

    def read(self, name: str) -> NDArray[Any]:
        """The whole tensor in its stored dtype (bf16 as u16, fp8 and mxfp4 bytes as u8)."""
        entry = self._entry(name)
        return self._read(entry, entry.offset, entry.nbytes, entry.shape)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows start..stop-1 along the first axis, in the stored dtype."""
        entry = self._entry(name)
        rows = entry.shape[0] if entry.shape else 0
        if not 0 <= start <= stop <= rows:
            raise CheckpointError(f"rows {start}..{stop} of {name}, which has {rows}")
        row_bytes = entry.nbytes // rows if rows else 0
        shape = (stop - start, *entry.shape[1:])
        return self._read(
            entry, entry.offset + start * row_bytes, (stop - start) * row_bytes, shape
        )

    def _entry(self, name: str) -> StoredTensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path.name} has no tensor {name!r}") from None

    def _read(
        self, entry: StoredTensor, offset: int, nbytes: int, shape: tuple[int, ...]
    ) -> NDArray[Any]:
        if DTYPE_BITS[entry.dtype] < 8:
            raise CheckpointError(f"{entry.name}: dtype {entry.dtype} cannot be read")
        values = np.empty(shape, dtype=np.dtype(_NUMPY.get(entry.dtype, "u1")))
        view = values.reshape(-1).view(np.uint8).data if nbytes else memoryview(b"")
        with _open(self.path) as file:
            if _identity(os.fstat(file.fileno())) != self._identity:
                raise CheckpointError(
                    f"{self.path.name} changed since it was opened", "open the checkpoint again"
                )
            try:
                file.seek(offset)
                done = 0
                while done < nbytes:
                    got = file.readinto(view[done : done + _READ_BYTES])
                    if not got:
                        raise CheckpointError(
                            f"{self.path.name} ends {nbytes - done} bytes short in {entry.name!r}"
                        )
                    done += got
            except OSError as error:
                raise CheckpointError(
                    f"reading {entry.name!r} from {self.path} failed: {error.strerror or error}"
                ) from error
        return values

    def _read_header(self, file: FileIO, size: int) -> bytes:
        name = self.path.name
        if size < 8:
            raise CheckpointError(f"{name} has {size} bytes, too few for a safetensors file")
        length = int.from_bytes(file.read(8), "little")
        if length > HEADER_LIMIT_BYTES:
            raise CheckpointError(
                f"{name} states a header of {length} bytes, more than {HEADER_LIMIT_BYTES}",
                "this is no safetensors file, or it is damaged",
            )
        if length > size - 8:
            raise CheckpointError(
                f"{name} states a header of {length} bytes, but has {size} bytes in all",
                "the file is truncated; download it again",
            )
        data = file.read(length)
        if len(data) != length:
            raise CheckpointError(f"{name} ends inside its header")
        if not data.startswith(b"{"):
            raise CheckpointError(f"the header of {name} does not start with '{{'")
        # Counted before parsing, because every bracket becomes a Python object.
        if data.count(b"{") > TENSOR_LIMIT + 2 or data.count(b"[") > 2 * TENSOR_LIMIT + 2:
            raise CheckpointError(
                f"the header of {name} describes more than {TENSOR_LIMIT} tensors"
            )
        return data


def _open(path: Path) -> FileIO:
    """Open a regular file unbuffered (O_NONBLOCK so that a FIFO cannot hang us)."""
    try:
        descriptor = os.open(
            path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
        )
    except OSError as error:
        raise CheckpointError(f"cannot open {path}: {error.strerror or error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is not a regular file")
    return FileIO(descriptor, "rb")


def _identity(info: os.stat_result) -> tuple[int, int, int, int]:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def _check_header(
    raw: Any, file: str, data_offset: int, data_bytes: int
) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    metadata = raw.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{file}: __metadata__ is not a table of strings")
    entries = [_entry(name, value, file) for name, value in raw.items()]
    # The format demands bytes back to back: anything else is a hole, an overlap or truncation.
    position, before = 0, ""
    for entry in sorted(entries, key=lambda e: (e.offset, e.offset + e.nbytes)):
        if entry.offset != position:
            what = "overlaps" if entry.offset < position else "leaves a hole after"
            raise CheckpointError(
                f"{file}: {entry.name!r} starts at byte {entry.offset} and {what} "
                f"{before or 'the header'!r}, which ends at {position}"
            )
        position, before = entry.offset + entry.nbytes, entry.name
    if position != data_bytes:
        raise CheckpointError(
            f"{file}: the header describes {position} bytes of tensors, the file has {data_bytes}",
            "the file is truncated or damaged; download it again",
        )
    tensors = {
        e.name: StoredTensor(e.name, file, e.dtype, e.shape, data_offset + e.offset, e.nbytes)
        for e in entries
    }
    return metadata, tensors


def _entry(name: str, value: Any, file: str) -> StoredTensor:
    """One checked entry, its offset still relative to the data."""
    where = f"{file}: tensor {name[:120]!r}"
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise CheckpointError(f"{where} has a name that is not Unicode text") from None
    if not name or len(name) > _NAME_LIMIT:
        raise CheckpointError(f"{where} has a name of {len(name)} characters")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{where} has unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or len(shape) > _RANK_LIMIT or not all(map(_is_size, shape)):
        raise CheckpointError(f"{where}: shape {str(shape)[:120]} is not up to {_RANK_LIMIT} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise CheckpointError(f"{where}: data_offsets {str(offsets)[:120]} is not two offsets")
    begin, end = offsets
    if begin > end:
        raise CheckpointError(f"{where} begins at byte {begin} but ends at {end}")
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
    if bits % 8 or bits // 8 != end - begin:
        raise CheckpointError(
            f"{where}: {dtype} {shape} needs {bits / 8:g} bytes, its offsets span {end - begin}"
        )
    return StoredTensor(name, file, dtype, tuple(shape), begin, end - begin)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _BYTES_LIMIT
