"""Rows of the embedding table as f32, unpacked when they are asked for.

A step of decoding asks for one to four rows, of tokens that mostly came before: unpacking them
anew would take longer than everything else its host side does, so the latest are kept.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from mimo_edge.cancel import CancelSignal
from mimo_edge.errors import BundleError
from mimo_edge.quant.base import format_by_ggml_type
from mimo_edge.row_reader import RowReader
from mimo_edge.runtimes.base import F32, TokenIds

KEPT_BYTES = 512 << 10
# Tokens of a step, not of a prompt, whose rows would push each other out.
_FEW = 16


class EmbeddingRows:
    """Rows [M] of a table of `rows` rows in the format `ggml_type`, read by `reader`, which this
    closes."""

    def __init__(self, reader: RowReader, ggml_type: int, rows: int, width: int) -> None:
        self._reader = reader
        self._format = format_by_ggml_type(ggml_type)
        self._rows, self._width = rows, width
        self._kept: OrderedDict[int, F32] = OrderedDict()
        self._most = max(_FEW, KEPT_BYTES // (4 * width))

    def get(self, token_ids: TokenIds, cancel: CancelSignal | None = None) -> F32:
        """Rows of token_ids [T] -> f32 [T, M]. Raises BundleError, Cancelled."""
        if len(token_ids) > _FEW:
            return self._read(np.asarray(token_ids, np.int64), cancel)
        wanted = token_ids.tolist()
        kept = self._kept
        missing = [row for row in dict.fromkeys(wanted) if row not in kept]
        if missing:
            kept.update(zip(missing, self._read(np.array(missing, np.int64), cancel), strict=True))
        out = np.empty((len(wanted), self._width), np.float32)
        for index, row in enumerate(wanted):
            out[index] = kept[row]
            kept.move_to_end(row)
        while len(kept) > self._most:
            kept.popitem(last=False)
        return out

    def _read(self, ids: NDArray[np.int64], cancel: CancelSignal | None) -> F32:
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self._rows:
            raise BundleError(f"token id outside 0..{self._rows - 1}")
        return self._format.dequantize(self._reader.rows(ids, cancel), self._width)

    def close(self) -> None:
        """Close the file. Twice is harmless."""
        self._reader.close()
