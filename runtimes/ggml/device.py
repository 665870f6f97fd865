"""The compute device: a ggml CPU backend, its buffer types, scratch memory and cancellation.

Scratch memory is one `ggml_gallocr` for every graph of the device: graphs run one at a time, so
they share it. When it grows, the addresses of graphs allocated before are void; `epoch` counts
that, and a graph of an older epoch must be built again.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from mimo_edge.cancel import Cancel
from mimo_edge.errors import BackendError, Cancelled, UsageError
from mimo_edge.runtimes.ggml import bindings as ggml
from mimo_edge.runtimes.ggml.bindings import Bindings, bindings
from mimo_edge.units import round_up

PAGE = mmap.PAGESIZE
_HUGE_PAGE = 2 << 20

# GCC's _tile_loadconfig names 8 of the 64 bytes it reads, so the optimiser drops the stores of
# ggml's tile shapes and the first product on AMX ends the process (seen with GCC 12).
_UNSAFE_BUFFER_TYPES = frozenset({"AMX"})


@dataclass(frozen=True)
class BufferType:
    """A kind of memory for weights: plain, or one that stores them in another order."""

    pointer: int
    name: str
    alignment: int


class Device:
    """One ggml CPU backend with `threads` threads. Runs one graph at a time."""

    def __init__(self, threads: int) -> None:
        if not 1 <= threads <= 512:
            raise UsageError(f"threads = {threads}", "give 1 to 512, at most the device's cores")
        self.ggml: Bindings = bindings()
        self.threads = threads
        self.epoch = 0
        self._pid = os.getpid()
        self._running = threading.Lock()
        self._backend = self._made(self.ggml.ggml_backend_cpu_init(), "a CPU backend")
        self._device = self.ggml.ggml_backend_get_device(self._backend)
        self.ggml.ggml_backend_cpu_set_n_threads(self._backend, threads)
        self.plain = self._buffer_type(self.ggml.ggml_backend_cpu_buffer_type())
        extra = map(self._buffer_type, ggml.extra_buffer_types(self.ggml, self._device))
        self._extra = [kind for kind in extra if kind.name not in _UNSAFE_BUFFER_TYPES]
        self._scratch = self._made(self.ggml.ggml_gallocr_new(self.plain.pointer), "an allocator")
        self._flag_function, self._libc = ggml.flag_function()
        self.cancel: Cancel | None = None
        """What may stop the pass that is running."""
        # What ggml was told to look at, and what keeps its memory in place.
        self._watched: tuple[int, Cancel] | None = None
        self._flag: object = None

    def set_threads(self, count: int) -> None:
        """Compute with `count` threads from the next graph on. Raises UsageError."""
        if not 1 <= count <= 512:
            raise UsageError(f"threads = {count}", "give 1 to 512, at most the device's cores")
        self.threads = count
        self.ggml.ggml_backend_cpu_set_n_threads(self._backend, count)

    def _buffer_type(self, pointer: int) -> BufferType:
        name = self.ggml.ggml_backend_buft_name(pointer).decode()
        return BufferType(pointer, name, int(self.ggml.ggml_backend_buft_get_alignment(pointer)))

    @staticmethod
    def _made(pointer: int | None, what: str) -> int:
        if not pointer:
            raise BackendError(f"ggml could not make {what}: out of memory")
        return pointer

    # --- weights: which memory suits a matrix ---

    def best_buffer_type(self, ggml_type: int, ne: tuple[int, ...], routed: bool) -> BufferType:
        """The reordering buffer type that supports a weight of this type and shape, else plain.

        ne is ggml's order, innermost first; `routed` asks about mul_mat_id on stacked experts.
        Support is asked of ggml itself with a throw-away operation.
        """
        g = self.ggml
        context = self._made(
            g.ggml_init(ggml.InitParams(int(g.ggml_tensor_overhead()) * 8, None, True)), "a context"
        )
        try:
            shape = ggml.Ne(*ne, *(1,) * (ggml.MAX_DIMS - len(ne)))
            weight = g.ggml_new_tensor(context, ggml_type, ggml.MAX_DIMS, shape)
            if routed:
                x = g.ggml_new_tensor(context, ggml.TYPE_F32, 4, ggml.Ne(ne[0], 1, 4, 1))
                ids = g.ggml_new_tensor(context, ggml.TYPE_I32, 4, ggml.Ne(1, 4, 1, 1))
                op = g.ggml_mul_mat_id(context, weight, x, ids)
            else:
                x = g.ggml_new_tensor(context, ggml.TYPE_F32, 4, ggml.Ne(ne[0], 4, 1, 1))
                op = g.ggml_mul_mat(context, weight, x)
            struct = ggml.TensorStruct.from_address(weight)
            for kind in self._extra:
                empty = g.ggml_backend_buft_alloc_buffer(kind.pointer, 0)
                if not empty:
                    continue
                struct.buffer = empty
                supported = bool(g.ggml_backend_dev_supports_op(self._device, op))
                g.ggml_backend_buffer_free(empty)
                if supported:
                    return kind
            return self.plain
        finally:
            g.ggml_free(context)

    def use_huge_pages(self, address: int, nbytes: int) -> None:
        """Ask the system for huge pages inside memory that was not written yet.

        Reading weights in small pages, a core waits for page tables and its prefetcher stops at the
        end of each. Only whole huge pages are asked for, so nothing outside takes memory. Where the
        system has none it refuses, and nothing changes.
        """
        advice, madvise = getattr(mmap, "MADV_HUGEPAGE", None), getattr(self._libc, "madvise", None)
        start = round_up(address, _HUGE_PAGE)
        length = (address + nbytes) // _HUGE_PAGE * _HUGE_PAGE - start
        if advice is not None and madvise is not None and length > 0:
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)

    # --- running ---

    def allocate(self, graphs: Sequence[int]) -> int:
        """Give every intermediate of `graphs` its scratch address; returns the epoch they are of.

        The memory grows for the largest first, so that all of them are of one epoch.
        """
        g = self.ggml
        before = self.scratch_bytes if self.epoch else -1
        # alloc_graph alone would reuse the plan of the previous graph when node counts and sizes
        # happen to agree, although lifetimes differ: reserve always plans the graph at hand.
        fine = len(graphs) == 1 or all(
            g.ggml_gallocr_reserve(self._scratch, graph) for graph in graphs
        )
        fine = fine and all(
            g.ggml_gallocr_reserve(self._scratch, graph)
            and g.ggml_gallocr_alloc_graph(self._scratch, graph)
            for graph in graphs
        )
        if not fine or self.scratch_bytes != before:
            self.epoch += 1
        if not fine:
            raise BackendError(
                "scratch memory for the graph could not be allocated",
                "use a smaller prefill chunk or context",
            )
        return self.epoch

    @property
    def scratch_bytes(self) -> int:
        """Bytes of shared scratch memory."""
        return int(self.ggml.ggml_gallocr_get_buffer_size(self._scratch, 0))

    def compute(self, graph: int) -> None:
        """Run `graph`. Raises Cancelled, or BackendError when ggml refuses."""
        if not self._backend:
            raise BackendError("the backend is closed")
        if self.forked:
            raise BackendError(
                "this process was forked from the one that opened the model",
                "OpenMP threads do not survive fork: open the model after forking",
            )
        if self._running.locked():
            raise BackendError("another thread is computing", "one call at a time per runtime")
        cancel = self.cancel
        watch = None if cancel is None else (self._flag_function, cancel)
        if watch != self._watched:
            self._watch(cancel)
        # `with`, because KeyboardInterrupt can come right after an acquire() that was a call.
        with self._running:
            status = int(self.ggml.ggml_backend_graph_compute(self._backend, graph))
        if status == ggml.STATUS_ABORTED:
            raise Cancelled("cancelled while computing")
        if status != ggml.STATUS_SUCCESS:
            raise BackendError(f"ggml could not compute the graph (status {status})")

    def cancelled_by(self, cancel: Cancel | None) -> _CancelledBy:
        """In here `cancel` stops a graph after its current operation."""
        return _CancelledBy(self, cancel)

    def _watch(self, cancel: Cancel | None) -> None:
        """Tell ggml what stops the graphs from now on. The passes of an answer have one `cancel`,
        so this is not done for each."""
        set_callback = self.ggml.ggml_backend_cpu_set_abort_callback
        if cancel is None:
            set_callback(self._backend, None, None)
            self._watched = self._flag = None
            return
        flag = (ctypes.c_char * len(cancel.flag)).from_buffer(cancel.flag)
        set_callback(self._backend, self._flag_function, ctypes.addressof(flag))
        self._watched, self._flag = (self._flag_function, cancel), flag

    @property
    def closed(self) -> bool:
        return not self._backend

    @property
    def forked(self) -> bool:
        """Whether this is a child of the process that made the device."""
        return os.getpid() != self._pid

    def close(self) -> None:
        """Free the backend and the scratch memory. Twice is harmless."""
        if not self._backend:
            return
        self.ggml.ggml_gallocr_free(self._scratch)
        self.ggml.ggml_backend_free(self._backend)
        self._backend = self._scratch = 0


class _CancelledBy:
    """See `Device.cancelled_by`. A class, because small models enter it thousands of times a
    second."""

    __slots__ = ("_cancel", "_device")

    def __init__(self, device: Device, cancel: Cancel | None) -> None:
        self._device, self._cancel = device, cancel

    def __enter__(self) -> None:
        self._device.cancel = self._cancel

    def __exit__(self, *_: object) -> None:
        self._device.cancel = None


class Region:
    """Zeroed anonymous memory for tensors, reserved now and paid for when touched.

    Rows of a cache that were never written take no memory, so a cache for a long context grows
    page by page without moving.
    """

    def __init__(self, device: Device, nbytes: int) -> None:
        self.nbytes = max(PAGE, -(-nbytes // PAGE) * PAGE)
        self._ggml = device.ggml
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        try:
            self._map = mmap.mmap(-1, self.nbytes, flags=flags)
        except (OSError, OverflowError) as error:
            raise BackendError(
                f"{self.nbytes} bytes of address space for the KV cache were refused: {error}",
                "use a smaller context",
            ) from error
        anchor = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(anchor)
        del anchor  # a live export would keep the map from being closed
        self.buffer = self._ggml.ggml_backend_cpu_buffer_from_ptr(self.address, self.nbytes)
        if not self.buffer:
            self._map.close()
            raise BackendError("ggml could not make a buffer: out of memory")

    def close(self) -> None:
        """Unmap. Tensors placed here are void afterwards. Twice is harmless."""
        if self.buffer:
            self._ggml.ggml_backend_buffer_free(self.buffer)
            self._map.close()
            self.buffer = 0
