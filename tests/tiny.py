"""Tiny random MiMo models shared by the tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from mimo_edge.config import MimoConfig
from mimo_edge.runtimes.base import F32
from mimo_edge.runtimes.weights import DictWeights


def tiny_config(**overrides: Any) -> MimoConfig:
    """Two global and two sliding layers, 8 experts, window 9, 3 MTP blocks, odd vocabulary."""
    base = MimoConfig(
        family="mimo_v2",
        vocab_size=97,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        swa_num_key_value_heads=2,
        head_dim=24,
        v_head_dim=16,
        intermediate_size=96,
        rope_theta=5e6,
        swa_rope_theta=1e4,
        layernorm_epsilon=1e-5,
        max_position_embeddings=4096,
        hybrid_layer_pattern=(0, 1, 1, 0),
        moe_layer_freq=(0, 1, 1, 1),
        sliding_window=9,
        partial_rotary_factor=0.334,
        attention_value_scale=0.707,
        add_swa_attention_sink_bias=True,
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        num_mtp_layers=3,
        eos_token_ids=(1, 3),
    )
    return replace(base, **overrides)


def streamed_config() -> MimoConfig:
    """64 experts of 0.8 MiB (Q8_0) a layer, so that a bound on memory is felt."""
    return tiny_config(
        hidden_size=512,
        num_attention_heads=8,
        head_dim=48,
        v_head_dim=32,
        intermediate_size=1024,
        moe_intermediate_size=512,
        n_routed_experts=64,
        num_experts_per_tok=4,
        sliding_window=32,
        vocab_size=2000,
    )


def tiny_mimo7b_config(**overrides: Any) -> MimoConfig:
    """A dense MiMo-7B shape: q/k/v biases, full rotary, one MTP block."""
    base = MimoConfig(
        family="mimo",
        vocab_size=97,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        v_head_dim=16,
        intermediate_size=96,
        rope_theta=640_000.0,
        layernorm_epsilon=1e-5,
        max_position_embeddings=4096,
        hybrid_layer_pattern=(0, 0, 0),
        moe_layer_freq=(0, 0, 0),
        attention_bias=True,
        num_mtp_layers=1,
        eos_token_ids=(1,),
    )
    return replace(base, **overrides)


def random_weights(config: MimoConfig, seed: int = 0, scale: float = 1.0) -> DictWeights:
    """Random f32 weights with every tensor the config calls for, in canonical names.

    Matrices ~ N(0, scale / sqrt(in)), so activations neither vanish nor explode; sinks,
    router biases and norms are far from their neutral values, so forgetting one shows.
    """
    rng = np.random.default_rng(seed)
    tensors: dict[str, F32] = {}

    def matrix(name: str, *shape: int) -> None:
        values = rng.standard_normal(shape, dtype=np.float32) * (scale / np.sqrt(shape[-1]))
        tensors[name] = values.astype(np.float32)

    def vector(name: str, size: int, mean: float, spread: float) -> None:
        tensors[name] = (mean + spread * rng.standard_normal(size)).astype(np.float32)

    m, h, d, dv = config.hidden_size, config.num_attention_heads, config.head_dim, config.v_head_dim
    tensors["token_embd.weight"] = rng.standard_normal((config.vocab_size, m), dtype=np.float32)
    matrix("output.weight", config.vocab_size, m)
    vector("output_norm.weight", m, 1.0, 0.2)
    for index in range(config.num_hidden_layers + config.num_mtp_layers):
        spec, p = config.layer(index), f"blk.{index}."
        g = spec.num_key_value_heads
        vector(p + "attn_norm.weight", m, 1.0, 0.2)
        vector(p + "ffn_norm.weight", m, 1.0, 0.2)
        for part, rows in (("q", h * d), ("k", g * d), ("v", g * dv)):
            matrix(p + f"attn_{part}.weight", rows, m)
            if config.attention_bias:
                vector(p + f"attn_{part}.bias", rows, 0.0, 0.5)
        matrix(p + "attn_output.weight", m, h * dv)
        if spec.sinks:
            vector(p + "attn_sinks.weight", h, 0.5, 1.0)
        if spec.moe:
            e, f = config.n_routed_experts, config.moe_intermediate_size
            matrix(p + "ffn_gate_inp.weight", e, m)
            vector(p + "exp_probs_b.bias", e, 0.0, 0.3)
            matrix(p + "ffn_gate_exps.weight", e, f, m)
            matrix(p + "ffn_up_exps.weight", e, f, m)
            matrix(p + "ffn_down_exps.weight", e, m, f)
        else:
            matrix(p + "ffn_gate.weight", config.intermediate_size, m)
            matrix(p + "ffn_up.weight", config.intermediate_size, m)
            matrix(p + "ffn_down.weight", m, config.intermediate_size)
        if index >= config.num_hidden_layers:
            matrix(p + "nextn.eh_proj.weight", m, 2 * m)
            vector(p + "nextn.enorm.weight", m, 1.0, 0.2)
            vector(p + "nextn.hnorm.weight", m, 1.0, 0.2)
            vector(p + "layer_output_norm.weight", m, 1.0, 0.2)
    return DictWeights(config, tensors)
