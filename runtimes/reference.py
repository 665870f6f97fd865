"""The forward pass in NumPy f32: the oracle of every other backend. It reads top to bottom:
norm, rotary embedding, attention, feed-forward, router, experts, block, model, MTP block.

Source: MiMo-V2-Flash technical report section 2; transformers models/mimo_v2_flash (f32, eager)
is matched within 1e-4. MiMo-7B: transformers Qwen2 for the trunk; its MTP block follows the
vendor's modeling code, which feeds the true embedding in row 0 where vLLM's mimo_mtp.py feeds
zeros (one row of one draft block: tokens never depend on it).

How speculative decoding must call `mtp_forward`
------------------------------------------------
State: the target has processed tokens x_0..x_p (`cache.length == p + 1`), x_{p+1} is chosen but
not processed, H_i is row i of the target's residual stream before the final norm
(`forward(..., hidden_rows=n)`), and `old[k]` is the p of the last call to block k (none: no call).

    drafts = []
    for k in range(K):                                  # K <= num_mtp_layers
        known = x_0..x_{p+1} followed by drafts         # x_{p+2} = drafts[0], ...
        first = old[k] - k + 1 if block k was called before else 0
        first = max(0, first, p - W + 1)                # no W term for MiMo-7B: see below
        logits = mtp_forward(k, known[first + 1 + k : p + 2 + k], H[first..p], first, cache)
        drafts.append(argmax(logits)); old[k] = p
    verify = forward([x_{p+1}, *drafts], cache, logits_rows=K + 1, hidden_rows=K + 1)
    ... a of K drafts accepted ...
    cache.rollback(K - a)                               # p becomes p + 1 + a

- Every block takes the target's H_i; only the tokens shift by one per block. Never feed one
  block's output to the next.
- Rows old[k]-k+1..old[k] of block k were computed from drafts. They are written again with the
  tokens that were then chosen, which is why H_{p-1} and H_p must be kept past a commit (for K
  blocks the last K - 1 rows of H, plus every row since the last call to a block).
- After prefill the last W rows of H (`hidden_rows=min(W, T)`) are enough to fill a block's ring;
  earlier rows are never seen. Fewer do after `cache.begin_mtp(k, first)`: the block then sees rows
  from there on. MiMo-7B's block attends to everything: give it every row, so call
  `mtp_forward` (or ask `hidden_rows=T`) after every prefill chunk.
- Rows must reach back as far as the newest row sees: a hole raises CacheError.
- `cache.rollback` drops MTP rows of undone positions; call it before the next `mtp_forward`.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mimo_edge.cancel import Cancel, check_cancel
from mimo_edge.config import LayerSpec, MimoConfig
from mimo_edge.errors import BackendError, CacheError, GenerationError, UsageError
from mimo_edge.kv_cache import LayerCache, ModelCache, Positions, Rows
from mimo_edge.runtimes.base import (
    F32,
    VERIFY_ROWS,
    Cache,
    ExpertWeights,
    ForwardResult,
    RouteSink,
    TokenIds,
    Weights,
)
from mimo_edge.runtimes.checks import check_ids, check_mtp_rows, check_wanted
from mimo_edge.runtimes.observer import Observer

ExpertIds = NDArray[np.int64]

# Attention scores are f32 [H, block, S]: queries go in blocks so that a long prefill stays small.
QUERY_BLOCK = 256


def rms_norm(x: F32, weight: F32, eps: float) -> F32:
    """x [T, M] -> [T, M]: x / sqrt(mean(x^2) + eps) * weight."""
    mean_square = np.square(x).sum(axis=-1, keepdims=True) / np.float32(x.shape[-1])
    normed: F32 = x * (1 / np.sqrt(mean_square + np.float32(eps)))
    return normed * weight


def rotary_angles(positions: Positions, rotary_dim: int, theta: float) -> tuple[F32, F32]:
    """cos and sin f32 [T, rotary_dim / 2] of position * theta^(-2d / rotary_dim).

    All in f32, as the model was trained and as transformers computes it: exact angles would
    differ by position * 6e-8 radians. Source: transformers compute_default_rope_parameters.
    """
    exponent = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    frequency = np.float32(1.0) / np.float32(theta) ** exponent
    angles = positions.astype(np.float32)[:, None] * frequency
    return np.cos(angles), np.sin(angles)


def rotate(x: F32, cos: F32, sin: F32) -> F32:
    """Rotate the leading dims of x [T, heads, D] in place: dim d pairs with d + R/2 (NEOX)."""
    half = cos.shape[-1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    a, b = x[..., :half].copy(), x[..., half : 2 * half]
    x[..., :half] = a * cos - b * sin
    x[..., half : 2 * half] = b * cos + a * sin
    return x


def product(x: F32, weight: F32, apart: bool) -> F32:
    """x [T, in] times weight [out, in] -> [T, out]. `apart`: each row by itself, because a product
    of several sums in another order than a product of one."""
    if apart:
        y: F32 = np.matmul(x[:, None], weight.T)[:, 0]
        return y
    return x @ weight.T


def attend(
    q: F32,
    q_positions: Positions,
    rows: Rows,
    window: int | None,
    sinks: F32,
    query_block: int = QUERY_BLOCK,
) -> F32:
    """Grouped-query attention: q [T, H, D] over cached rows of G KV heads -> [T, H, Dv].

    A query at position i sees position j if 0 <= i - j < window (None: no lower bound).
    `sinks` f32 [H] is one extra softmax column per query head, without a value and not scaled
    by 1/sqrt(D); -inf is no sink. Source: technical report eq. 1-2.
    """
    length, heads, dim = q.shape
    keys, values, positions = rows
    groups, group = keys.shape[0], heads // keys.shape[0]
    reach = np.iinfo(np.int64).max if window is None else window
    sink = sinks.reshape(groups, group, 1, 1)
    scale = np.float32(dim**-0.5)
    out = np.empty((length, heads, values.shape[-1]), np.float32)
    for start in range(0, length, query_block):
        block = q[start : start + query_block]
        t = len(block)
        behind = q_positions[start : start + t, None] - positions  # [t, S]
        visible = (behind >= 0) & (behind < reach)
        seen = np.flatnonzero(visible.any(axis=0))
        low, high = seen[0], seen[-1] + 1
        # query head n reads KV head n // group, so heads split as [G, group]
        split = block.reshape(t, groups, group, dim).transpose(1, 2, 0, 3)  # [G, H/G, t, D]
        scores = split.reshape(groups, group * t, dim) @ keys[:, low:high].transpose(0, 2, 1)
        scores = scores.reshape(groups, group, t, high - low) * scale
        np.copyto(scores, -np.inf, where=~visible[:, low:high])
        top = np.maximum(scores.max(axis=-1, keepdims=True), sink)
        weights = np.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True) + np.exp(sink - top)
        weights /= total
        mixed = weights.reshape(groups, group * t, high - low) @ values[:, low:high]
        mixed = mixed.reshape(groups, group, t, -1).transpose(2, 0, 1, 3)  # [t, G, H/G, Dv]
        out[start : start + t] = mixed.reshape(t, heads, -1)
    return out


def silu(x: F32) -> F32:
    """x * sigmoid(x); exp may overflow to inf, which gives the right limit, 0."""
    y: F32 = x / (1 + np.exp(-x))
    return y


def route(logits: F32, bias: F32, config: MimoConfig) -> tuple[ExpertIds, F32]:
    """Pick K experts per token: the bias chooses, the plain sigmoid weighs.

    logits f32 [T, E], bias f32 [E] -> ids i64 [T, K] best first, weights f32 [T, K]. Equal
    scores go to the lowest index. Source: technical report section 2.2 (noaux_tc, one group).
    """
    scores: F32 = np.reciprocal(1 + np.exp(-logits))
    order: ExpertIds = np.argsort(-(scores + bias), axis=-1, kind="stable")
    ids = order[:, : config.num_experts_per_tok]
    weights: F32 = np.take_along_axis(scores, ids, axis=-1)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + np.float32(1e-20))
    return ids, weights * np.float32(config.routed_scaling_factor)


class ReferenceBackend:
    """The reference `Backend`: NumPy f32 over any `Weights`, which it owns and closes.

    Tensors are loaded when first used and kept. Routed experts are kept too, all of them or at
    most `max_cached_experts`, the least recently used going first. `observer`, when set, sees
    every matmul input and route, `routes` only the experts chosen. Not thread-safe.
    """

    name = "reference"

    def __init__(
        self,
        weights: Weights,
        *,
        max_cached_experts: int | None = None,
        observer: Observer | None = None,
        routes: RouteSink | None = None,
    ) -> None:
        if max_cached_experts is not None and max_cached_experts < 0:
            raise UsageError(f"max_cached_experts = {max_cached_experts}", "use 0 or more")
        self.config = weights.config
        self.observer = observer
        self._routes = routes
        self._weights: Weights | None = weights
        self._tensors: dict[str, F32] = {}
        self._experts: OrderedDict[tuple[int, int], ExpertWeights] = OrderedDict()
        self._max_cached_experts = max_cached_experts
        self._apart = False  # whether rows of the running pass are computed one by one
        self._no_sinks = np.full(self.config.num_attention_heads, -np.inf, np.float32)

    # --- weights ---

    def _source(self) -> Weights:
        if self._weights is None:
            raise BackendError("the backend is closed")
        return self._weights

    def _tensor(self, name: str) -> F32:
        tensor = self._tensors.get(name)
        if tensor is None:
            tensor = self._source().tensor(name)
            # A bias or sink that is not finite would misroute tokens and leave every result finite.
            small = tensor.ndim == 1 or name.endswith("ffn_gate_inp.weight")
            if small and not np.isfinite(tensor).all():
                where = f"block {name.split('.')[1]}: " if name.startswith("blk.") else ""
                raise GenerationError(f"{where}{name} holds NaN or Inf", "the weights are damaged")
            self._tensors[name] = tensor
        return tensor

    def _expert(self, layer: int, expert: int) -> ExpertWeights:
        key = (layer, expert)
        found = self._experts.pop(key, None) or self._source().expert(layer, expert)
        limit = self._max_cached_experts
        if limit != 0:
            self._experts[key] = found
            if limit is not None and len(self._experts) > limit:
                self._experts.popitem(last=False)
        return found

    def _linear(self, name: str, x: F32, bias: str | None = None) -> F32:
        """x [T, in] -> x W^T (+ bias) [T, out]."""
        if self.observer is not None:
            self.observer.matmul(name, x)
        y = product(x, self._tensor(name), self._apart)
        if bias is not None:
            y += self._tensor(bias)
        return y

    def _norm(self, name: str, x: F32) -> F32:
        return rms_norm(x, self._tensor(name), self.config.layernorm_epsilon)

    # --- one block: decoder layer or MTP block ---

    def _attention(
        self, spec: LayerSpec, x: F32, position: int, cache: LayerCache, queries: int
    ) -> F32:
        """Normed x [T, M] at positions position.. -> [queries, M] for its last rows.

        Every row leaves its key and value in the cache; only the last `queries` attend.
        """
        c, p = self.config, f"blk.{spec.index}."
        total, heads, groups = len(x), c.num_attention_heads, spec.num_key_value_heads
        positions = np.arange(position, position + total, dtype=np.int64)
        cos, sin = rotary_angles(positions, c.rotary_dim, spec.rope_theta)

        def project(part: str, rows: F32) -> F32:
            bias = f"{p}attn_{part}.bias" if c.attention_bias else None
            return self._linear(f"{p}attn_{part}.weight", rows, bias)

        q = project("q", x[-queries:]).reshape(queries, heads, c.head_dim)
        k = project("k", x).reshape(total, groups, c.head_dim)
        v = project("v", x).reshape(total, groups, c.v_head_dim)
        v *= np.float32(c.attention_value_scale)  # once, before it is cached
        rotate(q, cos[-queries:], sin[-queries:])
        rotate(k, cos, sin)
        rows = cache.write(position, k, v, queries)
        sinks = self._tensor(p + "attn_sinks.weight") if spec.sinks else self._no_sinks
        block = 1 if self._apart else QUERY_BLOCK
        o = attend(q, positions[-queries:], rows, spec.window, sinks, block)  # [queries, H, Dv]
        return self._linear(p + "attn_output.weight", o.reshape(queries, -1))

    def _feed_forward(self, spec: LayerSpec, x: F32) -> F32:
        """Normed x [T, M] -> [T, M]: routed experts, or one dense SwiGLU."""
        if spec.moe:
            return self._routed_experts(spec, x)
        p = f"blk.{spec.index}.ffn_"
        hidden = silu(self._linear(p + "gate.weight", x)) * self._linear(p + "up.weight", x)
        return self._linear(p + "down.weight", hidden)

    def _routed_experts(self, spec: LayerSpec, x: F32) -> F32:
        """Sum over the chosen experts of weight * down(silu(gate x) * up x), x [T, M].

        (token, expert) pairs are grouped by expert, so each expert is read once.
        """
        layer, p = spec.index, f"blk.{spec.index}."
        logits = self._linear(p + "ffn_gate_inp.weight", x)  # [T, E]
        ids, weights = route(logits, self._tensor(p + "exp_probs_b.bias"), self.config)
        if self.observer is not None:
            self.observer.route(layer, ids, weights)
        if self._routes is not None:
            self._routes(layer, ids)
        out = np.zeros_like(x)
        by_expert = np.argsort(ids, axis=None, kind="stable")
        chosen, starts = np.unique(ids.ravel()[by_expert], return_index=True)
        pairs_of = np.split(by_expert, starts[1:])
        for expert, pairs in zip(chosen.tolist(), pairs_of, strict=True):
            tokens = pairs // ids.shape[1]
            gate, up, down = self._expert(layer, expert)
            rows = x[tokens]
            hidden = silu(product(rows, gate, self._apart)) * product(rows, up, self._apart)
            if self.observer is not None:
                self.observer.expert_matmul(p + "ffn_gate_exps.weight", expert, rows)
                self.observer.expert_matmul(p + "ffn_up_exps.weight", expert, rows)
                self.observer.expert_matmul(p + "ffn_down_exps.weight", expert, hidden)
            # a token chooses an expert at most once, so no index repeats in this +=
            out[tokens] += weights.reshape(-1, 1)[pairs] * product(hidden, down, self._apart)
        return out

    def _block(
        self, spec: LayerSpec, h: F32, position: int, cache: LayerCache, queries: int
    ) -> F32:
        """Residual stream h [T, M] -> its last `queries` rows after the block."""
        p = f"blk.{spec.index}."
        x = self._norm(p + "attn_norm.weight", h)
        h = h[-queries:] + self._attention(spec, x, position, cache, queries)
        h = h + self._feed_forward(spec, self._norm(p + "ffn_norm.weight", h))
        if not np.isfinite(h).all():
            bad = int(np.flatnonzero(~np.isfinite(h).all(axis=-1))[0])
            raise GenerationError(
                f"block {spec.index} gave NaN or Inf at position "
                f"{position + len(x) - queries + bad}",
                "the weights of this block, or the input to it, are damaged",
            )
        return h

    def _head(self, norm: str, h: F32) -> F32:
        """h [n, M] -> logits f32 [n, V]."""
        tied = self.config.tie_word_embeddings
        table = "token_embd.weight" if tied else "output.weight"
        logits = self._linear(table, self._norm(norm, h))
        if not np.isfinite(logits).all():
            raise GenerationError("the output head gave NaN or Inf", "its weights are damaged")
        return logits

    # --- Backend ---

    def new_cache(self, context: int, verify_rows: int = VERIFY_ROWS) -> ModelCache:
        """An empty cache; see ModelCache. Raises ContextLengthError past the model's positions."""
        return ModelCache(self.config, context, verify_rows)

    def forward(
        self,
        token_ids: TokenIds,
        cache: Cache,
        *,
        logits_rows: int = 1,
        hidden_rows: int = 0,
        cancel: Cancel | None = None,
    ) -> ForwardResult:
        """Append token_ids [T] to `cache`; logits f32 [logits_rows, V] and residual rows before
        the final norm f32 [hidden_rows, M] of the last rows come back.

        Any T works: a prefill chunk, one token, or a verify batch. T, and so every chunk, may
        exceed the rows a rollback can undo. The cache keeps its length if an error is raised.
        Raises UsageError (ids, row counts), ContextLengthError (before anything is touched),
        CacheError (not ours), GenerationError (NaN or Inf, naming the layer), Cancelled.
        """
        source = self._source()
        ids = check_ids(token_ids, self.config)
        total = len(ids)
        check_wanted(total, logits_rows, hidden_rows)
        ours = self._check_cache(cache)
        ours.require(total)
        position = ours.length
        # What a verify could be gives each row the bits of a pass of its own.
        self._apart = total <= ours.verify_rows
        with np.errstate(over="ignore", invalid="ignore"):
            h = source.embedding(ids)
            for spec, layer_cache in zip(self.config.layers, ours.layers, strict=True):
                check_cancel(cancel)
                h = self._block(spec, h, position, layer_cache, total)
            logits = self._head("output_norm.weight", h[total - logits_rows :])
        ours.commit(total)
        return ForwardResult(logits=logits, hidden=h[total - hidden_rows :].copy())

    def mtp_forward(
        self,
        depth: int,
        token_ids: TokenIds,
        hidden: F32,
        position: int,
        cache: Cache,
        *,
        cancel: Cancel | None = None,
    ) -> F32:
        """Run MTP block `depth` on rows position..position+n-1; see the top of this file.

        token_ids [n] = x_{i+1+depth}, hidden f32 [n, M] = H_i -> logits f32 [V] of the last row,
        which predicts x_{i+2+depth}. Earlier rows only leave their key and value.
        Raises UsageError (depth, shapes, ids), CacheError (rows missing or not yet processed),
        GenerationError (NaN or Inf), Cancelled.
        """
        check_cancel(cancel)
        logits: F32 = self._mtp(depth, token_ids, hidden, position, cache, 1)[0]
        return logits

    def mtp_rows(
        self, depth: int, token_ids: TokenIds, hidden: F32, position: int, cache: Cache
    ) -> F32:
        """As `mtp_forward`, with logits f32 [n, V] of every row: for evaluation, calibration."""
        return self._mtp(depth, token_ids, hidden, position, cache, len(token_ids))

    def _mtp(
        self, depth: int, token_ids: TokenIds, hidden: F32, position: int, cache: Cache, rows: int
    ) -> F32:
        c, source = self.config, self._source()
        ids = check_ids(token_ids, c)
        ours = self._check_cache(cache)
        hidden = check_mtp_rows(c, depth, len(ids), hidden, position, ours.length)
        spec = c.layer(c.num_hidden_layers + depth)
        p = f"blk.{spec.index}."
        self._apart = False
        with np.errstate(over="ignore", invalid="ignore"):
            e = self._norm(p + "nextn.enorm.weight", source.embedding(ids))
            h = self._norm(p + "nextn.hnorm.weight", hidden)
            # V2 projects [embedding ; hidden], MiMo-7B the reverse
            pair = (e, h) if c.family == "mimo_v2" else (h, e)
            z = self._linear(p + "nextn.eh_proj.weight", np.concatenate(pair, axis=-1))
            z = self._block(spec, z, position, ours.mtp[depth], rows)
            return self._head(p + "layer_output_norm.weight", z)

    def close(self) -> None:
        """Drop the weights and close their source. Calling it twice is harmless."""
        if self._weights is not None:
            self._weights.close()
        self._weights = None
        self._tensors.clear()
        self._experts.clear()

    # --- input checks ---

    def _check_cache(self, cache: Cache) -> ModelCache:
        if not isinstance(cache, ModelCache) or cache.config != self.config:
            raise CacheError("this cache belongs to another backend or model")
        return cache


