"""Memory cgroups: a bound the kernel keeps on a process and everything it reads, page cache
included, and the kernel's own figure of the most that was used. Versions 1 and 2.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mimo_edge.errors import DeviceError

_log = logging.getLogger(__name__)
_counter = itertools.count()


@dataclass(frozen=True)
class _Files:
    """Names of the control files of one version."""

    limit: str
    peak: str
    usage: str
    swap: str


_V1 = _Files(
    "memory.limit_in_bytes",
    "memory.max_usage_in_bytes",
    "memory.usage_in_bytes",
    "memory.memsw.limit_in_bytes",
)
_V2 = _Files("memory.max", "memory.peak", "memory.current", "memory.swap.max")


class MemoryCgroup:
    """A memory cgroup of our own, for one child process. Make with `create`; a context manager.

    Start the child with `command`, so that it is counted from its first page on.
    """

    def __init__(self, path: Path, version: int) -> None:
        self.path = path
        self.version = version
        self._files = _V1 if version == 1 else _V2

    @classmethod
    def create(cls, limit: int | None = None) -> MemoryCgroup:
        """A new, empty cgroup that holds at most `limit` bytes, swap not allowed.

        Raises DeviceError with the reason when none can be made here.
        """
        reasons = []
        for parent, version in _parents():
            path = parent / f"mimo-edge-bench-{os.getpid()}-{next(_counter)}"
            try:
                path.mkdir()
            except OSError as error:
                reasons.append(f"{parent}: {error.strerror}")
                continue
            group = cls(path, version)
            if (path / group._files.limit).exists():
                try:
                    group._bound(limit)
                except OSError as error:
                    reasons.append(f"{parent}: its limit cannot be set: {error.strerror}")
                else:
                    return group
            else:
                reasons.append(f"{parent}: the memory controller is not on")
            path.rmdir()
        raise DeviceError(
            "no memory cgroup can be made here: "
            + ("; ".join(reasons) if reasons else "the system has none"),
            "run as root, or in a scope with delegation (systemd-run --user --scope)",
        )

    def _bound(self, limit: int | None) -> None:
        if limit is None:
            return
        (self.path / self._files.limit).write_text(str(limit))
        # Version 1 counts memory and swap together there, version 2 swap alone.
        swap = str(limit) if self.version == 1 else "0"
        with suppress(OSError):  # kernels without swap accounting lack the file
            (self.path / self._files.swap).write_text(swap)

    def command(self, command: Sequence[str]) -> list[str]:
        """`command` as a child of this cgroup: it joins before the program is loaded."""
        join = 'echo $$ > "$0" && exec "$@"'
        return ["/bin/sh", "-c", join, str(self.path / "cgroup.procs"), *command]

    def peak_bytes(self) -> int | None:
        """Most bytes the kernel ever counted; None on kernels that do not record it."""
        return self._number(self._files.peak)

    def usage_bytes(self) -> int | None:
        """Bytes counted now."""
        return self._number(self._files.usage)

    def kills(self) -> int:
        """Processes the kernel killed for memory."""
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        try:
            lines = (self.path / name).read_text().splitlines()
        except OSError:
            return 0
        counts = dict(line.split() for line in lines if len(line.split()) == 2)
        return int(counts.get("oom_kill", 0))

    def _number(self, name: str) -> int | None:
        try:
            return int((self.path / name).read_text())
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        """Remove the cgroup; its processes must have ended."""
        for _ in range(50):
            try:
                self.path.rmdir()
            except FileNotFoundError:
                return
            except OSError:  # a process that was just killed is still leaving
                time.sleep(0.02)
            else:
                return
        _log.warning("%s cannot be removed: it still holds a process", self.path)

    def __enter__(self) -> MemoryCgroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _parents(proc: Path = Path("/proc/self")) -> list[tuple[Path, int]]:
    """Where a cgroup for our child could be made, best first, with the version there."""
    try:
        mounts = [line.split() for line in (proc / "mounts").read_text().splitlines()]
        entries = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
    except OSError:
        return []
    found: list[tuple[Path, int]] = []
    for _, place, kind, options, *_ in mounts:
        if kind == "cgroup" and "memory" in options.split(","):
            for _, controllers, own in entries:
                if "memory" in controllers.split(","):
                    # Inside a container the own path may not exist below its mount.
                    found += [(p, 1) for p in (Path(place + own), Path(place)) if p.is_dir()]
        elif kind == "cgroup2":
            own = next((e[2] for e in entries if e[0] == "0"), "/")
            found += [(p, 2) for p in _delegating(Path(place), own)]
    return list(dict.fromkeys(found))


def _delegating(root: Path, own: str) -> list[Path]:
    """Our cgroup and those above it whose children have a memory controller, nearest first.

    A version 2 cgroup that holds processes cannot give its children controllers, so the place
    is usually a parent of our own.
    """
    here = root / own.lstrip("/")
    found = []
    while True:
        with suppress(OSError):
            if "memory" in (here / "cgroup.subtree_control").read_text().split():
                found.append(here)
        if here == root or root not in here.parents:
            return found
        here = here.parent
