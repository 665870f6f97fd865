"""Complete random checkpoints in the on-disk formats of the MiMo releases, for the tests.

`write_checkpoint` returns the folder and the weights a correct reader must produce bit for
bit: values are rounded to their stored format here and decoded again by the plain formulas of
spec section 4.2, written out naively, not by the code under test. (Only the rounding INTO fp8
uses mimo_edge.export.fp8.encode, which test_fp8.py holds against torch.)

Kinds: "flash" (split qkv, fp8, scales in other shards), "flash_bf16", "v25" (qkv fused in four
tensor-parallel shards with phantom scale rows, plus vision and audio tensors to skip), "v26"
(as v25 with MXFP4 experts, bf16 router, eps 1e-6), "mimo7b" (dense, biases, one file).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tiny import random_weights, tiny_config, tiny_mimo7b_config

from mimo_edge.config import MimoConfig, QuantizationConfig
from mimo_edge.export import fp8
from mimo_edge.export.pipeline import export_bundle
from mimo_edge.runtimes.weights import DictWeights

Kind = Literal["flash", "flash_bf16", "v25", "v26", "mimo7b"]
KINDS: tuple[Kind, ...] = ("flash", "flash_bf16", "v25", "v26", "mimo7b")
TP = 4  # tensor-parallel shards of the fused kinds

F32 = NDArray[np.float32]
Stored = tuple[str, tuple[int, ...], bytes]  # safetensors dtype, shape, bytes


# --- Number formats -----------------------------------------------------------------------


def to_bf16(values: F32) -> NDArray[np.uint16]:
    """f32 -> bf16 bits, round to nearest even (spec section 2, numerics)."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> F32:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _e4m3fn(code: int) -> float:
    """Value of one code by the formula of spec section 4.2."""
    sign, e, m = (-1.0 if code & 0x80 else 1.0), (code >> 3) & 15, code & 7
    return sign * (m * 2.0**-9 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7))


_E4M3FN = np.array([_e4m3fn(code) for code in range(256)], dtype=np.float32)
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
_E2M1 = np.concatenate([_E2M1, -_E2M1])


def fp8_blocks(weight: F32, block: tuple[int, int]) -> tuple[Stored, Stored, F32]:
    """(weight, scale, true values) of one block-scaled fp8 matrix."""
    codes, scale = fp8.quantise(weight, block)
    spread = np.repeat(np.repeat(scale, block[0], axis=0), block[1], axis=1)
    truth = _E4M3FN[codes] * spread[: weight.shape[0], : weight.shape[1]]
    return stored(codes, "F8_E4M3"), stored(scale), truth


def mxfp4_blocks(weight: F32) -> tuple[Stored, Stored, F32]:
    """(packed codes, E8M0 scales, true values): 32 columns a block, low nibble = even column."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, columns // 32, 32)
    peak = np.abs(groups).max(axis=2)
    exponent = np.floor(np.log2(np.maximum(peak, 1e-30))).astype(np.int32) - 2
    scale = np.ldexp(np.float32(1), exponent).astype(np.float32)
    ratio = groups / scale[:, :, None]
    codes = np.abs(ratio[..., None] - _E2M1).argmin(axis=-1).astype(np.uint8)
    truth = (_E2M1[codes] * scale[:, :, None]).reshape(rows, columns).astype(np.float32)
    codes = codes.reshape(rows, columns)
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return stored(packed), stored((exponent + 127).astype(np.uint8)), truth


def stored(values: NDArray[Any], dtype: str | None = None) -> Stored:
    """An array as its safetensors entry; u16 means bf16."""
    names = {"float32": "F32", "float16": "F16", "uint16": "BF16", "uint8": "U8"}
    return dtype or names[values.dtype.name], values.shape, np.ascontiguousarray(values).tobytes()


# --- The container ------------------------------------------------------------------------


def write_safetensors(
    path: Path, tensors: Mapping[str, Stored], metadata: Mapping[str, str] | None = None
) -> None:
    """Write one safetensors file, tensors in the order given."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        end = offset + len(data)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, data in tensors.values():
            file.write(data)


