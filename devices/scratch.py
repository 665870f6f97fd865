"""A file to read from while measuring flash: written, opened, then out of sight.

Its name is gone as soon as it is open, so that whatever ends the process, SIGKILL included, its
space comes back. One that was left while it was being written is removed by the next run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from mimo_edge.errors import DeviceError
from mimo_edge.flash_file import FlashFile
from mimo_edge.units import format_bytes

_NAME = ".mimo-edge-probe-"
_ROOM = 4  # times the file must be free: a full disk hurts others
_WRITE_BYTES = 1 << 20


class ScratchFile(NamedTuple):
    """The same file opened past the page cache and through it; without `direct_works` both are the
    latter."""

    direct: FlashFile
    buffered: FlashFile

    @property
    def direct_works(self) -> bool:
        """Whether the file system takes direct reads."""
        return self.direct.alignment > 0


@contextmanager
def scratch_file(folder: Path, nbytes: int) -> Iterator[ScratchFile]:
    """`nbytes` random bytes in `folder`, on disk and out of the page cache.

    Raises DeviceError without room for several of it, or when it cannot be written.
    """
    path = folder / f"{_NAME}{os.getpid()}"
    opened: list[FlashFile] = []
    made = False
    try:
        _remove_abandoned(folder)
        free = shutil.disk_usage(folder).free
        if free < _ROOM * nbytes:
            raise DeviceError(
                f"{format_bytes(free)} are free in {folder}, a file of {format_bytes(nbytes)} "
                f"wants {format_bytes(_ROOM * nbytes)}",
                "name another --dir, or a smaller --file-size",
            )
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        made = True
        try:
            _write(fd, nbytes)
        finally:
            os.close(fd)
        for direct in (True, False):
            opened.append(FlashFile(path, direct=direct, announce=False))
        path.unlink()
        made = False
        yield ScratchFile(*opened)
    except OSError as error:
        raise DeviceError(
            f"{folder} cannot be measured: {error.strerror}", "name another --dir"
        ) from error
    finally:
        for file in opened:
            file.close()
        if made:
            with suppress(OSError):
                path.unlink()


def _write(fd: int, nbytes: int) -> None:
    left = nbytes
    while left:
        # not the same bytes again: some disks store those once
        left -= os.write(fd, os.urandom(min(_WRITE_BYTES, left)))
    os.fsync(fd)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """An empty folder in `folder`, removed at the end. Raises DeviceError when none can be made."""
    path = folder / f"{_NAME}{os.getpid()}-models"
    try:
        _remove_abandoned(folder)
        path.mkdir(0o700)
    except OSError as error:
        raise DeviceError(
            f"{folder} cannot be measured: {error.strerror}", "name another --dir"
        ) from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """What processes left that are no more."""
    for path in folder.glob(f"{_NAME}*"):
        number = path.name.removeprefix(_NAME).removesuffix("-models")
        if number.isdigit() and not _alive(int(number)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True
