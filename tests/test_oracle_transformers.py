"""The reference against transformers, live: f32, eager attention, same weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import random_weights, tiny_config, tiny_mimo7b_config

import mimo_edge
from mimo_edge.config import MimoConfig
from mimo_edge.runtimes.reference import ReferenceBackend, full_logits, mtp_full_logits

pytestmark = pytest.mark.oracle

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hf_model import hf_logits, hf_model, hf_mtp_logits, load_hf  # noqa: E402

# Random tiny models agree to about 1e-6; the project promises 1e-4 of the largest logit.
TIGHT, PROMISED = 1e-5, 1e-4
NANO = Path(mimo_edge.__file__).parent / "nano" / "checkpoint"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_close(ours: Any, theirs: Any, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()
    assert np.array_equal(ours.argmax(-1), theirs.argmax(-1))


# name -> (config, tokens). transformers fixes sliding kv heads = 2 x global, sinks on sliding.
CONFIGS: dict[str, tuple[MimoConfig, int]] = {
    "window 9, 3 of 8 experts": (tiny_config(), 80),
    "window 3, 1 of 5 experts, odd sizes": (
        tiny_config(
            vocab_size=131,
            hidden_size=52,
            num_attention_heads=6,
            num_key_value_heads=3,
            swa_num_key_value_heads=6,
            head_dim=18,
            v_head_dim=7,
            intermediate_size=75,
            sliding_window=3,
            n_routed_experts=5,
            num_experts_per_tok=1,
            moe_intermediate_size=13,
        ),
        37,
    ),
    "window 40, all experts, value heads wider": (
        tiny_config(
            num_attention_heads=8,
            num_key_value_heads=2,
            swa_num_key_value_heads=4,
            head_dim=12,
            v_head_dim=20,
            sliding_window=40,
            n_routed_experts=6,
            num_experts_per_tok=6,
            layernorm_epsilon=1e-6,
        ),
        170,
    ),
    "real layer pattern, 4 of 16 experts, tied": (
        tiny_config(
            num_hidden_layers=8,
            hybrid_layer_pattern=(0, 1, 1, 1, 1, 0, 1, 1),
            moe_layer_freq=(0, 1, 1, 1, 1, 1, 1, 1),
            sliding_window=17,
            n_routed_experts=16,
            num_experts_per_tok=4,
            tie_word_embeddings=True,
        ),
        90,
    ),
    "sliding only, full rotary, other scales": (
        tiny_config(
            hybrid_layer_pattern=(1, 1, 1, 1),
            moe_layer_freq=(1, 0, 1, 0),
            partial_rotary_factor=1.0,
            attention_value_scale=0.612,
            routed_scaling_factor=2.5,
            norm_topk_prob=False,
            swa_rope_theta=500.0,
            sliding_window=5,
        ),
        41,
    ),
    "global only, dense only, one kv head": (
        tiny_config(hybrid_layer_pattern=(0, 0, 0, 0), moe_layer_freq=(0, 0, 0, 0)),
        60,
    ),
    "long: positions past 2,000": (
        tiny_config(
            num_hidden_layers=2,
            hybrid_layer_pattern=(0, 1),
            moe_layer_freq=(0, 1),
            hidden_size=32,
            sliding_window=33,
        ),
        2100,
    ),
    "mimo 7b": (tiny_mimo7b_config(), 70),
    "mimo 7b, one kv head, odd sizes, tied": (
        tiny_mimo7b_config(
            vocab_size=89,
            hidden_size=44,
            num_attention_heads=6,
            num_key_value_heads=1,
            head_dim=14,
            v_head_dim=14,
            intermediate_size=61,
            tie_word_embeddings=True,
        ),
        50,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_random_models(name: str) -> None:
    config, length = CONFIGS[name]
    weights = random_weights(config, seed=len(name))
    ids = np.random.default_rng(1).integers(0, config.vocab_size, length)
    theirs, residual = hf_logits(hf_model(weights), ids)
    assert_close(full_logits(weights, ids), theirs, TIGHT)

    backend = ReferenceBackend(weights)
    cache = backend.new_cache(length, verify_rows=4)
    logits, hidden = [], []
    wrong = (ids + 1) % config.vocab_size
    sizes = iter([17, 1, 4, 3, 2, 4, 1, 1, 4] * length)  # prefill, decode, verify with rollback
    while cache.length < length:
        start, size = cache.length, min(next(sizes), length - cache.length)
        keep = size if size > 4 else max(1, size - 2)
        batch = np.concatenate([ids[start : start + keep], wrong[start + keep : start + size]])
        got = backend.forward(batch, cache, logits_rows=size, hidden_rows=size)
        cache.rollback(size - keep)
        logits.append(got.logits[:keep])
        hidden.append(got.hidden[:keep])
    assert_close(np.concatenate(logits), theirs, TIGHT)
    ours = np.concatenate(hidden)
    assert np.abs(ours - residual).max() <= TIGHT * np.abs(residual).max()

    for depth in range(config.num_mtp_layers):
        draft = hf_mtp_logits(weights, ids, residual, depth)
        assert_close(mtp_full_logits(weights, ids, depth), draft, TIGHT)


# --- mimo-nano, read from its files by a few independent lines ---


def dequantised(folder: Path) -> dict[str, Any]:
    """Every tensor of the checkpoint in f32: fp8 weights times their 128x128 block scales."""
    from safetensors.torch import load_file

    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    raw: dict[str, Any] = {}
    for shard in sorted(set(index.values())):
        raw |= load_file(folder / shard)
    assert set(raw) == set(index)
    out = {}
    for name, tensor in raw.items():
        if name.endswith("_scale_inv"):
            continue
        value = tensor.float()
        if tensor.dtype == torch.float8_e4m3fn:
            scale = raw[name + "_scale_inv"]
            rows, cols = value.shape
            scale = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
            value = value * scale
        out[name] = value
    return out


def nano_prompt(folder: Path) -> Any:
    """Token ids of a real conversation, several windows long."""
    from tokenizers import Tokenizer

    tools = "".join(
        f"<function><name>{name}</name><description>{text}</description><parameters>"
        f"<parameter><name>{arg}</name><type>string</type></parameter></parameters></function>\n"
        for name, text, arg in [
            ("set_light", "Change the brightness of the lights in a room", "room"),
            ("guest_wifi", "Turn the guest wifi on or off for some time", "duration"),
            ("navigate", "Start navigation to a place", "destination"),
            ("set_alarm", "Set an alarm on the phone", "time"),
            ("climate", "Set the temperature of a zone of the car", "temperature"),
        ]
    )
    text = (
        "<|im_start|>system\nYou are MiMo, a helpful assistant.\n"
        f"<tools>\n{tools}</tools><|im_end|>"
        "<|im_start|>user\n把客厅的灯调暗一点<|im_end|><|im_start|>assistant\n<think></think>"
        "<tool_call>\n<function=set_light>\n<parameter=room>客厅</parameter>\n</function>\n"
        "</tool_call><|im_end|><|im_start|>user\nturn on guest wifi for two hours<|im_end|>"
        "<|im_start|>assistant\n<think></think>"
    )
    return np.array(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids)


@pytest.mark.skipif(not NANO.is_dir(), reason="the mimo-nano checkpoint is not in this checkout")
def test_mimo_nano() -> None:
    from mimo_edge.export.checkpoint import Checkpoint
    from mimo_edge.export.weights import CheckpointWeights

    weights = CheckpointWeights(Checkpoint.open(NANO))
    config = weights.config
    stated = json.loads((NANO / "config.json").read_text())
    assert config.sliding_window == stated["sliding_window_size"] + 1
    prompt = nano_prompt(NANO)
    assert len(prompt) > 2 * config.sliding_window

    raw = dequantised(NANO)
    mtp = {name: raw.pop(name) for name in list(raw) if name.startswith("model.mtp.")}
    theirs_model = load_hf(config, raw)

    # greedy continuation through the cache, then one pass of transformers over all of it
    backend = ReferenceBackend(weights)
    cache = backend.new_cache(len(prompt) + 24)
    got = backend.forward(prompt, cache, logits_rows=len(prompt), hidden_rows=len(prompt))
    ids, logits, hidden = prompt.tolist(), [got.logits], [got.hidden]
    for _ in range(24):
        ids.append(int(logits[-1][-1].argmax()))
        got = backend.forward(np.array(ids[-1:]), cache, hidden_rows=1)
        logits.append(got.logits)
        hidden.append(got.hidden)
    theirs, residual = hf_logits(theirs_model, np.array(ids))
    assert_close(np.concatenate(logits), theirs, PROMISED)
    ours = np.concatenate(hidden)
    assert np.abs(ours - residual).max() <= PROMISED * np.abs(residual).max()

    assert config.num_mtp_layers == 3
    for depth in range(3):
        draft = nano_mtp(config, raw, mtp, ids, residual, depth)
        count = len(ids) - 1 - depth
        rows = backend.mtp_rows(depth, np.array(ids[1 + depth :]), ours[:count], 0, cache)
        assert_close(rows, draft, PROMISED)
    backend.close()


def nano_mtp(
    config: MimoConfig, raw: dict[str, Any], mtp: dict[str, Any], ids: Any, hidden: Any, depth: int
) -> Any:
    """The MTP block in plain torch from the checkpoint's own names and spec section 3.1."""
    c, f = config, torch.nn.functional
    w = {
        n.removeprefix(f"model.mtp.layers.{depth}."): t for n, t in mtp.items() if f".{depth}." in n
    }

    def norm(x: Any, name: str) -> Any:
        return f.rms_norm(x, (c.hidden_size,), w[name + ".weight"], c.layernorm_epsilon)

    tokens = torch.tensor(ids[1 + depth :])
    n, g, d = len(tokens), c.swa_num_key_value_heads, c.head_dim
    e = norm(raw["model.embed_tokens.weight"][tokens], "enorm")
    h = norm(torch.from_numpy(hidden[:n]), "hnorm")
    z = torch.cat([e, h], -1) @ w["eh_proj.weight"].T

    x = norm(z, "input_layernorm")
    heads = {
        part: (x @ w[f"self_attn.{part}_proj.weight"].T).reshape(n, count, -1).transpose(0, 1)
        for part, count in (("q", c.num_attention_heads), ("k", g), ("v", g))
    }
    angle = torch.outer(
        torch.arange(n, dtype=torch.float64),
        c.swa_rope_theta ** (-torch.arange(0, c.rotary_dim, 2, dtype=torch.float64) / c.rotary_dim),
    )
    turn = torch.polar(torch.ones_like(angle), angle)
    for part in "qk":
        head = heads[part].clone()
        a, b = head[..., : c.rotary_dim // 2], head[..., c.rotary_dim // 2 : c.rotary_dim]
        turned = torch.complex(a.double(), b.double()) * turn
        head[..., : c.rotary_dim] = torch.cat([turned.real, turned.imag], -1).float()
        heads[part] = head
    group = c.num_attention_heads // g
    keys, values = (heads[part].repeat_interleave(group, 0) for part in "kv")
    behind = torch.arange(n)[:, None] - torch.arange(n)
    hidden_rows = (behind < 0) | (behind > c.sliding_window - 1)
    scores = (heads["q"] @ keys.transpose(1, 2) / d**0.5).masked_fill(hidden_rows, -torch.inf)
    sink = w["self_attn.attention_sink_bias"][:, None, None].expand(-1, n, 1)
    share = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    o = share @ (values * c.attention_value_scale)
    z = z + o.transpose(0, 1).reshape(n, -1) @ w["self_attn.o_proj.weight"].T

    y = norm(z, "pre_mlp_layernorm")
    gate, up, down = (w[f"mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
    z = z + (f.silu(y @ gate.T) * (y @ up.T)) @ down.T
    return (norm(z, "final_layernorm") @ raw["lm_head.weight"].T).numpy()