# --- config.json --------------------------------------------------------------------------


def config_of(kind: Kind, **overrides: Any) -> MimoConfig:
    """The config a correct reader must return for a checkpoint of this kind."""
    if kind == "mimo7b":
        return tiny_mimo7b_config(**overrides)
    values: dict[str, Any] = {"num_mtp_layers": 3}
    if kind in ("v25", "v26"):
        # As in the real models a global layer's scale rows (12) allow T = 4 alone, and a sliding
        # layer's (12) allow 1, 2 and 4; llama.cpp, which tries 8 before 4, is not misled either.
        values |= {"num_attention_heads": 8, "num_key_value_heads": 4}
        values |= {"swa_num_key_value_heads": 8, "head_dim": 80, "v_head_dim": 32}
        values |= {"rope_theta": 1e7, "fused_qkv": True}
    if kind == "v26":
        values["layernorm_epsilon"] = 1e-6
    config = tiny_config(**(values | overrides))
    if kind != "flash_bf16" and "quantization" not in overrides:
        names = [f"model.layers.{i}.self_attn.o_proj" for i in range(config.num_hidden_layers)]
        names += [f"model.mtp.layers.{k}.self_attn.o_proj" for k in range(config.num_mtp_layers)]
        store: Literal["fp8", "mxfp4"] = "mxfp4" if kind == "v26" else "fp8"
        config = replace(
            config, quantization=QuantizationConfig("fp8", (128, 128), store, tuple(names))
        )
    return config


def hf_config(config: MimoConfig, kind: Kind) -> dict[str, Any]:
    """config.json of `config` with the keys its release writes (spec sections 1.1, 1.2)."""
    raw: dict[str, Any] = {
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "hidden_act": "silu",
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    if config.eos_token_ids:
        # One id here, the rest in generation_config.json: a reader must stop on all of them.
        raw["eos_token_id"] = config.eos_token_ids[0]
    if kind == "mimo7b":
        return raw | {
            "architectures": ["MiMoForCausalLM"],
            "model_type": "mimo",
            "head_dim": config.head_dim,
            "rms_norm_eps": config.layernorm_epsilon,
            "num_nextn_predict_layers": config.num_mtp_layers,
            "rope_scaling": None,
            "use_sliding_window": False,
        }
    before = config.sliding_window - 1
    raw |= {
        "architectures": ["MiMoV2FlashForCausalLM"],
        "model_type": "mimo_v2_flash",
        "head_dim": config.head_dim,
        "v_head_dim": config.v_head_dim,
        "swa_num_attention_heads": config.num_attention_heads,
        "swa_num_key_value_heads": config.swa_num_key_value_heads,
        "swa_head_dim": config.head_dim,
        "swa_v_head_dim": config.v_head_dim,
        "partial_rotary_factor": config.partial_rotary_factor,
        "swa_rope_theta": config.swa_rope_theta,
        "sliding_window": before,
        "sliding_window_size": before,
        "attention_chunk_size": before,
        "hybrid_layer_pattern": list(config.hybrid_layer_pattern),
        "hybrid_block_size": None,
        "moe_layer_freq": list(config.moe_layer_freq),
        "n_routed_experts": config.n_routed_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "n_shared_experts": None,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": config.norm_topk_prob,
        "routed_scaling_factor": (
            None if config.routed_scaling_factor == 1.0 else config.routed_scaling_factor
        ),
        "attention_value_scale": config.attention_value_scale,
        "add_swa_attention_sink_bias": config.add_swa_attention_sink_bias,
        "add_full_attention_sink_bias": config.add_full_attention_sink_bias,
        "layernorm_epsilon": config.layernorm_epsilon,
    }
    if kind in ("v25", "v26"):
        raw |= {
            "architectures": ["MiMoV2ForCausalLM"],
            "model_type": "mimo_v2",
            "attention_projection_layout": "fused_qkv",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": config.rope_theta,
                "partial_rotary_factor": config.partial_rotary_factor,
            },
            "vision_config": {"depth": 1},
            "audio_config": {"audio_channels": 1},
        }
    quantization = config.quantization
    if quantization.quant_method != "none":
        raw["quantization_config"] = {
            "quant_method": quantization.quant_method,
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(quantization.weight_block_size),
            "ignored_layers": list(quantization.ignored_layers),
        }
        if kind == "v25":
            raw["quantization_config"]["store_dtype"] = "fp8"
        if kind == "v26":
            raw["quantization_config"] |= {"store_dtype": "mxfp4", "mxfp4_block_size": 32}
    return raw


