"""The expert cache as an `ExpertSource`: routed experts from flash, in slots ggml multiplies.

A pass of a few tokens asks for all its experts at once and computes them in the order they
arrive; a longer one, or one that needs more experts than there are slots, walks them group by
group so that the experts used most stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import numpy as np

from mimo_edge.errors import BackendError, DeviceError, UsageError
from mimo_edge.experts.cache import ExpertCache
from mimo_edge.experts.guesses import GuessRecord
from mimo_edge.experts.policy import MOST_ROWS_OF_A_STEP
from mimo_edge.experts.reader import DEFAULT_LANES
from mimo_edge.experts.slots import SlotPool
from mimo_edge.experts.stats import CacheStats
from mimo_edge.experts.table import ExpertLayer, ExpertTable, Stack
from mimo_edge.runtimes.ggml import bindings as ggml
from mimo_edge.runtimes.ggml.device import Device
from mimo_edge.runtimes.ggml.graph import Context, Tensor
from mimo_edge.runtimes.ggml.resident import SwiGlu
from mimo_edge.runtimes.ggml.slots import ExpertGroup, Ids

# Experts of a long pass that come, and are computed, together: of small pools a quarter, so that
# one group computes while others are read.
_GROUP, _GROUPS = 8, 4


class PoolTensors:
    """A `SlotPool` seen as gate, up {M, F, count} and down {F, M, count} in a layer's format."""

    def __init__(self, device: Device, table: ExpertTable, pool: SlotPool) -> None:
        """Raises BackendError when ggml has no memory for the descriptions."""
        self.count = pool.count
        self.layouts = {entry.layer: entry for entry in table.layers}
        self._device = device
        self._pool = pool
        self._buffers: list[int] = []
        self._tensors: dict[tuple[tuple[int, tuple[int, int]], ...], SwiGlu] = {}
        self._context = Context(device, 3 * len(table.layers))
        for kind in range(3):
            buffer = device.ggml.ggml_backend_cpu_buffer_from_ptr(
                pool.address(kind), pool.region_bytes(kind)
            )
            if not buffer:
                self.close()
                raise BackendError("ggml could not make a buffer: out of memory")
            self._buffers.append(buffer)

    def tensors(self, layer: int) -> SwiGlu:
        """gate, up and down over all slots, in the layer's formats."""
        entry: ExpertLayer = self.layouts[layer]
        key = tuple((stack.ggml_type, stack.shape) for stack in entry.stacks)
        if key not in self._tensors:
            gate, up, down = (self._tensor(kind, s) for kind, s in enumerate(entry.stacks))
            self._tensors[key] = SwiGlu(gate, up, down)
        return self._tensors[key]

    def _tensor(self, kind: int, stack: Stack) -> Tensor:
        g, stride = self._device.ggml, self._pool.strides[kind]
        out, width = stack.shape
        made = self._context.new(stack.ggml_type, (width, out, self.count))
        if made.nb[2] != stack.nbytes:
            raise BackendError(f"an expert of {stack.nbytes} bytes, ggml expects {made.nb[2]}")
        struct = ggml.TensorStruct.from_address(made.pointer)
        struct.nb[2], struct.nb[3] = stride, stride * self.count
        buffer = self._buffers[kind]
        if g.ggml_backend_tensor_alloc(buffer, made.pointer, self._pool.address(kind)) != 0:
            raise BackendError("ggml could not place the expert slots")
        return Tensor(made.pointer)

    def close(self) -> None:
        """Forget the tensors; the pool keeps its memory. Twice is harmless."""
        for buffer in self._buffers:
            self._device.ggml.ggml_backend_buffer_free(buffer)
        self._buffers.clear()
        self._context.close()


