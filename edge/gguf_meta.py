"""MimoConfig as GGUF metadata: what the exporter writes and what we read from any file.

Arch `mimo2` for the MiMo-V2 family, `qwen2` for MiMo-7B (its MTP block lies in a side file of
arch `mimo-mtp`, because stock loaders refuse tensors they do not know). What no key states is
read off the tensors: MoE layers by their router, sinks and MTP blocks by their presence.

Source: spec section 5; llama.cpp:conversion/mimo.py, src/models/mimo2.cpp, src/models/qwen2.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mimo_edge.config import MimoConfig
from mimo_edge.errors import BundleError, ConfigError
from mimo_edge.gguf_file import GgufType, TensorInfo

ARCH_V2 = "mimo2"
ARCH_7B = "qwen2"
ARCH_7B_MTP = "mimo-mtp"
GATING_SIGMOID = 2
# A GGUF names one end-of-turn token; these are the ones a MiMo model stops on (spec 1.3).
STOP_TOKENS = ("<|endoftext|>", "<|im_end|>")


class Value(NamedTuple):
    """A metadata value with its GGUF type; `item` is the item type of an array."""

    type: GgufType
    value: Any
    item: GgufType | None = None


def u16(value: int) -> Value:
    return Value(GgufType.UINT16, value)


def u32(value: int) -> Value:
    return Value(GgufType.UINT32, value)


def i32(value: int) -> Value:
    return Value(GgufType.INT32, value)


def f32(value: float) -> Value:
    return Value(GgufType.FLOAT32, value)


def boolean(value: bool) -> Value:
    return Value(GgufType.BOOL, value)


def text(value: str) -> Value:
    return Value(GgufType.STRING, value)


def i32s(values: Iterable[int]) -> Value:
    return Value(GgufType.ARRAY, list(values), GgufType.INT32)


def f32s(values: Iterable[float]) -> Value:
    return Value(GgufType.ARRAY, list(values), GgufType.FLOAT32)


def texts(values: Iterable[str]) -> Value:
    return Value(GgufType.ARRAY, list(values), GgufType.STRING)


def architecture(config: MimoConfig) -> str:
    """`general.architecture` of a model of this family."""
    return ARCH_V2 if config.family == "mimo_v2" else ARCH_7B


def config_metadata(config: MimoConfig) -> dict[str, Value]:
    """The model keys of spec section 5, in a fixed order (general and tokenizer keys apart)."""
    return _v2_metadata(config) if config.family == "mimo_v2" else _7b_metadata(config)


def _v2_metadata(c: MimoConfig) -> dict[str, Value]:
    layers = [c.layer(i) for i in range(c.num_hidden_layers + c.num_mtp_layers)]
    keys = {
        "block_count": u32(len(layers)),
        "context_length": u32(c.max_position_embeddings),
        "embedding_length": u32(c.hidden_size),
        "feed_forward_length": u32(c.intermediate_size),
        "attention.head_count": u32(c.num_attention_heads),
        "attention.head_count_kv": i32s(layer.num_key_value_heads for layer in layers),
        "attention.key_length": u32(c.head_dim),
        "attention.value_length": u32(c.v_head_dim),
        "attention.sliding_window": u32(c.sliding_window),
        "attention.sliding_window_pattern": i32s(int(layer.sliding) for layer in layers),
        "attention.value_scale": f32(c.attention_value_scale),
        "attention.layer_norm_rms_epsilon": f32(c.layernorm_epsilon),
        "rope.dimension_count": u32(c.rotary_dim),
        "rope.freq_base": f32(c.rope_theta),
        "rope.freq_base_swa": f32(c.swa_rope_theta),
        "expert_feed_forward_length": u32(c.moe_intermediate_size),
    }
    if c.n_routed_experts:
        keys |= {
            "expert_count": u32(c.n_routed_experts),
            "expert_used_count": u32(c.num_experts_per_tok),
            "expert_group_count": u32(1),
            "expert_group_used_count": u32(1),
            "expert_gating_func": u32(GATING_SIGMOID),
        }
        # Stock llama.cpp renormalises always and scales never for this arch, so these are
        # written only for models that differ; the exporter warns about those.
        if not c.norm_topk_prob:
            keys["expert_weights_norm"] = boolean(False)
        if c.routed_scaling_factor != 1.0:
            keys["expert_weights_scale"] = f32(c.routed_scaling_factor)
    if c.num_mtp_layers:
        keys["nextn_predict_layers"] = u32(c.num_mtp_layers)
    return {f"{ARCH_V2}.{key}": value for key, value in keys.items()}


def _7b_metadata(c: MimoConfig) -> dict[str, Value]:
    if c.head_dim * c.num_attention_heads != c.hidden_size or c.rotary_dim != c.head_dim:
        raise ConfigError(
            f"{c.num_attention_heads} heads of {c.head_dim} with {c.rotary_dim} rotary dims do not "
            f"fit arch qwen2 of width {c.hidden_size}"
        )
    keys = {
        "block_count": u32(c.num_hidden_layers),
        "context_length": u32(c.max_position_embeddings),
        "embedding_length": u32(c.hidden_size),
        "feed_forward_length": u32(c.intermediate_size),
        "attention.head_count": u32(c.num_attention_heads),
        "attention.head_count_kv": u32(c.num_key_value_heads),
        "attention.layer_norm_rms_epsilon": f32(c.layernorm_epsilon),
        "rope.freq_base": f32(c.rope_theta),
    }
    return {f"{ARCH_7B}.{key}": value for key, value in keys.items()}


def read_config(
    metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo], where: object = "model"
) -> MimoConfig:
    """The model config of an open GGUF file, ours or a third party's.

    W is `attention.sliding_window` as stored; an absent `attention.value_scale` means no
    scaling; MTP blocks announced but not in the file count as absent. Floats come back as
    stored, in single precision. Raises BundleError on an unknown architecture or when keys and
    tensors contradict each other, ConfigError on absurd values.
    """
    arch = metadata.get("general.architecture")
    if arch not in (ARCH_V2, ARCH_7B):
        raise BundleError(
            f"{where} holds architecture {arch!r}", f"supported: {ARCH_V2}, {ARCH_7B} (MiMo-7B)"
        )
    keys = _Keys(metadata, f"{arch}.", where)
    blocks, mtp = _count_blocks(keys, tensors)
    embedding = _shape(tensors, "token_embd.weight", where)
    if len(embedding) != 2:
        raise BundleError(f"{where}: token_embd.weight has the shape {list(embedding)}")
    layers = blocks - mtp
    if keys.optional_int("nextn_predict_layers", 0) > mtp == 0:
        layers = blocks - keys.optional_int("nextn_predict_layers", 0)
    if not 1 <= layers <= 1024:
        raise BundleError(f"{where}: {arch}.block_count leaves {layers} layers")
    common: dict[str, Any] = {
        "vocab_size": embedding[0],
        "hidden_size": keys.integer("embedding_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": keys.integer("attention.head_count"),
        "intermediate_size": keys.integer("feed_forward_length"),
        "rope_theta": keys.number("rope.freq_base"),
        "layernorm_epsilon": keys.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": keys.integer("context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "num_mtp_layers": mtp,
        "eos_token_ids": _stop_ids(metadata, where),
    }
    read = _read_v2 if arch == ARCH_V2 else _read_7b
    return MimoConfig(**common, **read(keys, tensors, layers, mtp))


def _read_v2(
    keys: _Keys, tensors: Mapping[str, TensorInfo], layers: int, mtp: int
) -> dict[str, Any]:
    total = layers + mtp
    pattern = keys.per_layer("attention.sliding_window_pattern", total)
    if any(v not in (0, 1) for v in pattern) or not all(pattern[layers:]):
        raise keys.wrong("attention.sliding_window_pattern", pattern)
    kv = keys.per_layer("attention.head_count_kv", total)
    per_kind = {kind: {n for n, p in zip(kv, pattern, strict=True) if p == kind} for kind in (0, 1)}
    if any(len(found) > 1 for found in per_kind.values()):
        raise keys.wrong("attention.head_count_kv", kv)
    global_kv, sliding_kv = (next(iter(per_kind[kind]), 1) for kind in (0, 1))
    moe = tuple(int(f"blk.{i}.ffn_gate_inp.weight" in tensors) for i in range(layers))
    sinks = [f"blk.{i}.attn_sinks.weight" in tensors for i in range(total)]
    by_kind = {
        kind: {s for s, p in zip(sinks, pattern, strict=True) if p == kind} for kind in (0, 1)
    }
    if any(len(found) > 1 for found in by_kind.values()):
        raise BundleError(f"{keys.where}: only some layers of a kind have attn_sinks")
    gating = keys.optional_int("expert_gating_func", GATING_SIGMOID)
    groups = keys.optional_int("expert_group_count", 1)
    if gating != GATING_SIGMOID or groups not in (0, 1):
        raise BundleError(
            f"{keys.where}: gating function {gating} with {groups} expert groups is not supported"
        )
    head_dim = keys.integer("attention.key_length")
    return {
        "family": "mimo_v2",
        "num_key_value_heads": global_kv,
        "swa_num_key_value_heads": sliding_kv,
        "head_dim": head_dim,
        "v_head_dim": keys.integer("attention.value_length"),
        "swa_rope_theta": keys.number("rope.freq_base_swa", keys.number("rope.freq_base")),
        "sliding_window": keys.integer("attention.sliding_window"),
        "partial_rotary_factor": _factor(keys.integer("rope.dimension_count"), head_dim),
        "attention_value_scale": keys.number("attention.value_scale", 1.0),
        "hybrid_layer_pattern": tuple(pattern[:layers]),
        "moe_layer_freq": moe,
        "add_full_attention_sink_bias": True in by_kind[0],
        "add_swa_attention_sink_bias": True in by_kind[1],
        "n_routed_experts": keys.optional_int("expert_count", 0),
        "num_experts_per_tok": keys.optional_int("expert_used_count", 0),
        "moe_intermediate_size": keys.optional_int("expert_feed_forward_length", 0),
        "norm_topk_prob": keys.flag("expert_weights_norm", True),
        "routed_scaling_factor": keys.number("expert_weights_scale", 1.0),
    }


def _read_7b(
    keys: _Keys, tensors: Mapping[str, TensorInfo], layers: int, mtp: int
) -> dict[str, Any]:
    heads, hidden = keys.integer("attention.head_count"), keys.integer("embedding_length")
    if not heads or hidden % heads:
        raise BundleError(f"{keys.where}: {heads} heads do not divide the width {hidden}")
    head_dim = keys.optional_int("attention.key_length", hidden // heads)
    return {
        "family": "mimo",
        "num_key_value_heads": keys.optional_int("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "v_head_dim": keys.optional_int("attention.value_length", head_dim),
        "hybrid_layer_pattern": (0,) * layers,
        "moe_layer_freq": (0,) * layers,
        "attention_bias": any(
            f"blk.0.attn_{part}.bias" in tensors for part in ("q", "k", "v", "qkv")
        ),
    }


def _count_blocks(keys: _Keys, tensors: Mapping[str, TensorInfo]) -> tuple[int, int]:
    """(blocks in the file, MTP blocks among them): all announced MTP blocks, or none."""
    blocks = keys.integer("block_count")
    announced = keys.optional_int("nextn_predict_layers", 0)
    if not 0 <= announced <= 16:
        raise keys.wrong("nextn_predict_layers", announced)
    layers = blocks - announced
    found = [f"blk.{layers + k}.nextn.eh_proj.weight" in tensors for k in range(announced)]
    if any(found) and not all(found):
        missing = found.index(False)
        raise BundleError(f"{keys.where} lacks MTP block {missing} of {announced}")
    return blocks, announced if all(found) else 0


def _factor(rotary_dim: int, head_dim: int) -> float:
    """A partial_rotary_factor for which int(head_dim * factor) is rotary_dim again."""
    if not 0 < rotary_dim <= head_dim:
        raise BundleError(f"{rotary_dim} rotary dims of a head of {head_dim}")
    factor = rotary_dim / head_dim
    while int(head_dim * factor) < rotary_dim:
        factor = math.nextafter(factor, 2.0)
    return factor


def _stop_ids(metadata: Mapping[str, Any], where: object) -> tuple[int, ...]:
    """Every id generation stops on: the keys' and, by name, MiMo's two stop tokens."""
    ids: list[int] = []
    for key in ("eos", "eot"):
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise BundleError(f"{where}: tokenizer.ggml.{key}_token_id = {value!r}")
            ids.append(value)
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    if not isinstance(tokens, Sequence) or isinstance(tokens, str):
        raise BundleError(f"{where}: tokenizer.ggml.tokens is not an array of strings")
    ids += [i for i, token in enumerate(tokens) if token in STOP_TOKENS]
    return tuple(dict.fromkeys(ids))


class _Keys:
    """Typed access to the keys of one architecture."""

    def __init__(self, metadata: Mapping[str, Any], prefix: str, where: object) -> None:
        self._metadata = metadata
        self._prefix = prefix
        self.where = where

    def wrong(self, key: str, value: object) -> BundleError:
        shown = repr(value) if len(repr(value)) < 80 else repr(value)[:80] + "..."
        return BundleError(f"{self.where}: {self._prefix}{key} = {shown} is not usable")

    def _get(self, key: str) -> Any:
        try:
            return self._metadata[self._prefix + key]
        except KeyError:
            raise BundleError(f"{self.where} lacks the key {self._prefix}{key}") from None

    def integer(self, key: str) -> int:
        value = self._get(key)
        if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
            value = value[0].item()  # written per layer, the same in all
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, value)
        return value

    def optional_int(self, key: str, default: int) -> int:
        return self.integer(key) if self._prefix + key in self._metadata else default

    def number(self, key: str, default: float | None = None) -> float:
        if default is not None and self._prefix + key not in self._metadata:
            return default
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(key, value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._metadata.get(self._prefix + key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value)
        return value

    def per_layer(self, key: str, total: int) -> list[int]:
        """An integer per block; a scalar counts for all of them."""
        value = self._get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return [value] * total
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iub" or len(value) < total:
            raise self.wrong(key, value)
        return [int(v) for v in value[:total]]


def _shape(tensors: Mapping[str, TensorInfo], name: str, where: object) -> tuple[int, ...]:
    try:
        return tensors[name].shape
    except KeyError:
        raise BundleError(f"{where} lacks the tensor {name}") from None


def check_tensors(
    config: MimoConfig, tensors: Mapping[str, TensorInfo], where: object = "model"
) -> None:
    """Every tensor the config calls for is there with its shape, and no other.

    Fused or split q/k/v are both accepted, and `nextn.shared_head_norm` for
    `layer_output_norm`. Raises BundleError naming the tensor: an unknown one could change the
    function, so it is refused, not skipped.
    """
    expected = expected_shapes(config)
    if config.tie_word_embeddings and "output.weight" not in tensors:
        del expected["output.weight"]  # the head is the embedding, stored once
    for index in range(config.num_hidden_layers + config.num_mtp_layers):
        _accept_fused(expected, tensors, index)
        norm = f"blk.{index}.layer_output_norm.weight"
        other = f"blk.{index}.nextn.shared_head_norm.weight"
        if norm in expected and norm not in tensors and other in tensors:
            expected[other] = expected.pop(norm)
    for name, shape in expected.items():
        found = _shape(tensors, name, where)
        if found != shape:
            raise BundleError(f"{where}: {name} has shape {list(found)}, not {list(shape)}")
    if unknown := sorted(set(tensors) - set(expected)):
        raise BundleError(
            f"{where} has {len(unknown)} tensors this model does not know: {', '.join(unknown[:4])}"
        )


def check_experts(
    config: MimoConfig, tensors: Mapping[str, TensorInfo], where: object = "model"
) -> None:
    """The routed experts of a model are there with their shapes, and nothing else. Raises
    BundleError naming the tensor."""
    expected = {n: shape for n, shape in expected_shapes(config).items() if len(shape) == 3}
    for name, shape in expected.items():
        if (found := _shape(tensors, name, where)) != shape:
            raise BundleError(f"{where}: {name} has shape {list(found)}, not {list(shape)}")
    if unknown := sorted(set(tensors) - set(expected)):
        raise BundleError(f"{where} has tensors besides its routed experts: {unknown[0]}")


def _accept_fused(
    expected: dict[str, tuple[int, ...]], tensors: Mapping[str, TensorInfo], index: int
) -> None:
    for suffix in ("weight", "bias"):
        fused = f"blk.{index}.attn_qkv.{suffix}"
        if fused in tensors and f"blk.{index}.attn_q.{suffix}" in expected:
            parts = [expected.pop(f"blk.{index}.attn_{p}.{suffix}") for p in "qkv"]
            expected[fused] = (sum(part[0] for part in parts), *parts[0][1:])


def expected_shapes(config: MimoConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> NumPy shape of every tensor of a model, q/k/v split."""
    m, h, f = config.hidden_size, config.num_attention_heads, config.intermediate_size
    d, dv = config.head_dim, config.v_head_dim
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (config.vocab_size, m)}
    shapes["output.weight"] = (config.vocab_size, m)
    shapes["output_norm.weight"] = (m,)
    for index in range(config.num_hidden_layers + config.num_mtp_layers):
        spec, p = config.layer(index), f"blk.{index}."
        g = spec.num_key_value_heads
        shapes[p + "attn_norm.weight"] = (m,)
        for part, rows in (("q", h * d), ("k", g * d), ("v", g * dv)):
            shapes[p + f"attn_{part}.weight"] = (rows, m)
            if config.attention_bias:
                shapes[p + f"attn_{part}.bias"] = (rows,)
        if spec.sinks:
            shapes[p + "attn_sinks.weight"] = (h,)
        shapes[p + "attn_output.weight"] = (m, h * dv)
        shapes[p + "ffn_norm.weight"] = (m,)
        if spec.moe:
            e, fe = config.n_routed_experts, config.moe_intermediate_size
            shapes[p + "ffn_gate_inp.weight"] = (e, m)
            shapes[p + "exp_probs_b.bias"] = (e,)
            shapes[p + "ffn_gate_exps.weight"] = (e, fe, m)
            shapes[p + "ffn_up_exps.weight"] = (e, fe, m)
            shapes[p + "ffn_down_exps.weight"] = (e, m, fe)
        else:
            shapes[p + "ffn_gate.weight"] = (f, m)
            shapes[p + "ffn_up.weight"] = (f, m)
            shapes[p + "ffn_down.weight"] = (m, f)
        if index >= config.num_hidden_layers:
            shapes[p + "nextn.eh_proj.weight"] = (m, 2 * m)
            shapes[p + "nextn.enorm.weight"] = (m,)
            shapes[p + "nextn.hnorm.weight"] = (m,)
            shapes[p + "layer_output_norm.weight"] = (m,)
    return shapes