# --- The tensors --------------------------------------------------------------------------

_V2_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_sinks.weight": "self_attn.attention_sink_bias",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
}
_V2_MTP = _V2_LAYER | {
    "ffn_norm.weight": "pre_mlp_layernorm.weight",
    "nextn.enorm.weight": "enorm.weight",
    "nextn.hnorm.weight": "hnorm.weight",
    "nextn.eh_proj.weight": "eh_proj.weight",
    "layer_output_norm.weight": "final_layernorm.weight",
}
_MIMO7B_MTP = _V2_LAYER | {
    "nextn.enorm.weight": "token_layernorm.weight",
    "nextn.hnorm.weight": "hidden_layernorm.weight",
    "nextn.eh_proj.weight": "input_proj.weight",
    "layer_output_norm.weight": "final_layernorm.weight",
}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "output_norm.weight": "model.norm.weight",
}
_FP8_PARTS = ("attn_q.", "attn_k.", "attn_v.", "ffn_gate.", "ffn_up.", "ffn_down.", "_exps.")


class _Builder:
    """Turns canonical f32 weights into source tensors and remembers the rounded truth."""

    def __init__(self, config: MimoConfig, kind: Kind, weights: DictWeights) -> None:
        self.config, self.kind, self.weights = config, kind, weights
        self.tensors: dict[str, Stored] = {}
        self.truth: dict[str, F32] = {}

    def build(self) -> None:
        c = self.config
        for name, source in _TOP.items():
            if name == "output.weight" and c.tie_word_embeddings:
                self.truth[name] = self.truth["token_embd.weight"]
            else:
                self.plain(name, source)
        for index in range(c.num_hidden_layers + c.num_mtp_layers):
            mtp = index - c.num_hidden_layers
            if mtp < 0:
                prefix, names = f"model.layers.{index}.", _V2_LAYER
            elif c.family == "mimo":
                prefix, names = f"model.mtp_layers.{mtp}.", _MIMO7B_MTP
            else:
                prefix, names = f"model.mtp.layers.{mtp}.", _V2_MTP
            for part, source in names.items():
                name = f"blk.{index}.{part}"
                if not self.weights.has(name):
                    continue
                if c.fused_qkv and part.startswith(("attn_q.", "attn_k.", "attn_v.")):
                    if part == "attn_q.weight":
                        self.fused_qkv(index, prefix)
                elif self.is_fp8(part):
                    self.matrix(name, prefix + source)
                else:
                    self.plain(name, prefix + source)
            if c.layer(index).moe:
                self.experts(index, prefix)

    def is_fp8(self, part: str) -> bool:
        scaled = self.config.quantization.quant_method == "fp8"
        return scaled and part.endswith(".weight") and any(p in part for p in _FP8_PARTS)

    def plain(self, name: str, source: str) -> None:
        values = self.weights.tensor(name)
        router = name.endswith((".ffn_gate_inp.weight", ".exp_probs_b.bias"))
        f32 = router and not (self.kind == "v26" and name.endswith(".weight"))
        # Both stored forms of the sinks occur: bf16 in the fp8 kinds, f32 in the others.
        f32 = f32 or (name.endswith("attn_sinks.weight") and self.kind in ("flash_bf16", "v26"))
        if f32:
            self.tensors[source], self.truth[name] = stored(values), values
        else:
            bits = to_bf16(values)
            self.tensors[source], self.truth[name] = stored(bits), from_bf16(bits)

    def matrix(self, name: str, source: str) -> None:
        block = self.config.quantization.weight_block_size
        weight, scale, truth = fp8_blocks(self.weights.tensor(name), block)
        self.tensors[source], self.tensors[source + "_scale_inv"] = weight, scale
        self.truth[name] = truth

    def fused_qkv(self, index: int, prefix: str) -> None:
        """Rank by rank [Q of heads/T | K of kv/T | V of kv/T], quantised rank by rank."""
        source = prefix + "self_attn.qkv_proj.weight"
        parts = {p: self.weights.tensor(f"blk.{index}.attn_{p}.weight") for p in "qkv"}
        ranks = {p: np.split(values, TP) for p, values in parts.items()}
        true_ranks: dict[str, list[F32]] = {p: [] for p in "qkv"}
        codes, scales = [], []
        width = self.config.hidden_size
        for t in range(TP):
            chunk = np.concatenate([ranks[p][t] for p in "qkv"])
            if self.config.quantization.quant_method == "fp8":
                block = self.config.quantization.weight_block_size
                weight, scale, true_chunk = fp8_blocks(chunk, block)
                codes.append(weight)
                scales.append(scale)
            else:
                bits = to_bf16(chunk)
                codes.append(stored(bits))
                true_chunk = from_bf16(bits)
            start = 0
            for p in "qkv":
                stop = start + len(ranks[p][t])
                true_ranks[p].append(true_chunk[start:stop])
                start = stop
        rows = sum(len(values) for values in parts.values())
        data = b"".join(code[2] for code in codes)
        self.tensors[source] = (codes[0][0], (rows, width), data)
        if scales:
            shape = (sum(scale[1][0] for scale in scales), scales[0][1][1])
            joined = b"".join(scale[2] for scale in scales)
            self.tensors[source + "_scale_inv"] = ("F32", shape, joined)
        for p in "qkv":
            self.truth[f"blk.{index}.attn_{p}.weight"] = np.concatenate(true_ranks[p])

    def experts(self, index: int, prefix: str) -> None:
        for part in ("gate", "up", "down"):
            name = f"blk.{index}.ffn_{part}_exps.weight"
            truths = []
            for e, values in enumerate(self.weights.tensor(name)):
                source = f"{prefix}mlp.experts.{e}.{part}_proj.weight"
                if self.kind == "v26":
                    weight, scale, truth = mxfp4_blocks(values)
                    self.tensors[source], self.tensors[source + "_scale"] = weight, scale
                elif self.is_fp8("_exps.weight"):
                    block = self.config.quantization.weight_block_size
                    weight, scale, truth = fp8_blocks(values, block)
                    self.tensors[source], self.tensors[source + "_scale_inv"] = weight, scale
                else:
                    bits = to_bf16(values)
                    self.tensors[source], truth = stored(bits), from_bf16(bits)
                truths.append(truth)
            self.truth[name] = np.stack(truths)


