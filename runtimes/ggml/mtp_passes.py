"""MTP blocks as graphs: one block on n rows, and all of them one after the other.

`MtpPass` gives logits: the host chooses the token for the next block. Of a small model whose
embedding table is in memory, `ChainPass` does that inside: what each block proposes is looked up
and fed to the next, and a draft is one call into ggml instead of three.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mimo_edge.runtimes.base import F32
from mimo_edge.runtimes.ggml import blocks
from mimo_edge.runtimes.ggml.bindings import TYPE_F16, TYPE_F32, TYPE_I32, TYPE_I64
from mimo_edge.runtimes.ggml.cache import GgmlCache, RingIndex
from mimo_edge.runtimes.ggml.cache_memory import kv_rows
from mimo_edge.runtimes.ggml.device import Device
from mimo_edge.runtimes.ggml.graph import Graph, Inputs, Tensor
from mimo_edge.runtimes.ggml.kept_graphs import LARGE_INPUT_BYTES
from mimo_edge.runtimes.ggml.masks import fill_full, fill_newest
from mimo_edge.runtimes.ggml.resident import ModelWeights
from mimo_edge.runtimes.ggml.streamed import FEW_TOKENS
from mimo_edge.runtimes.ggml.token_input import TokenInput


class MtpShape(NamedTuple):
    """What an MTP graph depends on: block, rows, and rows of K/V its query reads."""

    depth: int
    tokens: int
    read_rows: int
    large: bool


class ChainShape(NamedTuple):
    """What a chain depends on: how many blocks, on how many rows."""

    blocks: int
    tokens: int
    large: bool


def mtp_shape(cache: GgmlCache, depth: int, tokens: int, position: int) -> MtpShape:
    """The shape of an MTP pass over rows position.. . The first draft of an answer writes more rows
    than others: where that takes little memory all these graphs are kept."""
    kv = cache.mtp[depth]
    ring = isinstance(cache.mtp_index[depth], RingIndex)
    read_rows = kv.rows if ring else kv_rows(position + tokens)
    return MtpShape(depth, tokens, read_rows, _large(cache, tokens))


def chain_shape(cache: GgmlCache, count: int, tokens: int) -> ChainShape:
    """The shape of a chain, kept as in `mtp_shape`."""
    return ChainShape(count, tokens, _large(cache, tokens))


def _large(cache: GgmlCache, tokens: int) -> bool:
    return tokens > FEW_TOKENS and 8 * cache.config.hidden_size * tokens > LARGE_INPUT_BYTES


class _Rows:
    """What every block of a pass over n rows is given besides embeddings."""

    def __init__(self, inputs: Inputs, cache: GgmlCache, n: int, read_rows: int) -> None:
        c, new = cache.config, inputs.new
        self.config = c
        self.total = n
        self._window = c.layer(c.num_hidden_layers).window
        self.hidden = new(TYPE_F32, c.hidden_size, n)
        self.positions = new(TYPE_I32, n)
        self.ids = new(TYPE_I64, n)
        self.mask = new(TYPE_F16, read_rows, 1)  # only the last row queries
        self._arrays: tuple[NDArray[Any], ...] | None = None

    def fill(self, hidden: F32, position: int, ring: RingIndex | None) -> None:
        """Set the inputs; `ring` is what it is once these rows are written, None without one."""
        last = position + self.total - 1
        rows = np.arange(position, last + 1, dtype=np.int64)
        filled, positions, ids, mask = self._memory()
        filled[...] = hidden
        positions[...] = rows
        if ring is None or self._window is None:
            ids[...] = rows
            fill_full(mask, rows[-1:])
        else:
            np.remainder(rows, ring.rows, out=ids)
            fill_newest(mask[0], max(ring.oldest(), last - self._window + 1, 0), last)

    def _memory(self) -> tuple[NDArray[Any], ...]:
        """What `fill` sets."""
        if self._arrays is None:
            mask, hidden = self.mask.array().reshape(1, -1), self.hidden.array()
            rows = hidden.reshape(self.total, -1)
            self._arrays = rows, self.positions.array(), self.ids.array(), mask
        return self._arrays

    def block(
        self, g: Graph, model: ModelWeights, cache: GgmlCache, depth: int, embedding: Tensor
    ) -> Tensor:
        """embedding {M, n} -> logits {V, 1} of the last row; every row leaves its K/V."""
        c, w, kv = self.config, model.mtp[depth], cache.mtp[depth]
        assert w.mtp is not None
        z = blocks.mtp_input(g, w.mtp, c, embedding, self.hidden)
        shared = blocks.BlockInputs(c, self.positions, self.total)
        access = blocks.KvAccess(kv, self.ids, self.mask, self.mask.ne[0], False)
        z_last = blocks.block(g, w, shared, access, z)
        return blocks.head(g, model.output, w.mtp.output_norm, c.layernorm_epsilon, z_last)


class _MtpGraph:
    """Graph and inputs of a pass."""

    def __init__(self, device: Device, nodes: int) -> None:
        self._device = device
        self._inputs = Inputs(device)
        self._graph = Graph(device, nodes)

    @property
    def current(self) -> bool:
        """Whether the scratch addresses are still those of the device."""
        return self._graph.epoch == self._device.epoch

    @property
    def nbytes(self) -> int:
        """Bytes of inputs and descriptions; intermediate results lie in the shared scratch."""
        return self._inputs.nbytes + self._graph.context_bytes

    def compute(self) -> None:
        """Run with the inputs filled before."""
        self._graph.compute()

    def close(self) -> None:
        """Free graph and inputs."""
        self._graph.close()
        self._inputs.close()


class MtpPass(_MtpGraph):
    """One MTP block on n rows: every row leaves its K/V, the newest gives logits. `tokens` and
    `rows` are to be filled before each run."""

    def __init__(
        self, device: Device, model: ModelWeights, cache: GgmlCache, shape: MtpShape
    ) -> None:
        super().__init__(device, blocks.tensors_of(cache.config, 2))
        try:
            g, n = self._graph, shape.tokens
            self.tokens = TokenInput(self._inputs, cache.config, model.table, n)
            self.rows = _Rows(self._inputs, cache, n, shape.read_rows)
            self._inputs.allocate()
            embedding = self.tokens.embedding(g)
            logits = self.rows.block(g, model, cache, shape.depth, embedding)
            self._logits = g.output(logits)
            g.finish()
        except BaseException:
            self.close()
            raise

    def logits(self) -> F32:
        """Logits f32 [V] of the last run."""
        return self._logits.array().reshape(-1).copy()


class ChainPass(_MtpGraph):
    """The first blocks on the same n rows, each with the token the one before chose.
    `tokens` (of block 0) and `rows` are to be filled before each run."""

    def __init__(
        self, device: Device, model: ModelWeights, cache: GgmlCache, shape: ChainShape
    ) -> None:
        super().__init__(device, blocks.tensors_of(cache.config, 2 * shape.blocks))
        table, n = model.table, shape.tokens
        assert table is not None
        try:
            self.tokens = TokenInput(self._inputs, cache.config, table, n)
            self.rows = _Rows(self._inputs, cache, n, cache.mtp[0].rows)
            self._inputs.allocate()
            self._logits: list[Tensor] = []
            self._chosen: list[Tensor] = []
            g = self._graph
            embedding = self.tokens.embedding(g)
            for depth in range(shape.blocks):
                logits = self.rows.block(g, model, cache, depth, embedding)
                self._logits.append(g.output(logits))
                self._chosen.append(g.output(g.argmax(logits)))
                if depth + 1 < shape.blocks:
                    row = g.get_rows(table, self._chosen[-1])
                    embedding = g.concat(blocks.last_rows(g, embedding, n - 1), row, 1)
            g.finish()
        except BaseException:
            self.close()
            raise

    def logits(self) -> list[F32]:
        """Logits f32 [V] of every block in the last run; only lent, until the device computes."""
        return [tensor.array() for tensor in self._logits]

    def chosen(self) -> list[int]:
        """The token of every block in the last run."""
        return [int(tensor.array()[0]) for tensor in self._chosen]
