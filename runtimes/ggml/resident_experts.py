"""Routed experts that are all in RAM, as an `ExpertSource`: for long passes of a resident model.

A few tokens of a resident model are one graph with the routing inside. A long pass is cut at the
routers like a streamed one, because its large experts are faster one by one (expert_matrix.py).
"""

from __future__ import annotations

from collections.abc import Generator

from mimo_edge.config import MimoConfig
from mimo_edge.runtimes.ggml.expert_matrix import worthwhile
from mimo_edge.runtimes.ggml.resident import ModelWeights, SwiGlu
from mimo_edge.runtimes.ggml.slots import ExpertGroup, Ids


class StackedExperts:
    """The stacked experts of resident layers as slots: expert e of a layer is in slot e."""

    def __init__(self, config: MimoConfig, model: ModelWeights) -> None:
        self.count = config.n_routed_experts
        self.layouts: dict[int, SwiGlu] = {
            w.spec.index: w.experts
            for w in model.layers
            if w.experts is not None and worthwhile(w.experts)
        }

    def tensors(self, layer: int) -> SwiGlu:
        """See `SlotTensors.tensors`."""
        return self.layouts[layer]


class ResidentExperts:
    """An `ExpertSource` that has everything; of layers with small experts it has none."""

    def __init__(self, config: MimoConfig, model: ModelWeights) -> None:
        self.slots = StackedExperts(config, model)

    def groups(self, layer: int, experts: Ids, counts: Ids) -> Generator[ExpertGroup, None, None]:
        """See `ExpertSource.groups`."""
        del layer, counts
        yield ExpertGroup(experts, experts)

    def guesses(self, rows: int) -> bool:
        """Never: everything is there."""
        del rows
        return False

    def passed(self, rows: int, guessed: bool, seconds: float) -> None:
        """Nothing to learn."""

    def expect(self, layer: int, experts: Ids | None) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing is held."""
