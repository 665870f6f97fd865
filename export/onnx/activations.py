"""Ranges of every activation, measured: the float graphs of a model run on a text, one component at
a time.

The residual stream of the whole text goes through the reference model layer by layer, as in
export/calibrate.py, so memory is one layer whatever the model's size; before a layer moves on, its
graph runs on the same rows with every value as an output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mimo_edge.config import LayerSpec, MimoConfig
from mimo_edge.export.calibrate import Collector, Walker
from mimo_edge.export.onnx.graph import F32, RowReader
from mimo_edge.export.onnx.npu_graphs import Component, linear_of
from mimo_edge.export.onnx.npu_model import (
    CentredBias,
    activations,
    float_model,
    with_outputs,
    write_weights,
)
from mimo_edge.export.onnx.qdq import MARGIN, Range
from mimo_edge.npu_io import MASKED, PREFILL_TOKENS, Shape, mtp_ring_rows, ring_rows
from mimo_edge.onnx_io import HEAD, Kind, kind_of
from mimo_edge.quant.imatrix import Imatrix
from mimo_edge.runtimes.base import TokenIds, Weights
from mimo_edge.runtimes.ggml.cache import EMPTY
from mimo_edge.runtimes.onnx.npu_feed import NpuInputs, padded, rows_by_kind
from mimo_edge.runtimes.onnx.plain import PlainSession
from mimo_edge.runtimes.reference import rms_norm

# Positions of one context, and how many contexts at most.
CONTEXT_TOKENS, MOST_TOKENS = 512, 2048
Arrays = dict[str, NDArray[Any]]
Span = tuple[int, int]


@dataclass(frozen=True)
class Sample:
    """Rows a component met at `position` and on, with the rows before them in its caches: `rows` by
    input name (h; e and hidden; x), `keys` and `values` [1, G, position, D] by layer."""

    position: int
    rows: Mapping[str, F32]
    keys: Mapping[int, F32]
    values: Mapping[int, F32]

    def feed(self, config: MimoConfig, component: Component, shape: Shape) -> Arrays:
        """Inputs of the component's graph of this shape. Caches keep what they have room for."""
        feed: Arrays = {n: padded(x[: shape.tokens], shape.tokens) for n, x in self.rows.items()}
        if not component.layers:
            return feed
        specs = [config.layer(index) for index in component.layers]
        kinds = rows_by_kind(config, specs, shape, _ring(config, specs[0]))
        held: dict[Kind, NDArray[np.int64]] = {}
        for spec in specs:
            rows = kinds[kind_of(spec)]
            kept = np.arange(max(0, self.position - rows), self.position)
            positions = np.full(rows, EMPTY, np.int64)
            positions[: len(kept)] = kept
            held[kind_of(spec)] = positions
            for name, source in (("pk", self.keys), ("pv", self.values)):
                found = source[spec.index]
                made = np.zeros((*found.shape[:2], rows, found.shape[3]), np.float32)
                made[:, :, : len(kept)] = found[:, :, kept]
                feed[f"{name}_{spec.index}"] = made
        inputs = NpuInputs(config, specs, shape.tokens, kinds)
        inputs.fill(self.position, min(shape.tokens, len(next(iter(self.rows.values())))), held)
        return feed | inputs.arrays


@dataclass(frozen=True)
class Activations:
    """What was measured: ranges by value name and a sample, by component; and how much each input
    of a matrix matters, by canonical name."""

    ranges: Mapping[str, Mapping[str, Range]]
    samples: Mapping[str, Sample]
    importance: Mapping[str, F32]


