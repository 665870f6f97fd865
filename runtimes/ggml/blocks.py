"""One decoder layer or MTP block as graph nodes: attention, dense FFN, router, experts, head.

Shapes are ggml's, innermost first: h {M, T}, q {D, H, T}, k {D, G, T}. Where numbers differ
from the reference in the last bits: matmuls with quantised weights quantise activations to 8
bits, attention uses ggml's online softmax, and an f16 cache accumulates values in f16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mimo_edge.config import MimoConfig
from mimo_edge.runtimes.ggml.cache_memory import KvTensors
from mimo_edge.runtimes.ggml.graph import Graph, Tensor
from mimo_edge.runtimes.ggml.resident import BlockWeights, MtpWeights, Projection, SwiGlu

# Node room: a MoE block takes about 45 tensors plus two per chosen expert; a product of more rows
# than there are takes two more (a block has at most seven).
_BLOCK_TENSORS = 64
# Scores are sigmoid + bias, far inside this; it turns NaN into a number for the sort.
_SCORE_LIMIT = 1e30


@dataclass(frozen=True)
class KvAccess:
    """How one pass reads and writes the K/V rows of a layer.

    The rows of the chunk at `write_ids` (its last rows, as many as there are ids) are stored.
    Attention reads the first `read_rows` rows of the cache. With `append`, the chunk is not yet
    among them (it may be longer than the ring): it is attended to after them and stored last.
    `mask` f16 {columns, T} says what each query sees. `apart`: rows that each token of the chunk
    reads, when its query is to be computed alone.
    """

    kv: KvTensors
    write_ids: Tensor
    mask: Tensor | None  # None: no row of this pass queries
    read_rows: int
    append: bool
    apart: tuple[int, ...] | None = None


@dataclass(frozen=True)
class BlockInputs:
    """What the layers of one pass share."""

    config: MimoConfig
    positions: Tensor  # i32 {T}
    total: int  # T


def tensors_of(config: MimoConfig, blocks_count: int, apart: int = 0) -> int:
    """Tensors a graph of that many blocks may need, with `apart` more in each for rows that are
    computed apart; a head counts as one."""
    return (_BLOCK_TENSORS + 3 * config.num_experts_per_tok + apart) * blocks_count


def last_rows(g: Graph, a: Tensor, rows: int) -> Tensor:
    """The last `rows` of a {n, T}."""
    return rows_from(g, a, a.ne[1] - rows, rows)


def rows_from(g: Graph, a: Tensor, start: int, rows: int) -> Tensor:
    """`rows` rows of a {n, T} from `start` on."""
    if rows == a.ne[1]:
        return a
    return g.view(a, (a.ne[0], rows), (a.nb[1],), start * a.nb[1])


def _project(
    g: Graph, w: BlockWeights, c: MimoConfig, x: Tensor, groups: Sequence[int]
) -> tuple[list[Tensor], Tensor, Tensor]:
    """q {D, H, queries} of the last rows for each number of queries in `groups`, k {D, G, T},
    v {G * Dv, T}."""
    heads, kv_heads = c.num_attention_heads, w.spec.num_key_value_heads
    found: dict[str, Tensor] = {}
    queries: list[Tensor] = []
    for projection in w.projections:
        if projection.parts == ("q",):
            # Each group by itself: what else is computed must not change a row's bits.
            outputs = [_linear(g, projection, last_rows(g, x, count)) for count in groups]
            queries = [_q(g, c, y, count) for y, count in zip(outputs, groups, strict=True)]
            continue
        y = _linear(g, projection, x)
        offset, stride = 0, y.nb[1]
        for part in projection.parts:
            if part == "q":
                queries = [_q(g, c, y, count) for count in groups]
                offset += heads * c.head_dim * 4
            elif part == "k":
                found["k"] = g.view(
                    y, (c.head_dim, kv_heads, x.ne[1]), (c.head_dim * 4, stride), offset
                )
                offset += kv_heads * c.head_dim * 4
            else:
                found["v"] = g.view(y, (kv_heads * c.v_head_dim, x.ne[1]), (stride,), offset)
                offset += kv_heads * c.v_head_dim * 4
    return queries, found["k"], found["v"]


def _q(g: Graph, c: MimoConfig, y: Tensor, count: int) -> Tensor:
    """Queries {D, H, count} of the last rows of y, which begins with them."""
    skip = (y.ne[1] - count) * y.nb[1]
    shape = (c.head_dim, c.num_attention_heads, count)
    return g.view(y, shape, (c.head_dim * 4, y.nb[1]), skip)


def _linear(g: Graph, projection: Projection, x: Tensor) -> Tensor:
    y = g.mul_mat(projection.weight, x)
    return y if projection.bias is None else g.add(y, projection.bias)


def attention(
    g: Graph,
    w: BlockWeights,
    inputs: BlockInputs,
    access: KvAccess,
    h: Tensor,
    groups: Sequence[int],
) -> list[Tensor]:
    """h {M, T} -> attention output {M, queries} of its last rows, for each number of queries in
    `groups`; every row leaves its K/V.

    The value scale is applied once, after the output projection as llama.cpp does: rows then
    equal llama.cpp's bit for bit, which 8-bit activations do not when V is scaled before.
    """
    c, kv_heads = inputs.config, w.spec.num_key_value_heads
    x = g.norm(h, w.attn_norm, c.layernorm_epsilon)
    queries, k, v = _project(g, w, c, x, groups)
    k = g.rope(k, inputs.positions, c.rotary_dim, w.spec.rope_theta)
    k = g.reshape(k, kv_heads * c.head_dim, inputs.total)
    if not access.append:
        _store(g, access, k, v)
    outputs = []
    for q, count in zip(queries, groups, strict=True):
        at = inputs.positions
        if count < inputs.total:
            at = g.view(at, (count,), (), (inputs.total - count) * 4)
        q = g.rope(q, at, c.rotary_dim, w.spec.rope_theta)
        mixed = _attend(g, w, c, access, q, k, v)
        mixed = g.reshape(mixed, c.num_attention_heads * c.v_head_dim, count)
        mixed = g.mul_mat(w.attn_output, mixed)
        if c.attention_value_scale != 1.0:
            mixed = g.scale(mixed, c.attention_value_scale)
        outputs.append(mixed)
    if access.append:
        for mixed in outputs:
            g.run_now(mixed)  # the ring is read before the chunk overwrites it
        _store(g, access, k, v)
    return outputs


def _attend(
    g: Graph, w: BlockWeights, c: MimoConfig, access: KvAccess, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """q {D, H, queries} of the last rows -> {Dv, H, queries}."""
    assert access.mask is not None
    keys, values = _rows(g, access, k, v)
    kv_heads = w.spec.num_key_value_heads

    def attend(q: Tensor, mask: Tensor, rows: int) -> Tensor:
        return g.attention(
            q,
            _heads(g, keys, c.head_dim, kv_heads, rows),
            _heads(g, values, c.v_head_dim, kv_heads, rows),
            mask,
            c.head_dim**-0.5,
            w.sinks,
        )

    count = q.ne[2]
    mask = last_rows(g, access.mask, count)
    if access.apart is None:
        return attend(q, mask, keys.ne[1])
    parts = []
    for row, reads in enumerate(access.apart[-count:]):
        one = g.view(q, (*q.ne[:2], 1), q.nb[1:3], row * q.nb[2])
        seen = g.view(mask, (reads, 1), (mask.nb[1],), row * mask.nb[1])
        parts.append(attend(one, seen, reads))
    return g.concat_all(parts, 2)


def _rows(g: Graph, access: KvAccess, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys {G * D, S} and values {G * Dv, S} to attend to."""
    kv, rows = access.kv, access.read_rows
    if not access.append:
        return (
            g.view(kv.key, (kv.key.ne[0], rows), (kv.key.nb[1],)),
            g.view(kv.value, (kv.value.ne[0], rows), (kv.value.nb[1],)),
        )
    chunk = [g.cast(k, kv.key.type), g.cast(v, kv.value.type)]
    if rows:
        chunk = [g.concat(kv.key, chunk[0], 1), g.concat(kv.value, chunk[1], 1)]
    return chunk[0], chunk[1]


