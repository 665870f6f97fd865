"""Routed experts that are all in RAM, as an `ExpertSource`: for long passes of a resident model.

A few tokens of a resident model are one graph with the routing inside. A long pass is cut at the
routers like a streamed one, because its large experts are faster one by one (expert_matrix.py).
Where only experts are ggml's, every pass is cut there.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping

from mimo_edge.config import MimoConfig
from mimo_edge.runtimes.ggml.device import Device
from mimo_edge.runtimes.ggml.expert_matrix import worthwhile
from mimo_edge.runtimes.ggml.raw import RawTensors
from mimo_edge.runtimes.ggml.resident import ModelWeights, SwiGlu
from mimo_edge.runtimes.ggml.slots import PARTS, ExpertGroup, Ids
from mimo_edge.runtimes.ggml.weight_buffers import WeightBuffers


class StackedExperts:
    """The stacked experts of resident layers as slots: expert e of a layer is in slot e."""

    def __init__(self, config: MimoConfig, layouts: Mapping[int, SwiGlu]) -> None:
        self.count = config.n_routed_experts
        self.layouts = dict(layouts)

    def tensors(self, layer: int) -> SwiGlu:
        """See `SlotTensors.tensors`."""
        return self.layouts[layer]


class ExpertWeights(WeightBuffers):
    """The routed experts of every layer and nothing else, by layer, for a model whose other weights
    are somewhere else."""

    def __init__(self, device: Device, source: RawTensors) -> None:
        """Raises BundleError on missing or misshapen tensors, BackendError when memory is short."""
        moe = [spec.index for spec in source.config.layers if spec.moe]
        super().__init__(device, source, 3 * len(moe))
        try:
            self.layers = {layer: self._experts(layer) for layer in moe}
            self._load()
        except BaseException:
            self.close()
            raise

    def _experts(self, layer: int) -> SwiGlu:
        gate, up, down = (
            self._matrix(f"blk.{layer}.ffn_{part}_exps.weight", routed=True) for part in PARTS
        )
        return SwiGlu(gate, up, down)


class ResidentExperts:
    """An `ExpertSource` that has everything it was given. Of a whole model these are the layers
    with large experts (`of_model`); with weights of its own (`loaded`) it frees them."""

    def __init__(
        self,
        config: MimoConfig,
        layouts: Mapping[int, SwiGlu],
        weights: WeightBuffers | None = None,
    ) -> None:
        self.slots = StackedExperts(config, layouts)
        self._weights = weights

    @classmethod
    def of_model(cls, config: MimoConfig, model: ModelWeights) -> ResidentExperts:
        """Those of `model`: of layers with small experts, which are faster inside a graph, none."""
        large = {
            w.spec.index: w.experts
            for w in model.layers
            if w.experts is not None and worthwhile(w.experts)
        }
        return cls(config, large)

    @classmethod
    def loaded(cls, device: Device, source: RawTensors) -> ResidentExperts:
        """All of a model's, loaded for this alone. Raises BundleError, BackendError."""
        weights = ExpertWeights(device, source)
        return cls(source.config, weights.layers, weights)

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
        """Free the weights that are its own. Twice is harmless."""
        if self._weights is not None:
            self._weights.close()
