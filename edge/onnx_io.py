"""What a writer of ONNX graphs and a runtime that feeds them agree on: names and shapes.

The ONNX form of a model is a folder of graphs in ONNX Runtime's model package layout. Components
`embed`, `layers_00`, `layers_01`, ..., `lm_head` and `mtp_0`, ... each have one or more variants
(`cpu`, ...). The graph is cut at every router: a component of decoder layers ends with one, routed
experts run outside, and the host adds their sum to `h_out` before the next component.

Layer and MTP graphs take (T new tokens, C columns of keys, per kind of attention "full" and
"sliding"; i is a layer, MTP blocks counted on; f32 unless said):

    h [T, M]                residual stream; MTP: e [T, M] embeddings and hidden [T, M] instead
    cos_K, sin_K [1, T, R/2]  rotary angles of the new tokens
    mask_K [T, C]           0 where a query sees a column, MASKED where it does not
    pk_i [1, G, P, D], pv_i [1, G, P, Dv]   keys (rotated) and values of the cache
    at_K i64 [1]            only "in_place": slot of the first new row

and give

    h_out [T, M]            after the last layer; without routed experts when the graph ends in a
                            router, and then also
    x [T, M], ids i64 [T, K], weights [T, K]   the experts' input, which experts, how much of each
    kn_i [1, G, T, D], vn_i [1, G, T, Dv]      "append": the new rows; columns are [cache | new]
    ck_i, cv_i              "in_place": the caches with the new rows written round from slot at_K;
                            bind them to the memory of pk_i and pv_i, and nothing is copied

Values are cached unscaled: `attention_value_scale` is part of the output projection.
`embed` takes tokens i64 [T] and gives h; `lm_head` takes h [T, M] and norm i64 [1], which picks
the final norm (0: the model's, 1 + k: MTP block k's), and gives logits [T, V].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from mimo_edge.config import LayerSpec, MimoConfig

FOLDER = "onnx"
PACKAGE_MANIFEST = "manifest.json"
MODEL_NAME = "model.onnx"
DATA_NAME = "weights.bin"
OPSET = 24
CONTRIB_OPSET = 1
IR_VERSION = 12
"""Of opset 24's own time: no newer feature is used."""
CPU_VARIANT = "cpu"
LAYERS_PER_SHARD = 8
"""Decoder layers of one component where no router ends it sooner."""

RUN_ROWS = 128
"""Most new tokens that one run of a graph on the CPU computes: a longer pass runs a graph several
times, because attention keeps its scores of every row and column at once, and then gives the routed
experts all of its rows together."""

EMBED, HEAD = "embed", "lm_head"
MASKED = -1e30
"""What a mask says of a column that is not seen: finite, because -inf times 0 would be NaN; far
below any score, so that its weight is exactly 0."""

CacheForm = Literal["append", "in_place"]
Kind = Literal["full", "sliding"]


def kind_of(spec: LayerSpec) -> Kind:
    """Which mask and rotary angles a layer takes."""
    return "sliding" if spec.window is not None else "full"


def mtp_name(depth: int) -> str:
    """Component of MTP block `depth`."""
    return f"mtp_{depth}"


class Shard(NamedTuple):
    """A component of decoder layers: first..last without gaps; `cut` when it ends in a router."""

    name: str
    layers: tuple[int, ...]
    cut: bool


def shards(config: MimoConfig, most: int) -> tuple[Shard, ...]:
    """The decoder layers as components of up to `most` layers each, one ending at every router."""
    found: list[Shard] = []
    layers: list[int] = []
    for spec in config.layers:
        layers.append(spec.index)
        if spec.moe or len(layers) == most or spec.index == config.num_hidden_layers - 1:
            found.append(Shard(f"layers_{len(found):02d}", tuple(layers), spec.moe))
            layers = []
    return tuple(found)


def component_names(config: MimoConfig, layer_shards: Sequence[Shard]) -> tuple[str, ...]:
    """Every component of a model, in the order of their use."""
    mtp = [mtp_name(depth) for depth in range(config.num_mtp_layers)]
    return (EMBED, *(shard.name for shard in layer_shards), HEAD, *mtp)