def _heads(g: Graph, rows: Tensor, dim: int, kv_heads: int, count: int) -> Tensor:
    """The first `count` rows of {G * D, S} seen as {D, count, G}."""
    head_bytes = rows.nb[1] // kv_heads
    return g.view(rows, (dim, count, kv_heads), (rows.nb[1], head_bytes))


def _store(g: Graph, access: KvAccess, k: Tensor, v: Tensor) -> None:
    count = access.write_ids.ne[0]
    g.set_rows(access.kv.key, last_rows(g, k, count), access.write_ids)
    g.set_rows(access.kv.value, last_rows(g, v, count), access.write_ids)


def dense(g: Graph, w: SwiGlu, x: Tensor) -> Tensor:
    """down(silu(gate x) * up x)."""
    return g.mul_mat(w.down, g.swiglu(g.mul_mat(w.gate, x), g.mul_mat(w.up, x)))


def scores(g: Graph, w: BlockWeights, x: Tensor) -> tuple[Tensor, Tensor]:
    """x {M, T} -> what weighs experts and what chooses them, both {E, T}."""
    assert w.router is not None
    assert w.router_bias is not None
    weighing = g.sigmoid(g.mul_mat(w.router, x))
    return weighing, g.clamp(g.add(weighing, w.router_bias), -_SCORE_LIMIT, _SCORE_LIMIT)


