"""The tokens of a pass as its first tensor: looked up inside, or embedding rows from the host."""

from __future__ import annotations

from collections.abc import Callable

from mimo_edge.config import MimoConfig
from mimo_edge.runtimes.base import F32, TokenIds
from mimo_edge.runtimes.ggml.bindings import TYPE_F32, TYPE_I32
from mimo_edge.runtimes.ggml.graph import Graph, Inputs, Tensor

ReadRows = Callable[[TokenIds], F32]
"""Embedding rows f32 [T, M] of token ids [T]; may read a file."""


class TokenInput:
    """`total` tokens of a pass; ids where there is a `table` {M, V}, rows {M, T} otherwise."""

    def __init__(
        self, inputs: Inputs, config: MimoConfig, table: Tensor | None, total: int
    ) -> None:
        self._table = table
        if table is None:
            self._input = inputs.new(TYPE_F32, config.hidden_size, total)
        else:
            self._input = inputs.new(TYPE_I32, total)

    def embedding(self, g: Graph) -> Tensor:
        """{M, T}"""
        return self._input if self._table is None else g.get_rows(self._table, self._input)

    def fill(self, token_ids: TokenIds, rows: ReadRows) -> None:
        """Set the tokens [T]; ids, of which all must be in the vocabulary, or what `rows` gives."""
        if self._table is None:
            self._input.array().reshape(len(token_ids), -1)[...] = rows(token_ids)
        else:
            self._input.array()[...] = token_ids
