"""What a tensor is for: the key a recipe decides by."""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    """Role of a tensor in the model. 1-D tensors are never quantised."""

    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"  # every RMSNorm weight
    SINKS = "sinks"
    BIAS = "bias"  # q/k/v biases of MiMo-7B
    ATTENTION = "attention"  # q, k, v, fused qkv and output projections of decoder layers
    DENSE_FFN = "dense_ffn"
    ROUTER = "router"
    ROUTER_BIAS = "router_bias"
    EXPERT = "expert"
    MTP = "mtp"  # every matrix of an MTP block


UNQUANTISED = frozenset({Role.NORM, Role.SINKS, Role.BIAS, Role.ROUTER, Role.ROUTER_BIAS})
