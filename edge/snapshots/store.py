"""A folder of snapshots that several processes share, within a bound on its size.

    KEY.snap        processed prompts, by what they are (see prefixes.py); the ones used longest ago
                    are deleted first when there is no room
    spill-XXXX/     idle caches of one process, deleted when it ends

Everything in it can be computed again, so nothing here ever raises because of the disk or of what
lies there: a damaged file is deleted, a write that fails is given up, both are logged and counted.
Changes are made under a lock of the folder; a reader that has opened a file keeps it, whoever
deletes it meanwhile.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mimo_edge.atomic_file import sweep, writing
from mimo_edge.errors import SnapshotError, UsageError
from mimo_edge.snapshots.file import Section, SnapshotFile, write

_log = logging.getLogger(__name__)

DEFAULT_BYTES = 512 << 20
_NAME = re.compile(r"[0-9a-f]{64}\.snap")
_LOCK, _SPILL = ".lock", "spill-"
# How long to wait for another process that changes the folder, and how often to look.
_LOCK_TRIES, _LOCK_POLL_S = 100, 0.01
# A spill folder younger than this may not have its lock yet.
_YOUNG_S = 60.0


@dataclass
class StoreStats:
    """What happened to the files of one process."""

    hits: int = 0
    misses: int = 0
    written: int = 0
    evicted: int = 0
    damaged: int = 0
    failed_writes: int = 0


class Spilled:
    """An idle cache on disk; its file goes with this object."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path = path
        self.nbytes = nbytes
        self._pid = os.getpid()
        self._finalizer = weakref.finalize(self, _delete, path, self._pid)

    def discard(self) -> None:
        """Delete the file. Twice is harmless."""
        self._finalizer()


