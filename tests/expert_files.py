"""Files of random expert bytes with their tables, for tests of the expert cache."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mimo_edge.experts.policy import F64
from mimo_edge.experts.table import ExpertLayer, ExpertTable, Stack

U8 = NDArray[np.uint8]


class ExpertFile:
    """`rows` layers of `experts` experts; `sizes` are bytes of gate, up and down per layer.

    `expected(row, expert)` is what a slot must hold. Model layers are 1, 2, ... (0 is dense).
    """

    def __init__(
        self,
        path: Path,
        *,
        rows: int = 3,
        experts: int = 8,
        chosen: int = 2,
        sizes: tuple[int, int, int] | list[tuple[int, int, int]] = (4096, 4096, 8192),
        start: int = 4096,
        checksums: bool = True,
        heat: dict[int, F64] | None = None,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.path = path
        self._data: list[list[U8]] = []
        layers, parts, at = [], [rng.integers(0, 256, start, np.uint8)], start
        for row in range(rows):
            mine = sizes[row] if isinstance(sizes, list) else sizes
            stacks, data = [], []
            for nbytes in mine:
                block = rng.integers(0, 256, (experts, nbytes), np.uint8)
                stacks.append(Stack(path, at, nbytes, 0, (1, nbytes // 4)))
                data.append(block)
                parts.append(block.reshape(-1))
                at += block.size
            self._data.append(data)
            crc = tuple(self._crc(row, e) for e in range(experts)) if checksums else None
            layers.append(ExpertLayer(row + 1, (stacks[0], stacks[1], stacks[2]), crc))
        path.write_bytes(np.concatenate(parts).tobytes())
        self.table = ExpertTable(tuple(layers), experts, chosen, heat)

    def expected(self, row: int, expert: int) -> list[bytes]:
        """gate, up and down bytes."""
        return [block[expert].tobytes() for block in self._data[row]]

    def _crc(self, row: int, expert: int) -> int:
        crc = 0
        for part in self.expected(row, expert):
            crc = zlib.crc32(part, crc)
        return crc
