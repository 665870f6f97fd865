"""Reading byte ranges of a file past the page cache, or leaving nothing in it.

O_DIRECT where the file system takes it; else buffered reads in small pieces, each dropped from
the page cache again, so that memory use is what the plan says. A file that shrinks, changes or is
replaced under us is an error: what was read before may belong to another model.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

from mimo_edge.errors import BundleError
from mimo_edge.experts.slots import round_up

_log = logging.getLogger(__name__)

# Tried in this order: what direct reads must be aligned to depends on disk and file system.
_ALIGNMENTS = (4096, 16384, 65536)
# Buffered reads go in pieces of this size, so that no more than this is in the page cache.
_BUFFERED_BYTES = 1 << 20
_O_DIRECT: int = getattr(os, "O_DIRECT", 0)


class FlashFile:
    """An open file. `alignment` is what direct reads need, 0 when reads are buffered.

    Reads from several threads at once are safe.
    """

    def __init__(self, path: Path, *, direct: bool = True, announce: bool = True) -> None:
        """`announce`: warn when direct reads are not to be had. Raises BundleError when the file
        cannot be opened."""
        self.path = path
        self._fd = -1
        self.alignment = 0
        reason = "it was asked for"
        try:
            if direct and _O_DIRECT:
                reason = self._open_direct()
            elif direct:
                reason = "this system has no O_DIRECT"
            if self._fd < 0:
                self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                # Read-ahead would fill the page cache with experts nobody asked for.
                _advise(self._fd, 0, 0, "POSIX_FADV_RANDOM")
                _log.log(
                    logging.WARNING if direct and announce else logging.INFO,
                    "%s is read through the page cache (%s), dropping it behind",
                    path,
                    reason,
                )
            status = os.fstat(self._fd)
        except OSError as error:
            self.close()
            raise BundleError(f"cannot open {path}: {error.strerror}") from error
        self.size = status.st_size
        self._identity = (status.st_dev, status.st_ino)
        self._changed = (status.st_size, status.st_mtime_ns)

    def _open_direct(self) -> str:
        """Open with O_DIRECT and find the alignment. Returns why not, "" when it works."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | _O_DIRECT)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP):
                raise
            return f"the file system refuses O_DIRECT: {error.strerror}"
        self._fd = fd
        with mmap.mmap(-1, _ALIGNMENTS[-1]) as probe, memoryview(probe) as view:
            for alignment in _ALIGNMENTS:
                try:
                    with view[:alignment] as piece:
                        os.preadv(fd, [piece], 0)
                except OSError as error:
                    if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP):
                        raise
                else:
                    self.alignment = alignment
                    return ""
        os.close(fd)
        self._fd = -1
        return "direct reads are refused at every alignment"

    def check(self) -> None:
        """Raises BundleError when the file is no longer the one that was opened."""
        hint = "open the model again"
        try:
            held, named = os.fstat(self._fd), os.stat(self.path)
        except OSError as error:
            raise BundleError(f"{self.path} is gone: {error.strerror}", hint) from error
        if (named.st_dev, named.st_ino) != self._identity:
            raise BundleError(f"{self.path} was replaced while running", hint)
        if held.st_size < self.size:
            raise BundleError(
                f"{self.path} was truncated while running, from {self.size} to "
                f"{held.st_size} bytes",
                hint,
            )
        if (held.st_size, held.st_mtime_ns) != self._changed:
            raise BundleError(f"{self.path} was changed while running", hint)

    def aligned(self, offset: int, targets: Sequence[memoryview]) -> bool:
        """Whether targets may be read from `offset` without a bounce buffer, given memory that
        is page-aligned."""
        if not self.alignment:
            return True
        return not any(n % self.alignment for n in (offset, *(len(t) for t in targets)))

    def bounce_bytes(self, nbytes: int) -> int:
        """Size of a bounce buffer for any range of `nbytes`."""
        return round_up(nbytes, self.alignment) + self.alignment if self.alignment else 0

    def read(
        self, offset: int, targets: Sequence[memoryview], bounce: memoryview | None = None
    ) -> int:
        """Fill `targets` one after the other from `offset`; returns the bytes read from flash.

        Not `aligned` ranges of a direct file go through `bounce` (page-aligned, at least
        `bounce_bytes` long). Raises BundleError when the bytes cannot be had in full.
        """
        if self.aligned(offset, targets):
            total = sum(len(target) for target in targets)
            self._fill(offset, list(targets), total)
            return total
        total = sum(len(target) for target in targets)
        start = offset // self.alignment * self.alignment
        length = round_up(offset + total, self.alignment) - start
        assert bounce is not None
        assert len(bounce) >= length
        with bounce[:length] as piece:
            self._fill(start, [piece], offset + total - start)
            at = offset - start
            for target in targets:
                target[:] = piece[at : at + len(target)]
                at += len(target)
        return length

    def load(self, offset: int, nbytes: int) -> memoryview:
        """`nbytes` >= 1 bytes from `offset` in memory of their own. Raises BundleError when they
        cannot be had in full."""
        unit = self.alignment or 1
        start = offset // unit * unit
        length = round_up(offset + nbytes, unit) - start
        view = memoryview(mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self._fill(start, [view], offset + nbytes - start)
        return view[offset - start : offset - start + nbytes]

    def _fill(self, offset: int, targets: list[memoryview], needed: int) -> None:
        """Read until `needed` bytes are there, or raise."""
        done = 0
        while done < needed:
            at = offset + done
            pieces = _rest(targets, done)
            if not self.alignment:
                pieces = _first(pieces, _BUFFERED_BYTES - at % _BUFFERED_BYTES)
            try:
                count = self._preadv(pieces, at)
            except OSError as error:
                raise BundleError(
                    f"{self.path}: reading {needed - done} bytes at {at} failed: {error.strerror}",
                    "check the disk, and copy the file again",
                ) from error
            if not self.alignment:
                page = at // mmap.PAGESIZE * mmap.PAGESIZE
                _advise(self._fd, page, at + count - page, "POSIX_FADV_DONTNEED")
            elif done + count < needed:
                count -= count % self.alignment  # go on from where a direct read may start
            if count <= 0:
                raise BundleError(
                    f"{self.path}: short read, {done} of {needed} bytes at {offset} "
                    f"(file size {self.size})",
                    "copy the file again",
                )
            done += count

    def _preadv(self, targets: Sequence[memoryview], offset: int) -> int:
        return os.preadv(self._fd, targets, offset)

    def close(self) -> None:
        """Close. Twice is harmless."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _rest(targets: Sequence[memoryview], skip: int) -> list[memoryview]:
    """`targets` without their first `skip` bytes."""
    rest = []
    for target in targets:
        if skip < len(target):
            rest.append(target[skip:] if skip else target)
        skip = max(0, skip - len(target))
    return rest


def _first(targets: Sequence[memoryview], count: int) -> list[memoryview]:
    """The first `count` bytes of `targets`."""
    kept = []
    for target in targets:
        if count > 0:
            kept.append(target[:count])
        count -= len(target)
    return kept


def _advise(fd: int, offset: int, length: int, advice: str) -> None:
    """posix_fadvise where the system has it."""
    value = getattr(os, advice, None)
    if value is not None:
        os.posix_fadvise(fd, offset, length, value)