class SnapshotStore:
    """The snapshots in `folder`, which is made when it is missing, of at most `limit_bytes` bytes
    in all. Raises UsageError when the folder cannot be used."""

    def __init__(self, folder: Path, limit_bytes: int = DEFAULT_BYTES) -> None:
        if isinstance(limit_bytes, bool) or limit_bytes < 1:
            raise UsageError(f"snapshot_bytes = {limit_bytes!r}", "use 1 or more")
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.stats = StoreStats()
        self._spill: Path | None = None
        self._spill_lock = -1
        self._spilled: weakref.WeakSet[Spilled] = weakref.WeakSet()
        self._pid = os.getpid()
        try:
            # What is kept holds what people wrote: it is nobody else's to read.
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._locked():
                self._tidy()
        except OSError as error:
            raise UsageError(
                f"snapshots cannot be kept in {folder}: {error.strerror}", "use another folder"
            ) from error

    # --- processed prompts ---

    def open(self, key: str) -> SnapshotFile | None:
        """The snapshot of that key, to be closed by the caller; None when there is none. What is
        opened counts as used now."""
        path = self._path(key)
        try:
            self._used_now(path)
            return SnapshotFile(path)
        except SnapshotError as error:
            # Another process may delete it at any time; what is not there is not damaged.
            if not isinstance(error.__cause__, FileNotFoundError):
                self.damaged(key, error)
        self.stats.misses += 1
        return None

    def damaged(self, key: str, error: Exception) -> None:
        """Delete a snapshot that turned out to be useless."""
        _log.warning("%s; deleted, it is computed again", error)
        self.stats.damaged += 1
        with suppress(OSError):
            self._path(key).unlink(missing_ok=True)

    def keep(self, key: str, header: bytes, sections: Sequence[Section]) -> bool:
        """Write a snapshot; whether it is there now."""
        path = self._path(key)
        try:
            with self._locked():
                if path.exists():
                    return True
                nbytes = _size(header, sections)
                if not self._make_room(nbytes):
                    self._gave_up(path, f"{nbytes} bytes do not fit into {self.limit_bytes}")
                    return False
                # No wait for the disk: what a power cut tears is found by its checksum.
                with writing(path, sync=False) as file:
                    write(file, header, sections)
                self._used_now(path)
        except OSError as error:
            self._gave_up(path, error.strerror or str(error))
            return False
        self.stats.written += 1
        return True

    # --- idle caches ---

    def spill(self, header: bytes, sections: Sequence[Section]) -> Spilled | None:
        """Write an idle cache; None when there is no room for it or the disk fails."""
        path = self.folder
        try:
            with self._locked():
                path = self._spill_folder() / f"{time.monotonic_ns():x}.idle"
                nbytes = _size(header, sections)
                if not self._make_room(nbytes):
                    self._gave_up(path, f"{nbytes} bytes do not fit into {self.limit_bytes}")
                    return None
                with writing(path, sync=False) as file:
                    write(file, header, sections)
        except OSError as error:
            self._gave_up(path, error.strerror or str(error))
            return None
        spilled = Spilled(path, nbytes)
        self._spilled.add(spilled)
        return spilled

    # --- the folder ---

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is kept, by all processes."""
        return sum(size for _, size, _ in self._files())

    def close(self) -> None:
        """Delete what is this process's alone. Twice is harmless."""
        if os.getpid() != self._pid or self._spill is None:
            return
        for spilled in list(self._spilled):
            spilled.discard()
        shutil.rmtree(self._spill, ignore_errors=True)
        os.close(self._spill_lock)
        self._spill = None

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.snap"

    def _gave_up(self, path: Path, why: str) -> None:
        _log.warning("snapshot %s was not written: %s", path, why)
        self.stats.failed_writes += 1

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Nobody else changes the folder in here. Raises OSError, a TimeoutError when another
        process takes too long."""
        descriptor = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            for left in reversed(range(_LOCK_TRIES)):
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not left:
                        raise TimeoutError(0, "another process keeps the folder locked") from None
                    time.sleep(_LOCK_POLL_S)
            yield
        finally:
            os.close(descriptor)

    def _files(self) -> list[tuple[int, int, Path]]:
        """(time of last use in ns, bytes, path) of every file."""
        found = []
        for base, _, names in os.walk(self.folder):
            for name in names:
                path = Path(base) / name
                with suppress(OSError):  # another process deleted it
                    status = path.stat()
                    found.append((status.st_mtime_ns, status.st_size, path))
        return found

    def _used_now(self, path: Path) -> None:
        """Make the file the one used last, also where the clock was set back since the others were:
        a board without a battery starts in 1970."""
        newest = max((used for used, _, other in self._files() if other != path), default=0)
        now = max(time.time_ns(), newest + 1)
        with suppress(OSError):  # not there, or on a file system without times
            os.utime(path, ns=(now, now))

    def _make_room(self, nbytes: int) -> bool:
        """Delete the snapshots used longest ago until `nbytes` more fit; whether they do."""
        if nbytes > self.limit_bytes:
            return False
        files = sorted(self._files())
        over = sum(size for _, size, _ in files) + nbytes - self.limit_bytes
        for _, size, path in files:
            if over <= 0:
                break
            # Other files are no snapshots of ours, or somebody still needs them.
            if path.parent == self.folder and _NAME.fullmatch(path.name):
                with suppress(FileNotFoundError):
                    path.unlink()
                    self.stats.evicted += 1
                over -= size
        return over <= 0

    def _spill_folder(self) -> Path:
        if self._spill is None:
            made = Path(tempfile.mkdtemp(prefix=_SPILL, dir=self.folder))
            lock = os.open(made / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._spill, self._spill_lock = made, lock
        return self._spill

    def _tidy(self) -> None:
        """Delete what killed processes left behind."""
        sweep(self.folder)
        for path in self.folder.glob(f"{_SPILL}*"):
            try:
                with (path / _LOCK).open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
            except FileNotFoundError:
                with suppress(OSError):
                    if time.time() - path.stat().st_mtime > _YOUNG_S:
                        shutil.rmtree(path, ignore_errors=True)
            except OSError:
                continue  # in use


def _size(header: bytes, sections: Sequence[Section]) -> int:
    return len(header) + sum(section.nbytes for section in sections)


def _delete(path: Path, pid: int) -> None:
    if os.getpid() == pid:
        with suppress(OSError):
            path.unlink(missing_ok=True)
