"""Write a trained mimo-nano as a checkpoint in the on-disk format of MiMo-V2-Flash."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .model import Attention, Dense, MoE, Nano, NanoConfig
from .quantise import fp8_blocks

HERE = Path(__file__).parent


def hf_config(c: NanoConfig, eos: int) -> dict[str, Any]:
    """config.json with the keys of MiMo-V2-Flash."""
    return {
        "architectures": ["MiMoV2FlashForCausalLM"],
        "model_type": "mimo_v2_flash",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": len(c.hybrid_layer_pattern),
        "num_attention_heads": c.num_attention_heads,
        "swa_num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "swa_num_key_value_heads": c.swa_num_key_value_heads,
        "head_dim": c.head_dim,
        "swa_head_dim": c.head_dim,
        "v_head_dim": c.v_head_dim,
        "swa_v_head_dim": c.v_head_dim,
        "partial_rotary_factor": c.partial_rotary_factor,
        "rope_theta": int(c.rope_theta),
        "swa_rope_theta": int(c.swa_rope_theta),
        "rope_scaling": None,
        "max_position_embeddings": 8192,
        "sliding_window": c.sliding_window,
        "sliding_window_size": c.sliding_window,
        "attention_chunk_size": c.sliding_window,
        "hybrid_block_size": None,
        "hybrid_layer_pattern": list(c.hybrid_layer_pattern),
        "moe_layer_freq": list(c.moe_layer_freq),
        "intermediate_size": c.intermediate_size,
        "moe_intermediate_size": c.moe_intermediate_size,
        "n_routed_experts": c.n_routed_experts,
        "n_shared_experts": None,
        "num_experts_per_tok": c.num_experts_per_tok,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": None,
        "attention_value_scale": c.attention_value_scale,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "use_qk_norm": False,
        "attention_dropout": 0.0,
        "layernorm_epsilon": c.layernorm_epsilon,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": False,
        "eos_token_id": eos,
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "ignored_layers": [
                f"model.layers.{i}.self_attn.o_proj" for i in range(len(c.hybrid_layer_pattern))
            ]
            + [f"model.mtp.layers.{k}.self_attn.o_proj" for k in range(3)],
        },
    }


def tensors(model: Nano) -> dict[str, Tensor]:
    """Every tensor of the checkpoint, by HF name."""
    out: dict[str, Tensor] = {}

    def bf16(name: str, p: Tensor) -> None:
        out[name] = p.detach().to(torch.bfloat16).contiguous()

    def fp8(name: str, p: Tensor) -> None:
        out[name + ".weight"], out[name + ".weight_scale_inv"] = fp8_blocks(p.detach().float())

    def attention(prefix: str, a: Attention) -> None:
        for leaf in ("q_proj", "k_proj", "v_proj"):
            fp8(f"{prefix}.self_attn.{leaf}", getattr(a, leaf))
        bf16(f"{prefix}.self_attn.o_proj.weight", a.o_proj)
        if a.sliding:
            bf16(f"{prefix}.self_attn.attention_sink_bias", a.attention_sink_bias)

    def dense(prefix: str, d: Dense) -> None:
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            fp8(f"{prefix}.{leaf}", getattr(d, leaf))

    bf16("model.embed_tokens.weight", model.embed_tokens)
    for i, layer in enumerate(model.layers):
        prefix = f"model.layers.{i}"
        bf16(f"{prefix}.input_layernorm.weight", layer.input_layernorm.weight)
        attention(prefix, layer.self_attn)
        bf16(f"{prefix}.post_attention_layernorm.weight", layer.post_attention_layernorm.weight)
        mlp = layer.mlp
        if isinstance(mlp, MoE):
            out[f"{prefix}.mlp.gate.weight"] = mlp.router.detach().float().contiguous()
            out[f"{prefix}.mlp.gate.e_score_correction_bias"] = (
                mlp.bias.detach().float().contiguous()
            )
            for e in range(mlp.n):
                for leaf in ("gate_proj", "up_proj", "down_proj"):
                    fp8(f"{prefix}.mlp.experts.{e}.{leaf}", getattr(mlp, leaf)[e])
        else:
            dense(f"{prefix}.mlp", mlp)
    bf16("model.norm.weight", model.norm.weight)
    bf16("lm_head.weight", model.lm_head)
    blocks = list(model.mtp) + [model.mtp[0]] * (3 - len(model.mtp))
    for k, block in enumerate(blocks):
        prefix = f"model.mtp.layers.{k}"
        for leaf in ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm"):
            bf16(f"{prefix}.{leaf}.weight", getattr(block, leaf).weight)
        bf16(f"{prefix}.eh_proj.weight", block.eh_proj)
        attention(prefix, block.self_attn)
        dense(f"{prefix}.mlp", block.mlp)
    return {k: v.clone() for k, v in out.items()}


def _shard(name: str, last_layer: int) -> int:
    """Shard 1: trunk up to the middle; 2: the rest; 3: MTP. The middle layer's scales go to shard
    2.
    """
    if name.startswith("model.mtp."):
        return 3
    if name.startswith("model.layers."):
        layer = int(name.split(".")[2])
        half = last_layer // 2
        if layer == half and name.endswith("_scale_inv"):
            return 2
        return 1 if layer <= half else 2
    return 1 if name.startswith("model.embed") else 2


def export(model: Nano, tokenizer: Path, out: Path) -> None:
    """Write the checkpoint folder; every file appears under its name only when complete."""
    out.mkdir(parents=True, exist_ok=True)
    work = out.parent / (out.name + ".writing")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    every = tensors(model)
    last = len(model.layers) - 1
    files = {n: f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)}
    index = {name: files[_shard(name, last)] for name in every}
    for f in files.values():
        save_file(
            {k: v for k, v in every.items() if index[k] == f}, work / f, metadata={"format": "pt"}
        )
    total = sum(v.numel() * v.element_size() for v in every.values())

    def dump(name: str, value: Any) -> None:
        (work / name).write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", "utf-8")

    dump(
        "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))},
    )
    added = {t["content"]: t for t in json.loads(tokenizer.read_text("utf-8"))["added_tokens"]}
    ids = {name: t["id"] for name, t in added.items()}
    dump("config.json", hf_config(model.c, ids["<|im_end|>"]))
    dump(
        "generation_config.json",
        {
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "pad_token_id": ids["<|endoftext|>"],
            "do_sample": False,
        },
    )
    template = (HERE / "chat_template.jinja").read_text("utf-8")
    (work / "chat_template.jinja").write_text(template, "utf-8")
    dump(
        "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(t["id"]): {
                    "content": name,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": t["special"],
                }
                for name, t in added.items()
            },
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "bos_token": None,
            "chat_template": template,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 8192,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "unk_token": None,
        },
    )
    shutil.copy(tokenizer, work / "tokenizer.json")
    for f in sorted(work.iterdir()):
        f.chmod(0o644)
        os.replace(f, out / f.name)
    work.rmdir()
