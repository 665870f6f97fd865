"""Single rows of a tensor, read from its file when they are asked for.

An embedding table is large and each token needs one row of it, so the table needs no memory: rows
are read one by one, and the latest are kept, because tokens repeat within a text and between the
target and its MTP blocks. What the page cache holds is read at once; everything else by threads of
its own, so that a disk that hangs does not take the caller with it and many rows are read together
(0.7 ms a row one by one, 0.2 ms with four threads, on the development machine).
"""

from __future__ import annotations

import os
import queue
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mimo_edge.cancel import CancelSignal, check_cancel
from mimo_edge.errors import BackendError, BundleError, IntegrityError, MimoEdgeError
from mimo_edge.flash_file import FlashFile
from mimo_edge.gguf_file import U8, GgufFile

# Rows kept: some 1,200 of a real model's.
CACHE_BYTES = 4 << 20
_PIECE_BYTES = 1 << 20
# Threads that read, each at least so many rows.
_LANES, _LANE_ROWS = 4, 4
# How often a waiting caller looks at its cancel signal.
_CANCEL_POLL_S = 0.02
_CLOSE_WAIT_S = 1.0


class RowReader:
    """Rows of tensor `name` of an open `file`. Close it, or it ends with its last reference.

    `past_cache`: read with O_DIRECT where that works, and leave nothing in the page cache.
    `crc32` of the whole tensor lets it go on with a file that was repaired while running.
    One call at a time.
    """

    def __init__(
        self, file: GgufFile, name: str, *, past_cache: bool = False, crc32: int | None = None
    ) -> None:
        """Raises BundleError when there is no such tensor or its file cannot be opened."""
        self._disk = _Disk(file, name, past_cache, crc32)
        self._row_bytes = file.row_bytes(name)
        self._kept: OrderedDict[int, U8] = OrderedDict()
        self._most = max(1, CACHE_BYTES // self._row_bytes)
        self._threads: _Threads | None = None

    def rows(self, ids: NDArray[np.int64], cancel: CancelSignal | None = None) -> U8:
        """Rows ids [n], which must exist: u8 [n, row bytes].

        Raises BundleError when they cannot be read, or when the file is no longer the one that
        was opened; IntegrityError when it was changed and the tensor with it; Cancelled.
        """
        wanted = ids.tolist()
        new: dict[int, U8] = {}
        missing = []
        for row in dict.fromkeys(wanted):
            if row in self._kept:
                self._kept.move_to_end(row)
                continue
            new[row] = np.empty(self._row_bytes, np.uint8)
            if not self._disk.read_cached(row, new[row]):
                missing.append(row)
        if missing:
            self._fetch(missing, new, cancel)
        out: U8 = np.empty((len(wanted), self._row_bytes), np.uint8)
        for i, row in enumerate(wanted):
            found = new.get(row)
            out[i] = self._kept[row] if found is None else found
        self._kept.update(new)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return out

    def _fetch(self, rows: list[int], new: dict[int, U8], cancel: CancelSignal | None) -> None:
        """Read rows into the arrays of `new`, in the threads."""

        def part(mine: list[int]) -> Callable[[], None]:
            return lambda: self._disk.read([(row, new[row]) for row in mine], cancel)

        if self._threads is None or self._threads.pid != os.getpid():
            self._threads = _Threads()
        lanes = max(1, min(_LANES, len(rows) // _LANE_ROWS))
        self._threads.run([part(rows[lane::lanes]) for lane in range(lanes)], cancel)

    def close(self) -> None:
        """Close the file. Twice is harmless."""
        if self._threads is not None:
            self._threads.end()
            self._threads.join()
            self._threads = None
        self._disk.close()

    def __del__(self) -> None:
        threads = getattr(self, "_threads", None)
        if threads is not None:
            threads.end()


class _Disk:
    """Reads single rows of a tensor from its file; any thread may ask."""

    def __init__(self, file: GgufFile, name: str, past_cache: bool, crc32: int | None) -> None:
        self._name = name
        self._info = file.info(name)
        self._row_bytes = file.row_bytes(name)
        self._past_cache = past_cache
        self._crc32 = crc32
        self._repairing = threading.Lock()
        self._closed = False
        self._flash = self._opened()

    def read_cached(self, row: int, out: U8) -> bool:
        """Put a row into out u8 [row bytes] if that needs no disk."""
        if self._past_cache:
            return False
        with out.data as target:
            if not self._flash.read_cached(self._start(row), target):
                return False
        try:
            self._flash.check()
        except BundleError:
            return False  # `read` knows what to do about it
        return True

    def read(self, rows: list[tuple[int, U8]], cancel: CancelSignal | None) -> None:
        """Put every row into its array u8 [row bytes]. Raises BundleError, Cancelled."""
        for row, out in rows:
            check_cancel(cancel)  # when a read took long, nobody may want the others any more
            flash = self._flash
            try:
                try:
                    self._fetch(flash, row, out)
                except BundleError:
                    if not self._repaired(flash):
                        raise
                    self._fetch(self._flash, row, out)
            except IntegrityError:
                raise
            except BundleError as error:
                message = f"row {row} of {self._name}: {error.message}"
                raise BundleError(message, error.hint) from error

    def _start(self, row: int) -> int:
        return self._info.offset + row * self._row_bytes

    def _opened(self) -> FlashFile:
        past = self._past_cache
        return FlashFile(self._info.file, direct=past, keep_pages=not past, announce=False)

    def _fetch(self, flash: FlashFile, row: int, out: U8) -> None:
        try:
            with out.data as target:
                flash.load(self._start(row), target)
        except BundleError:
            flash.check()  # truncated or replaced says more than short
            raise
        flash.check()

    def _repaired(self, failed: FlashFile) -> bool:
        """Whether the file that is there now holds the same tensor; then it is used."""
        if self._crc32 is None or self._closed:
            return False
        with self._repairing:
            if self._flash is not failed:
                return True  # another thread was here before
            try:
                now = self._opened()
                found = self._crc32_in(now)
            except BundleError:
                return False  # what was wrong at first says it better
            if found != self._crc32:
                now.close()
                raise IntegrityError(
                    f"{now.path}: {self._name} has CRC-32 {found:08x}, not {self._crc32:08x}, "
                    "since the file was changed while running",
                    "copy the file again",
                )
            self._flash = now  # the old one is closed when its last reader is through
            if self._closed:
                now.close()
            return True

    def _crc32_in(self, file: FlashFile) -> int:
        piece = bytearray(min(_PIECE_BYTES, self._info.nbytes))
        crc, left, offset = 0, self._info.nbytes, self._info.offset
        with memoryview(piece) as whole:
            while left:
                with whole[: min(left, len(whole))] as step:
                    file.load(offset, step)
                    crc = zlib.crc32(step, crc)
                    offset, left = offset + len(step), left - len(step)
        file.check()
        return crc

    def close(self) -> None:
        self._closed = True
        self._flash.close()


class _Job:
    """Work for one of the threads: `done` when it is over, `error` when it failed."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work
        self.done = threading.Event()
        self.error: MimoEdgeError | None = None


class _Threads:
    """Do pieces of work side by side, while their caller may give up waiting."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def run(self, works: list[Callable[[], None]], cancel: CancelSignal | None) -> None:
        """Do all `works` and wait for them. Raises what the first of them raises, or Cancelled."""
        while len(self._threads) < len(works):
            name = f"mimo-rows-{len(self._threads)}"
            thread = threading.Thread(target=_serve, args=(self._jobs,), name=name, daemon=True)
            thread.start()
            self._threads.append(thread)
        jobs = [_Job(work) for work in works]
        for job in jobs:
            self._jobs.put(job)
        for job in jobs:
            while not job.done.wait(None if cancel is None else _CANCEL_POLL_S):
                check_cancel(cancel)
        for job in jobs:
            if job.error is not None:
                raise job.error

    def end(self) -> None:
        """End after the work at hand."""
        for _ in self._threads:
            self._jobs.put(None)

    def join(self) -> None:
        """Wait for the end, but not for a disk that hangs."""
        until = time.monotonic() + _CLOSE_WAIT_S
        for thread in self._threads if self.pid == os.getpid() else ():
            thread.join(max(0.0, until - time.monotonic()))


def _serve(jobs: queue.SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        try:
            job.work()
        except MimoEdgeError as error:
            job.error = error
        except BaseException as error:  # whoever waits must hear of it
            job.error = BackendError(f"reading rows failed: {error!r}")
        job.done.set()
        del job  # until the next one comes, nothing is held