def _extra_towers(rng: np.random.Generator) -> dict[str, Stored]:
    """Vision and audio tensors of the omni releases, with dtypes the text path never reads."""
    ones = rng.standard_normal((4, 6), dtype=np.float32)
    return {
        "visual.patch_embed.proj.weight": stored(ones.reshape(4, 1, 2, 1, 3)),
        "visual.blocks.0.attn.qkv.weight": stored(to_bf16(ones)),
        "audio_encoder.layers.0.fc1.weight": stored(to_bf16(ones)),
        "audio_encoder.steps": ("I64", (2,), np.arange(2, dtype=np.int64).tobytes()),
        "speech_embeddings.0.weight": stored(to_bf16(ones)),
    }


def _shards(tensors: dict[str, Stored], count: int) -> list[dict[str, Stored]]:
    """Spread tensors over files; a scale goes to another file than its weight."""
    shards: list[dict[str, Stored]] = [{} for _ in range(count)]
    weights = [name for name in tensors if not name.endswith(("_scale_inv", "_scale"))]
    for i, name in enumerate(weights):
        home = i * count // len(weights)
        shards[home][name] = tensors[name]
        for suffix in ("_scale_inv", "_scale"):
            if name + suffix in tensors:
                shards[(home + 1) % count][name + suffix] = tensors[name + suffix]
    return shards


