"""Routing traces: which experts every layer chose for every token, written while a model runs.

A file is one line of JSON (the header) and then records, little-endian:
u8 phase, u8 zero, u16 row (position in the header's `layers`), u32 tokens T, then T * K u16
expert ids. One record is one layer in one pass. The file is flushed after every pass: a process
that is killed leaves whole passes, at worst with a piece of one more, which `read_trace` names.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mimo_edge.config import MimoConfig
from mimo_edge.errors import BundleError, UsageError

FORMAT = "mimo-edge routes"
VERSION = 1
_RECORD = struct.Struct("<BBHI")
_START = f'{{"format":"{FORMAT}"'.encode()
_MAX_HEADER_BYTES = 1 << 20
_MAX_EXPERTS = 1 << 16


class Phase(IntEnum):
    """What kind of pass a record belongs to."""

    PREFILL = 0
    DECODE = 1
    VERIFY = 2


@dataclass(frozen=True)
class TraceHeader:
    """Model layers with experts, experts per layer E, experts per token K."""

    layers: tuple[int, ...]
    experts: int
    chosen: int
    source: str = ""

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise UsageError("a trace needs its layers in rising order")
        if len(self.layers) > 1 << 16 or not 1 <= self.chosen <= self.experts <= _MAX_EXPERTS:
            raise UsageError(
                f"a trace of {len(self.layers)} layers, {self.chosen} of {self.experts} experts"
            )


@dataclass(frozen=True)
class Route:
    """Experts `ids` i64 [T, K] that layer `row` chose in one pass."""

    phase: Phase
    row: int
    ids: NDArray[np.int64]


@dataclass(frozen=True)
class Trace:
    """A whole trace in memory."""

    header: TraceHeader
    routes: tuple[Route, ...]

    @property
    def tokens(self) -> int:
        """Tokens the first layer saw."""
        return sum(len(route.ids) for route in self.routes if route.row == 0)

    def first(self, tokens: int) -> Trace:
        """The records up to the pass in which the first layer has seen `tokens` tokens."""
        seen = 0
        for end, route in enumerate(self.routes):
            if route.row == 0:
                if seen >= tokens:
                    return Trace(self.header, self.routes[:end])
                seen += len(route.ids)
        return self

    def only(self, *phases: Phase) -> Trace:
        """The records of some phases."""
        return Trace(self.header, tuple(r for r in self.routes if r.phase in phases))


class TraceWriter:
    """Appends routes to a file. Not thread-safe. Close it, or use it as a context manager.

    While a model runs, the engine sets `phase` before a pass and calls `flush` after it; in
    between the backend calls `record` for every layer.
    """

    def __init__(self, path: Path, header: TraceHeader) -> None:
        """Overwrites an older trace. Raises BundleError when the file cannot be made, UsageError
        when the path holds something else."""
        _refuse_other_files(path)
        self.phase = Phase.PREFILL
        self._path = path
        self._header = header
        self._row_of = {layer: row for row, layer in enumerate(header.layers)}
        raw = {
            "format": FORMAT,
            "version": VERSION,
            "layers": list(header.layers),
            "experts": header.experts,
            "chosen": header.chosen,
            "source": header.source,
        }
        self._file: BinaryIO | None = None
        try:
            self._file = path.open("wb")
        except OSError as error:
            raise BundleError(f"cannot write {path}: {error.strerror}") from error
        self._write(json.dumps(raw, separators=(",", ":"), ensure_ascii=False).encode() + b"\n")

    @classmethod
    def of_model(cls, path: Path, config: MimoConfig, source: str) -> TraceWriter:
        """A trace of the model `source`. Raises UsageError when it has no routed experts."""
        layers = tuple(spec.index for spec in config.layers if spec.moe)
        if not layers:
            raise UsageError(f"{source} has no routed experts: there are no routes to trace")
        header = TraceHeader(layers, config.n_routed_experts, config.num_experts_per_tok, source)
        return cls(path, header)

    def record(self, layer: int, ids: NDArray[np.integer[Any]]) -> None:
        """`route` in the phase that is running."""
        self.route(self.phase, layer, ids)

    def route(self, phase: Phase, layer: int, ids: NDArray[np.integer[Any]]) -> None:
        """Record ids [T, K] chosen by model layer `layer`."""
        row = self._row_of.get(layer)
        h = self._header
        if row is None or ids.ndim != 2 or ids.shape[1] != h.chosen or not len(ids):
            raise UsageError(f"layer {layer}, ids {list(ids.shape)} do not belong in this trace")
        if int(ids.min()) < 0 or int(ids.max()) >= h.experts:
            raise UsageError(f"layer {layer}: an expert id is outside 0..{h.experts - 1}")
        self._write(_RECORD.pack(phase, 0, row, len(ids)) + ids.astype("<u2").tobytes())

    def _write(self, data: bytes) -> None:
        if self._file is None:
            raise UsageError(f"the trace {self._path} is closed")
        try:
            self._file.write(data)
        except OSError as error:
            raise BundleError(f"cannot write {self._path}: {error.strerror}") from error

    def flush(self) -> None:
        """Hand what is recorded to the system, so that it survives the end of this process."""
        if self._file is not None:
            try:
                self._file.flush()
            except OSError as error:
                raise BundleError(f"cannot write {self._path}: {error.strerror}") from error

    def close(self) -> None:
        """Write what is buffered and close. Twice is harmless."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:
                raise BundleError(f"cannot write {self._path}: {error.strerror}") from error

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_trace(path: Path, header: TraceHeader, routes: Iterable[Route]) -> None:
    """Write a whole trace."""
    with TraceWriter(path, header) as writer:
        for route in routes:
            writer.route(route.phase, header.layers[route.row], route.ids)


