"""The graphs compiled for one NPU, opened: every component by the shape of a pass."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mimo_edge.bundle import Bundle
from mimo_edge.config import MimoConfig
from mimo_edge.errors import BundleError, ProviderError, UsageError
from mimo_edge.npu_io import (
    ANY_SHAPE,
    INDEX_NAME,
    NORMS_NAME,
    NpuComponent,
    NpuVariant,
    Shape,
    read_index,
)
from mimo_edge.onnx_io import CPU_VARIANT, EMBED, FOLDER, HEAD, MODEL_NAME, mtp_name
from mimo_edge.runtimes.base import F32
from mimo_edge.runtimes.onnx.isolated import Worker
from mimo_edge.runtimes.onnx.library import Session
from mimo_edge.runtimes.onnx.qnn import PROVIDER, Qnn, emulated
from mimo_edge.runtimes.onnx.qnn_targets import target

Arrays = Mapping[str, NDArray[Any]]
_JOBS = "mimo_edge.runtimes.onnx.npu_jobs"


class Graph(Protocol):
    """A component of one shape, or of any."""

    def run(self, feed: Arrays) -> dict[str, NDArray[Any]]:
        """All outputs."""
        ...


class NpuGraph:
    """A compiled graph: all of it on the NPU."""

    def __init__(self, path: Path, variant: NpuVariant, qnn: Qnn) -> None:
        """Raises ProviderError when it is refused, or any node would run elsewhere."""
        chip = target(variant.target)
        self._plugin = qnn.plugin(chip)
        self._session = qnn.open_session(path, chip)
        self._inputs = [found.name for found in self._session.get_inputs()]
        self._outputs = [found.name for found in self._session.get_outputs()]

    def run(self, feed: Arrays) -> dict[str, NDArray[Any]]:
        """See `Graph`. Raises ProviderError."""
        with self._plugin.errors("run"):
            found = self._session.run(self._outputs, {name: feed[name] for name in self._inputs})
        return dict(zip(self._outputs, found, strict=True))


class CpuGraph:
    """A component the NPU refuses, on the CPU."""

    def __init__(self, path: Path, threads: int) -> None:
        """Raises BundleError."""
        self._session = Session(path, threads)

    def run(self, feed: Arrays) -> dict[str, NDArray[Any]]:
        """See `Graph`. Raises BackendError."""
        names = {io.name for io in self._session.inputs}
        arrays = {name: np.ascontiguousarray(feed[name]) for name in names}
        sizes: dict[str, int] = {}
        for io in self._session.inputs:
            for dim, size in zip(io.shape, arrays[io.name].shape, strict=True):
                if isinstance(dim, str):
                    sizes[dim] = size
        for io in self._session.outputs:
            assert io.dtype is not None
            shape = [sizes[d] if isinstance(d, str) else d for d in io.shape]
            arrays[io.name] = np.empty(shape, io.dtype)
        self._session.bind(arrays).run()
        return {io.name: arrays[io.name] for io in self._session.outputs}


class NpuPackage:
    """What a bundle holds for one NPU. Graphs are opened when first run; `try_all` loads every one
    in another process before, since a bad one can end ours."""

    def __init__(
        self, bundle: Bundle, config: MimoConfig, npu: str | None, threads: int, qnn: Qnn
    ) -> None:
        """`npu` names the target; None: the only one there is. Raises ProviderError when the bundle
        has no graphs for it, BundleError when they do not fit the model."""
        self.folder = bundle.path / FOLDER
        self._qnn = qnn
        self.variant = _choose(self.folder / INDEX_NAME, npu)
        self._config = config
        self._threads = threads
        self._graphs: dict[tuple[str, Shape], Graph] = {}
        by_name = {component.name: component for component in self.variant.components}
        decoder = [
            c
            for c in self.variant.components
            if c.layers and c.layers[-1] < config.num_hidden_layers
        ]
        layers = [layer for component in decoder for layer in component.layers]
        if layers != list(range(config.num_hidden_layers)):
            raise BundleError(f"{self.folder}: the graphs for {self.variant.name} hold {layers}")
        wanted = [HEAD, *(mtp_name(depth) for depth in range(config.num_mtp_layers))]
        if missing := [name for name in wanted if name not in by_name]:
            raise BundleError(f"{self.folder} lacks {missing[0]} for {self.variant.name}")
        self.decoder = tuple(decoder)
        self.head = by_name[HEAD]
        self.mtp = tuple(by_name[mtp_name(depth)] for depth in range(config.num_mtp_layers))
        self.embed = Session(self.folder / EMBED / CPU_VARIANT / MODEL_NAME, threads)
        self.norms = _norms(self.folder / NORMS_NAME, config)

    def try_all(self) -> None:
        """Load every graph in a process of its own. Raises ProviderError naming the first that is
        refused, or that ends the process."""
        with Worker() as worker:
            for component in self._used():
                if component.precision == "cpu":
                    continue
                for shape in component.files:
                    try:
                        worker.call(
                            f"{_JOBS}:run_compiled",
                            model=str(self._path(component, shape)),
                            npu=self.variant.target,
                            feeds=[],
                            qnn=self._qnn,
                        )
                    except ProviderError as error:
                        raise ProviderError(
                            f"{component.name} ({shape.label}) for {self.variant.name}: "
                            f"{error.message}",
                            "export the model for this NPU again, or use --ep cpu",
                        ) from error

    def graph(self, component: NpuComponent, shape: Shape) -> Graph:
        """The graph for passes of `shape`. Raises ProviderError, BundleError."""
        cpu = component.precision == "cpu"
        key = (component.name, ANY_SHAPE if cpu else shape)
        if key not in self._graphs:
            path = self._path(component, key[1])
            self._graphs[key] = (
                CpuGraph(path, self._threads) if cpu else NpuGraph(path, self.variant, self._qnn)
            )
        return self._graphs[key]

    def stats(self) -> dict[str, Any]:
        """JSON-ready: what runs where, and why not on the NPU."""
        used = self._used()
        cpu = [c for c in used if c.precision == "cpu"]
        return {
            "provider": PROVIDER,
            "target": self.variant.target,
            "emulated": emulated(),
            "components": len(used),
            "on_npu": len(used) - len(cpu),
            "on_cpu": [{"component": c.name, "reason": c.reason} for c in cpu],
            "precisions": {c.name: c.precision for c in used},
            "reduced": {c.name: c.reason for c in used if c.reason and c.precision != "cpu"},
        }

    def _used(self) -> tuple[NpuComponent, ...]:
        return (*self.decoder, self.head, *self.mtp)

    def _path(self, component: NpuComponent, shape: Shape) -> Path:
        if shape not in component.files:
            have = ", ".join(found.label for found in component.files)
            raise BundleError(f"{component.name} has no graph for {shape.label}, only {have}")
        return self.folder / component.name / self.variant.name / component.files[shape][0]


def compiled_targets(bundle: Path) -> tuple[str, ...]:
    """The NPUs a bundle has graphs for. Raises BundleError when its index is damaged."""
    path = bundle / FOLDER / INDEX_NAME
    try:
        data = path.read_bytes()
    except OSError:
        return ()
    return tuple(variant.target for variant in read_index(data, str(path)).values())


def _choose(path: Path, npu: str | None) -> NpuVariant:
    """The variant asked for, from the index."""
    try:
        variants = read_index(path.read_bytes(), str(path))
    except OSError as error:
        raise ProviderError(
            f"{path.parent.parent} has no graphs for an NPU",
            "export it with --npu, as in --npu v73",
        ) from error
    have = ", ".join(v.target for v in variants.values())
    if npu is None:
        if len(variants) != 1:
            first = next(iter(variants.values())).target
            raise UsageError(
                f"the bundle has graphs for several NPUs: {have}",
                f"say which, as in --ep qnn:{first}, or give the device's --profile",
            )
        return next(iter(variants.values()))
    wanted = f"qnn-{target(npu).name}"
    if wanted not in variants:
        raise ProviderError(
            f"the bundle has no graphs for {npu}, only for {have}", f"export it with --npu {npu}"
        )
    return variants[wanted]


def _norms(path: Path, config: MimoConfig) -> F32:
    """The final norms f32 [1 + MTP blocks, M], the model's first."""
    try:
        values = np.fromfile(path, "<f4")
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}", "export the model again") from error
    width = config.hidden_size
    # A runtime without drafts uses fewer of them.
    if values.size % width or values.size // width < 1 + config.num_mtp_layers:
        raise BundleError(f"{path} holds {values.size} numbers, which are no norms of {width}")
    return values.reshape(-1, width).astype(np.float32)
