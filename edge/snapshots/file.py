"""The snapshot file: one header of JSON, then sections of bytes, each with its checksum.

    offset  bytes  little-endian
    0       8      "MIMOSNAP"
    8       4      version of the format
    12      4      bytes of the header
    16      4      CRC-32 of the header
    20      4      0
    24      ...    header: {"kind", "model", "state", "sections": [[name, bytes, CRC-32], ...]}
    ...     ...    sections, one after the other, without gaps to the end of the file

Nothing in it depends on page sizes, pointers or the machine it was written on. A reader believes
nothing: sizes are compared with the file before anything is allocated, checksums before anything
is used.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from mimo_edge.errors import SnapshotError, SnapshotMismatchError

U8 = NDArray[np.uint8]

MAGIC = b"MIMOSNAP"
VERSION = 1
_HEAD = struct.Struct("<8sIIII")
# A conversation of a million tokens takes a few MB as text.
MAX_HEADER_BYTES = 64 << 20
_MAX_SECTIONS = 1 << 14


@dataclass(frozen=True)
class Section:
    """A named run of bytes, in parts that follow each other: u8, each contiguous."""

    name: str
    parts: tuple[U8, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)


def as_bytes(values: NDArray[Any], dtype: str) -> U8:
    """Values as bytes of `dtype`, which says the byte order."""
    return np.ascontiguousarray(values.astype(dtype, copy=False)).reshape(-1).view(np.uint8)


def encode_header(
    kind: str, model: str, state: Mapping[str, Any], sections: Sequence[Section]
) -> bytes:
    """Everything before the sections. Raises SnapshotError when `state` is no JSON."""
    table = [[s.name, s.nbytes, _crc(s.parts)] for s in sections]
    raw = {"kind": kind, "model": model, "state": dict(state), "sections": table}
    try:
        text = json.dumps(raw, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise SnapshotError(f"a session with values that are no JSON: {error}") from None
    if len(text) > MAX_HEADER_BYTES:
        raise SnapshotError(f"a header of {len(text)} bytes, at most {MAX_HEADER_BYTES} are kept")
    return _HEAD.pack(MAGIC, VERSION, len(text), zlib.crc32(text), 0) + text


def write(file: BinaryIO, header: bytes, sections: Iterable[Section]) -> None:
    """Write a snapshot. Raises OSError."""
    file.write(header)
    for section in sections:
        for part in section.parts:
            file.write(part.data)


class SnapshotFile:
    """An open snapshot, its header read and checked. A context manager.

    `kind`, `model` and `state` are what was written; sections are read in any order, each checked
    against its checksum. Raises SnapshotError on damage, SnapshotMismatchError for a version this
    build does not know.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise SnapshotError(f"cannot read {path}: {error.strerror}") from error
        try:
            self._read_header()
        except OSError as error:
            self._file.close()
            raise SnapshotError(f"cannot read {path}: {error.strerror}") from error
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        head = self._file.read(_HEAD.size)
        if len(head) < _HEAD.size or head[: len(MAGIC)] != MAGIC:
            self.fail("this is no snapshot of mimo-edge")
        _, version, length, crc, zero = _HEAD.unpack(head)
        if version != VERSION:
            raise SnapshotMismatchError(
                f"{self.path} has version {version} of the format, this build reads {VERSION}"
            )
        if length > min(MAX_HEADER_BYTES, size - _HEAD.size):
            self.fail(f"its header of {length} bytes does not fit into {size} bytes")
        text = self._file.read(length)
        if len(text) < length or zlib.crc32(text) != crc or zero:
            self.fail("the checksum of its header differs")
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError):  # bad UTF-8 too
            self.fail("its header is no JSON")
        keys = {"kind": str, "model": str, "state": dict, "sections": list}
        if not isinstance(raw, dict) or set(raw) != set(keys):
            self.fail("its header has other fields")
        for key, wanted in keys.items():
            if not isinstance(raw[key], wanted):
                self.fail(f"{key} in its header is a {type(raw[key]).__name__}")
        self.kind: str = raw["kind"]
        self.model: str = raw["model"]
        self.state: dict[str, Any] = raw["state"]
        self._places: dict[str, tuple[int, int, int]] = {}
        offset = _HEAD.size + length
        if len(raw["sections"]) > _MAX_SECTIONS:
            self.fail(f"it names {len(raw['sections'])} sections")
        for entry in raw["sections"]:
            if (
                not isinstance(entry, list)
                or [type(part) for part in entry] != [str, int, int]
                or entry[0] in self._places
                or entry[1] < 0
            ):
                self.fail("its table of sections is malformed")
            name, nbytes, checksum = entry
            self._places[name] = (offset, nbytes, checksum)
            offset += nbytes
        if offset != size:
            self.fail(f"it has {size} bytes and should have {offset}")

    def size(self, name: str) -> int:
        """Bytes of a section. Raises SnapshotError when there is none of that name."""
        if name not in self._places:
            self.fail(f"it has no section {name!r}")
        return self._places[name][1]

    def read(self, name: str) -> U8:
        """The bytes of a section. Raises SnapshotError on damage."""
        nbytes = self.size(name)
        offset, _, checksum = self._places[name]
        found = np.empty(nbytes, np.uint8)
        try:
            self._file.seek(offset)
            done = self._file.readinto(found.data)
        except OSError as error:
            raise SnapshotError(f"cannot read {self.path}: {error.strerror}") from error
        if done != nbytes:
            self.fail(f"section {name!r} ends after {done} of {nbytes} bytes")
        if zlib.crc32(found.data) != checksum:
            self.fail(f"the checksum of section {name!r} differs")
        return found

    def fail(self, why: str) -> NoReturn:
        """Raise SnapshotError about this file."""
        raise SnapshotError(f"{self.path} is damaged: {why}")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> SnapshotFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _crc(parts: Iterable[U8]) -> int:
    value = 0
    for part in parts:
        value = zlib.crc32(part.data, value)
    return value


def count(value: Any, file: SnapshotFile, what: str) -> int:
    """`value` of a header as a count. Raises SnapshotError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        file.fail(f"{what} is {str(value)[:40]!r}, not a count")
    return value


def pairs(value: Any, file: SnapshotFile, what: str) -> Iterator[tuple[int, int]]:
    """`value` of a header as pairs of counts. Raises SnapshotError."""
    if not isinstance(value, list):
        file.fail(f"{what} are no list")
    for entry in value:
        if not isinstance(entry, list) or len(entry) != 2:
            file.fail(f"{what} are no pairs")
        yield count(entry[0], file, what), count(entry[1], file, what)
