"""Routed experts in a bounded number of slots: memory ggml computes on, filled by somebody else.

`ExpertSlots` is N equal records of page-aligned memory, shared by all layers; a record holds
gate, up and down of one expert, each on pages of its own so that O_DIRECT can read into it. The
forward pass asks an `ExpertSource` for the experts a layer's tokens chose and computes each
group it yields, so that what is resident is computed while the rest is read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Generator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mimo_edge.errors import BackendError, BundleError, UsageError
from mimo_edge.runtimes.ggml import bindings as ggml
from mimo_edge.runtimes.ggml.device import PAGE, Device, Region
from mimo_edge.runtimes.ggml.graph import Context, Tensor
from mimo_edge.runtimes.ggml.raw import RawTensors
from mimo_edge.runtimes.ggml.resident import SwiGlu

Ids = NDArray[np.int64]
U8 = NDArray[np.uint8]

PARTS = ("gate", "up", "down")


class ExpertPart(NamedTuple):
    """One matrix of an expert: ggml type, shape [out, in], bytes, and offset in a record."""

    ggml_type: int
    shape: tuple[int, int]
    nbytes: int
    offset: int


@dataclass(frozen=True)
class ExpertLayout:
    """Where gate, up and down of one expert of a layer lie in a record."""

    parts: tuple[ExpertPart, ExpertPart, ExpertPart]
    nbytes: int

    @classmethod
    def of(cls, source: RawTensors, layer: int) -> ExpertLayout:
        """The layout of a MoE layer's experts. Raises BundleError when it has none."""
        offset, parts = 0, []
        for part in PARTS:
            name = f"blk.{layer}.ffn_{part}_exps.weight"
            raw = source.tensor(name)
            if len(raw.shape) != 3:
                raise BundleError(f"{name} of shape {list(raw.shape)} stacks no experts")
            experts, out, width = raw.shape
            nbytes = raw.data.size // experts
            parts.append(ExpertPart(raw.ggml_type, (out, width), nbytes, offset))
            offset += -(-nbytes // PAGE) * PAGE
        return cls((parts[0], parts[1], parts[2]), offset)


class ExpertGroup(NamedTuple):
    """Experts of a layer and the slots that hold them, until the next group is asked for."""

    experts: Ids
    slots: Ids


class SlotTensors(Protocol):
    """`count` slots as tensors; `layouts` has the streamed layers as keys."""

    @property
    def count(self) -> int: ...

    @property
    def layouts(self) -> Collection[int]: ...

    def tensors(self, layer: int) -> SwiGlu:
        """gate, up {M, F, count} and down {F, M, count} of a layer's format, over all slots."""
        ...


class ExpertSource(Protocol):
    """Decides which expert is in which slot, and reads the ones that are missing."""

    @property
    def slots(self) -> SlotTensors: ...

    def groups(self, layer: int, experts: Ids, counts: Ids) -> Generator[ExpertGroup, None, None]:
        """Yield groups that cover `experts` (ascending, each once; `counts` rows chose them).

        A group's slots hold their experts from the moment it is yielded until the next is asked
        for; the first may be empty, when all experts are still on their way. A read error is
        raised here and ends the pass. Closed when a pass ends early.
        """
        ...

    def guesses(self, rows: int) -> bool:
        """Whether guesses of what layers will choose are of use in the pass of `rows` tokens that
        begins. Asked once per pass that could guess."""
        ...

    def passed(self, rows: int, guessed: bool, seconds: float) -> None:
        """A pass of `rows` tokens that could guess took so long, with guesses or without."""
        ...

    def expect(self, layer: int, experts: Ids | None) -> None:
        """A hint: the experts `layer`, the next to run, will probably choose, likeliest first; told
        while the streamed layer before it runs. Or None for nearly all of them; told just before
        the groups of the streamed layer before it are asked for."""
        ...

    def close(self) -> None:
        """Stop reading and free the slots. Twice is harmless."""
        ...


class ExpertSlots:
    """`count` records of memory, and typed tensors over them for each layer."""

    def __init__(self, device: Device, layouts: Mapping[int, ExpertLayout], count: int) -> None:
        """`layouts`: of every streamed layer. Raises UsageError, BackendError (memory)."""
        if count < 1 or not layouts:
            raise UsageError(f"{count} expert slots for {len(layouts)} layers", "both start at 1")
        self.count = count
        self.layouts = dict(layouts)
        self.record_bytes = max(layout.nbytes for layout in layouts.values())
        self._device = device
        self._region = Region(device, self.record_bytes * count)
        self._context = Context(device, 3 * len(layouts))
        self._tensors: dict[tuple[ExpertPart, ...], SwiGlu] = {}

    def tensors(self, layer: int) -> SwiGlu:
        """gate, up {M, F, count} and down {F, M, count} of a layer's format, over all slots."""
        parts = self.layouts[layer].parts
        if parts not in self._tensors:
            self._tensors[parts] = SwiGlu(*(self._tensor(part) for part in parts))
        return self._tensors[parts]

    def _tensor(self, part: ExpertPart) -> Tensor:
        g = self._device.ggml
        out, width = part.shape
        made = self._context.new(part.ggml_type, (width, out, self.count))
        struct = ggml.TensorStruct.from_address(made.pointer)
        # One expert after the other, but a whole record apart.
        struct.nb[2] = self.record_bytes
        struct.nb[3] = self.record_bytes * self.count
        address = self._region.address + part.offset
        if g.ggml_backend_tensor_alloc(self._region.buffer, made.pointer, address) != 0:
            raise BackendError("ggml could not place the expert slots")
        return Tensor(made.pointer)

    def part(self, layer: int, slot: int, index: int) -> U8:
        """Memory of part `index` (gate, up, down) of `slot`, to be filled: u8 [nbytes]."""
        if not 0 <= slot < self.count:
            raise UsageError(f"slot {slot} of {self.count}")
        part = self.layouts[layer].parts[index]
        address = self._region.address + slot * self.record_bytes + part.offset
        return np.ctypeslib.as_array((ctypes.c_uint8 * part.nbytes).from_address(address))

    @property
    def nbytes(self) -> int:
        """Address space of all slots; memory is paid for when a slot is first filled."""
        return self._region.nbytes

    def close(self) -> None:
        """Unmap. Views handed out earlier must not be touched any more. Twice is harmless."""
        self._context.close()
        self._region.close()
