"""The contract of a weight format, and the registry of all of them.

A format packs rows of f32 into bytes and back. Rows are the `in` dimension of a weight
[out, in]; stacked experts [E, out, in] are given as [E * out, in]. Every format class is
registered when it is defined, so a new format is one class in one file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mimo_edge.errors import QuantError

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

# Elements worked on at a time: temporaries stay around a MiB each whatever the tensor's size,
# which bounds memory and keeps them in the cache.
GROUP_ELEMENTS = 1 << 18

# No weight is near these. Beyond them ggml's fits overflow and its asserts can end the process.
MAX_IMPORTANCE = 1e20

FORMATS: dict[str, Format] = {}


class Format(ABC):
    """One weight format. Instances carry no state; get one from `get_format`. They may be used from
    several threads at once: the heavy part of both directions runs without the interpreter lock.

    Subclasses set the class attributes and implement `_pack` and `_unpack`; shapes, dtypes,
    NaN, infinities and row groups are handled here once.
    """

    name: ClassVar[str]
    ggml_type: ClassVar[int]
    block_size: ClassVar[int]  # elements of a row that share one block
    block_bytes: ClassVar[int]
    # Byte offsets of f16 scales inside a block: a scale that is not finite makes a block garbage.
    scale_offsets: ClassVar[tuple[int, ...]] = ()
    uses_importance: ClassVar[bool] = False
    requires_importance: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            return  # a shared base, not a format
        if cls.name in FORMATS or any(f.ggml_type == cls.ggml_type for f in FORMATS.values()):
            raise TypeError(f"format {cls.name} (ggml type {cls.ggml_type}) is defined twice")
        FORMATS[cls.name] = cls()

    def __repr__(self) -> str:
        return f"<Format {self.name}>"

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included."""
        return 8 * self.block_bytes / self.block_size

    def supports(self, cols: int) -> bool:
        """Whether rows of `cols` elements are whole blocks."""
        return cols > 0 and cols % self.block_size == 0

    def row_bytes(self, cols: int) -> int:
        """Bytes of one row of `cols` elements. Raises QuantError if that is not whole blocks."""
        if not self.supports(cols):
            raise QuantError(
                f"{self.name} needs rows of a multiple of {self.block_size} elements, got {cols}",
                "let the recipe choose: it falls back and reports it",
            )
        return cols // self.block_size * self.block_bytes

    def quantize(self, x: F32, importance: F32 | None = None) -> U8:
        """f32 [rows, cols] -> u8 [rows, row_bytes].

        `importance` f32 [cols]: mean square of each input column (see quant/imatrix); formats
        with `uses_importance` minimise the error weighted by it, others ignore it. Extra memory is
        bounded by a few MiB. Raises QuantError on a wrong dtype or shape, on NaN or infinity
        (naming row and block), and where a block's scale does not fit its type.
        """
        if not isinstance(x, np.ndarray) or x.ndim != 2 or x.dtype != np.float32:
            raise QuantError(f"{self.name} quantises f32 [rows, cols], got {_describe(x)}")
        rows, cols = x.shape
        out: U8 = np.empty((rows, self.row_bytes(cols)), dtype=np.uint8)
        weights = self._check_importance(importance, cols)
        for start, stop in row_groups(rows, cols):
            group: F32 = np.ascontiguousarray(x[start:stop])
            self._check_finite(group, start)
            self._pack(group, weights, out[start:stop])
            self._check_scales(out[start:stop], start)
        return out

    def dequantize(self, raw: U8, cols: int) -> F32:
        """u8 [rows, row_bytes] -> f32 [rows, cols]. Raises QuantError on a wrong dtype or shape
        and on blocks whose scale is NaN or infinite."""
        width = self.row_bytes(cols)
        if not isinstance(raw, np.ndarray) or raw.ndim != 2 or raw.dtype != np.uint8:
            raise QuantError(f"{self.name} dequantises u8 [rows, bytes], got {_describe(raw)}")
        if raw.shape[1] != width:
            raise QuantError(
                f"{self.name} rows of {cols} elements have {width} bytes, got {raw.shape[1]}"
            )
        out: F32 = np.empty((raw.shape[0], cols), dtype=np.float32)
        for start, stop in row_groups(raw.shape[0], cols):
            group: U8 = np.ascontiguousarray(raw[start:stop])
            self._check_scales(group, start)
            self._unpack(group, out[start:stop])
        return out

    @abstractmethod
    def _pack(self, x: F32, importance: F32 | None, out: U8) -> None:
        """Pack finite, contiguous x [rows, cols] into contiguous out [rows, row_bytes]."""

    @abstractmethod
    def _unpack(self, raw: U8, out: F32) -> None:
        """Unpack contiguous raw [rows, row_bytes] into contiguous out [rows, cols]."""

    def _check_finite(self, x: F32, first_row: int) -> None:
        finite = np.isfinite(x)
        if not finite.all():
            row, col = (int(i) for i in np.argwhere(~finite)[0])
            raise QuantError(
                f"{x[row, col]} at row {first_row + row}, column {col} "
                f"(block {col // self.block_size}) cannot be quantised to {self.name}",
                "the source tensor is damaged",
            )

    def _check_scales(self, raw: U8, first_row: int) -> None:
        if not self.scale_offsets:
            return
        blocks = raw.reshape(raw.shape[0], -1, self.block_bytes)
        for offset in self.scale_offsets:
            # All exponent bits set is an infinity or a NaN; they sit in the high byte.
            bad = (blocks[:, :, offset + 1] & 0x7C) == 0x7C
            if bad.any():
                row, block = (int(i) for i in np.argwhere(bad)[0])
                raise QuantError(
                    f"the {self.name} scale of row {first_row + row}, block {block} is not a "
                    "finite f16 number",
                    "values too large for the format (f16 holds up to 65504), or damaged data",
                )

    def _check_importance(self, importance: F32 | None, cols: int) -> F32 | None:
        if importance is None:
            if self.requires_importance:
                raise QuantError(
                    f"{self.name} cannot be made without an importance matrix",
                    "calibrate first (--calibrate FILE), or choose a format that needs none",
                )
            return None
        wrong = not isinstance(importance, np.ndarray) or importance.dtype != np.float32
        if wrong or importance.shape != (cols,):
            raise QuantError(f"importance is {_describe(importance)}, not f32 [{cols}]")
        # Written so that NaN fails too.
        good = (importance >= 0) & (importance <= MAX_IMPORTANCE)
        if not good.all():
            col = int(np.argmin(good))
            raise QuantError(f"importance of column {col} is {importance[col]}")
        if not importance.any():
            raise QuantError(
                "importance is zero everywhere", "pass None for inputs that were never seen"
            )
        return np.ascontiguousarray(importance)


def row_groups(rows: int, cols: int) -> Iterator[tuple[int, int]]:
    """(start, stop) ranges over `rows`, each about GROUP_ELEMENTS elements and at least one row."""
    step = max(1, GROUP_ELEMENTS // max(1, cols))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def get_format(name: str) -> Format:
    """The format called `name` in any case ("Q4_0", "q4_0"). Raises QuantError if unknown."""
    try:
        return FORMATS[name.upper()]
    except KeyError:
        raise QuantError(
            f"unknown weight format {name!r}", f"known: {', '.join(FORMATS)}"
        ) from None


def format_by_ggml_type(ggml_type: int) -> Format:
    """The format with this ggml type id. Raises QuantError if we do not have it."""
    for fmt in FORMATS.values():
        if fmt.ggml_type == ggml_type:
            return fmt
    raise QuantError(
        f"ggml type {ggml_type} is not supported",
        f"known: {', '.join(f'{f.name} ({f.ggml_type})' for f in FORMATS.values())}",
    )


def _describe(x: object) -> str:
    if isinstance(x, np.ndarray):
        return f"{x.dtype} {list(x.shape)}"
    return type(x).__name__
