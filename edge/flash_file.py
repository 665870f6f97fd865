"""Reading byte ranges of a file: past the page cache, leaving nothing in it, or plainly.

O_DIRECT where the file system takes it; else buffered reads in small pieces, each dropped from
the page cache again, so that memory use is what the plan says. Nothing is ever mapped: a mapped
file that is truncated kills the process with SIGBUS, a read of it is an error. A file that
shrinks, changes or is replaced under us is an error, too: what was read before may belong to
another model. Who has checksums may `refresh` and go on with what is there now.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from mimo_edge.errors import BundleError
from mimo_edge.units import round_up

_log = logging.getLogger(__name__)

# Tried in this order: what direct reads must be aligned to depends on disk and file system.
_ALIGNMENTS = (4096, 16384, 65536)
# Buffered reads go in pieces of this size, so that no more than this is in the page cache.
_BUFFERED_BYTES = 1 << 20
# Loading goes through a bounce buffer of this size.
_LOAD_BYTES = 4 << 20
_O_DIRECT: int = getattr(os, "O_DIRECT", 0)
_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)


class FlashFile:
    """An open file. `alignment` is what direct reads need, 0 when reads are buffered.

    Reads from several threads at once are safe.
    """

    def __init__(
        self, path: Path, *, direct: bool = True, keep_pages: bool = False, announce: bool = True
    ) -> None:
        """`keep_pages`: what buffered reads bring into the page cache may stay there. `announce`:
        warn when direct reads are not to be had. Raises BundleError when the file cannot be
        opened."""
        self.path = path
        self._place = os.path.abspath(path)  # still there when the working directory changes
        self._fd = -1
        self._keeps_pages = keep_pages
        self._refreshing = threading.Lock()
        self._renewed = 0
        self.alignment = 0
        reason = "it was asked for"
        try:
            if direct and _O_DIRECT:
                reason = self._open_direct()
            elif direct:
                reason = "this system has no O_DIRECT"
            if self._fd < 0:
                self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                if not keep_pages:
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
        self._note(status)

    def _note(self, status: os.stat_result) -> None:
        """Remember which file this is, and in which state."""
        self._identity = (status.st_dev, status.st_ino)
        self._changed = (status.st_size, status.st_mtime_ns)

    def drop_pages(self) -> None:
        """Give back what earlier reads left in the page cache, and leave nothing there any more."""
        self._keeps_pages = False
        _advise(self._fd, 0, 0, "POSIX_FADV_DONTNEED")
        _advise(self._fd, 0, 0, "POSIX_FADV_RANDOM")

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
            held, named = os.fstat(self._fd), os.stat(self._place)
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

    @property
    def state(self) -> int:
        """Another number after every `refresh`: a read in between may be of either file."""
        with self._refreshing:
            return self._renewed

    def refresh(self) -> bool:
        """Go on with the file that `path` names now; False when there is none of at least the
        old size. Its contents may differ: only for callers who check them."""
        flags = os.O_RDONLY | os.O_CLOEXEC | (_O_DIRECT if self.alignment else 0)
        with self._refreshing:
            try:
                fd = os.open(self._place, flags)
            except OSError:
                return False
            try:
                status = os.fstat(fd)
                if status.st_size < self.size or self._fd < 0:
                    return False
                # In place of the old one: reads in other threads never meet a closed descriptor.
                os.dup2(fd, self._fd, inheritable=False)
            finally:
                os.close(fd)
            self._note(status)
            self._renewed += 1
            return True

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

    def load(self, offset: int, out: memoryview) -> None:
        """Fill `out`, memory of any alignment and size, from `offset` on. Raises as `read`."""
        unit = self.alignment
        if not unit:
            self.read(offset, [out])
            return
        size = round_up(min(len(out), _LOAD_BYTES), unit) + unit
        bounce = memoryview(mmap.mmap(-1, size))  # goes with its last view, also after an error
        done = 0
        while done < len(out):
            at = offset + done
            skip = at % unit
            count = min(len(out) - done, size - skip)
            piece = bounce[: round_up(skip + count, unit)]
            self._fill(at - skip, [piece], skip + count)
            out[done : done + count] = piece[skip : skip + count]
            done += count

    def _fill(self, offset: int, targets: list[memoryview], needed: int) -> None:
        """Read until `needed` bytes are there, or raise."""
        if self._fd < 0:
            raise BundleError(f"{self.path} was closed")
        done = 0
        while done < needed:
            at = offset + done
            pieces = _rest(targets, done)
            dropping = not self.alignment and not self._keeps_pages
            if dropping:
                pieces = _first(pieces, _BUFFERED_BYTES - at % _BUFFERED_BYTES)
            try:
                count = self._preadv(pieces, at)
            except OSError as error:
                raise BundleError(
                    f"{self.path}: reading {needed - done} bytes at {at} failed: {error.strerror}",
                    "check the disk, and copy the file again",
                ) from error
            if dropping:
                page = at // mmap.PAGESIZE * mmap.PAGESIZE
                _advise(self._fd, page, at + count - page, "POSIX_FADV_DONTNEED")
            elif self.alignment and done + count < needed:
                count -= count % self.alignment  # go on from where a direct read may start
            if count <= 0:
                raise BundleError(
                    f"{self.path}: short read, {done} of {needed} bytes at {offset} "
                    f"(file size {self.size})",
                    "copy the file again",
                )
            done += count

    def read_cached(self, offset: int, target: memoryview) -> bool:
        """Fill `target` from `offset` on if the page cache holds all of it; no disk is touched."""
        if self.alignment or not _NOWAIT or self._fd < 0:
            return False
        try:
            return os.preadv(self._fd, [target], offset, _NOWAIT) == len(target)
        except OSError:  # not there, or this file system cannot tell
            return False

    def _preadv(self, targets: Sequence[memoryview], offset: int) -> int:
        return os.preadv(self._fd, targets, offset)

    def close(self) -> None:
        """Close. Twice is harmless."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


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
