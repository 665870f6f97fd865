"""Weights held in memory: for tests, small models and tools that build a model themselves."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mimo_edge.config import MimoConfig
from mimo_edge.errors import CheckpointError
from mimo_edge.runtimes.base import F32, ExpertWeights, TokenIds


class DictWeights:
    """A `Weights` over a plain dict of f32 arrays by canonical (GGUF) name.

    Experts are stacked tensors `blk.N.ffn_{gate,up,down}_exps.weight` [E, out, in].
    """

    def __init__(self, config: MimoConfig, tensors: Mapping[str, F32]) -> None:
        self._config = config
        self._tensors = dict(tensors)

    @property
    def config(self) -> MimoConfig:
        return self._config

    def has(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str) -> F32:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(f"no tensor {name!r} in this model") from None

    def expert(self, layer: int, expert: int) -> ExpertWeights:
        gate, up, down = (
            self.tensor(f"blk.{layer}.ffn_{kind}_exps.weight")[expert]
            for kind in ("gate", "up", "down")
        )
        return ExpertWeights(gate, up, down)

    def embedding(self, token_ids: TokenIds) -> F32:
        rows: F32 = self.tensor("token_embd.weight")[np.asarray(token_ids, dtype=np.int64)]
        return rows

    def close(self) -> None:
        self._tensors.clear()