def _refuse_other_files(path: Path) -> None:
    """Raise UsageError when `path` is a file with something else than a trace in it."""
    try:
        if not path.is_file():
            return
        with path.open("rb") as file:
            start = file.read(len(_START))
    except OSError:
        return  # writing it will say why not
    if start and start != _START:
        raise UsageError(
            f"{path} exists and is no routing trace", "choose another name, or remove it first"
        )


def read_trace(path: Path, *, partial: bool = False) -> Trace:
    """Read and check a whole trace; with `partial`, also one that was cut off, up to the cut.

    Raises BundleError naming the byte that is wrong.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    end = data.find(b"\n", 0, _MAX_HEADER_BYTES)
    if end < 0:
        raise BundleError(f"{path} is no routing trace")
    header = _header(data[:end], path)
    routes: list[Route] = []
    position = end + 1
    while position < len(data):
        if position + _RECORD.size > len(data):
            if partial:
                break
            raise _truncated(path, position, len(routes))
        phase, zero, row, tokens = _RECORD.unpack_from(data, position)
        start = position + _RECORD.size
        count = tokens * header.chosen
        if phase > max(Phase) or zero or row >= len(header.layers) or not tokens:
            raise BundleError(f"{path}: record {len(routes)} at byte {position} is damaged")
        if start + 2 * count > len(data):
            if partial:
                break
            raise _truncated(path, position, len(routes))
        ids = np.frombuffer(data, "<u2", count, start).astype(np.int64)
        if int(ids.max()) >= header.experts:
            raise BundleError(
                f"{path}: record {len(routes)} at byte {position} names expert {int(ids.max())} "
                f"of {header.experts}"
            )
        routes.append(Route(Phase(phase), row, ids.reshape(tokens, header.chosen)))
        position = start + 2 * count
    return Trace(header, tuple(routes))


def _truncated(path: Path, position: int, whole: int) -> BundleError:
    return BundleError(
        f"{path} is truncated at byte {position}, after {whole} whole records",
        "record it again, or ask for the records before the cut (--partial)",
    )


def _header(line: bytes, path: Path) -> TraceHeader:
    try:
        raw = json.loads(line)
        if raw["format"] != FORMAT or raw["version"] != VERSION:
            raise BundleError(f"{path} has format {raw['format']!r} {raw['version']!r}")
        numbers: Sequence[Any] = [*raw["layers"], raw["experts"], raw["chosen"]]
        if any(type(n) is not int for n in numbers):
            raise ValueError("not integers")
        return TraceHeader(tuple(raw["layers"]), raw["experts"], raw["chosen"], str(raw["source"]))
    except BundleError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError, UsageError) as error:
        raise BundleError(f"{path} is no routing trace: {error!r}") from error
