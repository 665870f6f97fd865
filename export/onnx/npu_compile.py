"""Compiling a model for NPUs ahead of time: every component, for every target, checked by running
it.

What a target refuses is tried again with less: fewer layers at once, then fp16 instead of int4,
then not at all: the CPU computes that part, which the index says with the reason, and `stats`
repeats.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mimo_edge.config import MimoConfig
from mimo_edge.errors import BackendError, ProviderError
from mimo_edge.export.onnx.activations import Activations, Arrays, Sample
from mimo_edge.export.onnx.graph import F32, RowReader
from mimo_edge.export.onnx.npu_check import CHOICE, check
from mimo_edge.export.onnx.npu_graphs import (
    Component,
    Precision,
    components,
    cpu_linear_of,
    decoder_shard,
    linear_of,
)
from mimo_edge.export.onnx.npu_model import (
    CentredBias,
    float_model,
    quantised_model,
    with_outputs,
    write_weights,
)
from mimo_edge.export.onnx.qdq import Range
from mimo_edge.npu_io import (
    ANY_SHAPE,
    DECODE_TOKENS,
    VERIFY_TOKENS,
    NpuComponent,
    Shape,
)
from mimo_edge.onnx_io import DATA_NAME, MODEL_NAME, shards
from mimo_edge.runtimes.onnx.isolated import Worker
from mimo_edge.runtimes.onnx.plain import PlainSession
from mimo_edge.runtimes.onnx.qnn_targets import Target

_log = logging.getLogger(__name__)

_JOBS = "mimo_edge.runtimes.onnx.npu_jobs"


@dataclass(frozen=True)
class NpuPlan:
    """What is to be compiled: `buckets` are cache lengths of global layers, `layers_per_shard` the
    most decoder layers in one graph."""

    config: MimoConfig
    targets: tuple[Target, ...]
    precision: Precision
    buckets: tuple[int, ...]
    layers_per_shard: int

    def components(self) -> tuple[Component, ...]:
        """What is compiled, unless something is refused."""
        return components(self.config, self.buckets, self.layers_per_shard)

    def measured(self) -> tuple[Component, ...]:
        """What calibration measures: layer by layer, so that any run of layers can be put
        together."""
        return components(self.config, self.buckets, 1)


class Compiler:
    """Compiles for one target into `folder`/COMPONENT/VARIANT. `work` takes graphs while they are
    compiled. Close it: it owns a process."""

    def __init__(
        self,
        plan: NpuPlan,
        target: Target,
        reader: RowReader,
        activations: Activations | None,
        folder: Path,
        work: Path,
    ) -> None:
        self._plan = plan
        self._target = target
        self._reader = CentredBias(reader)
        self._measurements = activations
        self._folder = folder
        self._work = work
        self._worker = Worker()
        self._layer_names = {shard.layers[0]: shard.name for shard in shards(plan.config, 1)}

    def close(self) -> None:
        """End the process. Twice is harmless."""
        self._worker.close()

    def component(self, component: Component, refused: tuple[str, ...] = ()) -> list[NpuComponent]:
        """Compile one, with less where it is refused; the parts it became, in order. `refused`:
        why more layers at once were not compiled."""
        reasons = list(refused)
        for precision in _precisions(self._plan.precision):
            try:
                return [replace(self._compiled(component, precision), reason="; ".join(reasons))]
            except (ProviderError, BackendError) as error:
                count = len(component.layers)
                what = f"{count} layers in {precision}" if count > 1 else precision
                reasons.append(f"{what}: {error.message}")
                _log.warning(
                    "%s refuses %s in %s: %s", self._target.name, component.name, precision, error
                )
            if len(component.layers) > 1:
                return [
                    part
                    for half in self._halves(component)
                    for part in self.component(half, tuple(reasons))
                ]
        _log.warning("%s runs on the CPU: %s", component.name, reasons[-1])
        return [self.on_cpu(component, "; ".join(reasons))]

    def on_cpu(self, component: Component, reason: str) -> NpuComponent:
        """A component the NPU refuses, written for the CPU: one graph for any shape."""
        place = self._folder / component.name / self._target.variant
        place.mkdir(parents=True, exist_ok=True)
        graph = component.build(ANY_SHAPE, cpu_linear_of(self._plan.config, self._plan.precision))
        write_weights(graph, self._reader, place)
        (place / MODEL_NAME).write_bytes(graph.to_bytes())
        files = {ANY_SHAPE: (MODEL_NAME, DATA_NAME)}
        return NpuComponent(component.name, component.layers, "cpu", files, reason)

    def _halves(self, component: Component) -> list[Component]:
        middle = len(component.layers) // 2
        halves = (component.layers[:middle], component.layers[middle:])
        return [
            decoder_shard(
                self._plan.config, f"{component.name}{letter}", members, self._plan.buckets
            )
            for letter, members in zip("ab", halves, strict=True)
        ]

    def _compiled(self, component: Component, precision: Precision) -> NpuComponent:
        """Compile and check every graph of a component. Raises ProviderError."""
        place = self._folder / component.name / self._target.variant
        work = self._work / component.name
        shutil.rmtree(place, ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)
        place.mkdir(parents=True)
        work.mkdir(parents=True)
        try:
            graphs = self._sources(component, precision, work)
            files = {
                shape: self._worker.call(
                    f"{_JOBS}:compile_graph",
                    source=str(source),
                    made=str(place / f"{shape.label}.onnx"),
                    npu=self._target.name,
                )
                for shape, source in graphs.items()
            }
            single = self._check(component, precision, graphs, place)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return NpuComponent(component.name, component.layers, precision, files, "", single)

    def _sources(self, component: Component, precision: Precision, work: Path) -> dict[Shape, Path]:
        linear = linear_of(self._plan.config, precision, self._activations().importance)
        ranges, made = self._ranges(component), {}
        weights: Path | None = None
        for shape in component.shapes:
            graph = component.build(shape, linear)
            if weights is None:
                weights = write_weights(graph, self._reader, work)
            if precision == "int4":
                model = quantised_model(graph, weights, ranges, self._target)
            else:
                model = float_model(graph)
            made[shape] = work / f"{shape.label}.onnx"
            onnx.save(model, made[shape])
        return made

    # --- what was measured, layer by layer, for a run of layers ---

    def _activations(self) -> Activations:
        assert self._measurements is not None, "only what runs on the CPU needs no measurements"
        return self._measurements

    def _measured(self, component: Component) -> list[str]:
        names = [self._layer_names.get(index) for index in component.layers]
        found = [name for name in names if name is not None]
        return found or [component.name]

    def _ranges(self, component: Component) -> Mapping[str, Range]:
        names = self._measured(component)
        made: dict[str, Range] = {}
        for name in names:
            for value, found in self._activations().ranges[name].items():
                shared = value.startswith(("mask_", "cos_", "sin_"))
                made[value] = made.get(value, found).union(found) if shared else found
        # The input is the first layer's; outputs are the last one's, which came last.
        return made | {"h": self._activations().ranges[names[0]]["h"]} if len(names) > 1 else made

    def sample(self, component: Component) -> Sample:
        """Rows the component met in calibration, and the caches before them."""
        samples = [self._activations().samples[name] for name in self._measured(component)]
        keys = {index: x for sample in samples for index, x in sample.keys.items()}
        values = {index: x for sample in samples for index, x in sample.values.items()}
        return Sample(samples[0].position, samples[0].rows, keys, values)

    # --- checks ---

    def _check(
        self, component: Component, precision: Precision, graphs: Mapping[Shape, Path], place: Path
    ) -> int:
        """Run every graph and compare; see NpuComponent.single for what comes back."""
        config, sample = self._plan.config, self.sample(component)
        found: dict[Shape, Arrays] = {}
        for shape, source in graphs.items():
            feed = sample.feed(config, component, shape)
            expected = self._expected(component, source, feed)
            found[shape] = self._run(place, shape, [feed])[0]
            rows = min(shape.tokens, len(next(iter(sample.rows.values()))))
            what = f"{component.name} in {precision}, {shape.label}"
            check(found[shape], expected, rows, config.n_routed_experts, what)
        verifies = [shape for shape in graphs if shape.tokens == VERIFY_TOKENS]
        for tokens in (DECODE_TOKENS, VERIFY_TOKENS):
            singles = [Shape(tokens, shape.rows) for shape in verifies]
            if all(
                single in graphs
                and self._same_rows(component, sample, single, found[verify], place)
                for single, verify in zip(singles, verifies, strict=True)
            ):
                return tokens
        return 0

    def _expected(self, component: Component, source: Path, feed: Arrays) -> Arrays:
        """What the CPU computes, and what experts are chosen by."""
        model = onnx.load_model(source, load_external_data=False)
        choices = [name for node in model.graph.node for name in node.output if _is_choice(name)]
        if not choices:
            return PlainSession(source).run(feed)
        more = source.with_suffix(".more.onnx")
        onnx.save(with_outputs(model, choices), more)
        found = PlainSession(more).run(feed)
        found[CHOICE] = found.pop(choices[-1])
        return found

    def _same_rows(
        self, component: Component, sample: Sample, shape: Shape, found: Arrays, place: Path
    ) -> bool:
        """Whether the rows of a verify, one by one in the graph of `shape`, each seeing the ones
        before in the cache, have the same bits."""
        feeds = [
            _row(sample, row, found).feed(self._plan.config, component, shape)
            for row in range(VERIFY_TOKENS)
        ]
        return all(
            _row_of(name, found[name], row).tobytes() == _row_of(name, x, 0).tobytes()
            for row, alone in enumerate(self._run(place, shape, feeds))
            for name, x in alone.items()
        )

    def _run(self, place: Path, shape: Shape, feeds: Sequence[Arrays]) -> list[Arrays]:
        found: list[Arrays] = self._worker.call(
            f"{_JOBS}:run_compiled",
            model=str(place / f"{shape.label}.onnx"),
            npu=self._target.name,
            feeds=list(feeds),
        )
        return found


def _precisions(asked: Precision) -> tuple[Precision, ...]:
    return ("int4", "fp16") if asked == "int4" else ("fp16",)


def _row(sample: Sample, row: int, found: Arrays) -> Sample:
    """The sample of row `row` alone, the rows before it in the caches."""

    def grown(part: str, old: Mapping[int, F32]) -> dict[int, F32]:
        return {
            index: np.concatenate([x, found[f"{part}n_{index}"][:, :, :row]], axis=2)
            for index, x in old.items()
        }

    rows = {name: x[row : row + 1] for name, x in sample.rows.items()}
    return Sample(sample.position + row, rows, grown("k", sample.keys), grown("v", sample.values))


def _is_choice(name: str) -> bool:
    return name.endswith(".router.choice")


def _row_of(name: str, x: NDArray[Any], row: int) -> NDArray[Any]:
    part = x[:, :, row] if name[:3] in ("kn_", "vn_") else x[row]
    return np.ascontiguousarray(part)