def measure_activations(
    weights: Weights,
    components: Sequence[Component],
    reader: RowReader,
    token_ids: TokenIds,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> Activations:
    """Run token_ids [N] through the model, in contexts of 512, and measure.

    `folder` takes the float weights of one component at a time. Raises GenerationError when the
    weights give NaN, and what reading them raises."""
    config = weights.config
    ids = np.asarray(token_ids, np.int32)[:MOST_TOKENS]
    spans = [
        (start, min(start + CONTEXT_TOKENS, len(ids)))
        for start in range(0, len(ids), CONTEXT_TOKENS)
    ]
    collector = Collector(config, Imatrix(("activations",), CONTEXT_TOKENS))
    walker = Walker(weights, collector)
    ranges: dict[str, dict[str, Range]] = {}
    samples: dict[str, Sample] = {}
    h = walker.embed(ids)
    decoder = [c for c in components if c.layers and c.layers[-1] < config.num_hidden_layers]
    others = {c.name: c for c in components if c not in decoder}

    def report() -> None:
        if progress is not None:
            progress(len(ranges), len(components))

    for component in decoder:
        meter = Meter(config, component, reader, folder)
        for span in spans:
            meter.context({"h": h[slice(*span)]})
        ranges[component.name], samples[component.name] = meter.close()
        report()
        for index in component.layers:
            walker.block(config.layer(index), h, spans)
    head = Meter(config, others[HEAD], reader, folder)
    eps = config.layernorm_epsilon
    head.context({"x": rms_norm(h, weights.tensor("output_norm.weight"), eps)})
    walker.observe_head("output_norm.weight", h)
    for depth in range(config.num_mtp_layers):
        spec = config.layer(config.num_hidden_layers + depth)
        component = others[f"mtp_{depth}"]
        meter = Meter(config, component, reader, folder)
        joined = []
        for start, stop in spans:
            known = ids[start + 1 + depth : stop]
            rows = h[start : start + len(known)]
            if not len(known):
                continue
            meter.context({"e": walker.embed(known), "hidden": rows})
            joined.append(walker.join(depth, known, rows))
        ranges[component.name], samples[component.name] = meter.close()
        report()
        z = np.concatenate(joined)
        ends = np.cumsum([len(part) for part in joined]).tolist()
        walker.block(spec, z, list(zip([0, *ends[:-1]], ends, strict=True)))
        norm = weights.tensor(f"blk.{spec.index}.layer_output_norm.weight")
        head.context({"x": rms_norm(z, norm, eps)})
    ranges[HEAD], samples[HEAD] = head.close()
    report()
    found = collector.imatrix
    importance = {
        name: value
        for name in found.names
        if len(found.counts(name)) == 1 and (value := found.importance(name, 0)) is not None
    }
    return Activations(ranges, samples, importance)


class Meter:
    """Runs a component's float graph over contexts and keeps the ranges of its values."""

    def __init__(
        self, config: MimoConfig, component: Component, reader: RowReader, folder: Path
    ) -> None:
        self._config = config
        self._component = component
        full = any(not config.layer(index).sliding for index in component.layers)
        self._shape = Shape(PREFILL_TOKENS, CONTEXT_TOKENS if full else 0)
        graph = component.build(self._shape, linear_of(config, "fp16"))
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(graph, CentredBias(reader), folder)
        model = float_model(graph)
        self._names = activations(model.graph)
        path = folder / f"{component.name}.onnx"
        onnx.save(with_outputs(model, self._names), path)
        self._session = PlainSession(path)
        path.unlink()
        self._ranges: dict[str, Range] = {}
        self._sample: Sample | None = None

    def context(self, rows: Mapping[str, F32]) -> None:
        """One context from its beginning: `rows` f32 [n, in] by input name."""
        total = len(next(iter(rows.values())))
        keys: dict[int, list[F32]] = {index: [] for index in self._component.layers}
        values: dict[int, list[F32]] = {index: [] for index in self._component.layers}
        for start, stop in _steps(total):
            part = {name: x[start:stop] for name, x in rows.items()}
            sample = Sample(
                start, part, _joined(keys, self._config, True), _joined(values, self._config, False)
            )
            feed = sample.feed(self._config, self._component, self._shape)
            found = self._session.run(feed)
            for name in self._names:
                self._note(name, found[name] if name in found else feed[name], stop - start)
            for index in keys:
                keys[index].append(found[f"kn_{index}"][:, :, : stop - start])
                values[index].append(found[f"vn_{index}"][:, :, : stop - start])
            # Of the whole steps the last: most rows in the caches.
            if stop - start == PREFILL_TOKENS or self._sample is None:
                self._sample = sample

    def _note(self, name: str, x: NDArray[Any], count: int) -> None:
        if name.startswith("mask_"):
            found = Range(MASKED, 0)
        elif name.startswith(("cos_", "sin_")):
            found = Range(-1 / MARGIN, 1 / MARGIN)
        else:
            found = Range.of(x)
        self._ranges[name] = found.union(self._ranges.get(name, found))

    def close(self) -> tuple[dict[str, Range], Sample]:
        """The ranges, widened, and a sample."""
        assert self._sample is not None
        widened = {
            name: found if name.startswith("mask_") else found.widened(MARGIN)
            for name, found in self._ranges.items()
        }
        return widened, self._sample


def _steps(total: int) -> Iterator[Span]:
    for start in range(0, total, PREFILL_TOKENS):
        yield start, min(start + PREFILL_TOKENS, total)


def _joined(parts: Mapping[int, list[F32]], config: MimoConfig, keys: bool) -> dict[int, F32]:
    made = {}
    for index, rows in parts.items():
        spec = config.layer(index)
        dim = config.head_dim if keys else config.v_head_dim
        none = np.zeros((1, spec.num_key_value_heads, 0, dim), np.float32)
        made[index] = np.concatenate([none, *rows], axis=2)
    return made


def _ring(config: MimoConfig, spec: LayerSpec) -> int:
    mtp = spec.index >= config.num_hidden_layers
    return mtp_ring_rows(config) if mtp else ring_rows(config)