def write_checkpoint(
    folder: Path,
    kind: Kind = "flash",
    *,
    seed: int = 0,
    shards: int = 3,
    tokenizer: bool = False,
    tp_size: int | None = None,
    weights: DictWeights | None = None,
    **overrides: Any,
) -> tuple[Path, DictWeights]:
    """Write a checkpoint of `kind` into `folder` (made if missing).

    `overrides` replace fields of the MimoConfig (for K-quants use widths that are multiples of
    256: hidden_size, intermediate_size, moe_intermediate_size and heads * v_head_dim).
    `shards`: 1 writes a single model.safetensors without an index (always so for "mimo7b").
    `tokenizer`: also write a tiny byte-level BPE with MiMo's special tokens and a chat template;
    the vocabulary then defaults to its size plus 7 padding ids, and the eos ids to the real two.
    `tp_size`: state it in the index metadata, as V2.5 does. `weights`: use these canonical f32
    weights instead of random ones.
    Returns (folder, true weights); their `.config` is what the reader must return.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer:
        size, eos = write_tokenizer(folder)
        overrides = {"vocab_size": size + 7, "eos_token_ids": eos} | overrides
    config = config_of(kind, **overrides)
    builder = _Builder(config, kind, weights or random_weights(config, seed))
    builder.build()
    tensors = builder.tensors
    if kind in ("v25", "v26"):
        tensors |= _extra_towers(np.random.default_rng(seed + 1))
    (folder / "config.json").write_text(json.dumps(hf_config(config, kind), indent=2))
    if len(config.eos_token_ids) > 1:
        generation = {"eos_token_id": list(reversed(config.eos_token_ids)), "temperature": 1.0}
        (folder / "generation_config.json").write_text(json.dumps(generation))
    if shards == 1 or kind == "mimo7b":
        write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    else:
        weight_map: dict[str, str] = {}
        for i, part in enumerate(_shards(tensors, shards)):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            write_safetensors(folder / file, part, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        metadata: dict[str, Any] = {"total_size": sum(len(t[2]) for t in tensors.values())}
        if tp_size is not None:
            metadata["tp_size"] = tp_size
        index = {"metadata": metadata, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if kind in ("v25", "v26"):
        # The real releases ship the audio tokenizer in a folder of its own.
        (folder / "audio_tokenizer").mkdir(exist_ok=True)
        write_safetensors(
            folder / "audio_tokenizer" / "model.safetensors",
            {"encoder.weight": stored(np.zeros((2, 2), dtype=np.float32))},
        )
    return folder, DictWeights(config, builder.truth)


# --- Tokenizer ----------------------------------------------------------------------------

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ADDED_TOKENS = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
)  # fmt: skip
PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' -%}
<|im_start|>system
You are MiMo, a helpful AI assistant engineered by Xiaomi.<|im_end|>
{%- endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.role == 'assistant' -%}
<think>{{ message.reasoning_content or '' }}</think>
{%- endif -%}
{{ message.content }}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking -%}<think></think>{%- endif -%}
{%- endif -%}
"""
_TEXT = ["turn on the guest wifi for two hours, the light in the living room: 把客厅的灯调暗一点"]


def write_tokenizer(folder: Path) -> tuple[int, tuple[int, int]]:
    """Write tokenizer.json and tokenizer_config.json; returns (size, the two eos ids)."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ADDED_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in SPECIAL_TOKENS,
        }
        for token in (*SPECIAL_TOKENS, *ADDED_TOKENS)
    }
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": described,
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    vocabulary = tokenizer.get_vocab()
    return len(vocabulary), (vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"])


def write_bundle(folder: Path, kind: Kind, *, recipe: str) -> Path:
    """Export a checkpoint of `kind` with a tokenizer; the checkpoint stays beside the bundle."""
    source, _ = write_checkpoint(folder / "source", kind, tokenizer=True)
    export_bundle(source, folder / "bundle", recipe=recipe).close()
    return folder / "bundle"
