"""Importance matrices: the mean square of every input column, in llama.cpp's GGUF form.

A file holds, per weight, `<name>.in_sum2` f32 [matrices, cols] (sums of squared inputs) and
`<name>.counts` f32 [matrices, 1] (rows summed); matrices are the experts of a stacked tensor,
else one. What we write is what llama-imatrix writes, key for key.
Source: llama.cpp:tools/imatrix/imatrix.cpp save_imatrix, common/imatrix-loader.cpp.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mimo_edge.errors import BundleError, ExportError, QuantError, UsageError
from mimo_edge.gguf_file import DEFAULT_ALIGNMENT, MAX_NAME_BYTES, GgufFile, StringArray
from mimo_edge.quant.base import F32

_SUM_SUFFIX = ".in_sum2"
_COUNT_SUFFIX = ".counts"


@dataclass
class _Entry:
    sums: NDArray[Any]  # [matrices, cols]: float64 once added to, a view of the file before
    counts: NDArray[np.int64]  # [matrices]


class Imatrix:
    """Sums of squared inputs by tensor name; add to it, read it from a file, write it.

    `datasets` names the texts used, `chunk_size` the tokens per chunk llama.cpp would report.
    """

    def __init__(self, datasets: Iterable[str] = (), chunk_size: int = 512) -> None:
        if not 1 <= chunk_size < 1 << 31:
            raise UsageError(f"chunk_size {chunk_size} is not a positive 32-bit number")
        self.datasets = tuple(datasets)
        self.chunk_size = chunk_size
        self._entries: dict[str, _Entry] = {}
        self._missed: set[str] = set()

    @property
    def names(self) -> list[str]:
        """Tensors it knows, sorted."""
        return sorted(self._entries)

    @property
    def chunk_count(self) -> int:
        """Whole chunks seen by the most used matrix, as llama.cpp counts them."""
        most = max((int(e.counts.max(initial=0)) for e in self._entries.values()), default=0)
        return most // self.chunk_size

    def counts(self, name: str) -> NDArray[np.int64]:
        """Rows seen per matrix of `name`, i64 [matrices]. Raises QuantError if unknown."""
        if name not in self._entries:
            raise QuantError(f"the importance matrix has no tensor {name!r}")
        return self._entries[name].counts.copy()

    def add(self, name: str, x: F32) -> None:
        """Add inputs x f32 [T, cols] of weight `name`. T may be 0."""
        self.add_expert(name, 0, 1, x)

    def add_expert(self, name: str, expert: int, n_experts: int, x: F32) -> None:
        """Add inputs x f32 [T, cols] that were routed to `expert` of stacked weight `name`.

        Raises QuantError on another shape than before, and on NaN or infinity.
        """
        if x.ndim != 2 or x.dtype != np.float32 or x.shape[1] == 0:
            raise QuantError(f"inputs of {name} are {x.dtype} {list(x.shape)}, not f32 [T, cols]")
        if not 0 <= expert < n_experts:
            raise QuantError(f"expert {expert} of {n_experts} in {name}")
        if not 0 < len(name.encode()) <= MAX_NAME_BYTES - len(_SUM_SUFFIX):
            raise QuantError(f"tensor name {name!r} does not fit an imatrix file")
        shape = (n_experts, x.shape[1])
        entry = self._entries.get(name)
        if entry is not None and entry.sums.shape != shape:
            raise QuantError(f"inputs of {name} are {list(shape)}, before {list(entry.sums.shape)}")
        sums = np.einsum("tc,tc->c", x, x, dtype=np.float64)
        if not (sums <= np.finfo(np.float32).max).all():  # NaN fails too
            raise QuantError(
                f"inputs of {name} (expert {expert}) hold NaN, infinity or a square beyond f32",
                "the calibration run is broken; nothing of it can be used",
            )
        if entry is None:
            entry = _Entry(np.zeros(shape), np.zeros(n_experts, dtype=np.int64))
            self._entries[name] = entry
        elif entry.sums.dtype != np.float64:
            entry.sums = entry.sums.astype(np.float64)
        entry.sums[expert] += sums
        entry.counts[expert] += x.shape[0]

    def importance(self, name: str, expert: int | None = None) -> F32 | None:
        """Mean square of every input column, f32 [cols]; `expert` for stacked tensors.

        None when there is no measurement: the count is 0 (see `unseen_experts`), every input was
        zero, or the tensor is not in the matrix at all (see `missed`). The caller quantises
        without importance then, and reports it. Raises QuantError when `expert` is left out for
        a stacked tensor or is out of range.
        """
        entry = self._entries.get(name)
        if entry is None:
            self._missed.add(name)
            return None
        matrices = len(entry.counts)
        if expert is None and matrices > 1:
            raise QuantError(f"{name} has {matrices} experts: say which")
        index = expert or 0
        if not 0 <= index < matrices:
            raise QuantError(f"expert {index} of {matrices} in the importance matrix of {name}")
        count = int(entry.counts[index])
        if count == 0:
            return None
        # From the sum as a file holds it, so that a resumed export, which reads the file, packs
        # the same bytes as one that still has the sums in memory.
        stored = entry.sums[index].astype(np.float32)
        mean: F32 = (stored.astype(np.float64) / count).astype(np.float32)
        return mean if mean.any() else None

    def unseen_experts(self) -> list[tuple[str, int]]:
        """(tensor, matrix) without a single input, in order; plain tensors count as matrix 0."""
        return [
            (name, int(index))
            for name in self.names
            for index in np.flatnonzero(self._entries[name].counts == 0)
        ]

    def missed(self) -> list[str]:
        """Tensors that were asked for and are not in the matrix, sorted."""
        return sorted(self._missed)

    def write(self, path: Path) -> None:
        """Write the GGUF file, the same bytes for the same content; whole or not at all.

        Raises ExportError if it cannot be written, and QuantError if there is nothing in it.
        """
        if not self._entries:
            raise QuantError("the importance matrix is empty", "calibrate on some text first")
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            try:
                with temporary.open("wb") as file:
                    self._write(file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise ExportError(f"cannot write {path}: {error}") from error

    def _write(self, file: BinaryIO) -> None:
        header = bytearray(b"GGUF")
        header += struct.pack("<IQQ", 3, 2 * len(self._entries), 4)
        header += _string("general.type") + struct.pack("<I", 8) + _string("imatrix")
        header += _string("imatrix.datasets")
        header += struct.pack("<IIQ", 9, 8, len(self.datasets))
        header += b"".join(_string(text) for text in self.datasets)
        for key, value in (("chunk_count", self.chunk_count), ("chunk_size", self.chunk_size)):
            header += _string(f"imatrix.{key}") + struct.pack("<II", 4, value)
        tensors: list[tuple[str, tuple[int, ...], NDArray[Any]]] = []
        for name in self.names:
            entry = self._entries[name]
            matrices, cols = entry.sums.shape
            stack = () if matrices == 1 else (matrices,)  # ggml drops trailing ones
            tensors.append((name + _SUM_SUFFIX, (cols, *stack), entry.sums))
            tensors.append((name + _COUNT_SUFFIX, (1, *stack), entry.counts))
        offset = 0
        for name, dims, values in tensors:
            header += _string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, 0, offset)
            offset += _padded(4 * values.size)
        file.write(header.ljust(_padded(len(header)), b"\0"))
        for _, _, values in tensors:
            data = values.astype("<f4").tobytes()
            file.write(data.ljust(_padded(len(data)), b"\0"))

    @classmethod
    def read(cls, path: Path) -> Imatrix:
        """Open an imatrix file; sums stay on disk until asked for.

        Raises BundleError on anything that is not a whole, sane imatrix GGUF.
        """
        file = GgufFile.open(path)
        kind = file.metadata.get("general.type", "imatrix")
        if kind != "imatrix":
            raise BundleError(f"{path} is a GGUF of type {kind!r}, not an importance matrix")
        datasets = file.metadata.get("imatrix.datasets", ())
        chunk_size = file.metadata.get("imatrix.chunk_size", 512)
        if not isinstance(datasets, (StringArray, tuple)):
            raise BundleError(f"{path}: imatrix.datasets is not a list of strings")
        if not isinstance(chunk_size, int) or not 1 <= chunk_size < 1 << 31:
            raise BundleError(f"{path}: imatrix.chunk_size = {chunk_size!r}")
        result = cls(datasets, chunk_size)
        for name in sorted({_base_name(path, tensor) for tensor in file.tensors}):
            result._entries[name] = _read_entry(file, path, name)
        if not result._entries:
            raise BundleError(f"{path} holds no importance data")
        return result


def _base_name(path: Path, tensor: str) -> str:
    for suffix in (_SUM_SUFFIX, _COUNT_SUFFIX):
        if tensor.endswith(suffix):
            return tensor.removesuffix(suffix)
    raise BundleError(f"{path}: tensor {tensor} is neither in_sum2 nor counts")


def _read_entry(file: GgufFile, path: Path, name: str) -> _Entry:
    """Check one pair of tensors. Stacks beyond two dimensions are flattened."""
    pair: list[F32] = []
    for tensor in (name + _SUM_SUFFIX, name + _COUNT_SUFFIX):
        info = file.info(tensor)
        if info.ggml_type != 0:
            raise BundleError(f"{path}: {tensor} is {info.type_name}, not F32")
        pair.append(file.raw(tensor).view("<f4").reshape(-1, info.shape[-1]))
    sums, counts = pair[0], pair[1].reshape(-1)
    if counts.size == 1:  # files converted from the old format share one count
        counts = np.repeat(counts, sums.shape[0])
    if counts.size != sums.shape[0]:
        raise BundleError(f"{path}: {name} has {sums.shape[0]} matrices and {counts.size} counts")
    # Written so that NaN fails too.
    if not ((counts >= 0) & (counts < 2.0**62)).all():
        raise BundleError(f"{path}: {name} has a count that is negative or not finite")
    for index, row in enumerate(sums):  # one at a time: a large file is never whole in memory
        if not ((row >= 0) & np.isfinite(row)).all():
            raise BundleError(
                f"{path}: {name}, matrix {index} has a sum of squares that is negative or not "
                "finite"
            )
    return _Entry(sums, np.rint(counts).astype(np.int64))


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _padded(size: int) -> int:
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
