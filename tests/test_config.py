"""MimoConfig: the real models, every refused key and value, and the way through the manifest."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from checkpoint_factory import KINDS, Kind, config_of, hf_config
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config, tiny_mimo7b_config

from mimo_edge.config import IGNORED_KEYS, MimoConfig, QuantizationConfig
from mimo_edge.errors import ConfigError, UsageError
from mimo_edge.known_models import KNOWN_MODELS, known_model

CONFIGS = Path(__file__).parent.parent / "edge" / "configs"


def flash(**changes: Any) -> dict[str, Any]:
    return hf_config(config_of("flash"), "flash") | changes


def mimo7b(**changes: Any) -> dict[str, Any]:
    return hf_config(config_of("mimo7b"), "mimo7b") | changes


@pytest.mark.parametrize("kind", KINDS)
def test_reads_every_kind(kind: Kind) -> None:
    config = config_of(kind)
    read = MimoConfig.from_hf(hf_config(config, kind), num_mtp_layers=config.num_mtp_layers)
    assert replace(read, eos_token_ids=config.eos_token_ids) == config


# --- The released models (spec sections 1.1 and 1.2) --------------------------------------


def test_flash_is_the_published_model() -> None:
    c = known_model("MiMo-V2-Flash")
    assert (c.vocab_size, c.hidden_size, c.num_hidden_layers) == (152576, 4096, 48)
    assert [s.index for s in c.layers if not s.sliding] == [0, 5, 11, 17, 23, 29, 35, 41, 47]
    assert [s.index for s in c.layers if not s.moe] == [0]
    assert c.rotary_dim == 64
    assert c.sliding_window == 129  # sliding_window_size 128 counts the tokens before the query
    assert c.eos_token_ids == (151645, 151643)
    full, sliding, mtp = c.layer(5), c.layer(6), c.layer(50)
    assert (full.num_key_value_heads, full.rope_theta, full.window, full.sinks) == (
        4, 5e6, None, False,
    )  # fmt: skip
    assert (sliding.num_key_value_heads, sliding.rope_theta, sliding.window, sliding.sinks) == (
        8, 1e4, 129, True,
    )  # fmt: skip
    assert mtp == replace(sliding, index=50, moe=False)
    with pytest.raises(ConfigError, match="layer 51 of a model with 48 layers and 3 MTP"):
        c.layer(51)


def test_the_other_releases() -> None:
    v25, v26, small = (known_model(n) for n in KNOWN_MODELS[1:])
    base = known_model("MiMo-V2-Flash")
    same = {f.name for f in fields(base)} - {
        "rope_theta", "max_position_embeddings", "fused_qkv",
    }  # fmt: skip
    assert all(getattr(v25, name) == getattr(base, name) for name in same)
    assert (v25.rope_theta, v25.max_position_embeddings, v25.fused_qkv) == (1e7, 1048576, True)
    assert v26.layernorm_epsilon == 1e-6
    assert v26.quantization.expert_store == "mxfp4"
    assert (small.family, small.attention_bias, small.num_mtp_layers) == ("mimo", True, 1)
    assert (small.head_dim, small.rotary_dim, small.rope_theta) == (128, 128, 640_000.0)
    assert all(s.window is None and not s.moe for s in (*small.layers, small.layer(36)))


def parameters(c: MimoConfig) -> int:
    """Number of weights, counted from the shapes."""
    m, total = c.hidden_size, c.vocab_size * c.hidden_size * 2 + c.hidden_size
    for i in range(c.num_hidden_layers + c.num_mtp_layers):
        s = c.layer(i)
        q, kv = c.num_attention_heads, s.num_key_value_heads
        qkv = (q + kv) * c.head_dim + kv * c.v_head_dim
        total += m * (qkv + q * c.v_head_dim + 2)
        total += qkv if c.attention_bias else 0
        total += q if s.sinks else 0
        if s.moe:
            total += c.n_routed_experts * (3 * m * c.moe_intermediate_size + m + 1)
        else:
            total += 3 * m * c.intermediate_size
        if i >= c.num_hidden_layers:
            total += 2 * m * m + 3 * m
    return total


@pytest.mark.parametrize(
    ("name", "billions"), [("MiMo-V2-Flash", 309.77), ("MiMo-V2.5", 309.77), ("MiMo-7B", 7.83)]
)
def test_parameter_counts_are_the_published_ones(name: str, billions: float) -> None:
    assert round(parameters(known_model(name)) / 1e9, 2) == billions


def test_mtp_block_has_the_published_size() -> None:
    c = known_model("MiMo-V2-Flash")
    with_mtp, without = parameters(c), parameters(replace(c, num_mtp_layers=0))
    small = 5 * c.hidden_size + c.num_attention_heads  # five norms and the sinks
    assert (with_mtp - without) / 3 - small == 329_252_864  # the matrices: spec section 3.1


def test_unknown_model_name() -> None:
    with pytest.raises(UsageError, match="known: MiMo-V2-Flash"):
        known_model("../MiMo-7B")
    assert {p.stem for p in CONFIGS.glob("*.json")} == set(KNOWN_MODELS)


@pytest.mark.oracle
def test_transformers_reads_flash_the_same_way() -> None:
    """transformers' own config class on our file: same geometry, same window."""
    transformers = pytest.importorskip("transformers")
    raw = json.loads((CONFIGS / "MiMo-V2-Flash.json").read_text())
    unused = ("architectures", "quantization_config", "rope_scaling")  # the last is null
    theirs = transformers.MiMoV2FlashConfig(**{k: v for k, v in raw.items() if k not in unused})
    ours = known_model("MiMo-V2-Flash")
    assert theirs.sliding_window == ours.sliding_window
    kinds = ["sliding_attention" if s.sliding else "full_attention" for s in ours.layers]
    assert list(theirs.layer_types) == kinds
    for name in ("hidden_size", "head_dim", "v_head_dim", "n_routed_experts", "vocab_size"):
        assert getattr(theirs, name) == getattr(ours, name), name


