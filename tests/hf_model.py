"""Our canonical weights inside transformers' classes: the oracle of the reference.

Import this only after `pytest.importorskip("torch")` and `("transformers")`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from mimo_edge.config import MimoConfig
from mimo_edge.runtimes.base import F32, Weights


def hf_model(weights: Weights) -> Any:
    """An f32, eager MiMoV2FlashForCausalLM (or Qwen2ForCausalLM for MiMo-7B) with `weights`.

    Every parameter and buffer of the transformers model is set, or this raises.
    """
    config = weights.config
    model = (
        transformers.MiMoV2FlashForCausalLM(_mimo_v2_config(config))
        if config.family == "mimo_v2"
        else transformers.Qwen2ForCausalLM(_qwen2_config(config))
    )
    state = {name: torch.from_numpy(np.ascontiguousarray(t)) for name, t in _state(weights).items()}
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
