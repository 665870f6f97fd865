"""Reading experts into slots with a few threads, checking what was read.

An expert is three matrices (gate, up, down), each read in one part or several equal ones, so that
one expert uses all lanes, is there sooner, and is given up sooner when a guess proves wrong. A lane
takes the oldest part and, while parts are small, the queued parts that follow it in the file along
with it: one request for neighbours (36 KiB parts: 0.5 GB/s one by one, 1.5 GB/s eight at a time;
above 1 MiB it makes no difference). The lane that finishes the last part checks the expert's
checksum and reports. Lanes wait for work asleep; reads and checksums run without the interpreter's
lock.

A file that changes while running ends in an error when there are no checksums to judge it by. With
them it is opened anew, so that a repaired file works again, and every expert is checked again.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mimo_edge.errors import (
    BackendError,
    BundleError,
    Cancelled,
    IntegrityError,
    MimoEdgeError,
    UsageError,
)
from mimo_edge.experts.policy import Mask
from mimo_edge.experts.slots import SlotPool
from mimo_edge.experts.table import KINDS, ExpertTable
from mimo_edge.flash_file import FlashFile
from mimo_edge.units import round_up

_log = logging.getLogger(__name__)

DEFAULT_LANES = 4
COALESCE_BYTES = 1 << 20
# A part has at most so many bytes, and begins on a multiple of a unit in its matrix that no
# alignment of direct reads exceeds.
PART_BYTES, _PART_UNIT = 1 << 20, 64 << 10
# How long closing waits for reads that are running; a disk that hangs must not hang the program.
_CLOSE_WAIT_S = 1.0
# Reads of a file that is another one each time.
_ATTEMPTS = 3

Done = Callable[["ExpertRead", MimoEdgeError | None], None]


def part_bytes(nbytes: int) -> int:
    """Bytes of the parts, but the last, in which a matrix of `nbytes` is read."""
    count = -(-nbytes // PART_BYTES)
    return nbytes if count == 1 else round_up(-(-nbytes // count), _PART_UNIT)


class ExpertRead:
    """One expert on its way into a slot. `error` is set when it failed."""

    def __init__(self, row: int, expert: int, slot: int, done: Done, renewed: int) -> None:
        self.row, self.expert, self.slot = row, expert, slot
        self.renewed = renewed  # files opened anew before this read
        self.error: MimoEdgeError | None = None
        self.nbytes = 0  # read from flash for it
        self._done = done
        self._parts_left = 0
        self._started = False
        self._finished = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is finished, well or not; False when the time is over."""
        return self._finished.wait(timeout)

    @property
    def finished(self) -> bool:
        """Whether it is over."""
        return self._finished.is_set()


@dataclass(eq=False)
class _Part:
    """A matrix of one expert, or a part of it: `target` is its place in the slot."""

    read: ExpertRead
    kind: int
    file: int
    offset: int
    target: memoryview


@dataclass
class ReaderStats:
    """Totals since the reader was made. `busy_s` sums over lanes."""

    reads: int = 0
    experts: int = 0
    nbytes: int = 0
    busy_s: float = 0.0
    checked: int = 0


@dataclass
class _Shared:
    """What lanes and callers share. Lanes hold this and not the reader, so that a forgotten
    reader can be collected."""

    table: ExpertTable
    pool: SlotPool
    files: list[FlashFile]
    paranoid: bool
    wake: threading.Condition = field(default_factory=threading.Condition)
    urgent: deque[_Part] = field(default_factory=deque)
    ahead: deque[_Part] = field(default_factory=deque)
    waiting: dict[tuple[int, int], _Part] = field(default_factory=dict)
    flights: dict[tuple[int, int], ExpertRead] = field(default_factory=dict)
    stats: ReaderStats = field(default_factory=ReaderStats)
    closing: bool = False
    lanes_left: int = 0  # that have not ended yet
    resources: ExitStack | None = None  # what the last lane closes, when nobody waits for it
    renewed: int = 0  # how often a file was opened anew because it had changed


