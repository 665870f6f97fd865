"""The model as ONNX graphs: runs of decoder layers, MTP blocks, embedding and head.

It reads as runtimes/reference does: norm, rotary embedding, attention, feed-forward, router, block.
Inputs, outputs and their shapes are listed in mimo_edge.onnx_io. Attention is written out in
grouped form (MatMul, mask, a sink column, Softmax, MatMul): faster on CPUs than the Attention
operator, and what NPUs take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from onnx import TensorProto

from mimo_edge.config import LayerSpec, MimoConfig
from mimo_edge.errors import ExportError
from mimo_edge.export.onnx.graph import Dim, Graph, Matrix, Source
from mimo_edge.export.onnx.linear import FloatLinear, Linear, TableFormat
from mimo_edge.gguf_meta import expected_shapes
from mimo_edge.onnx_io import CacheForm, Kind, kind_of

LinearOf = Callable[[str], Linear]
"""The format of a matrix by canonical name."""
_ROUTER = FloatLinear()
# What keeps a sum of weights from being 0 when they are normalised (reference.route).
_TINY = 1e-20


@dataclass(frozen=True)
class GraphForm:
    """What a variant asks of its graphs.

    `cache`: see onnx_io. `tokens`: T, None for any. `rows`: rows of the cache by kind, None for
    any; with "in_place" they are the columns, with "append" the columns less T. `fuse`: products of
    one input share a node where their formats agree (q, k and v; gate and up).
    """

    cache: CacheForm = "in_place"
    tokens: int | None = None
    rows: Mapping[Kind, int] = field(default_factory=dict)
    fuse: bool = True

    @property
    def token_dim(self) -> Dim:
        return "T" if self.tokens is None else self.tokens

    def row_dim(self, kind: Kind) -> Dim:
        return self.rows.get(kind, f"P_{kind}")

    def column_dim(self, kind: Kind) -> Dim:
        rows = self.row_dim(kind)
        if self.cache == "in_place":
            return rows
        if isinstance(rows, int) and self.tokens is not None:
            return rows + self.tokens
        return f"C_{kind}"


def decoder_layers(
    config: MimoConfig, layers: Sequence[int], linear: LinearOf, form: GraphForm
) -> Graph:
    """Decoder layers `layers`, one after the other. A layer with routed experts must be the last:
    its graph ends in the router."""
    block = _Block(Graph(f"layers_{layers[0]}_{layers[-1]}"), config, linear, form)
    g, c, t = block.graph, config, form.token_dim
    h = g.input("h", [t, c.hidden_size])
    for index in layers:
        spec = c.layer(index)
        h = block.attention(spec, h)
        x = block.norm(h, f"blk.{index}.ffn_norm.weight", f"L{index}.ffn.norm")
        if not spec.moe:
            h = g.node("Add", [h, block.dense(spec, x)], f"L{index}.h")
        elif index != layers[-1]:
            raise ExportError(f"layer {index} ends in a router, but layers follow in its graph")
        else:
            block.router(spec, x)
            g.node("Identity", [x], "x")
            g.output("x", [t, c.hidden_size])
    g.node("Identity", [h], "h_out")
    g.output("h_out", [t, c.hidden_size])
    return g


def mtp_block(config: MimoConfig, depth: int, linear: LinearOf, form: GraphForm) -> Graph:
    """MTP block `depth`: embeddings and hidden states of n rows -> their residual stream after the
    block (its final norm is the head's)."""
    index = config.num_hidden_layers + depth
    spec, p = config.layer(index), f"blk.{index}."
    block = _Block(Graph(f"mtp_{depth}"), config, linear, form)
    g, c, t = block.graph, config, form.token_dim
    e = g.input("e", [t, c.hidden_size])
    hidden = g.input("hidden", [t, c.hidden_size])
    e = block.norm(e, p + "nextn.enorm.weight", f"L{index}.enorm")
    hidden = block.norm(hidden, p + "nextn.hnorm.weight", f"L{index}.hnorm")
    # V2 projects [embedding ; hidden], MiMo-7B the reverse
    pair = [e, hidden] if c.family == "mimo_v2" else [hidden, e]
    both = g.node("Concat", pair, f"L{index}.pair", axis=1)
    h = block.product(both, [p + "nextn.eh_proj.weight"], f"L{index}.eh_proj")[0]
    h = block.attention(spec, h)
    x = block.norm(h, p + "ffn_norm.weight", f"L{index}.ffn.norm")
    g.node("Add", [h, block.dense(spec, x)], "h_out")
    g.output("h_out", [t, c.hidden_size])
    return g


def embedding(config: MimoConfig, table: TableFormat, form: GraphForm) -> Graph:
    """Rows of the embedding table."""
    g, t = Graph("embed"), form.token_dim
    tokens = g.input("tokens", [t], TensorProto.INT64)
    matrix = Matrix((Source("token_embd.weight", config.vocab_size),), config.hidden_size)
    table.emit(g, tokens, matrix, "h")
    g.output("h", [t, config.hidden_size])
    return g


def head(config: MimoConfig, linear: LinearOf, form: GraphForm) -> Graph:
    """A final norm, chosen by number, and the output projection. One graph for the model and its
    MTP blocks, so that the largest matrix is in memory once."""
    c = config
    block = _Block(Graph("lm_head"), c, linear, form)
    g, t = block.graph, form.token_dim
    h = g.input("h", [t, c.hidden_size])
    which = g.input("norm", [1], TensorProto.INT64)
    names = ["output_norm.weight"]
    blocks = range(c.num_hidden_layers, c.num_hidden_layers + c.num_mtp_layers)
    names += [f"blk.{index}.layer_output_norm.weight" for index in blocks]
    table = Matrix(tuple(Source(name, 1) for name in names), c.hidden_size)
    norms = g.plain("norms", table, (len(names), c.hidden_size))
    weight = g.node("Gather", [norms, which], "norm_row", axis=0)
    weight = g.node("Reshape", [weight, g.constant([c.hidden_size])], "norm_weight")
    x = block.scaled_norm(h, weight, "x")
    name = "token_embd.weight" if c.tie_word_embeddings else "output.weight"
    logits = block.product(x, [name], "head")[0]
    g.node("Identity", [logits], "logits")
    g.output("logits", [t, c.vocab_size])
    return g


class _Block:
    """Parts of a layer, added to one graph. Values of layer i are called L{i}.*."""

    def __init__(self, graph: Graph, config: MimoConfig, linear: LinearOf, form: GraphForm) -> None:
        if config.rotary_dim % 2:
            raise ExportError(f"{config.rotary_dim} rotary dims cannot be paired")
        self.graph = graph
        self._config = config
        self._linear = linear
        self._form = form
        self._shapes = expected_shapes(config)

    # --- small parts ---

    def norm(self, x: str, weight: str, name: str) -> str:
        """RMSNorm of x [T, M]."""
        return self.scaled_norm(x, self._vector([weight], f"{name}.weight"), name)

    def scaled_norm(self, x: str, weight: str, name: str) -> str:
        epsilon = self._config.layernorm_epsilon
        return self.graph.node("RMSNormalization", [x, weight], name, axis=-1, epsilon=epsilon)

    def product(self, x: str, names: Sequence[str], label: str, factor: float = 1.0) -> list[str]:
        """x [T, in] times each matrix of `names`: as one product, split afterwards, where that is
        wanted and their formats agree."""
        g, t = self.graph, self._form.token_dim
        kinds = [self._linear(name) for name in names]
        matrices = [self._matrix([name], factor) for name in names]
        if len(names) == 1:
            return [kinds[0].emit(g, x, matrices[0], label, t)]
        if self._form.fuse and all(kind == kinds[0] for kind in kinds):
            y = kinds[0].emit(g, x, self._matrix(names, factor), label, t)
            sizes = g.constant([matrix.rows for matrix in matrices])
            parts = [f"{label}.{number}" for number in range(len(names))]
            return g.nodes("Split", [y, sizes], parts, axis=1)
        return [
            kind.emit(g, x, matrix, f"{label}.{number}", t)
            for number, (kind, matrix) in enumerate(zip(kinds, matrices, strict=True))
        ]

    def _matrix(self, names: Sequence[str], factor: float = 1.0) -> Matrix:
        shapes = [self._shapes[name] for name in names]
        sources = [
            Source(name, shape[0], factor) for name, shape in zip(names, shapes, strict=True)
        ]
        return Matrix(tuple(sources), shapes[0][1])

    def _vector(self, names: Sequence[str], label: str) -> str:
        sizes = [self._shapes[name][0] for name in names]
        matrix = Matrix(tuple(Source(name, 1) for name in names), sum(sizes), flat=True)
        return self.graph.plain(label, matrix, (sum(sizes),))

    # --- attention ---

    def attention(self, spec: LayerSpec, h: str) -> str:
        """h [T, M] -> h plus attention of its norm; new keys and values become outputs."""
        g, c, i = self.graph, self._config, spec.index
        p, label, kind = f"blk.{i}.", f"L{i}.attn", kind_of(spec)
        heads, groups = c.num_attention_heads, spec.num_key_value_heads
        x = self.norm(h, p + "attn_norm.weight", f"{label}.norm")
        parts = self.product(x, [f"{p}attn_{part}.weight" for part in "qkv"], f"{label}.qkv")
        if c.attention_bias:
            parts = [
                g.node(
                    "Add",
                    [y, self._vector([f"{p}attn_{part}.bias"], f"{label}.{part}.bias")],
                    f"{label}.{part}.biased",
                )
                for part, y in zip("qkv", parts, strict=True)
            ]
        q = self._rotate(self._by_head(parts[0], heads, c.head_dim, f"{label}.q"), kind, "q", i)
        k = self._rotate(self._by_head(parts[1], groups, c.head_dim, f"{label}.k"), kind, "k", i)
        v = self._by_head(parts[2], groups, c.v_head_dim, f"{label}.v")
        keys = self._cached("k", k, spec, c.head_dim)
        values = self._cached("v", v, spec, c.v_head_dim)
        mixed = self._attend(q, keys, values, spec)  # [T, H * Dv]
        # Values are cached as they are; their scale is part of the projection.
        scale = c.attention_value_scale
        o = self.product(mixed, [p + "attn_output.weight"], f"{label}.o", scale)[0]
        return g.node("Add", [h, o], f"L{i}.h_attn")

    def _by_head(self, y: str, heads: int, dim: int, label: str) -> str:
        """[T, heads * dim] -> [1, heads, T, dim]."""
        g = self.graph
        split = g.node("Reshape", [y, g.constant([1, -1, heads, dim])], f"{label}.rows")
        return g.node("Transpose", [split], f"{label}.heads", perm=[0, 2, 1, 3])

    def _rotate(self, x: str, kind: Kind, part: str, index: int) -> str:
        """The leading R dims of x [1, heads, T, D]: dim d pairs with d + R/2."""
        g, t, rotary = self.graph, self._form.token_dim, self._config.rotary_dim
        cos = g.input(f"cos_{kind}", [1, t, rotary // 2])
        sin = g.input(f"sin_{kind}", [1, t, rotary // 2])
        return g.node(
            "RotaryEmbedding",
            [x, cos, sin],
            f"L{index}.attn.{part}.rotated",
            rotary_embedding_dim=0 if rotary == self._config.head_dim else rotary,
        )

    def _cached(self, part: str, new: str, spec: LayerSpec, dim: int) -> str:
        """All columns [1, G, C, dim]: the cache with the new rows [1, G, T, dim]."""
        g, form, kind, i = self.graph, self._form, kind_of(spec), spec.index
        groups, rows = spec.num_key_value_heads, form.row_dim(kind)
        past = g.input(f"p{part}_{i}", [1, groups, rows, dim])
        if form.cache == "in_place":
            at = g.input(f"at_{kind}", [1], TensorProto.INT64)
            found = g.node(
                "TensorScatter", [past, new, at], f"c{part}_{i}", axis=-2, mode="circular"
            )
            g.output(found, [1, groups, rows, dim])
            return found
        g.node("Identity", [new], f"{part}n_{i}")
        g.output(f"{part}n_{i}", [1, groups, form.token_dim, dim])
        return g.node("Concat", [past, new], f"L{i}.attn.{part}.columns", axis=2)

    def _attend(self, q: str, keys: str, values: str, spec: LayerSpec) -> str:
        """q [1, H, T, D] over [1, G, C, D] -> [T, H * Dv]. Query head n reads KV head n // (H/G),
        so the heads of a group are rows of one product."""
        g, c, form, kind = self.graph, self._config, self._form, kind_of(spec)
        heads, groups = c.num_attention_heads, spec.num_key_value_heads
        group, label = heads // groups, f"L{spec.index}.attn"
        factor = g.constant(c.head_dim**-0.5, "float32")
        q = g.node("Mul", [q, factor], f"{label}.q.scaled")
        q = g.node("Reshape", [q, g.constant([1, groups, -1, c.head_dim])], f"{label}.q.grouped")
        turned = g.node("Transpose", [keys], f"{label}.k.turned", perm=[0, 1, 3, 2])
        scores = g.node("MatMul", [q, turned], f"{label}.scores")  # [1, G, H/G * T, C]
        scores = g.node(
            "Reshape", [scores, g.constant([groups, group, -1, 0])], f"{label}.scores.split"
        )
        mask = g.input(f"mask_{kind}", [form.token_dim, form.column_dim(kind)])
        scores = g.node("Add", [scores, mask], f"{label}.scores.masked")
        if spec.sinks:
            scores = g.node("Concat", [scores, self._sinks(spec)], f"{label}.scores.sink", axis=-1)
        weights = g.node("Softmax", [scores], f"{label}.weights.all", axis=-1)
        if spec.sinks:
            weights = g.node(
                "Slice",
                [weights, g.constant([0]), g.constant([-1]), g.constant([-1])],
                f"{label}.weights",
            )
        weights = g.node(
            "Reshape", [weights, g.constant([1, groups, -1, 0])], f"{label}.weights.grouped"
        )
        mixed = g.node("MatMul", [weights, values], f"{label}.mixed")  # [1, G, H/G * T, Dv]
        mixed = g.node(
            "Reshape", [mixed, g.constant([1, heads, -1, c.v_head_dim])], f"{label}.mixed.heads"
        )
        mixed = g.node("Transpose", [mixed], f"{label}.mixed.rows", perm=[0, 2, 1, 3])
        return g.node(
            "Reshape", [mixed, g.constant([-1, heads * c.v_head_dim])], f"{label}.mixed.flat"
        )

    def _sinks(self, spec: LayerSpec) -> str:
        """The sink's logit as a column [G, H/G, T, 1]; it has no value and is not scaled."""
        g, c, i = self.graph, self._config, spec.index
        heads, groups = c.num_attention_heads, spec.num_key_value_heads
        sinks = self._vector([f"blk.{i}.attn_sinks.weight"], f"L{i}.attn.sinks.weight")
        shape = [groups, heads // groups, 1, 1]
        sinks = g.node("Reshape", [sinks, g.constant(shape)], f"L{i}.attn.sinks.heads")
        if self._form.tokens is not None:
            size = g.constant([*shape[:2], self._form.tokens, 1])
        else:
            size = self._sink_shape(f"L{i}.attn", shape)
        return g.node("Expand", [sinks, size], f"L{i}.attn.sinks")

    def _sink_shape(self, label: str, shape: Sequence[int]) -> str:
        g = self.graph
        total = g.node("Shape", [f"{label}.norm"], f"{label}.sinks.tokens", start=0, end=1)
        parts = [g.constant(shape[:2]), total, g.constant([1])]
        return g.node("Concat", parts, f"{label}.sinks.shape", axis=0)

    # --- feed-forward ---

    def dense(self, spec: LayerSpec, x: str) -> str:
        """down(silu(gate x) * up x), x [T, M]."""
        g, p, label = self.graph, f"blk.{spec.index}.ffn_", f"L{spec.index}.ffn"
        gate, up = self.product(x, [p + "gate.weight", p + "up.weight"], f"{label}.gate_up")
        sigmoid = g.node("Sigmoid", [gate], f"{label}.sigmoid")
        silu = g.node("Mul", [gate, sigmoid], f"{label}.silu")
        hidden = g.node("Mul", [silu, up], f"{label}.hidden")
        return self.product(hidden, [p + "down.weight"], f"{label}.down")[0]

    def router(self, spec: LayerSpec, x: str) -> None:
        """Outputs `ids` and `weights` [T, K]: the bias chooses, the plain sigmoid weighs. Of equal
        scores the lowest index is first, as TopK promises."""
        g, c, t, i = self.graph, self._config, self._form.token_dim, spec.index
        p, label, chosen = f"blk.{i}.", f"L{i}.router", c.num_experts_per_tok
        matrix = self._matrix([p + "ffn_gate_inp.weight"])
        logits = _ROUTER.emit(g, x, matrix, f"{label}.logits", t)
        scores = g.node("Sigmoid", [logits], f"{label}.scores")
        bias = self._vector([p + "exp_probs_b.bias"], f"{label}.bias")
        choice = g.node("Add", [scores, bias], f"{label}.choice")
        g.nodes("TopK", [choice, g.constant([chosen])], [f"{label}.best", "ids"], axis=-1)
        weights = g.node("GatherElements", [scores, "ids"], f"{label}.chosen", axis=1)
        if c.norm_topk_prob:
            total = g.node("ReduceSum", [weights, g.constant([-1])], f"{label}.sum", keepdims=1)
            total = g.node("Add", [total, g.constant(_TINY, "float32")], f"{label}.total")
            weights = g.node("Div", [weights, total], f"{label}.normed")
        factor = g.constant(c.routed_scaling_factor, "float32")
        g.node("Mul", [weights, factor], "weights")
        g.output("ids", [t, chosen], TensorProto.INT64)
        g.output("weights", [t, chosen])
