"""The decoder layers over T tokens as one graph.

A pass is built for one cache and one shape (`TrunkShape`) and reused for every call of that shape;
only its inputs are filled anew. Runs of layers without a host decision are one graph with the
routing inside, so a resident model costs one call into ggml per forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mimo_edge.config import LayerSpec
from mimo_edge.runtimes.base import VERIFY_ROWS, RouteSink
from mimo_edge.runtimes.ggml import blocks
from mimo_edge.runtimes.ggml.bindings import TYPE_F16, TYPE_I32, TYPE_I64
from mimo_edge.runtimes.ggml.cache import GgmlCache, Positions
from mimo_edge.runtimes.ggml.cache_memory import kv_rows
from mimo_edge.runtimes.ggml.device import Device
from mimo_edge.runtimes.ggml.graph import Graph, Inputs, Tensor, finish_together
from mimo_edge.runtimes.ggml.look_ahead import RouterGuess
from mimo_edge.runtimes.ggml.masks import fill_causal, fill_full, fill_ring
from mimo_edge.runtimes.ggml.resident import BlockWeights, ModelWeights
from mimo_edge.runtimes.ggml.rows import RowCheck
from mimo_edge.runtimes.ggml.slots import ExpertSource
from mimo_edge.runtimes.ggml.streamed import FEW_TOKENS, Carry, SlotExperts
from mimo_edge.runtimes.ggml.token_input import TokenInput

# Tensors for every row that is computed apart, in attention or in one product.
_ATTENTION_ROW_TENSORS, _PRODUCT_ROW_TENSORS = 14, 3


class TrunkShape(NamedTuple):
    """What a trunk graph depends on. `full_rows`: rows global layers read (0: no such layer).
    `ring`: "in_place" (written, then read), "fresh" (chunk only) or "append" (ring, then chunk).
    `exact`: every row gets the bits it would get in a pass of its own; its query is computed alone
    in sliding layers when `ring_apart`, in global ones when `full_apart` gives the rows each token
    reads."""

    tokens: int
    full_rows: int
    ring: str
    logits_rows: int
    hidden_rows: int
    exact: bool = False
    ring_apart: bool = False
    full_apart: tuple[int, ...] | None = None

    @property
    def large(self) -> bool:
        return self.tokens > FEW_TOKENS


def _apart_tensors(model: ModelWeights, shape: TrunkShape) -> int:
    """Tensors of a block, at most, that exact rows need on top."""
    if not shape.exact or shape.tokens == 1:
        return 0
    blocks_of = [w.matrices for w in model.layers] + [(model.output,)]
    products = max(sum(m.rows.together < shape.tokens for m in found) for found in blocks_of)
    per_row = _PRODUCT_ROW_TENSORS * products
    if shape.ring_apart or shape.full_apart is not None:
        per_row += _ATTENTION_ROW_TENSORS
    return per_row * shape.tokens


class _Filled(NamedTuple):
    """The memory of inputs, as `TrunkPass` fills it: positions and rows [T], masks [T, columns]."""

    positions: NDArray[np.int32]
    full_ids: NDArray[np.int64] | None
    ring_ids: NDArray[np.int64] | None
    full_mask: NDArray[np.float16] | None
    ring_mask: NDArray[np.float16] | None


@dataclass(frozen=True)
class _Segment:
    """A graph of the trunk; `ids` {K, few + rows} are the experts `layer` chose at its end for
    `rows` rows, behind those of `few` of them that are computed apart as well. `routes`: (layer,
    ids) of resident layers inside, kept when somebody wants to know."""

    graph: Graph
    layer: int | None = None
    ids: Tensor | None = None
    rows: int = 0
    few: int = 0
    routes: tuple[tuple[int, Tensor], ...] = ()


def _rows(ids: Tensor) -> NDArray[np.int32]:
    """Ids {K, rows} as i32 [rows, K]."""
    return ids.array().reshape(-1, ids.ne[0])


class TrunkPass:
    """The decoder layers and the head over T tokens.

    One graph when every expert is resident and tokens are few; otherwise cut after the router of
    each layer whose experts come from `experts`, and the chosen ones are computed in between.
    """

    def __init__(
        self,
        device: Device,
        model: ModelWeights,
        cache: GgmlCache,
        shape: TrunkShape,
        experts: ExpertSource | None = None,
        routes: RouteSink | None = None,
    ) -> None:
        """`routes` is told the experts every layer chose; without it resident layers keep theirs
        inside the graph."""
        self.config = cache.config
        self.shape = shape
        self._device = device
        self._segments: list[_Segment] = []
        self._inputs = Inputs(device)
        self._source = experts
        self._routes = routes
        self._resident_routes: list[tuple[int, Tensor]] = []
        self._carry: Carry | None = None
        self._slot_experts: SlotExperts | None = None
        self._guesses: dict[int, RouterGuess] = {}  # by layer
        self._epoch = -1
        self.logits_tensor: Tensor | None = None
        self.hidden_tensor: Tensor | None = None
        # Rows that every layer computes, in groups: the last only those that are asked for.
        self._groups = [[shape.tokens]] * (len(model.layers) - 1) + [self._wanted()]
        pairs = zip(model.layers, self._groups, strict=True)
        self._cut_at = [any(self._cuts(w, rows) for rows in groups) for w, groups in pairs]
        self._apart = _apart_tensors(model, shape)
        self._graph = self._new_graph(0)
        try:
            self._describe_inputs(model, cache)
            self._build(model, cache)
        except BaseException:
            self.close()
            raise

    def _new_graph(self, first: int) -> Graph:
        """A graph that begins with layer `first`: up to one that is cut, or all and a head."""
        cuts = self._cut_at[first:]
        end = first + cuts.index(True) + 1 if True in cuts else len(self._cut_at)
        # A group takes what a block takes; without any, keys and values are computed all the same.
        blocks_count = sum(max(1, len(groups)) for groups in self._groups[first:end])
        nodes = blocks.tensors_of(self.config, blocks_count + (True not in cuts), self._apart)
        return Graph(self._device, nodes, self.shape.exact)

    def _describe_inputs(self, model: ModelWeights, cache: GgmlCache) -> None:
        c, new, shape = self.config, self._inputs.new, self.shape
        total, ring_rows = shape.tokens, cache.ring.rows
        kept = min(total, ring_rows)
        columns = {"in_place": ring_rows, "fresh": total, "append": ring_rows + total}[shape.ring]
        has_ring = any(c.hybrid_layer_pattern)
        # A guess of the first route begins with the embedding, before the graph has run.
        table = None if self._source is not None else model.table
        self.tokens = TokenInput(self._inputs, c, table, total)
        self.positions = new(TYPE_I32, total)
        self.full_ids = new(TYPE_I64, total) if shape.full_rows else None
        self.full_mask = new(TYPE_F16, shape.full_rows, total) if shape.full_rows else None
        self.ring_ids = new(TYPE_I64, kept) if has_ring else None
        self.ring_mask = new(TYPE_F16, columns, total) if has_ring else None
        if self._source is not None:
            # Rows wanted in two groups are computed twice.
            most = max(total, sum(self._wanted()))
            self._carry = Carry(self._inputs, c, most)
        self._inputs.allocate()
        self._filled = _Filled(
            self.positions.array(),
            *(None if ids is None else ids.array() for ids in (self.full_ids, self.ring_ids)),
            *(
                None if mask is None else mask.array().reshape(total, -1)
                for mask in (self.full_mask, self.ring_mask)
            ),
        )
        if self._source is not None and self._carry is not None:
            self._slot_experts = SlotExperts(self._device, c, self._source, self._carry, most)

    def _build(self, model: ModelWeights, cache: GgmlCache) -> None:
        c, shape = self.config, self.shape
        shared = blocks.BlockInputs(c, self.positions, shape.tokens)
        hs = [self.tokens.embedding(self._graph)]
        for index, w in enumerate(model.layers):
            access = self._access(cache, w.spec)
            [h] = hs
            halves = blocks.attention_half(self._graph, w, shared, access, h, self._groups[index])
            if self._cut_at[index]:
                hs = self._cut(w, halves, index + 1)
            else:
                ids: list[Tensor] | None = [] if self._routes is not None else None
                hs = [
                    self._graph.add(h, blocks.feed_forward(self._graph, w, c, x, ids))
                    for h, x in halves
                ]
                # Only of the last group: it holds the rows of the others.
                self._resident_routes += [(index, one) for one in (ids or ())[-1:]]
            for h in hs:
                self._graph.run_now(h)
        g = self._graph
        if shape.hidden_rows:
            h = next(h for h in hs if h.ne[1] >= shape.hidden_rows)
            self.hidden_tensor = g.output(blocks.last_rows(g, h, shape.hidden_rows))
            g.output(h)
        if shape.logits_rows:
            h = next(h for h in hs if h.ne[1] >= shape.logits_rows)
            rows = blocks.last_rows(g, h, shape.logits_rows)
            eps = c.layernorm_epsilon
            logits = blocks.head(g, model.output, model.output_norm, eps, rows)
            self.logits_tensor = g.output(logits)
        self._segments.append(_Segment(g, routes=self._take_routes()))
        graphs = [segment.graph for segment in self._segments]
        if self._slot_experts is not None:
            graphs += self._slot_experts.largest()
            self._guess(model)
            graphs += [guess.graph for guess in self._guesses.values()]
        finish_together(graphs)
        self._epoch = self._device.epoch

    def _cuts(self, w: BlockWeights, rows: int) -> bool:
        """Whether the experts of a layer are computed between two graphs."""
        if not w.spec.moe or self._source is None:
            return False
        if w.experts is None:
            return True
        return rows > FEW_TOKENS and w.spec.index in self._source.slots.layouts

    def _wanted(self) -> list[int]:
        """Rows of the last layer, the most last, in groups computed by themselves: what else is
        wanted must not change the bits of the logits, and in one product it could. An exact pass
        keeps rows apart anyway."""
        shape = self.shape
        counts = sorted({shape.logits_rows, shape.hidden_rows} - {0})
        apart = not shape.exact and shape.logits_rows <= VERIFY_ROWS
        return counts if apart else counts[-1:]

    def _cut(
        self, w: BlockWeights, halves: Sequence[tuple[Tensor, Tensor]], following: int
    ) -> list[Tensor]:
        """End the graph at the router of a layer; the next starts with its sums, before layer
        `following`. `halves` are the residual stream and the experts' input of groups of rows, of
        which small ones may need no cut."""
        assert self._carry is not None
        g, carry = self._graph, self._carry
        cut = [half for half in halves if self._cuts(w, half[0].ne[1])]
        whole = [
            g.add(h, blocks.feed_forward(g, w, self.config, x))
            for h, x in halves
            if not self._cuts(w, h.ne[1])
        ]
        routes = [blocks.route(g, w, self.config, x) for _, x in cut]
        ids = g.output(g.concat_all([g.contiguous(ids) for ids, _ in routes], 1))
        carry.save(
            g,
            g.concat_all([h for h, _ in cut] + whole, 1),
            g.concat_all([x for _, x in cut], 1),
            g.concat_all([weights for _, weights in routes], 1),
        )
        # Rows of a small group are computed as if the large one were not there.
        few = cut[0][0].ne[1] if len(cut) > 1 else 0
        rows = ids.ne[1] - few
        self._segments.append(_Segment(g, w.spec.index, ids, rows, few, self._take_routes()))
        self._graph = g = self._new_graph(following)
        mixed = carry.restore(g, ids.ne[1])
        found, start, after = [], 0, ids.ne[1]
        for h, _ in halves:
            rows = h.ne[1]
            if self._cuts(w, rows):
                found.append(blocks.rows_from(g, mixed, start, rows))
                start += rows
            else:
                found.append(blocks.rows_from(g, carry.h, after, rows))
                after += rows
        return found

    def _guess(self, model: ModelWeights) -> None:
        """Guess the routes of cut layers, in a pass of few tokens: of the first from the embedding,
        of the others from the stream that the cut layer before left."""
        assert self._carry is not None
        if self.shape.large:
            return
        stream = self.tokens.embedding(self._graph)
        for segment in self._segments:
            # A last layer that computes fewer rows takes the last ones: they are not guessed.
            if segment.layer is not None and segment.rows == self.shape.tokens:
                w = model.layers[segment.layer]
                made = RouterGuess(self._device, self.config, w, stream, segment.rows)
                self._guesses[segment.layer] = made
                stream = self._carry.h

    def _take_routes(self) -> tuple[tuple[int, Tensor], ...]:
        taken, self._resident_routes = tuple(self._resident_routes), []
        return taken

    @property
    def current(self) -> bool:
        """Whether the scratch addresses are still those of the device."""
        return self._epoch == self._device.epoch

    @property
    def nbytes(self) -> int:
        """Bytes of inputs and descriptions; intermediate results lie in the shared scratch."""
        graphs = [segment.graph for segment in self._segments]
        graphs += [guess.graph for guess in self._guesses.values()]
        total = self._inputs.nbytes + sum(graph.context_bytes for graph in graphs)
        return total + (0 if self._slot_experts is None else self._slot_experts.nbytes)

    def compute(self) -> None:
        """Run with the inputs filled before."""
        source, rows = self._source, self.shape.tokens
        if source is None or not self._guesses:
            self._compute(guess=False)
            return
        guess = source.guesses(rows)
        began = perf_counter()
        self._compute(guess)
        source.passed(rows, guess, perf_counter() - began)

    def _compute(self, guess: bool) -> None:
        cut = [segment for segment in self._segments if segment.layer is not None]
        if cut and guess:
            self._expect_guessed(cut[0])
        for segment in self._segments:
            segment.graph.compute()
            if self._routes is not None:
                for layer, chosen in segment.routes:
                    self._routes(layer, _rows(chosen))
            if segment.layer is not None:
                assert segment.ids is not None
                assert self._slot_experts is not None
                # a copy: computing experts reuses the scratch memory they are in
                ids = _rows(segment.ids).copy()
                if self._routes is not None:
                    self._routes(segment.layer, ids[segment.few :])
                cut = cut[1:]
                meanwhile = partial(self._expect_guessed, cut[0]) if cut and guess else None
                if cut:
                    self._expect_nearly_all(cut[0])
                self._slot_experts.run(segment.layer, ids, segment.few, meanwhile)

    def _expect_guessed(self, segment: _Segment) -> None:
        """Guess what the next cut layer will want, and let the source know."""
        assert segment.layer is not None
        guess = self._guesses.get(segment.layer)
        if guess is not None and self._source is not None:
            self._source.expect(segment.layer, guess.run())

    def _expect_nearly_all(self, segment: _Segment) -> None:
        """Let the source know when the cut layer after the one that runs now will want nearly all
        experts. Uniform routes leave 2 % of them out then, real ones the least useful ones."""
        assert segment.layer is not None
        c = self.config
        many = segment.rows * c.num_experts_per_tok >= 4 * c.n_routed_experts
        if self._source is not None and self.shape.large and many:
            self._source.expect(segment.layer, None)

    def close(self) -> None:
        """Free graphs and inputs."""
        self._graph.close()
        for segment in self._segments:
            segment.graph.close()
        for guess in self._guesses.values():
            guess.close()
        if self._slot_experts is not None:
            self._slot_experts.close()
        self._inputs.close()

    def _access(self, cache: GgmlCache, spec: LayerSpec) -> blocks.KvAccess:
        kv, shape = cache.layers[spec.index], self.shape
        if spec.sliding:
            assert self.ring_ids is not None
            rows = 0 if shape.ring == "fresh" else kv.rows
            append = shape.ring != "in_place"
            apart = (rows,) * shape.tokens if shape.ring_apart else None
            return blocks.KvAccess(kv, self.ring_ids, self.ring_mask, rows, append, apart)
        assert self.full_ids is not None
        return blocks.KvAccess(
            kv, self.full_ids, self.full_mask, shape.full_rows, False, shape.full_apart
        )

    def fill(self, position: int, before: Positions | None, after: Positions) -> None:
        """Set the inputs, besides `tokens`, for rows at `position`.. : `before` are the positions
        the ring's slots hold (None unless rows are appended to it), `after` those they are written
        for."""
        total, filled = self.shape.tokens, self._filled
        queries = np.arange(position, position + total, dtype=np.int64)
        filled.positions[...] = queries
        if filled.full_ids is not None and filled.full_mask is not None:
            filled.full_ids[...] = queries
            fill_full(filled.full_mask, queries)
        if filled.ring_ids is not None and filled.ring_mask is not None:
            kept = filled.ring_ids.size
            np.remainder(queries[total - kept :], after.size, out=filled.ring_ids)
            mask, window = filled.ring_mask, self.config.sliding_window
            if self.shape.ring == "in_place":
                fill_ring(mask, after, queries, window)
            else:
                held = queries if before is None else np.concatenate([before, queries])
                fill_causal(mask, held, queries, window)


def trunk_shape(
    cache: GgmlCache, rows: RowCheck, tokens: int, logits_rows: int, hidden_rows: int
) -> TrunkShape:
    """The shape of a pass of `tokens` at the cache's current length. Passes that a verify could be
    are exact; `rows` tells what for."""
    c, position = cache.config, cache.length
    has_full, has_ring = not all(c.hybrid_layer_pattern), any(c.hybrid_layer_pattern)
    ring = "in_place"
    if has_ring and not cache.ring.in_place(position, tokens):
        ring = "append" if position else "fresh"
    full_rows = kv_rows(position + tokens) if has_full else 0
    exact, ring_apart, full_apart = tokens <= cache.verify_rows, False, None
    if exact and tokens > 1:
        memory = cache.memory
        ring_apart = has_ring and not rows.attention_together(memory, True, memory.ring_rows)
        if has_full and not rows.attention_together(memory, False, full_rows):
            full_apart = tuple(kv_rows(position + row + 1) for row in range(tokens))
    return TrunkShape(
        tokens, full_rows, ring, logits_rows, hidden_rows, exact, ring_apart, full_apart
    )