class ExpertReader:
    """Lanes that read experts of `table` into slots of `pool`.

    Works with checksums (each expert is checked the first time it is read, every time when
    `paranoid`) and without. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        table: ExpertTable,
        pool: SlotPool,
        *,
        lanes: int = DEFAULT_LANES,
        paranoid: bool = False,
        direct: bool = True,
    ) -> None:
        """Raises BundleError when a file cannot be opened, DeviceError without memory."""
        self._pid = os.getpid()
        self._lanes: list[threading.Thread] = []
        self._stack = ExitStack()  # runs backwards: bounce buffers, then files
        if not 1 <= lanes <= 64:
            raise UsageError(f"{lanes} reader lanes", "use 1 to 64")
        if paranoid and not table.has_checksums:
            raise UsageError(
                "paranoid reading needs checksums, and this model has none",
                "export it with mimo-edge export",
            )
        try:
            files: dict[Path, int] = {}
            opened: list[FlashFile] = []
            for layer in table.layers:
                for stack in layer.stacks:
                    if stack.file not in files:
                        files[stack.file] = len(opened)
                        opened.append(FlashFile(stack.file, direct=direct))
                        self._stack.callback(opened[-1].close)
            self._file_of = files
            self._shared = _Shared(table, pool, opened, paranoid)
            bounce = self._bounce_bytes()
            self.buffer_bytes = bounce * lanes
            checked = np.zeros((len(table.layers), table.experts), np.bool_)
            for number in range(lanes):
                lane = _Lane(self._shared, bounce, checked)
                self._stack.callback(lane.close)
                thread = threading.Thread(
                    target=lane.run, name=f"mimo-expert-lane-{number}", daemon=True
                )
                thread.start()
                self._shared.lanes_left += 1
                self._lanes.append(thread)
        except BaseException:
            self.close()
            raise

    def _bounce_bytes(self) -> int:
        """Bounce buffer of a lane: 0 when every part can be read straight into its slot."""
        shared = self._shared
        need = 0
        for layer in shared.table.layers:
            for stack in layer.stacks:
                file = shared.files[self._file_of[stack.file]]
                if file.alignment and (
                    stack.offset % file.alignment or stack.nbytes % file.alignment
                ):
                    span = max(part_bytes(stack.nbytes), COALESCE_BYTES)
                    need = max(need, file.bounce_bytes(span))
        return round_up(need, mmap.PAGESIZE)

    @property
    def direct(self) -> bool:
        """Whether every file is read past the page cache."""
        return all(file.alignment for file in self._shared.files)

    @property
    def stats(self) -> ReaderStats:
        """Totals so far (a live object)."""
        return self._shared.stats

    def read(
        self, row: int, expert: int, slot: int, done: Done, *, ahead: bool = False
    ) -> ExpertRead:
        """Queue a read of expert `expert` of the table's layer `row` into `slot`.

        `done(read, error)` is called once, from a lane, when no lane touches the slot any more.
        An expert already on its way is not queued twice: its running read is returned, and
        `done` is not called. `ahead` reads wait until no other read is queued.
        """
        self.check_process()
        s = self._shared
        if not (0 <= row < len(s.table.layers) and 0 <= expert < s.table.experts):
            raise UsageError(f"expert {expert} of row {row}")
        with s.wake:
            if s.closing:
                raise UsageError("the expert reader is closed")
            flying = s.flights.get((row, expert))
            if flying is not None:
                return flying
            read = ExpertRead(row, expert, slot, done, s.renewed)
            s.flights[row, expert] = read
            queue = s.ahead if ahead else s.urgent
            for kind, stack in enumerate(s.table.layers[row].stacks):
                offset = stack.offset + expert * stack.nbytes
                file, step = self._file_of[stack.file], part_bytes(stack.nbytes)
                with s.pool.view(slot, kind, stack.nbytes) as whole:
                    for at in range(0, stack.nbytes, step):
                        part = _Part(read, kind, file, offset + at, whole[at : at + step])
                        queue.append(part)
                        s.waiting[file, offset + at] = part
                        read._parts_left += 1
            s.wake.notify(read._parts_left)
        return read

    def hurry(self, read: ExpertRead) -> None:
        """Put what is still queued of a read-ahead before the other read-ahead."""
        s = self._shared
        with s.wake:
            mine = [part for part in s.ahead if part.read is read]
            for part in mine:
                s.ahead.remove(part)
                s.urgent.append(part)
            s.wake.notify(len(mine))

    def drop(self, read: ExpertRead) -> bool:
        """Take a read out of the queue; False when it has begun. `done` is not called."""
        s = self._shared
        with s.wake:
            if read._started or s.flights.get((read.row, read.expert)) is not read:
                return False
            for queue in (s.urgent, s.ahead):
                for part in [part for part in queue if part.read is read]:
                    queue.remove(part)
                    s.waiting.pop((part.file, part.offset), None)
                    part.target.release()
            del s.flights[read.row, read.expert]
        read._finished.set()
        return True

    @property
    def forked(self) -> bool:
        """Whether this is a child of the process that made the reader."""
        return os.getpid() != self._pid

    def stop(self, read: ExpertRead) -> None:
        """Read no more of an expert than what lanes are in; `done` is told Cancelled when a part of
        it is left out, and what it is told otherwise when none is."""
        s = self._shared
        with s.wake:
            if s.flights.get((read.row, read.expert)) is not read:
                return
            mine = [part for queue in (s.urgent, s.ahead) for part in queue if part.read is read]
            if not mine:
                return
            for part in mine:
                (s.urgent if part in s.urgent else s.ahead).remove(part)
                s.waiting.pop((part.file, part.offset), None)
                part.target.release()
            read.error = read.error or Cancelled("nobody waits for this expert any more")
            read._parts_left -= len(mine)
            running = read._parts_left > 0
        if not running:
            _report(s, read)

    def check_process(self) -> None:
        """Threads do not survive a fork: refuse to work in a child."""
        if self.forked:
            raise BackendError(
                "expert reading was started in another process", "open the model after the fork"
            )

    def close(self) -> None:
        """Stop the lanes once they finish the reads they are in; queued reads are dropped, and no
        read is reported any more. A read that hangs is left to its lane, which cleans up when it
        comes back. Twice is harmless; in a forked process nothing happens."""
        if self.forked:
            return  # the locks may be held by threads that do not exist here
        shared = getattr(self, "_shared", None)
        if shared is None:
            self._stack.close()
            return
        with shared.wake:
            shared.closing = True
            for queue in (shared.urgent, shared.ahead):
                for part in queue:
                    part.target.release()
                queue.clear()
            shared.waiting.clear()
            shared.wake.notify_all()
        until = time.monotonic() + _CLOSE_WAIT_S
        for thread in self._lanes:
            if thread is not threading.current_thread():  # collected inside a lane
                thread.join(max(0.0, until - time.monotonic()))
        self._lanes.clear()
        with shared.wake:
            resources = self._stack.pop_all()
            if shared.lanes_left:
                shared.resources = resources
                return
        resources.close()

    def __enter__(self) -> ExpertReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class _Lane:
    """One reading thread and its bounce buffer."""

    def __init__(self, shared: _Shared, bounce_bytes: int, checked: Mask) -> None:
        self._shared = shared
        self._checked = checked  # [R, E]: experts whose checksum was right once
        self._map: mmap.mmap | None = None
        self._bounce: memoryview | None = None
        if bounce_bytes:
            self._map = mmap.mmap(-1, bounce_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._bounce = memoryview(self._map)

    def close(self) -> None:
        if self._bounce is not None:
            self._bounce.release()
            self._bounce = None
        if self._map is not None:
            self._map.close()
            self._map = None

    def run(self) -> None:
        """Read what is queued until the reader is closed."""
        shared = self._shared
        try:
            self._work()
        finally:
            with shared.wake:
                shared.lanes_left -= 1
                last = None if shared.lanes_left else shared.resources
            if last is not None:
                last.close()

    def _work(self) -> None:
        shared = self._shared
        while True:
            with shared.wake:
                while not (shared.urgent or shared.ahead or shared.closing):
                    shared.wake.wait()
                if shared.closing:
                    return
                parts = self._take()
            self._read(parts)

    def _take(self) -> list[_Part]:
        """The oldest part, and its followers in the file while they are small."""
        s = self._shared
        parts = [s.urgent.popleft() if s.urgent else s.ahead.popleft()]
        total = 0
        while True:
            part = parts[-1]
            s.waiting.pop((part.file, part.offset), None)
            part.read._started = True
            total += len(part.target)
            follower = s.waiting.get((part.file, part.offset + len(part.target)))
            if follower is None or total + len(follower.target) > COALESCE_BYTES:
                return parts
            try:
                (s.urgent if follower in s.urgent else s.ahead).remove(follower)
            except ValueError:
                return parts
            parts.append(follower)

    def _read(self, parts: list[_Part]) -> None:
        shared = self._shared
        start = time.perf_counter()
        nbytes, error = self._attempt(parts)
        outcomes = [(part, nbytes // len(parts), error) for part in parts]
        reads = 1
        if error is not None and len(parts) > 1:
            # A bad block fails the expert it belongs to, not the neighbours read along with it.
            outcomes = [(part, *self._attempt([part])) for part in parts]
            reads += len(parts)
        finished = []
        with shared.wake:
            shared.stats.reads += reads
            for part, share, failure in outcomes:
                part.target.release()
                read = part.read
                read.nbytes += share
                shared.stats.nbytes += share
                if failure is not None and read.error is None:
                    read.error = _located(failure, shared.table, read, part)
                read._parts_left -= 1
                if not read._parts_left:
                    finished.append(read)
        for read in finished:
            self._finish(read)
        with shared.wake:
            shared.stats.busy_s += time.perf_counter() - start

    def _attempt(self, parts: list[_Part]) -> tuple[int, MimoEdgeError | None]:
        """Read neighbours in one go: the bytes read, and what went wrong."""
        file = self._shared.files[parts[0].file]
        try:
            return self._fetch(file, parts), None
        except MimoEdgeError as failure:
            return 0, failure
        except BaseException as failure:  # a lane must never die and leave others waiting
            _log.exception("reading experts failed")
            return 0, BackendError(f"reading {file.path} failed: {failure!r}")

    def _fetch(self, file: FlashFile, parts: list[_Part]) -> int:
        targets = [part.target for part in parts]
        for attempt in range(_ATTEMPTS):
            state = file.state
            try:
                nbytes = file.read(parts[0].offset, targets, self._bounce)
                file.check()
            except BundleError:
                if not self._renew(file, state) or attempt == _ATTEMPTS - 1:
                    raise
            else:
                if file.state == state:  # or else it was read from the file before
                    return nbytes
        raise BundleError(f"{file.path} keeps changing while running", "copy the file again")

    def _renew(self, file: FlashFile, state: int) -> bool:
        """Go on with a file that was changed or replaced, if checksums can tell whether it holds
        the same experts. False when it is still the file of `state`; raises what happened to it
        when there is nothing to go on with."""
        shared = self._shared
        try:
            file.check()
        except BundleError:
            if not shared.table.has_checksums or not file.refresh():
                raise  # truncated or replaced says more than short
        else:
            return file.state != state  # another lane may have gone on with it meanwhile
        with shared.wake:
            shared.renewed += 1
            self._checked[:] = False
        _log.warning("%s was changed while running: every expert is checked again", file.path)
        return True

    def _finish(self, read: ExpertRead) -> None:
        if self._shared.closing:
            return  # nobody waits for it, and its slot is gone
        if read.error is None:
            read.error = self._check(read)
        _report(self._shared, read)

    def _check(self, read: ExpertRead) -> MimoEdgeError | None:
        """Compare with the checksum, the first time or always."""
        shared = self._shared
        layer = shared.table.layers[read.row]
        if layer.crc32 is None or (self._checked[read.row, read.expert] and not shared.paranoid):
            return None
        crc = 0
        for kind, stack in enumerate(layer.stacks):
            with shared.pool.view(read.slot, kind, stack.nbytes) as data:
                crc = zlib.crc32(data, crc)
        with shared.wake:
            shared.stats.checked += 1
        if crc == layer.crc32[read.expert]:
            with shared.wake:  # what was read from an older file says nothing about the new one
                self._checked[read.row, read.expert] = read.renewed == shared.renewed
            return None
        places = ", ".join(
            f"{kind} at {stack.offset + read.expert * stack.nbytes}"
            for kind, stack in zip(KINDS, layer.stacks, strict=True)
        )
        since = " since the file was changed while running" if shared.renewed else ""
        return IntegrityError(
            f"{layer.stacks[0].file}: layer {layer.layer}, expert {read.expert} is damaged{since}: "
            f"CRC-32 {crc:08x}, not {layer.crc32[read.expert]:08x} ({places})",
            "copy the file again",
        )


def _report(shared: _Shared, read: ExpertRead) -> None:
    """The read is over: nothing touches its slot any more."""
    with shared.wake:
        shared.flights.pop((read.row, read.expert), None)
        shared.stats.experts += read.error is None
    read._done(read, read.error)
    read._finished.set()


def _located(
    error: MimoEdgeError, table: ExpertTable, read: ExpertRead, part: _Part
) -> MimoEdgeError:
    """The error of a read with the layer and expert it was for."""
    layer = table.layers[read.row].layer
    message = f"layer {layer}, expert {read.expert} ({KINDS[part.kind]}): {error.message}"
    kind = type(error) if isinstance(error, BundleError) else BackendError
    located = kind(message, error.hint)
    located.__cause__ = error
    return located
