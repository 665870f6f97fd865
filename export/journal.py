"""The journal of an export: which pieces are on disk for good.

One JSON object a line, each with its own CRC-32, appended and synced only after the bytes it
speaks of are synced. A line cut short by a crash ends the journal there: what follows it was
never promised. The first line states the job; a journal of another job is not resumed.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mimo_edge.errors import ExportError

NAME = "journal.jsonl"


class Journal:
    """An open, locked journal. `entries` are those read back, in order, without the job."""

    def __init__(self, path: Path) -> None:
        """Open or create the journal and take its lock.

        Raises ExportError when another export holds it.
        """
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise ExportError(
                f"another export is writing to {path.parent}", "wait for it, or stop it"
            ) from None
        lines, good = _read(path)
        self.job: dict[str, Any] | None = lines[0] if lines else None
        self.entries: list[dict[str, Any]] = lines[1:]
        os.ftruncate(self._fd, good)
        os.lseek(self._fd, good, os.SEEK_SET)

    def begin(self, job: dict[str, Any]) -> None:
        """Start an empty journal with its job."""
        self.append([job])
        self.job = job

    def append(self, entries: Iterable[dict[str, Any]]) -> None:
        """Add entries and sync them. What they speak of must be synced already."""
        data = b"".join(map(_line, entries))
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        os.fsync(self._fd)

    def close(self) -> None:
        """Release the lock."""
        os.close(self._fd)


def _line(entry: dict[str, Any]) -> bytes:
    text = json.dumps(entry, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(whole entries, bytes they take)."""
    data = path.read_bytes()
    entries, position = [], 0
    while (end := data.find(b"\n", position)) >= 0:
        line = data[position:end]
        try:
            crc, text = int(line[:8], 16), line[9:]
            if line[8:9] != b" " or zlib.crc32(text) != crc:
                break
            entry = json.loads(text)
        except ValueError:
            break
        if not isinstance(entry, dict):
            break
        entries.append(entry)
        position = end + 1
    return entries, position
