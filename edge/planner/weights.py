"""What the weights of a model take from memory and from the processor, pass by pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mimo_edge.budget import block_index
from mimo_edge.config import MimoConfig
from mimo_edge.gguf_file import TensorInfo
from mimo_edge.inventory import role_of
from mimo_edge.quant.roles import Role


@dataclass
class Scan:
    """Weights that a product reads: bytes and multiply-adds of one row, by format."""

    nbytes: dict[str, float] = field(default_factory=dict)
    macs: dict[str, float] = field(default_factory=dict)

    def add(self, info: TensorInfo, share: float = 1.0) -> None:
        """Count `share` of a tensor."""
        elements = 1
        for extent in info.shape:
            elements *= extent
        kind = info.type_name
        self.nbytes[kind] = self.nbytes.get(kind, 0.0) + share * info.nbytes
        self.macs[kind] = self.macs.get(kind, 0.0) + share * elements

    @property
    def total_bytes(self) -> float:
        return sum(self.nbytes.values())


@dataclass(frozen=True)
class Weights:
    """What passes read: the trunk without experts and head, and its part in every layer, the head,
    one MTP block, and one expert of each MoE layer together."""

    trunk: Scan
    layers: tuple[Scan, ...]
    head: Scan
    mtp_block: Scan
    expert: Scan

    @classmethod
    def of(cls, config: MimoConfig, tensors: Mapping[str, TensorInfo]) -> Weights:
        """Sort the tensors of a model."""
        trunk, head, mtp, expert = Scan(), Scan(), Scan(), Scan()
        layers = tuple(Scan() for _ in range(config.num_hidden_layers))
        for name, info in tensors.items():
            role = role_of(name, config)
            if role is Role.EMBEDDING:
                if config.tie_word_embeddings and "output.weight" not in tensors:
                    head.add(info)
            elif role is Role.HEAD:
                head.add(info)
            elif role is Role.EXPERT:
                expert.add(info, 1 / config.n_routed_experts)
            elif block_index(name) >= config.num_hidden_layers + config.num_mtp_layers:
                continue
            elif block_index(name) >= config.num_hidden_layers:
                mtp.add(info, 1 / config.num_mtp_layers)
            else:
                trunk.add(info)
                if block_index(name) >= 0:
                    layers[block_index(name)].add(info)
        return cls(trunk, layers, head, mtp, expert)
