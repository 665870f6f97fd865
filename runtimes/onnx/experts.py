"""Routed experts beside ONNX graphs: the same slots, reads and products as the ggml backend's.

A graph ends in a router; its experts' input and weights are bound to memory ggml reads, so that
between the graph and the experts nothing is copied.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimo_edge.config import MimoConfig
from mimo_edge.runtimes.base import F32, RouteSink
from mimo_edge.runtimes.ggml.device import Device
from mimo_edge.runtimes.ggml.graph import Inputs, finish_together
from mimo_edge.runtimes.ggml.slots import ExpertSource
from mimo_edge.runtimes.ggml.streamed import FEW_TOKENS, Carry, SlotExperts


class HostExperts:
    """Routed experts of passes of `total` tokens. `x` f32 [T, M] and `weights` f32 [T, K] are where
    a graph leaves them."""

    def __init__(
        self,
        device: Device,
        config: MimoConfig,
        source: ExpertSource,
        total: int,
        routes: RouteSink | None,
    ) -> None:
        self._device = device
        self._config = config
        self._source = source
        self._total = total
        self._routes = routes
        self._inputs = Inputs(device)
        try:
            carry = Carry(self._inputs, config, total)
            self._inputs.allocate()
        except BaseException:
            self._inputs.close()
            raise
        chosen, width = config.num_experts_per_tok, config.hidden_size
        self.x: F32 = carry.x.array().reshape(total, width)
        self.weights: F32 = carry.weights.array().reshape(total, chosen)
        rows = carry.y.array().reshape(-1, width)[: total * chosen]
        self._y: F32 = rows.reshape(total, chosen, width)
        self._experts = SlotExperts(device, config, source, carry, total)
        finish_together(self._experts.largest())
        self._epoch = device.epoch

    @property
    def current(self) -> bool:
        """Whether the scratch addresses are still those of the device."""
        return self._epoch == self._device.epoch

    def add(self, layer: int, ids: NDArray[np.integer[Any]], h: F32, following: int | None) -> None:
        """Add the weighted sum of the chosen experts ids [T, K] of `layer` to h [T, M].

        `following` is the next layer with experts: a long pass lets its source know that it will
        want nearly all of them. Raises what the source raises."""
        c = self._config
        many = self._total * c.num_experts_per_tok >= 4 * c.n_routed_experts
        if following is not None and many and self._total > FEW_TOKENS:
            self._source.expect(following, None)
        if self._routes is not None:
            self._routes(layer, ids)
        self._experts.run(layer, ids.astype(np.int32))
        # One after the other, so that a row's bits do not depend on how many rows there are.
        total = self._y[:, 0].copy()
        for choice in range(1, c.num_experts_per_tok):
            total += self._y[:, choice]
        h += total

    def close(self) -> None:
        """Free graphs and memory; the source stays."""
        self._experts.close()
        self._inputs.close()
