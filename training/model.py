"""The MiMo-V2 architecture in PyTorch, arranged for fast training of a small model on a CPU.

Same mathematics as the reference (`mimo_edge.runtimes.reference`); what differs is the work
order: sliding attention runs in blocks of one window, experts run on tokens sorted by expert, and
the MTP blocks compute feed-forward and head only on rows that carry loss. Shapes: B batch, T
tokens, H query heads, G KV heads, D head dim, Dv value dim, E experts, K chosen, W window without
the current token (128).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class NanoConfig:
    """Sizes of mimo-nano; field names are those of the checkpoint's config.json."""

    vocab_size: int = 2048
    hidden_size: int = 256
    hybrid_layer_pattern: tuple[int, ...] = (0, 1, 1, 1, 1, 0)
    moe_layer_freq: tuple[int, ...] = (0, 1, 1, 1, 1, 1)
    num_attention_heads: int = 4
    num_key_value_heads: int = 1
    swa_num_key_value_heads: int = 2
    head_dim: int = 96
    v_head_dim: int = 64
    partial_rotary_factor: float = 0.334
    rope_theta: float = 5e6
    swa_rope_theta: float = 1e4
    sliding_window: int = 128
    intermediate_size: int = 512
    moe_intermediate_size: int = 256
    n_routed_experts: int = 16
    num_experts_per_tok: int = 2
    attention_value_scale: float = 0.707
    layernorm_epsilon: float = 1e-5

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    @classmethod
    def load(cls, path: Path) -> NanoConfig:
        """Read the fields we use from a config.json."""
        raw = json.loads(path.read_text("utf-8"))
        kept = {
            k: tuple(v) if isinstance(v, list) else v
            for k, v in raw.items()
            if k in cls.__dataclass_fields__
        }
        return cls(**kept)


class RMSNorm(nn.Module):
    """h * rsqrt(mean(h^2) + eps) * weight, statistics in f32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, self.eps)


def _matrix(*shape: int, gain: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * gain * shape[-1] ** -0.5)


def rope_table(length: int, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, f32 [T, dim/2]."""
    freq = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * freq
    return angle.cos().float(), angle.sin().float()


