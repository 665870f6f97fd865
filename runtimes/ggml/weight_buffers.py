"""Weights in ggml buffers: tensors are described first, then loaded, a buffer per kind of memory.

Matrices go where ggml multiplies them fastest: the REPACK (on other CPUs KleidiAI) buffer type when
it takes their type and shape, plain memory otherwise.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np

from mimo_edge.errors import BackendError, BundleError
from mimo_edge.gguf_meta import expected_shapes
from mimo_edge.runtimes.ggml import bindings as ggml
from mimo_edge.runtimes.ggml.device import BufferType, Device
from mimo_edge.runtimes.ggml.graph import Context, Tensor
from mimo_edge.runtimes.ggml.raw import U8, RawTensor, RawTensors


class _Pending:
    """A tensor to load: its bytes in parts, and the kind of memory it goes to."""

    def __init__(self, tensor: Tensor, sources: Sequence[RawTensor], kind: BufferType) -> None:
        self.tensor = tensor
        self.sources = sources
        self.kind = kind

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(source.nbytes for source in self.sources)

    def read_into(self, out: U8) -> None:
        """Put the parts into out u8 [nbytes], one after the other."""
        start = 0
        for source in self.sources:
            source.read_into(out[start : start + source.nbytes])
            start += source.nbytes


class WeightBuffers:
    """Tensors of a model that were described with `_matrix` and `_add`, after `_load` in buffers
    that this owns."""

    def __init__(
        self, device: Device, source: RawTensors, tensors: int, *, repack: bool = True
    ) -> None:
        """`tensors`: at most so many will be described."""
        self._device = device
        self._source = source
        self._repack = repack
        self._config = source.config
        self._shapes = expected_shapes(source.config)
        self._pending: list[_Pending] = []
        self._buffers: list[int] = []
        self._kinds: dict[int, BufferType] = {}  # by buffer
        self.nbytes: dict[str, int] = {}  # by buffer type name
        self._context = Context(device, tensors)

    def close(self) -> None:
        """Free the buffers. Twice is harmless."""
        for buffer in self._buffers:
            self._device.ggml.ggml_backend_buffer_free(buffer)
        self._buffers.clear()
        self._context.close()

    # --- describing ---

    def _matrix(self, name: str, routed: bool = False) -> Tensor:
        return self._add([self._get(name)], matrix=True, routed=routed)

    def _get(self, name: str) -> RawTensor:
        raw = self._source.tensor(name)
        if raw.shape != self._shapes[name]:
            raise BundleError(f"{name} has shape {list(raw.shape)}, not {list(self._shapes[name])}")
        return raw

    def _add(
        self, sources: Sequence[RawTensor], matrix: bool = False, routed: bool = False
    ) -> Tensor:
        """Describe one tensor made of `sources` stacked along their first axis."""
        first = sources[0]
        rows = sum(s.shape[0] for s in sources)
        ne = tuple(reversed((rows, *first.shape[1:])))
        kind = self._device.plain
        if matrix and self._repack:
            kind = self._device.best_buffer_type(first.ggml_type, ne, routed)
        tensor = self._context.new(first.ggml_type, ne)
        self._pending.append(_Pending(tensor, sources, kind))
        return tensor

    # --- loading ---

    def _load(self) -> None:
        largest = max(pending.nbytes for pending in self._pending)
        # A map of its own, not from the heap: all of it goes back to the system afterwards.
        self._load_through(np.frombuffer(mmap.mmap(-1, largest), np.uint8))
        self._pending.clear()

    def _load_through(self, staging: U8) -> None:
        """Load everything, each tensor by way of `staging`, which is as large as the largest."""
        g = self._device.ggml
        for kind in {p.kind.pointer: p.kind for p in self._pending}.values():
            mine = [p for p in self._pending if p.kind.pointer == kind.pointer]
            offsets, size = [], 0
            for pending in mine:
                offsets.append(size)
                needed = int(
                    g.ggml_backend_buft_get_alloc_size(kind.pointer, pending.tensor.pointer)
                )
                size += -(-needed // kind.alignment) * kind.alignment
            buffer = g.ggml_backend_buft_alloc_buffer(kind.pointer, size)
            if not buffer:
                raise BackendError(
                    f"{size} bytes for resident weights could not be allocated",
                    "use a smaller recipe, or stream experts",
                )
            self._buffers.append(buffer)
            self._kinds[buffer] = kind
            g.ggml_backend_buffer_set_usage(buffer, ggml.BUFFER_USAGE_WEIGHTS)
            base = int(g.ggml_backend_buffer_get_base(buffer))
            self._device.use_huge_pages(base, size)
            for pending, offset in zip(mine, offsets, strict=True):
                pointer = pending.tensor.pointer
                if g.ggml_backend_tensor_alloc(buffer, pointer, base + offset) != 0:
                    raise BackendError("ggml could not place a weight")
                nbytes = pending.nbytes
                if nbytes != int(g.ggml_nbytes(pointer)):
                    raise BackendError(
                        f"{nbytes} bytes for a tensor of {int(g.ggml_nbytes(pointer))}"
                    )
                pending.read_into(staging[:nbytes])
                g.ggml_backend_tensor_set(pointer, staging.ctypes.data, 0, nbytes)
            self.nbytes[kind.name] = self.nbytes.get(kind.name, 0) + size
