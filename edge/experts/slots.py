"""The memory experts live in: N equal slots for the experts of all layers.

One anonymous private map with three regions, for gate, up and down matrices. Slot s of a region
starts at s * stride, and the stride, a multiple of the page size, fits the largest matrix of
that kind in any layer. So a region is, for every layer, a 3-D tensor [n_slots, out, in] whose
outermost stride is `stride` and whose type is that layer's: layers in different formats share
the slots, and what a smaller format leaves unused at the end of a slot is `unused_bytes`.
Every slot begins on a page, so a direct read can land in it.

The map is private, not shared: only of private memory does MADV_DONTNEED give pages back. Regions
start on a huge page and ask for huge pages: direct reads into 4 KiB pages were measured at half
the speed (1.1 against 2.5 GB/s), because every page is a separate piece of the disk request.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Sequence

from mimo_edge.errors import DeviceError, UsageError
from mimo_edge.experts.table import KINDS, ExpertTable
from mimo_edge.units import round_up

_HUGE_PAGE_BYTES = 2 << 20


class SlotPool:
    """`count` slots for matrices of at most `largest` bytes (gate, up, down)."""

    def __init__(self, count: int, largest: Sequence[int]) -> None:
        """Raises DeviceError when the address space cannot be had."""
        if count < 1 or len(largest) != len(KINDS) or min(largest) < 1:
            raise UsageError(f"a pool of {count} slots for {list(largest)} bytes")
        self.count = count
        self.strides = tuple(round_up(n, mmap.PAGESIZE) for n in largest)
        sizes = [round_up(count * stride, mmap.PAGESIZE) for stride in self.strides]
        huge = min(sizes) >= _HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE")
        unit = _HUGE_PAGE_BYTES if huge else mmap.PAGESIZE
        try:
            self._map = mmap.mmap(
                -1,
                sum(round_up(size, unit) for size in sizes) + unit,
                flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
            )
        except (OSError, ValueError, OverflowError) as error:
            raise DeviceError(
                f"{sum(sizes)} bytes for {count} expert slots could not be mapped ({error})",
                "use fewer slots",
            ) from error
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        at = -base % unit
        self._starts: list[int] = []
        for size in sizes:
            self._starts.append(at)
            at += round_up(size, unit)
        if huge:
            self._advise(mmap.MADV_HUGEPAGE, self._starts[0], at - self._starts[0])
        self._base = base
        self._view: memoryview | None = memoryview(self._map)

    @staticmethod
    def bytes_per_slot(table: ExpertTable) -> int:
        """Bytes a slot takes for the experts of `table`."""
        return sum(round_up(n, mmap.PAGESIZE) for n in table.stride_bytes)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot, all three regions."""
        return sum(self.strides)

    @property
    def nbytes(self) -> int:
        """Bytes held when every slot is in use."""
        return self.count * self.slot_bytes

    def unused_bytes(self, expert_bytes: int) -> int:
        """Bytes of a slot that an expert of `expert_bytes` leaves unused."""
        return self.slot_bytes - expert_bytes

    def address(self, kind: int) -> int:
        """Address of the region of gate (0), up (1) or down (2): page-aligned, slot 0 first."""
        self._open()
        return self._base + self._starts[kind]

    def region_bytes(self, kind: int) -> int:
        """Bytes of a region: count * stride."""
        return self.count * self.strides[kind]

    def view(self, slot: int, kind: int, nbytes: int) -> memoryview:
        """The first `nbytes` bytes of a slot's matrix, writable. Lives no longer than the pool."""
        if not (0 <= slot < self.count and 0 <= nbytes <= self.strides[kind]):
            raise UsageError(f"{nbytes} bytes of slot {slot} of {self.count}")
        start = self._starts[kind] + slot * self.strides[kind]
        return self._open()[start : start + nbytes]

    def copy(self, source: int, target: int) -> None:
        """Copy a whole slot."""
        for kind, stride in enumerate(self.strides):
            self.view(target, kind, stride)[:] = self.view(source, kind, stride)

    def discard(self, first: int, count: int) -> None:
        """Give the memory of slots first..first+count-1 back to the system; they read as zeros."""
        if count:
            self._open()
            for start, stride in zip(self._starts, self.strides, strict=True):
                self._advise(mmap.MADV_DONTNEED, start + first * stride, count * stride)

    def _advise(self, advice: int, start: int, length: int) -> None:
        # A kernel without huge pages refuses the advice; MADV_DONTNEED cannot fail on our map.
        try:
            self._map.madvise(advice, start, length)
        except OSError:
            if advice == mmap.MADV_DONTNEED:
                raise

    def _open(self) -> memoryview:
        if self._view is None:
            raise UsageError("the slot pool is closed")
        return self._view

    def close(self) -> None:
        """Give the memory back. Twice is harmless; views and tensors on it must be gone."""
        view, self._view = self._view, None
        if view is not None:
            view.release()
            self._map.madvise(mmap.MADV_DONTNEED)
            # A view somebody still holds keeps the (now empty) map until it is dropped.
            with contextlib.suppress(BufferError):
                self._map.close()