class CachedExperts:
    """At most `slots` routed experts in memory, the others on flash. Close it after the backend
    that uses it (the backend does).

    `pin` hottest experts of every layer, by the bundle's heat, are never given up once they are
    there.
    """

    def __init__(
        self,
        device: Device,
        table: ExpertTable,
        slots: int,
        *,
        lanes: int = DEFAULT_LANES,
        pin: int = 0,
    ) -> None:
        """Raises DeviceError when one token's experts do not fit, with the pinned ones, or memory
        is short, BundleError when a file cannot be opened, UsageError."""
        if not 0 <= pin <= table.experts:
            raise UsageError(f"pin = {pin}", f"a layer has {table.experts} experts")
        self.cache = ExpertCache(table, slots, lanes=lanes)
        self._table = table
        self._device = device
        self._record = GuessRecord()
        self._next: int | None = None  # the layer after this one, when it wants nearly everything
        self.between_layers: Callable[[], None] | None = None
        """Called before every layer of a pass, while none of them is held."""
        try:
            if pin:
                self._pin_hottest(pin)
            self.slots = PoolTensors(device, table, self.cache.pool)
        except BaseException:
            self.cache.close()
            raise

    def _pin_hottest(self, count: int) -> None:
        if self._table.heat is None:
            raise UsageError(
                "no heat says which experts to pin", "export the model with --calibrate"
            )
        for row, entry in enumerate(self._table.layers):
            if row in self._table.heat:
                order = np.argsort(-self._table.heat[row], kind="stable")
                self.cache.pin(entry.layer, order[:count])

    def groups(self, layer: int, experts: Ids, counts: Ids) -> Generator[ExpertGroup, None, None]:
        """See `ExpertSource.groups`. A read that fails raises BundleError (IntegrityError when a
        checksum differs) naming layer and expert. Waiting ends with Cancelled when the pass is
        cancelled."""
        if self.between_layers is not None:
            self.between_layers()
        # Which token chose what is not told, and does not matter to the cache: how often, does.
        ids = np.repeat(experts, counts).reshape(-1, self._table.chosen)
        if len(ids) <= MOST_ROWS_OF_A_STEP and len(experts) <= self.cache.slots:
            return self._at_once(layer, ids)
        return self._in_turn(layer, ids)

    def _at_once(self, layer: int, ids: Ids) -> Generator[ExpertGroup, None, None]:
        cancel = self._device.cancel
        try:
            ticket = self.cache.begin(layer, ids, cancel=cancel)
        except DeviceError:  # slots were given back since they were counted
            yield from self._in_turn(layer, ids)
            return
        with ticket:
            if not ticket.resident.any():
                yield ExpertGroup(ticket.ids[:0], ticket.ids[:0])  # all are on their way
            for positions in ticket.groups():
                yield ExpertGroup(ticket.ids[positions], ticket.slots[positions].astype(np.int64))

    def _in_turn(self, layer: int, ids: Ids) -> Generator[ExpertGroup, None, None]:
        group = max(1, min(_GROUP, self.cache.slots // _GROUPS))
        following, self._next = self._next, None
        stream = self.cache.stream(layer, ids, group, then=following, cancel=self._device.cancel)
        try:
            for found in stream:
                yield ExpertGroup(found.ids, found.slots.astype(np.int64))
        finally:
            stream.close()

    def guesses(self, rows: int) -> bool:
        """See `ExpertSource.guesses`: not while it does not pay, or everything is there."""
        return not self.cache.holds_everything and self._record.worth(rows)

    def passed(self, rows: int, guessed: bool, seconds: float) -> None:
        """See `ExpertSource.passed`."""
        self._record.timed(rows, guessed, seconds)

    def expect(self, layer: int, experts: Ids | None) -> None:
        """See `ExpertSource.expect`."""
        if experts is None:
            self._next = layer
        else:
            self.cache.expect(layer, experts, self._record)

    def warm_up(self) -> int:
        """Begin to read, behind everything else, the experts used most into free slots, when it is
        known which they are or all fit. Returns how many will be read."""
        if self.cache.table.heat is None and not self.cache.holds_everything:
            return 0
        return self.cache.warm_up()

    def trim(self, fraction: float, timeout_s: float) -> int:
        """Give back `fraction` of all slots (0: use all of them again), between two layers of a
        running pass. Returns the bytes given back: less, or 0, when the layer in use does not end
        in time, or a token's experts would not fit any more."""
        return self.resize(self.planned - round(fraction * self.planned), timeout_s)

    # --- as `ResizableSlots` of edge/governor/slots.py ---

    @property
    def planned(self) -> int:
        """Slots there are when all are in use."""
        return self.cache.pool.count

    @property
    def count(self) -> int:
        """Slots that may be used now."""
        return self.cache.slots

    @property
    def used(self) -> int:
        """Slots that hold an expert, or await one."""
        return self.cache.used

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return self.cache.pool.slot_bytes

    def resize(self, count: int, timeout_s: float) -> int:
        """See `ResizableSlots.resize`."""
        cache, given = self.cache, 0
        count = max(count, cache.least)
        if count < cache.slots:
            given = cache.release(cache.slots - count, timeout_s=timeout_s)
        elif cache.grow(count - cache.slots):
            self.warm_up()
        return given * self.slot_bytes

    def stats(self) -> CacheStats:
        """Hits, misses and bytes so far."""
        return self.cache.stats()

    def close(self) -> None:
        """Stop reading and give the memory back. Twice is harmless."""
        self.slots.close()
        self.cache.close()
