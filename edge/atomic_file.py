"""Files that are whole or not there: written under another name, then renamed.

A process that is killed half-way leaves only its temporary file, which nobody takes for the real
one. Writers hold a lock on theirs, so whoever tidies up later can tell what is left over from what
is being written, in other processes and containers too.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_SUFFIX = ".tmp"
_MODE = 0o600
# A file younger than this may not be locked yet.
_SWEEP_AGE_S = 60.0


@contextmanager
def writing(path: Path, *, sync: bool = True, mode: int = _MODE) -> Iterator[BinaryIO]:
    """A file to write, which becomes `path` when this is left without an error, else nothing.

    `sync` waits until it is on the disk: a power cut then leaves the old or the new file, not a
    torn one. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}{_SUFFIX}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            _lock(file)
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path, pattern: str = "*") -> int:
    """Delete what writers of files called `pattern` left when they were killed a minute ago or
    earlier; how many files."""
    gone = 0
    for path in folder.glob(f".{pattern}.*{_SUFFIX}"):
        with suppress(OSError), path.open("rb") as file:
            if time.time() - os.fstat(file.fileno()).st_mtime < _SWEEP_AGE_S:
                continue
            # Refused while somebody writes it.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            gone += 1
    return gone


def _lock(file: BinaryIO) -> None:
    # Where a file system has no locks, a left-over file is only not told from others.
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
