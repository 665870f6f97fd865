"""The model once more, written from its definition: f64, one token and one head at a time.

No cache, no batching, nothing shared with runtimes/reference.py: rotation is a product of
complex numbers, the sink is one more score in a list, experts are summed token by token.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mimo_edge.config import LayerSpec
from mimo_edge.runtimes.base import Weights

Vector = Any  # f64 [n]


class NaiveModel:
    """`run` gives logits and residual rows of a sequence, `mtp` the teacher-forced MTP logits."""

    def __init__(self, weights: Weights) -> None:
        self.c, self.weights = weights.config, weights
        self.routes: dict[tuple[int, int], list[int]] = {}  # (layer, position) -> experts

    def w(self, name: str) -> Any:
        return self.weights.tensor(name).astype(np.float64)

    def embed(self, token: int) -> Vector:
        return self.weights.embedding(np.array([token], np.int32))[0].astype(np.float64)

    def norm(self, x: Vector, name: str) -> Vector:
        return x / np.sqrt(sum(v * v for v in x) / len(x) + self.c.layernorm_epsilon) * self.w(name)

    def rotated(self, head: Vector, position: int, theta: float) -> Vector:
        dims = self.c.rotary_dim
        out = head.copy()
        for d in range(dims // 2):
            turn = np.exp(1j * position * theta ** (-2 * d / dims))
            z = complex(head[d], head[d + dims // 2]) * turn
            out[d], out[d + dims // 2] = z.real, z.imag
        return out

    def project(self, p: str, part: str, x: Vector, heads: int) -> Any:
        y = self.w(f"{p}attn_{part}.weight") @ x
        if self.c.attention_bias:
            y = y + self.w(f"{p}attn_{part}.bias")
        return y.reshape(heads, -1)

    def attention(self, spec: LayerSpec, xs: list[Vector]) -> list[Vector]:
        c, p = self.c, f"blk.{spec.index}."
        kv = spec.num_key_value_heads
        q, k, v = [], [], []
        for i, x in enumerate(xs):
            heads = self.project(p, "q", x, c.num_attention_heads)
            q.append([self.rotated(h, i, spec.rope_theta) for h in heads])
            k.append([self.rotated(h, i, spec.rope_theta) for h in self.project(p, "k", x, kv)])
            v.append(self.project(p, "v", x, kv) * c.attention_value_scale)
        out = []
        for i in range(len(xs)):
            seen = [j for j in range(i + 1) if spec.window is None or i - j <= spec.window - 1]
            heads = []
            for n in range(c.num_attention_heads):
                g = n // (c.num_attention_heads // kv)
                scores = [float(q[i][n] @ k[j][g]) / np.sqrt(c.head_dim) for j in seen]
                if spec.sinks:
                    scores.append(float(self.w(p + "attn_sinks.weight")[n]))
                mass = np.exp(np.array(scores) - max(scores))
                share = mass / mass.sum()
                heads.append(sum(share[a] * v[j][g] for a, j in enumerate(seen)))
            out.append(self.w(p + "attn_output.weight") @ np.concatenate(heads))
        return out

    def swiglu(self, x: Vector, gate: Any, up: Any, down: Any) -> Vector:
        a = gate @ x
        return down @ (a / (1 + np.exp(-a)) * (up @ x))

    def feed_forward(self, spec: LayerSpec, x: Vector, position: int) -> Vector:
        c, p = self.c, f"blk.{spec.index}."
        if not spec.moe:
            return self.swiglu(x, *(self.w(f"{p}ffn_{n}.weight") for n in ("gate", "up", "down")))
        s = 1 / (1 + np.exp(-(self.w(p + "ffn_gate_inp.weight") @ x)))
        ranked = sorted(
            range(c.n_routed_experts),
            key=lambda e: (-(s[e] + self.w(p + "exp_probs_b.bias")[e]), e),
        )
        chosen = ranked[: c.num_experts_per_tok]
        self.routes[spec.index, position] = chosen
        total = sum(s[e] for e in chosen) + 1e-20 if c.norm_topk_prob else 1.0
        out = np.zeros(c.hidden_size)
        for e in chosen:
            matrices = [m.astype(np.float64) for m in self.weights.expert(spec.index, e)]
            out += s[e] / total * c.routed_scaling_factor * self.swiglu(x, *matrices)
        return out

    def block(self, index: int, hs: list[Vector]) -> list[Vector]:
        spec, p = self.c.layer(index), f"blk.{index}."
        mixed = self.attention(spec, [self.norm(h, p + "attn_norm.weight") for h in hs])
        hs = [h + a for h, a in zip(hs, mixed, strict=True)]
        return [
            h + self.feed_forward(spec, self.norm(h, p + "ffn_norm.weight"), i)
            for i, h in enumerate(hs)
        ]

    def head(self, hs: list[Vector], norm: str) -> Any:
        tied = self.c.tie_word_embeddings
        table = self.w("token_embd.weight" if tied else "output.weight")
        return np.stack([table @ self.norm(h, norm) for h in hs])

    def run(self, ids: Any) -> tuple[Any, list[Vector]]:
        hs = [self.embed(int(t)) for t in ids]
        for index in range(self.c.num_hidden_layers):
            hs = self.block(index, hs)
        return self.head(hs, "output_norm.weight"), hs

    def mtp(self, ids: Any, hs: list[Vector], depth: int) -> Any:
        """Row i: target state hs[i], token ids[i + 1 + depth]."""
        index = self.c.num_hidden_layers + depth
        p = f"blk.{index}."
        zs = []
        for i in range(len(ids) - 1 - depth):
            e = self.norm(self.embed(int(ids[i + 1 + depth])), p + "nextn.enorm.weight")
            h = self.norm(hs[i], p + "nextn.hnorm.weight")
            both = [h, e] if self.c.family == "mimo" else [e, h]
            zs.append(self.w(p + "nextn.eh_proj.weight") @ np.concatenate(both))
        return self.head(self.block(index, zs), p + "layer_output_norm.weight")
