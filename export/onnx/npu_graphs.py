"""The graphs of a model for NPUs: static shapes, so one per number of tokens and cache length.

Components are those of the CPU form, cut at the same routers, except that the head takes normed
rows: which norm is the host's choice, and the NPU gets its largest matrix alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mimo_edge.config import MimoConfig
from mimo_edge.errors import UsageError
from mimo_edge.export.onnx import layers
from mimo_edge.export.onnx.graph import F32, Dim, Graph, Matrix, Source
from mimo_edge.export.onnx.layers import GraphForm, LinearOf
from mimo_edge.export.onnx.linear import BlockLinear, FloatLinear, Linear
from mimo_edge.export.onnx.npu_linear import Int8Linear, LpbqLinear
from mimo_edge.gguf_meta import expected_shapes
from mimo_edge.npu_io import (
    ANY_SHAPE,
    DECODE_TOKENS,
    PREFILL_TOKENS,
    VERIFY_TOKENS,
    Shape,
    mtp_ring_rows,
    ring_rows,
)
from mimo_edge.onnx_io import HEAD, Kind, mtp_name, shards
from mimo_edge.quant.npu import BLOCK

Precision = Literal["int4", "fp16"]
"""LPBQ weights with u16 activations, or everything in fp16."""
LAYERS_PER_SHARD = 8
# Blocks the provider takes, best first.
_BLOCKS = (BLOCK, 32)
# onnxruntime-qnn 2.7.0: a compiled context with an LPBQ matrix of 8 blocks ends the process that
# loads it, whatever the block and the number of outputs.
_FATAL_BLOCKS = 8


@dataclass(frozen=True)
class Component:
    """What runs on the NPU at once: a run of decoder layers, an MTP block, or the head. `layers`:
    its decoder layers or MTP block, none for the head."""

    name: str
    layers: tuple[int, ...]
    shapes: tuple[Shape, ...]
    build: Callable[[Shape, LinearOf], Graph]
    """The graph of a shape; of ANY_SHAPE one that takes any number of tokens and rows."""


def components(
    config: MimoConfig, buckets: Sequence[int], layers_per_shard: int = LAYERS_PER_SHARD
) -> tuple[Component, ...]:
    """Every component of a model; `buckets` are the cache lengths of global layers, ascending.

    Raises UsageError when there is none."""
    if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
        raise UsageError(f"cache lengths {list(buckets)}", "give one or more, ascending")
    found = [
        decoder_shard(config, shard.name, shard.layers, buckets)
        for shard in shards(config, layers_per_shard)
    ]
    found.append(
        Component(HEAD, (), (Shape(VERIFY_TOKENS, 0),), lambda s, linear: _head(config, linear, s))
    )
    for depth in range(config.num_mtp_layers):
        found.append(_mtp(config, depth, buckets))
    return tuple(found)


def decoder_shard(
    config: MimoConfig, name: str, members: tuple[int, ...], buckets: Sequence[int]
) -> Component:
    """Decoder layers `members` as one component."""
    full = any(not config.layer(index).sliding for index in members)
    tokens = (DECODE_TOKENS, VERIFY_TOKENS, PREFILL_TOKENS)

    def build(shape: Shape, linear: LinearOf) -> Graph:
        form = _form(shape, full=shape.rows, sliding=ring_rows(config))
        return layers.decoder_layers(config, members, linear, form)

    return Component(name, members, _shapes(tokens, buckets if full else (0,)), build)


def _mtp(config: MimoConfig, depth: int, buckets: Sequence[int]) -> Component:
    spec = config.layer(config.num_hidden_layers + depth)
    rows = (0,) if spec.sliding else buckets

    def build(shape: Shape, linear: LinearOf) -> Graph:
        form = _form(shape, full=shape.rows, sliding=mtp_ring_rows(config))
        return layers.mtp_block(config, depth, linear, form)

    return Component(
        mtp_name(depth), (spec.index,), _shapes((VERIFY_TOKENS, PREFILL_TOKENS), rows), build
    )


def _head(config: MimoConfig, linear: LinearOf, shape: Shape) -> Graph:
    """x [T, M], normed -> logits [T, V]."""
    g = Graph(HEAD)
    name = "token_embd.weight" if config.tie_word_embeddings else "output.weight"
    tokens: Dim = shape.tokens or "T"
    x = g.input("x", [tokens, config.hidden_size])
    matrix = Matrix((Source(name, config.vocab_size),), config.hidden_size)
    logits = linear(name).emit(g, x, matrix, "head", tokens)
    g.node("Identity", [logits], "logits")
    g.output("logits", [tokens, config.vocab_size])
    return g


def _shapes(tokens: Sequence[int], rows: Sequence[int]) -> tuple[Shape, ...]:
    return tuple(Shape(t, r) for t in tokens for r in rows)


def _form(shape: Shape, full: int, sliding: int) -> GraphForm:
    if shape == ANY_SHAPE:
        return GraphForm(cache="append")
    rows: dict[Kind, int] = {"full": full, "sliding": sliding}
    # Products of one input stay apart: together they would have to share a scale.
    return GraphForm(cache="append", tokens=shape.tokens, rows=rows, fuse=False)


def cpu_linear_of(config: MimoConfig, precision: Precision) -> Callable[[str], Linear]:
    """How the CPU stores what an NPU refused: in as many bits."""
    if precision == "fp16":
        return lambda _: FloatLinear()
    return lambda name: BlockLinear(4 if _in_trunk(config, name) else 8)


def _in_trunk(config: MimoConfig, name: str) -> bool:
    parts = name.split(".")
    return parts[0] == "blk" and int(parts[1]) < config.num_hidden_layers


def linear_of(
    config: MimoConfig,
    precision: Precision,
    importance: Mapping[str, F32] | None = None,
) -> Callable[[str], Linear]:
    """How each matrix is stored, by canonical name: in "int4" LPBQ for the decoder layers, int8 for
    the head and MTP blocks, whose drafts 4 bits are known to spoil, and for widths that are no
    whole blocks; f32 in "fp16", which the compiler narrows itself.

    `importance` f32 [in]: mean square of a matrix's inputs, for LPBQ."""
    if precision == "fp16":
        half = FloatLinear()
        return lambda _: half
    shapes = expected_shapes(config)

    def find(name: str) -> Linear:
        width = shapes[name][-1]
        fits = (b for b in _BLOCKS if width % b == 0 and width // b != _FATAL_BLOCKS)
        block = next(fits, None)
        if block is None or not _in_trunk(config, name):
            return Int8Linear()
        return LpbqLinear(block, (importance or {}).get(name))

    return find