def route(g: Graph, w: BlockWeights, c: MimoConfig, x: Tensor) -> tuple[Tensor, Tensor]:
    """x {M, T} -> expert ids i32 {K, T} and weights {K, T}: the bias chooses, the plain sigmoid
    weighs."""
    total, chosen = x.ne[1], c.num_experts_per_tok
    weighing, choice = scores(g, w, x)
    ids = g.top_k(choice, chosen)
    weights = g.get_rows(g.reshape(weighing, 1, c.n_routed_experts, total), ids)  # {1, K, T}
    weights = g.reshape(weights, chosen, total)
    if c.norm_topk_prob:
        weights = g.div(weights, g.scale(g.sum_rows(weights), 1.0, 1e-20))
    if c.routed_scaling_factor != 1.0:
        weights = g.scale(weights, c.routed_scaling_factor)
    return ids, weights


def expert_rows(g: Graph, w: SwiGlu, x: Tensor, ids: Tensor) -> Tensor:
    """Each row of x {M, 1, T} through the experts ids {K, T} -> {M, K, T}.

    `w` may be the stacked experts of a layer, or slots that hold some of them; ids index it.
    """
    up = g.mul_mat_id(w.up, x, ids)  # {F, K, T}
    gate = g.mul_mat_id(w.gate, x, ids)
    return g.mul_mat_id(w.down, g.swiglu(gate, up), ids)


def weighted_sum(g: Graph, rows: Tensor, weights: Tensor) -> Tensor:
    """rows {M, K, T}, weights {K, T} -> sum over K of weight * row {M, T}."""
    _, chosen, total = rows.ne[:3]
    return sum_chosen(g, g.mul(rows, g.reshape(weights, 1, chosen, total)))


def sum_chosen(g: Graph, rows: Tensor) -> Tensor:
    """rows {M, K, T} -> their sum over K {M, T}."""
    width, chosen, total = rows.ne[:3]
    out = g.view(rows, (width, total), (rows.nb[2],))
    for k in range(1, chosen):
        out = g.add(out, g.view(rows, (width, total), (rows.nb[2],), k * rows.nb[1]))
    return out


def routed_experts(g: Graph, w: SwiGlu, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Sum over k of weights[k] * expert ids[k] of x {M, T} -> {M, T}."""
    rows = expert_rows(g, w, g.reshape(x, x.ne[0], 1, x.ne[1]), ids)
    return weighted_sum(g, rows, weights)


def feed_forward(
    g: Graph, w: BlockWeights, c: MimoConfig, x: Tensor, routes: list[Tensor] | None = None
) -> Tensor:
    """Normed x {M, T} -> {M, T}: a dense SwiGLU, or routed experts that are all resident.

    The ids {K, T} of chosen experts are added to `routes`, as an output, when it is given.
    """
    if w.dense is not None:
        return dense(g, w.dense, x)
    assert w.experts is not None
    ids, weights = route(g, w, c, x)
    if routes is not None:
        routes.append(g.output(g.contiguous(ids)))
    return routed_experts(g, w.experts, x, ids, weights)


def attention_half(
    g: Graph,
    w: BlockWeights,
    inputs: BlockInputs,
    access: KvAccess,
    h: Tensor,
    groups: Sequence[int],
) -> list[tuple[Tensor, Tensor]]:
    """Residual stream h {M, T} -> its last rows after attention and their normed FFN input, both
    {M, queries}, for each number of queries in `groups`."""
    found = []
    for mixed in attention(g, w, inputs, access, h, groups):
        after = g.add(last_rows(g, h, mixed.ne[1]), mixed)
        found.append((after, g.norm(after, w.ffn_norm, inputs.config.layernorm_epsilon)))
    return found


def block(g: Graph, w: BlockWeights, inputs: BlockInputs, access: KvAccess, h: Tensor) -> Tensor:
    """Residual stream h {M, T} -> its last row {M, 1} after the block; every row leaves its K/V."""
    [(h, x)] = attention_half(g, w, inputs, access, h, [1])
    return g.add(h, feed_forward(g, w, inputs.config, x))


def head(g: Graph, output: Tensor, norm: Tensor, eps: float, h: Tensor) -> Tensor:
    """h {M, n} -> logits {V, n}."""
    return g.mul_mat(output, g.norm(h, norm, eps))


def mtp_input(g: Graph, w: MtpWeights, c: MimoConfig, embedding: Tensor, hidden: Tensor) -> Tensor:
    """Embeddings and target hidden states {M, n} -> the block's residual stream {M, n}."""
    e = g.norm(embedding, w.enorm, c.layernorm_epsilon)
    h = g.norm(hidden, w.hnorm, c.layernorm_epsilon)
    # V2 projects [embedding ; hidden], MiMo-7B the reverse
    pair = (e, h) if c.family == "mimo_v2" else (h, e)
    return g.mul_mat(w.eh_proj, g.concat(*pair, 0))