# --- What must be refused -----------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str | None]] = [
    ({"surprise": 1, "attention_k_scale": 2}, r"\['attention_k_scale', 'surprise'\]"),
    ({"num_hidden_layers": 0, "hybrid_layer_pattern": [], "moe_layer_freq": []}, "outside 1"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
    ({"num_hidden_layers": 10**300}, "an integer of 997 bits"),
    ({"num_hidden_layers": 4.0}, "not an integer"),
    ({"num_hidden_layers": True}, "not an integer"),
    ({"num_hidden_layers": None}, "lacks 'num_hidden_layers'"),
    ({"hidden_size": -64}, "hidden_size = -64"),
    ({"hidden_size": "64"}, "not an integer"),
    ({"vocab_size": 1 << 40}, "vocab_size"),
    ({"n_routed_experts": 1 << 20}, "n_routed_experts"),
    ({"num_experts_per_tok": 9}, "9 experts per token out of 8"),
    ({"num_experts_per_tok": 0}, "0 experts per token"),
    ({"moe_intermediate_size": 0}, "moe_intermediate_size is missing"),
    ({"num_key_value_heads": 3}, "does not divide 4 query heads"),
    ({"swa_num_key_value_heads": 8}, "does not divide 4 query heads"),
    ({"swa_num_attention_heads": 8}, "swa_num_attention_heads = 8"),
    ({"swa_head_dim": 32}, "swa_head_dim = 32"),
    ({"swa_v_head_dim": 32}, "swa_v_head_dim = 32"),
    ({"hybrid_layer_pattern": [0, 1, 1]}, "has 3 entries for 4 layers"),
    ({"hybrid_layer_pattern": [0, 1, 2, 0]}, "not a list of 0 and 1"),
    ({"hybrid_layer_pattern": [False, 1, 1, 0]}, "not a list of 0 and 1"),
    ({"moe_layer_freq": 1}, "not a list of 0 and 1"),
    ({"rope_theta": 0}, "rope_theta = 0.0 is not a positive"),
    ({"rope_theta": 1e999}, "rope_theta = inf"),
    ({"rope_theta": 10**400}, "too large"),
    ({"rope_theta": 7}, None),  # allowed: only sanity is checked
    ({"swa_rope_theta": "1e4"}, "not a number"),
    ({"layernorm_epsilon": -1e-5}, "layernorm_epsilon"),
    ({"layernorm_epsilon": math.nan}, "layernorm_epsilon"),
    ({"partial_rotary_factor": 0.0}, "0 rotary dims"),
    ({"partial_rotary_factor": 1.5}, "36 rotary dims"),
    ({"partial_rotary_factor": 0.3}, "7 rotary dims"),
    ({"attention_value_scale": 0}, "attention_value_scale"),
    ({"routed_scaling_factor": math.inf}, "routed_scaling_factor"),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
    ({"rope_parameters": {"rope_theta": 1.0}}, "rope_parameters.rope_theta"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type"),
    ({"rope_parameters": [1]}, "rope_parameters is not an object"),
    ({"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
    ({"topk_method": "greedy"}, "topk_method"),
    ({"n_group": 8}, "n_group = 8"),
    ({"topk_group": 4}, "topk_group = 4"),
    ({"n_shared_experts": 1}, "n_shared_experts = 1"),
    ({"attention_bias": True}, "attention_bias = True"),
    ({"use_qk_norm": True}, "use_qk_norm"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"sliding_window": 16}, "spelled differently"),
    ({"sliding_window": 0}, "sliding_window = 0 is not a positive"),
    ({"sliding_window": "8"}, "not a positive integer"),
    (dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size")), "lacks"),
    ({"eos_token_id": 97}, "exceed the vocabulary"),
    ({"eos_token_id": [1, -2]}, "not a token id"),
    ({"eos_token_id": "x"}, "not a token id"),
    ({"tie_word_embeddings": 1}, "not true or false"),
    ({"architectures": "MiMoV2FlashForCausalLM"}, "not a list"),
    ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, "not a MiMo text model"),
    ({"architectures": [["x"]], "model_type": ["y"]}, "not a MiMo text model"),
    ({"attention_projection_layout": "rows"}, "attention_projection_layout 'rows'"),
    ({"num_nextn_predict_layers": 99}, "num_nextn_predict_layers|num_mtp_layers"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[str(c)[:60] for c, _ in REFUSED])
def test_refuses(changes: dict[str, Any], message: str | None) -> None:
    if message is None:
        MimoConfig.from_hf(flash(**changes))
        return
    with pytest.raises(ConfigError, match=message) as caught:
        MimoConfig.from_hf(flash(**changes))
    assert len(str(caught.value)) < 1000


QUANTIZATION: list[tuple[Any, str]] = [
    ([], "not an object"),
    ({"quant_method": "awq"}, "quant_method 'awq'"),
    ({"quant_method": "fp8", "fmt": "e5m2"}, "'e5m2'"),
    ({"quant_method": "fp8", "activation_scheme": "static"}, "static"),
    ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
    ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size"),
    ({"quant_method": "fp8", "weight_block_size": None}, "weight_block_size"),
    ({"quant_method": "fp8", "store_dtype": "nvfp4"}, "store_dtype 'nvfp4'"),
    ({"quant_method": "fp8", "mxfp4_block_size": 16}, "mxfp4_block_size 16"),
    ({"quant_method": "fp8", "ignored_layers": [1]}, "list of names"),
    ({"quant_method": "fp8", "zero_point": True}, "zero_point"),
]


@pytest.mark.parametrize(("raw", "message"), QUANTIZATION, ids=[m for _, m in QUANTIZATION])
def test_refuses_quantization(raw: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MimoConfig.from_hf(flash(quantization_config=raw))


MIMO7B: list[tuple[dict[str, Any], str]] = [
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"use_mrope": True}, "use_mrope"),
    ({"rope_scaling": {"factor": 2}}, "rope_scaling"),
    ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
    ({"num_attention_heads": 0}, "num_attention_heads"),
    ({"v_head_dim": 16}, r"\['v_head_dim'\]"),
    ({"rms_norm_eps": None}, "lacks 'rms_norm_eps'"),
]


@pytest.mark.parametrize(("changes", "message"), MIMO7B, ids=[m for _, m in MIMO7B])
def test_refuses_mimo7b(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MimoConfig.from_hf(mimo7b(**changes))


def test_mimo7b_has_no_window() -> None:
    with pytest.raises(ConfigError, match="no sliding window to override"):
        MimoConfig.from_hf(mimo7b(), window=128)


def test_not_an_object() -> None:
    with pytest.raises(ConfigError, match="holds a list"):
        MimoConfig.from_hf([])  # type: ignore[arg-type]


# --- What must be understood --------------------------------------------------------------


def test_keys_without_effect_are_ignored() -> None:
    plain = MimoConfig.from_hf(flash())
    for key in IGNORED_KEYS:
        if key in flash() or key in ("rope_parameters", "use_sliding_window"):
            continue  # those are set or checked by their own tests
        assert MimoConfig.from_hf(flash(**{key: 1})) == plain, key
    assert MimoConfig.from_hf(flash(odd=1), ignore_keys=["odd"]) == plain


def test_window_follows_transformers() -> None:
    assert MimoConfig.from_hf(flash()).sliding_window == 9  # sliding_window_size 8, plus the query
    only = {"sliding_window": None, "attention_chunk_size": None}
    assert MimoConfig.from_hf(flash(**only)).sliding_window == 9
    assert MimoConfig.from_hf(flash(), window=8).sliding_window == 8
    assert MimoConfig.from_hf(flash(sliding_window=16), window=8).sliding_window == 8
    with pytest.raises(ConfigError, match="sliding_window = 0"):
        MimoConfig.from_hf(flash(), window=0)


def test_layout_and_mtp_count() -> None:
    assert not MimoConfig.from_hf(flash()).fused_qkv
    fused = flash(architectures=["MiMoV2ForCausalLM"], model_type="mimo_v2")
    assert MimoConfig.from_hf(fused).fused_qkv
    assert not MimoConfig.from_hf(fused | {"attention_projection_layout": "split"}).fused_qkv
    by_type = flash(architectures=None, model_type="mimo_v2")
    assert MimoConfig.from_hf(by_type).fused_qkv
    stated = flash(num_nextn_predict_layers=3)
    assert MimoConfig.from_hf(flash()).num_mtp_layers == 0
    assert MimoConfig.from_hf(stated).num_mtp_layers == 3
    assert MimoConfig.from_hf(stated, num_mtp_layers=1).num_mtp_layers == 1
    assert MimoConfig.from_hf(mimo7b(), num_mtp_layers=0).num_mtp_layers == 0


# --- The way through the manifest ---------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_through_json(kind: Kind) -> None:
    config = config_of(kind)
    assert MimoConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"extra": 1}, r"unknown model config fields \['extra'\]"),
    ({"family": "llama"}, "family 'llama'"),
    ({"hidden_size": "64"}, "hidden_size"),
    ({"rope_theta": "1"}, "malformed"),
    ({"hybrid_layer_pattern": 3}, "malformed"),
    ({"hybrid_layer_pattern": [0, 1]}, "not 4 entries"),
    ({"quantization": {"bits": 4}}, "malformed"),
    ({"quantization": 3}, "malformed"),
    ({"eos_token_ids": ["a"]}, "malformed"),
    ({"eos_token_ids": [-1]}, "eos ids"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_FIELDS, ids=[str(c) for c, _ in BAD_FIELDS])
def test_from_dict_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MimoConfig.from_dict(tiny_config().to_dict() | changes)


def test_from_dict_needs_every_field() -> None:
    raw = tiny_config().to_dict()
    del raw["head_dim"]
    with pytest.raises(ConfigError, match="head_dim"):
        MimoConfig.from_dict(raw)


def test_direct_construction_is_checked() -> None:
    with pytest.raises(ConfigError, match="no sliding layers"):
        tiny_mimo7b_config(hybrid_layer_pattern=(0, 1, 0))
    with pytest.raises(ConfigError, match="quantization"):
        tiny_config(quantization={"quant_method": "fp8"})
    assert tiny_config(quantization=QuantizationConfig()).quantization.quant_method == "none"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(key=st.sampled_from(sorted(hf_config(config_of("v26"), "v26"))), value=JSON)
def test_any_value_is_read_or_refused(key: str, value: Any) -> None:
    """Whatever a key holds: a valid config or a ConfigError, nothing else."""
    raw = hf_config(config_of("v26"), "v26") | {key: value}
    try:
        config = MimoConfig.from_hf(raw)
    except ConfigError:
        return
    assert MimoConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