def rope(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first dims (NEOX pairs d, d + half) of x [B, T, heads, D]."""
    cos, sin = (t[None, :, None, :].to(x.dtype) for t in table)
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


class Attention(nn.Module):
    """Global attention (causal), or sliding attention over 129 tokens with one learned sink per
    head.
    """

    def __init__(self, c: NanoConfig, sliding: bool) -> None:
        super().__init__()
        self.c, self.sliding = c, sliding
        self.heads, self.groups = (
            c.num_attention_heads,
            c.swa_num_key_value_heads if sliding else c.num_key_value_heads,
        )
        self.q_proj = _matrix(self.heads * c.head_dim, c.hidden_size)
        self.k_proj = _matrix(self.groups * c.head_dim, c.hidden_size)
        self.v_proj = _matrix(self.groups * c.v_head_dim, c.hidden_size)
        self.o_proj = _matrix(c.hidden_size, self.heads * c.v_head_dim, gain=0.3)
        if sliding:
            self.attention_sink_bias = nn.Parameter(torch.zeros(self.heads))

    def forward(self, x: Tensor, tables: dict[bool, tuple[Tensor, Tensor]]) -> Tensor:
        c = self.c
        b, t, _ = x.shape
        qkv = F.linear(x, torch.cat((self.q_proj, self.k_proj, self.v_proj)))
        nq, nk = self.heads * c.head_dim, self.groups * c.head_dim
        q = rope(qkv[..., :nq].view(b, t, self.heads, c.head_dim), tables[self.sliding])
        k = rope(qkv[..., nq : nq + nk].view(b, t, self.groups, c.head_dim), tables[self.sliding])
        v = qkv[..., nq + nk :].view(b, t, self.groups, c.v_head_dim) * c.attention_value_scale
        out = self._window(q, k, v) if self.sliding else self._full(q, k, v)
        return F.linear(out, self.o_proj)

    def _full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, t, _, d = q.shape
        v = F.pad(v, (0, d - v.shape[-1]))  # equal head dims let the fused CPU kernel run
        k, v = (
            z.transpose(1, 2)
            .expand(b, self.groups, t, d)
            .repeat_interleave(self.heads // self.groups, 1)
            for z in (k, v)
        )
        o = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True)
        return o[..., : self.c.v_head_dim].transpose(1, 2).reshape(b, t, -1)

    def _window(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Query r of a block sees keys r .. r+128 of [previous block | this block]: 129 with itself.
        b, t, h, d = q.shape
        w, g = self.c.sliding_window, self.groups
        n, per = t // w, h // g
        qb = q.view(b, n, w, g, per, d).permute(0, 1, 3, 4, 2, 5).reshape(b, n, g, per * w, d)

        def pairs(z: Tensor) -> Tensor:
            z = z.view(b, n, w, g, z.shape[-1]).transpose(2, 3)
            before = F.pad(z[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
            return torch.cat((before, z), 3)

        scores = (qb @ pairs(k).transpose(-1, -2)).view(b, n, g, per, w, 2 * w).float() * d**-0.5
        r, col = torch.arange(w)[:, None], torch.arange(2 * w)[None]
        seen = (col >= r) & (col <= r + w)
        first = (seen & (col >= w))[None]
        mask = torch.cat((first, seen[None].expand(n - 1, w, 2 * w)))[None, :, None, None]
        scores = scores.masked_fill(~mask, float("-inf"))
        sink = self.attention_sink_bias.view(1, 1, g, per, 1, 1).expand(b, n, g, per, w, 1)
        p = torch.cat((scores, sink), -1).softmax(-1)[..., :-1].to(v.dtype)
        o = p.reshape(b, n, g, per * w, 2 * w) @ pairs(v)
        return o.view(b, n, g, per, w, -1).permute(0, 1, 4, 2, 3, 5).reshape(b, t, -1)


class Dense(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, c: NanoConfig) -> None:
        super().__init__()
        self.gate_proj = _matrix(c.intermediate_size, c.hidden_size)
        self.up_proj = _matrix(c.intermediate_size, c.hidden_size)
        self.down_proj = _matrix(c.hidden_size, c.intermediate_size, gain=0.3)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, torch.cat((self.gate_proj, self.up_proj))).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down_proj)


class MoE(nn.Module):
    """Sigmoid router with a selection bias (aux-loss-free), K of E experts, weights normalised
    over the chosen.
    """

    bias: Tensor

    def __init__(self, c: NanoConfig) -> None:
        super().__init__()
        self.k, self.n = c.num_experts_per_tok, c.n_routed_experts
        self.router = _matrix(self.n, c.hidden_size)
        self.register_buffer("bias", torch.zeros(self.n))
        self.gate_proj = _matrix(self.n, c.moe_intermediate_size, c.hidden_size)
        self.up_proj = _matrix(self.n, c.moe_intermediate_size, c.hidden_size)
        self.down_proj = _matrix(self.n, c.hidden_size, c.moe_intermediate_size, gain=0.3)
        self.load = torch.zeros(self.n)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        with torch.autocast("cpu", enabled=False):
            s = F.linear(x.float(), self.router.float()).sigmoid()
        chosen = (s.detach() + self.bias).topk(self.k, -1).indices
        weight = s.gather(-1, chosen)
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        expert = chosen.flatten()
        order = expert.argsort(stable=True)
        counts = torch.bincount(expert, minlength=self.n)
        self.load = counts.float()
        rows = order // self.k
        low = torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype
        inputs = x.to(low).index_select(0, rows).split(counts.tolist())
        gate_up = torch.cat((self.gate_proj, self.up_proj), 1).to(low).unbind(0)
        down = self.down_proj.to(low).unbind(0)
        outs = []
        for e, part in enumerate(inputs):
            if not len(part):
                continue
            gate, up = F.linear(part, gate_up[e]).chunk(2, -1)
            outs.append(F.linear(F.silu(gate) * up, down[e]))
        y = torch.cat(outs).float() * weight.flatten().index_select(0, order)[:, None]
        return torch.zeros_like(x, dtype=torch.float32).index_add(0, rows, y).view(shape)


class Layer(nn.Module):
    """One trunk layer: two residual lines."""

    def __init__(self, c: NanoConfig, i: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.layernorm_epsilon)
        self.self_attn = Attention(c, bool(c.hybrid_layer_pattern[i]))
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.layernorm_epsilon)
        self.mlp: Dense | MoE = MoE(c) if c.moe_layer_freq[i] else Dense(c)

    def forward(self, h: Tensor, tables: dict[bool, tuple[Tensor, Tensor]]) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h), tables)
        return h + self.mlp(self.post_attention_layernorm(h))


class MTP(nn.Module):
    """One prediction block: target hidden state H_i and token x_{i+1+k} give x_{i+2+k}."""

    def __init__(self, c: NanoConfig) -> None:
        super().__init__()
        self.enorm = RMSNorm(c.hidden_size, c.layernorm_epsilon)
        self.hnorm = RMSNorm(c.hidden_size, c.layernorm_epsilon)
        self.eh_proj = _matrix(c.hidden_size, 2 * c.hidden_size)
        self.input_layernorm = RMSNorm(c.hidden_size, c.layernorm_epsilon)
        self.self_attn = Attention(c, True)
        self.pre_mlp_layernorm = RMSNorm(c.hidden_size, c.layernorm_epsilon)
        self.mlp = Dense(c)
        self.final_layernorm = RMSNorm(c.hidden_size, c.layernorm_epsilon)

    def forward(
        self, h: Tensor, e: Tensor, rows: Tensor, tables: dict[bool, tuple[Tensor, Tensor]]
    ) -> Tensor:
        """h, e [B, T, C] -> normed states of the chosen rows [N, C] (rows index B*T)."""
        z = F.linear(torch.cat((self.enorm(e), self.hnorm(h)), -1), self.eh_proj)
        z = z + self.self_attn(self.input_layernorm(z), tables)
        z = z.flatten(0, 1).index_select(0, rows)
        z = z + self.mlp(self.pre_mlp_layernorm(z))
        return self.final_layernorm(z)


class Nano(nn.Module):
    """Trunk, head and MTP blocks."""

    def __init__(self, c: NanoConfig, mtp_blocks: int) -> None:
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Parameter(torch.randn(c.vocab_size, c.hidden_size) * 0.5)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(len(c.hybrid_layer_pattern)))
        self.norm = RMSNorm(c.hidden_size, c.layernorm_epsilon)
        self.lm_head = nn.Parameter(torch.randn(c.vocab_size, c.hidden_size) * 0.02)
        self.mtp = nn.ModuleList(MTP(c) for _ in range(mtp_blocks))

    def tables(self, t: int) -> dict[bool, tuple[Tensor, Tensor]]:
        c = self.c
        return {
            s: rope_table(t, c.rotary_dim, c.swa_rope_theta if s else c.rope_theta)
            for s in (False, True)
        }

    def hidden(self, ids: Tensor, tables: dict[bool, tuple[Tensor, Tensor]]) -> Tensor:
        """ids [B, T] (T a multiple of the window) -> H before the final norm [B, T, C]."""
        h = F.embedding(ids, self.embed_tokens)
        for layer in self.layers:
            h = layer(h, tables)
        return h

    def logits(self, normed: Tensor) -> Tensor:
        return F.linear(normed, self.lm_head)

    def mtp_logits(
        self,
        k: int,
        h: Tensor,
        ids: Tensor,
        rows: Tensor,
        tables: dict[bool, tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Logits of block k on the chosen rows: row i takes token i+1+k.

        No gradient reaches the shared embedding and head.
        """
        shifted = F.pad(ids[:, 1 + k :], (0, 1 + k))
        e = F.embedding(shifted, self.embed_tokens.detach())
        return F.linear(self.mtp[k](h, e, rows, tables), self.lm_head.detach())

    def copy_mtp(self) -> None:
        """Turn one trained MTP block into three equal ones."""
        state = self.mtp[0].state_dict()
        while len(self.mtp) < 3:
            block = MTP(self.c)
            block.load_state_dict(state)
            self.mtp.append(block)

    @torch.no_grad()
    def plant_copying(self) -> None:
        """Start from an induction circuit: what followed this token last time, say it again.

        Copying unseen values is what the task needs, and the circuit for it appears late when
        learned from nothing. So a head of layer 1 begins as "look one token back" (a rotary
        pattern that peaks at distance 1, driven by a constant embedding dimension) and writes
        that token's code into its own subspace; a head of layers 2 and 4 begins by matching the
        current token against those codes and writes the token it finds into a third subspace,
        which the output head reads. Everything stays trainable.
        """
        c = self.c
        dv, d, rot = c.v_head_dim, c.head_dim, c.rotary_dim
        basis = torch.linalg.qr(torch.randn(c.hidden_size - 1, c.hidden_size - 1))[0]
        full = torch.zeros(c.hidden_size, c.hidden_size - 1)
        full[1:] = basis  # dimension 0 is the constant
        back, said, rest = full[:, :dv], full[:, dv : 2 * dv], full[:, 2 * dv :]
        self.embed_tokens.copy_(torch.randn(c.vocab_size, rest.shape[1]) @ rest.T * 0.5)
        self.embed_tokens[:, 0] = 2.0
        code = rest @ torch.linalg.qr(torch.randn(rest.shape[1], rest.shape[1]))[0]
        match, copy = code[:, :dv], code[:, rest.shape[1] - dv :]

        look: Attention = self.layers[1].self_attn
        look.q_proj[:d] = 0
        look.k_proj[:d] = 0
        half = rot // 2
        theta = c.swa_rope_theta ** (-torch.arange(half) * 2 / rot)
        for f, amplitude in enumerate((9.0, 7.0, 5.0, 5.0)):
            # q at phase 0 and k turned by one position: the product is cos(theta * (distance - 1))
            look.q_proj[f, 0] = amplitude / 4
            look.k_proj[f, 0] = amplitude / 4 * theta[f].cos()
            look.k_proj[half + f, 0] = amplitude / 4 * theta[f].sin()
        look.v_proj[:dv] = match.T
        look.o_proj[:, :dv] = back * 0.5
        for i in (2, 4):
            find: Attention = self.layers[i].self_attn
            find.q_proj[:d] = 0
            find.k_proj[:d] = 0
            find.q_proj[rot:d] = match.T * 1.4
            find.k_proj[rot:d] = back.T * 1.4
            find.v_proj[:dv] = copy.T
            find.o_proj[:, :dv] = said
            find.attention_sink_bias[0] = 8.0
        for layer in self.layers:
            if isinstance(layer.mlp, MoE):
                layer.mlp.router[:, 0] = (
                    0  # or the constant would favour the same experts everywhere
                )
        self.lm_head.copy_(
            self.embed_tokens @ copy @ said.T * 0.2 + 0.01 * torch.randn_like(self.lm_head)
        )
