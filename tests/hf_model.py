"""Our canonical weights inside transformers' classes: the oracle of the reference.

Import this only after `pytest.importorskip("torch")` and `("transformers")`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers

from mimo_edge.config import MimoConfig
from mimo_edge.runtimes.base import F32, Weights
from mimo_edge.runtimes.weights import DictWeights


def hf_model(weights: Weights) -> Any:
    """An f32, eager MiMoV2FlashForCausalLM (or Qwen2ForCausalLM for MiMo-7B) with `weights`.

    Every parameter and buffer of the transformers model is set, or this raises.
    """
    return _loaded(
        weights.config,
        {name: torch.from_numpy(np.ascontiguousarray(t)) for name, t in _state(weights).items()},
    )


def load_hf(config: MimoConfig, checkpoint: dict[str, Any]) -> Any:
    """An f32, eager MiMoV2FlashForCausalLM from torch tensors by checkpoint name (no MTP).

    Experts are stacked and sinks renamed as transformers does on loading; nothing of ours is
    involved but the config.
    """
    state = {n.replace("attention_sink_bias", "sinks"): t for n, t in checkpoint.items()}
    for layer in range(config.num_hidden_layers):
        p = f"model.layers.{layer}.mlp.experts."
        if p + "0.gate_proj.weight" not in state:
            continue
        parts = {
            part: torch.stack(
                [state.pop(f"{p}{e}.{part}_proj.weight") for e in range(config.n_routed_experts)]
            )
            for part in ("gate", "up", "down")
        }
        state[p + "gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        state[p + "down_proj"] = parts["down"]
    return _loaded(config, state)


def _loaded(config: MimoConfig, state: dict[str, Any]) -> Any:
    model = (
        transformers.MiMoV2FlashForCausalLM(_mimo_v2_config(config))
        if config.family == "mimo_v2"
        else transformers.Qwen2ForCausalLM(_qwen2_config(config))
    )
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert not missing, missing
    return model.float().eval()


def hf_logits(model: Any, token_ids: np.ndarray[Any, Any]) -> tuple[F32, F32]:
    """Logits f32 [T, V], and the residual stream before the final norm f32 [T, M]."""
    residual: list[Any] = []
    hook = model.model.layers[-1].register_forward_hook(
        lambda _m, _i, out: residual.append(out[0] if isinstance(out, tuple) else out)
    )
    try:
        with torch.no_grad():
            logits = model(torch.from_numpy(np.asarray(token_ids, np.int64))[None]).logits
    finally:
        hook.remove()
    return logits[0].numpy(), residual[0].reshape(len(token_ids), -1).numpy()


def hf_mtp_logits(
    weights: Weights, token_ids: np.ndarray[Any, Any], hidden: F32, depth: int
) -> F32:
    """Teacher-forced logits [T - 1 - depth, V] of an MTP block, given hidden [T, M].

    transformers has no MTP blocks, but after its input projection a block is one sliding, dense
    decoder layer (Qwen2 layer for MiMo-7B) whose final norm is its own: that is what runs here.
    """
    c, p = weights.config, f"blk.{weights.config.num_hidden_layers + depth}."
    kind = (1,) if c.family == "mimo_v2" else (0,)
    block = replace(
        c, num_hidden_layers=1, hybrid_layer_pattern=kind, moe_layer_freq=(0,), num_mtp_layers=0
    )
    table = weights.embedding(np.arange(c.vocab_size, dtype=np.int32))
    head = table if c.tie_word_embeddings else weights.tensor("output.weight")
    tensors = {
        "token_embd.weight": table,
        "output.weight": head,
        "output_norm.weight": weights.tensor(p + "layer_output_norm.weight"),
    }
    parts = ["attn_norm", "ffn_norm", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    parts += ["attn_q", "attn_k", "attn_v"] + (["attn_sinks"] if block.layer(0).sinks else [])
    names = [part + ".weight" for part in parts]
    names += [f"attn_{part}.bias" for part in "qkv"] if c.attention_bias else []
    tensors |= {"blk.0." + name: weights.tensor(p + name) for name in names}
    model = hf_model(DictWeights(block, tensors))

    def norm(x: F32, name: str) -> Any:
        y = torch.from_numpy(x)
        scale = torch.from_numpy(weights.tensor(p + name))
        return torch.nn.functional.rms_norm(y, (c.hidden_size,), scale, c.layernorm_epsilon)

    rows = len(token_ids) - 1 - depth
    e = norm(table[np.asarray(token_ids)[1 + depth :]], "nextn.enorm.weight")
    h = norm(hidden[:rows], "nextn.hnorm.weight")
    both = torch.cat([e, h] if c.family == "mimo_v2" else [h, e], dim=-1)
    z = both @ torch.from_numpy(weights.tensor(p + "nextn.eh_proj.weight")).T
    with torch.no_grad():
        logits: F32 = model(inputs_embeds=z[None]).logits[0].numpy()
    return logits


def _mimo_v2_config(c: MimoConfig) -> Any:
    # transformers fixes what our config leaves free
    assert c.swa_num_key_value_heads == 2 * c.num_key_value_heads
    assert c.add_swa_attention_sink_bias
    assert not c.add_full_attention_sink_bias
    rope = {"rope_type": "default", "partial_rotary_factor": c.partial_rotary_factor}
    return transformers.MiMoV2FlashConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        v_head_dim=c.v_head_dim,
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.layernorm_epsilon,
        moe_intermediate_size=c.moe_intermediate_size,
        num_experts_per_tok=c.num_experts_per_tok,
        n_routed_experts=c.n_routed_experts,
        norm_topk_prob=c.norm_topk_prob,
        routed_scaling_factor=c.routed_scaling_factor,
        attention_value_scale=c.attention_value_scale,
        sliding_window=c.sliding_window,
        layer_types=[
            "sliding_attention" if s else "full_attention" for s in c.hybrid_layer_pattern
        ],
        mlp_layer_types=["sparse" if m else "dense" for m in c.moe_layer_freq],
        rope_parameters={
            "full_attention": {**rope, "rope_theta": c.rope_theta},
            "sliding_attention": {**rope, "rope_theta": c.swa_rope_theta},
        },
        bos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=c.tie_word_embeddings,
        attn_implementation="eager",
        experts_implementation="eager",
        dtype="float32",
    )


def _qwen2_config(c: MimoConfig) -> Any:
    assert c.attention_bias  # Qwen2 always has q/k/v biases
    return transformers.Qwen2Config(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.layernorm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        use_sliding_window=False,
        bos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=c.tie_word_embeddings,
        attn_implementation="eager",
        dtype="float32",
    )


def _state(weights: Weights) -> dict[str, F32]:
    """transformers' state dict from canonical names."""
    c = weights.config
    state = {
        "model.embed_tokens.weight": weights.embedding(np.arange(c.vocab_size, dtype=np.int32)),
        "model.norm.weight": weights.tensor("output_norm.weight"),
    }
    state["lm_head.weight"] = (
        state["model.embed_tokens.weight"]
        if c.tie_word_embeddings
        else weights.tensor("output.weight")
    )
    for spec in c.layers:
        ours, theirs = f"blk.{spec.index}.", f"model.layers.{spec.index}."
        names = {
            "attn_norm.weight": "input_layernorm.weight",
            "ffn_norm.weight": "post_attention_layernorm.weight",
            "attn_output.weight": "self_attn.o_proj.weight",
        }
        for part in "qkv":
            names[f"attn_{part}.weight"] = f"self_attn.{part}_proj.weight"
            if c.attention_bias:
                names[f"attn_{part}.bias"] = f"self_attn.{part}_proj.bias"
        if spec.sinks:
            names["attn_sinks.weight"] = "self_attn.sinks"
        if spec.moe:
            names["ffn_gate_inp.weight"] = "mlp.gate.weight"
            names["exp_probs_b.bias"] = "mlp.gate.e_score_correction_bias"
            experts = [weights.expert(spec.index, e) for e in range(c.n_routed_experts)]
            state[theirs + "mlp.experts.gate_up_proj"] = np.stack(
                [np.concatenate([e.gate, e.up]) for e in experts]
            )
            state[theirs + "mlp.experts.down_proj"] = np.stack([e.down for e in experts])
        else:
            for part in ("gate", "up", "down"):
                names[f"ffn_{part}.weight"] = f"mlp.{part}_proj.weight"
        state |= {theirs + b: weights.tensor(ours + a) for a, b in names.items()}
    return state
