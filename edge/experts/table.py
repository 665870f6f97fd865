"""Where every routed expert of a model lies on flash."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mimo_edge.bundle import Bundle
from mimo_edge.config import MimoConfig
from mimo_edge.errors import BundleError, UsageError
from mimo_edge.experts.policy import F64
from mimo_edge.gguf_file import GgufFile

KINDS = ("gate", "up", "down")


@dataclass(frozen=True)
class Stack:
    """One kind of matrix of a layer's experts: expert e is the `nbytes` bytes at
    offset + e * nbytes of `file`, a [out, in] matrix of `ggml_type`."""

    file: Path
    offset: int
    nbytes: int
    ggml_type: int
    shape: tuple[int, int]


@dataclass(frozen=True)
class ExpertLayer:
    """The experts of model layer `layer`: gate, up, down, and the CRC-32 over the three of each
    expert (None: the file has no checksums)."""

    layer: int
    stacks: tuple[Stack, Stack, Stack]
    crc32: tuple[int, ...] | None = None

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        return sum(stack.nbytes for stack in self.stacks)


@dataclass(frozen=True)
class ExpertTable:
    """All layers with experts, in the order they run. `heat[row]` f64 [E], when known, says how
    often calibration used each expert."""

    layers: tuple[ExpertLayer, ...]
    experts: int
    chosen: int
    heat: Mapping[int, F64] | None = None

    def __post_init__(self) -> None:
        if not self.layers or not 1 <= self.chosen <= self.experts:
            raise UsageError(
                f"no expert table: {len(self.layers)} layers, {self.chosen} of {self.experts}"
            )
        for layer in self.layers:
            if layer.crc32 is not None and len(layer.crc32) != self.experts:
                raise BundleError(
                    f"layer {layer.layer}: {len(layer.crc32)} checksums of {self.experts} experts"
                )

    @property
    def stride_bytes(self) -> tuple[int, int, int]:
        """Largest bytes of a gate, up and down matrix over the layers."""
        gate, up, down = (max(x.stacks[kind].nbytes for x in self.layers) for kind in range(3))
        return gate, up, down

    @property
    def total(self) -> int:
        """Experts of all layers."""
        return len(self.layers) * self.experts

    @property
    def has_checksums(self) -> bool:
        """Whether a damaged expert can be told from a good one in every layer."""
        return all(layer.crc32 is not None for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all experts of all layers."""
        return sum(layer.expert_bytes for layer in self.layers) * self.experts

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> ExpertTable:
        """Experts of a bundle with its checksums and heat, or of a bare GGUF without."""
        manifest, heat = bundle.manifest, bundle.heat
        checksums = {} if manifest is None else manifest.experts
        table = cls.from_gguf(bundle.gguf, bundle.config, checksums)
        if heat is None:
            return table
        rows = {
            row: heat.counts[entry.layer].astype(np.float64)
            for row, entry in enumerate(table.layers)
            if entry.layer in heat.counts
        }
        return cls(table.layers, table.experts, table.chosen, rows)

    @classmethod
    def from_gguf(
        cls,
        gguf: GgufFile,
        config: MimoConfig,
        checksums: Mapping[int, Sequence[int]] | None = None,
    ) -> ExpertTable:
        """Experts of an open GGUF. Raises BundleError when a stack is missing or misshapen."""
        experts = config.n_routed_experts
        layers = []
        for spec in config.layers:
            if spec.moe:
                found = (checksums or {}).get(spec.index)
                gate, up, down = (
                    _stack(gguf, f"blk.{spec.index}.ffn_{kind}_exps.weight", experts)
                    for kind in KINDS
                )
                crc = None if found is None else tuple(found)
                layers.append(ExpertLayer(spec.index, (gate, up, down), crc))
        if not layers:
            raise UsageError("this model has no routed experts")
        return cls(tuple(layers), experts, config.num_experts_per_tok)


def _stack(gguf: GgufFile, name: str, experts: int) -> Stack:
    info = gguf.info(name)
    if len(info.shape) != 3 or info.shape[0] != experts:
        raise BundleError(f"{name} has shape {list(info.shape)}, not {experts} experts")
    return Stack(
        info.file,
        info.offset,
        info.nbytes // experts,
        info.ggml_type,
        (info.shape[1], info.shape[2]),
    )