def full_logits(weights: Weights, token_ids: ArrayLike) -> F32:
    """Logits f32 [T, V] of every position of one sequence token_ids [T]."""
    return _run_all(ReferenceBackend(weights), token_ids)[0].logits


def mtp_full_logits(weights: Weights, token_ids: ArrayLike, depth: int) -> F32:
    """Teacher-forced logits f32 [T - 1 - depth, V] of MTP block `depth` over token_ids [T].

    Row i takes H_i and x_{i+1+depth}, and predicts x_{i+2+depth}; the last row's prediction is
    one token past the sequence.
    """
    backend = ReferenceBackend(weights)
    ids = np.asarray(token_ids)
    rows = ids.size - 1 - depth
    if rows < 1:
        raise UsageError(f"{ids.size} tokens give MTP block {depth} no row")
    result, cache = _run_all(backend, ids)
    return backend.mtp_rows(depth, ids[1 + depth :], result.hidden[:rows], 0, cache)


def _run_all(backend: ReferenceBackend, token_ids: ArrayLike) -> tuple[ForwardResult, ModelCache]:
    ids = np.asarray(token_ids)
    cache = backend.new_cache(max(1, ids.size))
    return backend.forward(ids, cache, logits_rows=ids.size, hidden_rows=ids.size), cache
