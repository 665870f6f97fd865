"""Pages of a file that the kernel keeps in memory: how many, and dropping them.

A capped run must not find the model in memory that somebody else paid for: pages that were read
before count against nobody's cap.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

_WINDOW_BYTES = 1 << 30


def drop(files: Iterable[Path]) -> None:
    """Ask the kernel to forget the pages of `files`. Those mapped by another process stay."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fdatasync(fd)  # pages still to be written are not dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def cached_bytes(files: Iterable[Path]) -> int | None:
    """Bytes of `files` in the page cache now; None where the system does not tell."""
    libc = ctypes.CDLL(None, use_errno=True)
    mincore = getattr(libc, "mincore", None)
    if mincore is None:
        return None
    mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    total = 0
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            size = os.fstat(fd).st_size
            for start in range(0, size, _WINDOW_BYTES):
                pages = _cached_pages(mincore, fd, start, min(_WINDOW_BYTES, size - start))
                if pages is None:
                    return None
                total += min(pages * mmap.PAGESIZE, size - start)
        finally:
            os.close(fd)
    return total


def _cached_pages(
    mincore: Callable[[int, int, object], int], fd: int, start: int, length: int
) -> int | None:
    count = -(-length // mmap.PAGESIZE)
    flags = ctypes.create_string_buffer(count)
    # A private mapping only so that its address can be taken; it is never written.
    with mmap.mmap(
        fd, length, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=start
    ) as view:
        address = ctypes.c_char.from_buffer(view)
        try:
            if mincore(ctypes.addressof(address), length, flags):
                return None
        finally:
            del address
    # The other bits of each flag mean nothing.
    return int(np.count_nonzero(np.frombuffer(flags.raw, np.uint8) & 1))
