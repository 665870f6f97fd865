"""Tiny models and samples for tests of NPU graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
from tiny import random_weights, tiny_config

from mimo_edge.config import MimoConfig
from mimo_edge.export.onnx.activations import Sample
from mimo_edge.export.onnx.npu_graphs import Component
from mimo_edge.runtimes.base import F32, Weights
from mimo_edge.runtimes.weights import DictWeights


def tiny_npu_config(**overrides: Any) -> MimoConfig:
    """The tiny model with widths of whole LPBQ blocks."""
    sizes = {"head_dim": 24, "v_head_dim": 16, "intermediate_size": 128, "vocab_size": 96}
    return tiny_config(**(sizes | overrides))


class Rows:
    """A `RowReader` over weights in memory."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def rows(self, name: str, start: int, stop: int) -> F32:
        found = self._weights.tensor(name)
        return found[None] if found.ndim == 1 else found[start:stop]


def random_reader(config: MimoConfig, seed: int = 0) -> Rows:
    """Random weights by rows."""
    return Rows(random_weights(config, seed))


def weights_of(config: MimoConfig, seed: int = 0) -> DictWeights:
    """The weights `random_reader` reads."""
    return random_weights(config, seed)


def sample_of(
    config: MimoConfig, component: Component, position: int = 11, rows: int = 8
) -> Sample:
    """Random rows and caches for a component."""
    rng = np.random.default_rng(3)

    def normal(*shape: int) -> F32:
        return rng.standard_normal(shape).astype(np.float32)

    names = ["x"] if not component.layers else ["h"]
    if component.name.startswith("mtp"):
        names = ["e", "hidden"]
    keys, values = {}, {}
    for index in component.layers:
        groups = config.layer(index).num_key_value_heads
        keys[index] = normal(1, groups, position, config.head_dim)
        values[index] = normal(1, groups, position, config.v_head_dim)
    return Sample(
        position, {name: normal(rows, config.hidden_size) for name in names}, keys, values
    )
