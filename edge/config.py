"""The model configuration: one frozen dataclass for every MiMo text model we run.

Field names keep the Hugging Face key so a reader can search the checkpoint.
`MimoConfig.from_hf` refuses every key it neither uses nor lists in IGNORED_KEYS: a dropped
key can silently change the function (`attention_value_scale` was lost that way elsewhere).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from mimo_edge.errors import ConfigError

Family = Literal["mimo_v2", "mimo"]

# Keys that carry no information for the text forward pass, each with the reason.
IGNORED_KEYS: dict[str, str] = {
    "architectures": "read separately to choose the family",
    "attention_dropout": "training only",
    "attention_chunk_size": "a third spelling of sliding_window_size, checked for agreement",
    "audio_config": "audio tower is not exported",
    "audio_token_id": "audio tower is not exported",
    "auto_map": "remote code is never run",
    "bos_token_id": "the tokenizer adds no BOS",
    "dtype": "every tensor states its own dtype",
    "hybrid_block_size": "null in every release; hybrid_layer_pattern is authoritative",
    "image_token_id": "vision tower is not exported",
    "initializer_range": "training only",
    "max_window_layers": "Qwen2 leftover, window unused in MiMo-7B",
    "model_type": "read separately to choose the family",
    "moe_router_dtype": "the router tensor states its dtype; we always route in f32",
    "output_router_logits": "training only",
    "pad_token_id": "padding ids are never fed",
    "processor_config": "vision and audio are not exported",
    "rope_parameters": "repeats rope_theta and partial_rotary_factor, checked for agreement",
    "sliding_window": "a second spelling of sliding_window_size, checked for agreement",
    "transformers_version": "informative",
    "torch_dtype": "every tensor states its own dtype",
    "use_cache": "inference always caches",
    "use_mrope": "text positions are one-dimensional",
    "use_sliding_window": "Qwen2 leftover, must be false",
    "video_token_id": "vision tower is not exported",
    "vision_config": "vision tower is not exported",
    "vision_end_token_id": "vision tower is not exported",
    "vision_model_type": "vision tower is not exported",
    "vision_start_token_id": "vision tower is not exported",
}

# Absurd values are refused before anything is allocated from them.
_LIMITS = {
    "vocab_size": 1 << 22,
    "hidden_size": 1 << 17,
    "num_hidden_layers": 1024,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "swa_num_key_value_heads": 4096,
    "head_dim": 4096,
    "v_head_dim": 4096,
    "intermediate_size": 1 << 20,
    "max_position_embeddings": 1 << 26,
    "sliding_window": 1 << 26,
    "n_routed_experts": 8192,
    "num_experts_per_tok": 8192,
    "moe_intermediate_size": 1 << 20,
    "num_mtp_layers": 16,
}


@dataclass(frozen=True)
class QuantizationConfig:
    """How a checkpoint stores its linear weights (`quantization_config` of config.json)."""

    quant_method: Literal["none", "fp8"] = "none"
    weight_block_size: tuple[int, int] = (128, 128)
    expert_store: Literal["fp8", "mxfp4"] = "fp8"
    ignored_layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerSpec:
    """What one decoder layer or MTP block is: everything attention and FFN need to know."""

    index: int
    sliding: bool
    num_key_value_heads: int
    rope_theta: float
    window: int | None  # tokens visible including the current one; None = all
    sinks: bool
    moe: bool


@dataclass(frozen=True)
class MimoConfig:
    """A MiMo text model. `family` is "mimo_v2" (hybrid MoE) or "mimo" (dense MiMo-7B).

    `sliding_window` is W, the tokens visible to a query including itself
    (`sliding_window_size` of a checkpoint + 1, as transformers and SGLang read it).
    `num_mtp_layers` is counted from the tensors, never from config.json.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    v_head_dim: int
    intermediate_size: int
    rope_theta: float
    layernorm_epsilon: float
    max_position_embeddings: int
    hybrid_layer_pattern: tuple[int, ...]  # 0 = global, 1 = sliding
    moe_layer_freq: tuple[int, ...]  # 0 = dense FFN, 1 = routed experts
    swa_num_key_value_heads: int = 1
    swa_rope_theta: float = 10_000.0
    sliding_window: int = 129
    partial_rotary_factor: float = 1.0
    attention_value_scale: float = 1.0
    attention_bias: bool = False
    add_swa_attention_sink_bias: bool = False
    add_full_attention_sink_bias: bool = False
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    tie_word_embeddings: bool = False
    num_mtp_layers: int = 0
    fused_qkv: bool = False  # checkpoint stores TP-sharded qkv_proj (V2.5 on)
    eos_token_ids: tuple[int, ...] = ()
    quantization: QuantizationConfig = QuantizationConfig()

    def __post_init__(self) -> None:
        _validate(self)

    @property
    def rotary_dim(self) -> int:
        """Leading dims of each q/k head that rotate: int(head_dim * partial_rotary_factor)."""
        return int(self.head_dim * self.partial_rotary_factor)

    def layer(self, index: int) -> LayerSpec:
        """Spec of decoder layer `index`, or of MTP block k at index num_hidden_layers + k."""
        if not 0 <= index < self.num_hidden_layers + self.num_mtp_layers:
            raise ConfigError(
                f"layer {index} of a model with {self.num_hidden_layers} layers "
                f"and {self.num_mtp_layers} MTP blocks"
            )
        mtp = index >= self.num_hidden_layers
        if mtp:
            sliding, moe = self.family == "mimo_v2", False
        else:
            sliding = self.hybrid_layer_pattern[index] == 1
            moe = self.moe_layer_freq[index] == 1
        return LayerSpec(
            index=index,
            sliding=sliding,
            num_key_value_heads=(
                self.swa_num_key_value_heads if sliding else self.num_key_value_heads
            ),
            rope_theta=self.swa_rope_theta if sliding else self.rope_theta,
            window=self.sliding_window if sliding else None,
            sinks=(
                self.add_swa_attention_sink_bias if sliding else self.add_full_attention_sink_bias
            ),
            moe=moe,
        )

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """Specs of the decoder layers, MTP blocks not included."""
        return tuple(self.layer(i) for i in range(self.num_hidden_layers))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, read back by `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> MimoConfig:
        """Inverse of `to_dict`. Raises ConfigError on unknown or missing fields."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(raw) - known):
            raise ConfigError(f"unknown model config fields {unknown}")
        values = dict(raw)
        try:
            for name in ("hybrid_layer_pattern", "moe_layer_freq", "eos_token_ids"):
                if name in values:
                    values[name] = tuple(values[name])
            if "quantization" in values:
                quantization = dict(values["quantization"])
                for name in ("weight_block_size", "ignored_layers"):
                    if name in quantization:
                        quantization[name] = tuple(quantization[name])
                values["quantization"] = QuantizationConfig(**quantization)
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"model config is malformed: {error}") from error

    @classmethod
    def from_hf(
        cls,
        raw: Mapping[str, Any],
        *,
        num_mtp_layers: int | None = None,
        window: int | None = None,
        ignore_keys: Iterable[str] = (),
    ) -> MimoConfig:
        """Read a Hugging Face config.json.

        `num_mtp_layers`: counted by the checkpoint reader (most V2 configs do not state it).
        `window`: overrides W. `ignore_keys`: unknown keys the caller vouches for.
        Raises ConfigError on an unknown architecture, key or value.
        Source: spec sections 1.1 and 1.2; transformers MiMoV2FlashConfig for W.
        """
        if not isinstance(raw, Mapping):
            raise ConfigError(f"config.json holds a {type(raw).__name__}, not an object")
        family, fused = _family(raw)
        reader = _Reader(raw, set(ignore_keys))
        values = (
            _read_mimo_v2(reader, window) if family == "mimo_v2" else _read_mimo(reader, window)
        )
        reader.finish()
        declared = values.pop("num_mtp_layers", 0)
        return cls(
            family=family,
            fused_qkv=fused,
            num_mtp_layers=declared if num_mtp_layers is None else num_mtp_layers,
            **values,
        )


def _family(raw: Mapping[str, Any]) -> tuple[Family, bool]:
    """(family, fused qkv) from `architectures`, or `model_type` when that is missing."""
    table: dict[str, tuple[Family, bool]] = {
        "MiMoV2FlashForCausalLM": ("mimo_v2", False),
        "MiMoV2ForCausalLM": ("mimo_v2", True),
        "MiMoForCausalLM": ("mimo", False),
        "mimo_v2_flash": ("mimo_v2", False),
        "mimo_v2": ("mimo_v2", True),
        "mimo": ("mimo", False),
    }
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list):
        raise ConfigError("`architectures` is not a list")
    for name in [*architectures, raw.get("model_type")]:
        if isinstance(name, str) and name in table:
            family, fused = table[name]
            layout = raw.get("attention_projection_layout")
            if layout is not None:
                if layout not in ("fused_qkv", "split"):
                    raise ConfigError(f"attention_projection_layout {layout!r} is not supported")
                fused = layout == "fused_qkv"
            return family, fused
    raise ConfigError(
        f"architectures {architectures!r}, model_type {raw.get('model_type')!r} is not a MiMo "
        "text model",
        "supported: MiMoV2FlashForCausalLM, MiMoV2ForCausalLM, MiMoForCausalLM",
    )


class _Reader:
    """Typed access to config.json that remembers which keys were used."""

    def __init__(self, raw: Mapping[str, Any], ignore: set[str]) -> None:
        self._raw = raw
        self._used = set(IGNORED_KEYS) | ignore

    def _take(self, key: str, default: Any) -> Any:
        self._used.add(key)
        value = self._raw.get(key)
        if value is None:
            if default is _REQUIRED:
                raise ConfigError(f"config.json lacks {key!r}")
            return default
        return value

    def integer(self, key: str, default: Any = None) -> int:
        value = self._take(key, _REQUIRED if default is None else default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{key} = {value!r} is not an integer")
        # Checked here too: num_hidden_layers sizes tuples before the config is validated.
        if key in _LIMITS and not 0 <= value <= _LIMITS[key]:
            shown = value if abs(value) < 1 << 64 else f"an integer of {value.bit_length()} bits"
            raise ConfigError(f"{key} = {shown} is outside 0..{_LIMITS[key]}")
        return value

    def number(self, key: str, default: Any = None) -> float:
        value = self._take(key, _REQUIRED if default is None else default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{key} = {value!r} is not a number")
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{key} is an integer too large for a number") from None

    def flag(self, key: str, default: bool) -> bool:
        value = self._take(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{key} = {value!r} is not true or false")
        return value

    def pattern(self, key: str, length: int) -> tuple[int, ...]:
        value = self._take(key, _REQUIRED)
        if not isinstance(value, list) or any(type(v) is not int or v not in (0, 1) for v in value):
            raise ConfigError(f"{key} is not a list of 0 and 1")
        if len(value) != length:
            raise ConfigError(f"{key} has {len(value)} entries for {length} layers")
        return tuple(int(v) for v in value)

    def ids(self, key: str) -> tuple[int, ...]:
        value = self._take(key, [])
        ids = value if isinstance(value, list) else [value]
        if any(isinstance(v, bool) or not isinstance(v, int) or v < 0 for v in ids):
            raise ConfigError(f"{key} = {value!r} is not a token id or a list of them")
        return tuple(ids)

    def raw(self, key: str) -> Any:
        self._used.add(key)
        return self._raw.get(key)

    def must_be(self, key: str, *allowed: Any, why: str) -> None:
        """The key may be absent or hold one of `allowed`; anything else is another model."""
        value = self.raw(key)
        if value is not None and value not in allowed:
            raise ConfigError(f"{key} = {value!r} is not supported: {why}")

    def finish(self) -> None:
        if unknown := sorted(set(self._raw) - self._used):
            raise ConfigError(
                f"config.json has keys this version does not account for: {unknown}",
                "if they do not change the text model, name them with --ignore-config-key",
            )


_REQUIRED: Any = object()


def _read_mimo_v2(reader: _Reader, window: int | None) -> dict[str, Any]:
    layers = reader.integer("num_hidden_layers")
    heads, head_dim = reader.integer("num_attention_heads"), reader.integer("head_dim")
    v_head_dim = reader.integer("v_head_dim")
    reader.must_be("swa_num_attention_heads", heads, why="sliding layers share the head count")
    reader.must_be("swa_head_dim", head_dim, why="sliding layers share head_dim")
    reader.must_be("swa_v_head_dim", v_head_dim, why="sliding layers share v_head_dim")
    reader.must_be("hidden_act", "silu", why="MiMo-V2 uses SwiGLU")
    reader.must_be("scoring_func", "sigmoid", why="MiMo-V2 routes with a sigmoid")
    reader.must_be("topk_method", "noaux_tc", why="MiMo-V2 routes by biased top-k")
    reader.must_be("n_group", 1, why="grouped routing")
    reader.must_be("topk_group", 1, why="grouped routing")
    reader.must_be("n_shared_experts", 0, why="MiMo-V2 has no shared expert")
    reader.must_be("attention_bias", False, why="MiMo-V2 has no biases")
    reader.must_be("mlp_bias", False, why="MiMo-V2 has no biases")
    reader.must_be("use_qk_norm", False, why="MiMo-V2 has no q/k norm")
    reader.must_be("rope_scaling", why="MiMo-V2 scales no rotary angle")
    theta, factor = reader.number("rope_theta"), reader.number("partial_rotary_factor")
    _check_rope_parameters(reader.raw("rope_parameters"), theta, factor)
    kv_heads = reader.integer("num_key_value_heads")
    reader.raw("attention_projection_layout")
    return {
        "vocab_size": reader.integer("vocab_size"),
        "hidden_size": reader.integer("hidden_size"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "swa_num_key_value_heads": reader.integer("swa_num_key_value_heads"),
        "head_dim": head_dim,
        "v_head_dim": v_head_dim,
        "intermediate_size": reader.integer("intermediate_size"),
        "rope_theta": theta,
        "swa_rope_theta": reader.number("swa_rope_theta"),
        "partial_rotary_factor": factor,
        "layernorm_epsilon": reader.number("layernorm_epsilon"),
        "max_position_embeddings": reader.integer("max_position_embeddings"),
        "sliding_window": _window(reader, window),
        "hybrid_layer_pattern": reader.pattern("hybrid_layer_pattern", layers),
        "moe_layer_freq": reader.pattern("moe_layer_freq", layers),
        "n_routed_experts": reader.integer("n_routed_experts"),
        "num_experts_per_tok": reader.integer("num_experts_per_tok"),
        "moe_intermediate_size": reader.integer("moe_intermediate_size"),
        "norm_topk_prob": reader.flag("norm_topk_prob", True),
        "routed_scaling_factor": reader.number("routed_scaling_factor", 1.0),
        "attention_value_scale": reader.number("attention_value_scale", 1.0),
        "add_swa_attention_sink_bias": reader.flag("add_swa_attention_sink_bias", False),
        "add_full_attention_sink_bias": reader.flag("add_full_attention_sink_bias", False),
        "tie_word_embeddings": reader.flag("tie_word_embeddings", False),
        # Most V2 releases do not state it; a checkpoint's tensors are counted in any case.
        "num_mtp_layers": reader.integer("num_nextn_predict_layers", 0),
        "eos_token_ids": reader.ids("eos_token_id"),
        "quantization": _quantization(reader),
    }


def _read_mimo(reader: _Reader, window: int | None) -> dict[str, Any]:
    if window is not None:
        raise ConfigError("MiMo-7B has no sliding window to override")
    layers, heads = reader.integer("num_hidden_layers"), reader.integer("num_attention_heads")
    hidden = reader.integer("hidden_size")
    head_dim = reader.integer("head_dim", max(1, hidden // max(1, heads)))
    reader.must_be("hidden_act", "silu", why="MiMo-7B uses SwiGLU")
    reader.must_be("use_sliding_window", False, why="MiMo-7B attends to everything")
    reader.must_be("rope_scaling", why="MiMo-7B scales no rotary angle")
    reader.must_be("use_mrope", False, why="text positions are one-dimensional")
    mtp = reader.integer("num_nextn_predict_layers", 0)
    return {
        "vocab_size": reader.integer("vocab_size"),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": reader.integer("num_key_value_heads"),
        "head_dim": head_dim,
        "v_head_dim": head_dim,
        "intermediate_size": reader.integer("intermediate_size"),
        "rope_theta": reader.number("rope_theta"),
        "layernorm_epsilon": reader.number("rms_norm_eps"),
        "max_position_embeddings": reader.integer("max_position_embeddings"),
        "hybrid_layer_pattern": (0,) * layers,
        "moe_layer_freq": (0,) * layers,
        "attention_bias": reader.flag("attention_bias", True),
        "tie_word_embeddings": reader.flag("tie_word_embeddings", False),
        "num_mtp_layers": mtp,
        "eos_token_ids": reader.ids("eos_token_id"),
        "quantization": _quantization(reader),
    }


def _window(reader: _Reader, override: int | None) -> int:
    """W. `sliding_window_size` counts the tokens before the query, so W is one more."""
    spellings = {
        key: value
        for key in ("sliding_window_size", "sliding_window", "attention_chunk_size")
        if (value := reader.raw(key)) is not None
    }
    for key, value in spellings.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{key} = {value!r} is not a positive integer")
    if override is not None:
        return override
    if not spellings:
        raise ConfigError("config.json lacks 'sliding_window_size'")
    if len(set(spellings.values())) > 1:
        raise ConfigError(
            f"the window is spelled differently: {spellings}", "choose W with --window"
        )
    return int(next(iter(spellings.values()))) + 1


def _check_rope_parameters(raw: Any, theta: float, factor: float) -> None:
    """V2.5 repeats theta and factor inside `rope_parameters`; they must agree."""
    if raw is None:
        return
    if not isinstance(raw, Mapping):
        raise ConfigError("rope_parameters is not an object")
    expected: dict[str, Any] = {
        "rope_theta": theta,
        "partial_rotary_factor": factor,
        "rope_type": "default",
        "type": "default",
    }
    for key, value in raw.items():
        if key not in expected or value != expected[key]:
            raise ConfigError(f"rope_parameters.{key} = {value!r} is not supported")


def _quantization(reader: _Reader) -> QuantizationConfig:
    raw = reader.raw("quantization_config")
    if raw is None:
        return QuantizationConfig()
    if not isinstance(raw, Mapping):
        raise ConfigError("quantization_config is not an object")
    known = {
        "quant_method",
        "fmt",
        "activation_scheme",
        "weight_block_size",
        "ignored_layers",
        "modules_to_not_convert",
        "store_dtype",
        "mxfp4_block_size",
    }
    if unknown := sorted(set(raw) - known):
        raise ConfigError(f"quantization_config has unknown keys {unknown}")
    if raw.get("quant_method") != "fp8":
        raise ConfigError(f"quant_method {raw.get('quant_method')!r} is not supported, only fp8")
    if raw.get("fmt", "e4m3") != "e4m3":
        raise ConfigError(f"fp8 format {raw['fmt']!r} is not supported, only e4m3")
    if raw.get("activation_scheme", "dynamic") != "dynamic":
        raise ConfigError("static activation scales are not supported")
    block = raw.get("weight_block_size", [128, 128])
    if (
        not isinstance(block, list)
        or len(block) != 2
        or any(isinstance(b, bool) or not isinstance(b, int) or not 1 <= b <= 65536 for b in block)
    ):
        raise ConfigError(f"weight_block_size {block!r} is not two positive integers")
    stated = raw.get("store_dtype") or "fp8"
    if stated not in ("fp8", "mxfp4"):
        raise ConfigError(f"store_dtype {stated!r} is not supported, only fp8 and mxfp4")
    store: Literal["fp8", "mxfp4"] = "mxfp4" if stated == "mxfp4" else "fp8"
    if raw.get("mxfp4_block_size", 32) != 32:
        raise ConfigError(f"mxfp4_block_size {raw['mxfp4_block_size']!r} is not 32")
    ignored = raw.get("ignored_layers") or raw.get("modules_to_not_convert") or []
    if not isinstance(ignored, list) or any(not isinstance(name, str) for name in ignored):
        raise ConfigError("quantization_config.ignored_layers is not a list of names")
    return QuantizationConfig("fp8", (block[0], block[1]), store, tuple(ignored))


def _validate(c: MimoConfig) -> None:
    if c.family not in ("mimo_v2", "mimo"):
        raise ConfigError(f"model family {c.family!r} is not known")
    if not isinstance(c.quantization, QuantizationConfig):
        raise ConfigError("quantization is not a QuantizationConfig")
    optional = {"n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"}
    optional |= {"num_mtp_layers"}
    for name, limit in _LIMITS.items():
        value = getattr(c, name)
        low = 0 if name in optional else 1
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= limit:
            raise ConfigError(f"{name} = {value!r} is outside {low}..{limit}")
    for name in ("rope_theta", "swa_rope_theta", "layernorm_epsilon", "attention_value_scale"):
        value = getattr(c, name)
        if not math.isfinite(value) or value <= 0:
            raise ConfigError(f"{name} = {value!r} is not a positive number")
    if not math.isfinite(c.routed_scaling_factor):
        raise ConfigError(f"routed_scaling_factor = {c.routed_scaling_factor!r}")
    for name in ("num_key_value_heads", "swa_num_key_value_heads"):
        if c.num_attention_heads % getattr(c, name):
            raise ConfigError(
                f"{name} = {getattr(c, name)} does not divide {c.num_attention_heads} query heads"
            )
    if not 0 < c.partial_rotary_factor <= 1 or c.rotary_dim < 2 or c.rotary_dim % 2:
        raise ConfigError(
            f"partial_rotary_factor {c.partial_rotary_factor} of head_dim {c.head_dim} "
            f"gives {c.rotary_dim} rotary dims, not an even number >= 2"
        )
    for name in ("hybrid_layer_pattern", "moe_layer_freq"):
        pattern = getattr(c, name)
        if len(pattern) != c.num_hidden_layers or any(v not in (0, 1) for v in pattern):
            raise ConfigError(f"{name} is not {c.num_hidden_layers} entries of 0 or 1")
    if any(c.moe_layer_freq):
        if not 1 <= c.num_experts_per_tok <= c.n_routed_experts:
            raise ConfigError(
                f"{c.num_experts_per_tok} experts per token out of {c.n_routed_experts}"
            )
        if c.moe_intermediate_size < 1:
            raise ConfigError("moe_intermediate_size is missing")
    if c.family == "mimo" and any(c.hybrid_layer_pattern):
        raise ConfigError("MiMo-7B has no sliding layers")
    if any(i < 0 or i >= c.vocab_size for i in c.eos_token_ids):
        raise ConfigError(f"eos ids {c.eos_token_ids} exceed the vocabulary of {c.vocab_size}")
