"""The cache of routed experts: slots in RAM over experts on flash.

`begin` queues the reads a layer needs and returns at once, so that experts already there can be
computed with while the rest arrives. `stream` walks a layer that wants more experts than may be
in RAM at once, group by group, reading ahead. An expert in a slot is either whole and checked, or
not there: a failed read leaves its slot free and raises where the expert is waited for.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mimo_edge.cancel import CancelSignal
from mimo_edge.errors import Cancelled, DeviceError, MimoEdgeError, UsageError
from mimo_edge.experts.guesses import GuessRecord
from mimo_edge.experts.policy import FrequencyPolicy, Ids, Mask, Policy
from mimo_edge.experts.reader import DEFAULT_LANES, ExpertRead, ExpertReader
from mimo_edge.experts.residency import Residency, Slots
from mimo_edge.experts.slots import SlotPool
from mimo_edge.experts.stats import CacheStats, LayerStats
from mimo_edge.experts.table import ExpertTable

_log = logging.getLogger(__name__)

# How often a waiting caller looks at its cancel signal.
_CANCEL_POLL_S = 0.02
# Reads of `warm_up` in the queue at a time: enough for every lane, dropped quickly.
_WARM_READS = 4
# Experts on their way below which those a layer is expected to want are begun: flash is busy, and
# an expert's slot is taken from another one as late as possible.
_READS_BEFORE_EXPECTED = 2


class ExpertGroup(NamedTuple):
    """Experts `ids` i64 [g] of the streamed layer, in slots `slots` i32 [g]."""

    ids: Ids
    slots: Slots


class Ticket:
    """The experts of one layer in one pass, safe in their slots until `release`.

    `ids` i64 [U] are the distinct experts in rising order, `slots` i32 [U] where they are or will
    be, `resident` bool [U] which were there at once, `slot_ids` i32 the slots in the shape of the
    ids asked for. Use it as a context manager.
    """

    def __init__(
        self,
        cache: ExpertCache,
        row: int,
        ids: Ids,
        slots: Slots,
        resident: Mask,
        slot_ids: Slots,
        cancel: CancelSignal | None,
    ) -> None:
        self.row, self.ids, self.slots, self.resident = row, ids, slots, resident
        self.slot_ids = slot_ids
        self._cache = cache
        self._cancel = cancel
        # positions in ids that are still on their way, and those that arrived unannounced
        self._pending = {int(e): i for i, e in enumerate(ids.tolist()) if not resident[i]}
        self._arrived: list[int] = []
        self._joined: set[int] = set()  # pending experts whose read was begun for someone else
        self._lost: set[int] = set()  # experts whose read failed: not held any more
        self._error: MimoEdgeError | None = None
        self._open = True

    def groups(self) -> Iterator[NDArray[np.int64]]:
        """Positions in `ids` i64 [n], each once: first those resident, then the rest in the order
        it arrives, as many at a time as are there.

        Raises what went wrong with a read, or Cancelled.
        """
        first = np.flatnonzero(self.resident)
        if len(first):
            yield first
        while positions := self._cache._wait(self, everything=False):
            yield np.array(positions, np.int64)

    def wait(self) -> None:
        """Return when every expert is there. Raises what went wrong with a read, or Cancelled."""
        self._cache._wait(self, everything=True)

    def release(self) -> None:
        """The experts are no longer needed; reads not yet begun are dropped. Twice is harmless."""
        self._cache._release(self)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class ExpertCache:
    """At most `slots` experts of `table` in RAM.

    One forward pass at a time uses it; `release`, `grow` and `stats` may be called from other
    threads. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        table: ExpertTable,
        slots: int,
        *,
        policy: Policy | None = None,
        lanes: int = DEFAULT_LANES,
        paranoid: bool = False,
        direct: bool = True,
    ) -> None:
        """Slots beyond the number of experts are not made. Raises DeviceError when one token's
        experts do not fit, BundleError when a file cannot be opened."""
        if slots < table.chosen:
            need = table.chosen * SlotPool.bytes_per_slot(table)
            raise DeviceError(
                f"{slots} expert slots, but a token uses {table.chosen} experts of a layer at once",
                f"leave at least {need} bytes for experts",
            )
        count = min(slots, table.total)
        rows = len(table.layers)
        self.table = table
        self._row_of = {entry.layer: row for row, entry in enumerate(table.layers)}
        policy = policy or FrequencyPolicy(rows, table.experts, table.chosen, heat=table.heat)
        self._residency = Residency(rows, table.experts, count, policy)
        self._change = threading.Condition()
        self._reads: dict[tuple[int, int], ExpertRead] = {}
        self._waiting: dict[tuple[int, int], list[Ticket]] = {}
        self._ahead: dict[int, set[int]] = {}  # experts read ahead and held for their layer
        self._expected: deque[tuple[int, int]] = deque()  # to be read ahead, likeliest first
        self._guess: GuessRecord | None = None  # who wants to know which of those came true
        self._spoiled: set[tuple[int, int]] = set()  # failed when they were read ahead
        self._shrinking = 0  # calls of `release` that wait for the end of all reads
        self._warming: deque[tuple[int, int]] = deque()  # to be read into free slots, best first
        self._warm_reads: set[tuple[int, int]] = set()
        self._tickets = 0
        self._closed = False
        self._hits, self._misses, self._loads, self._nbytes = np.zeros((4, rows), np.int64)
        self._wait_s = np.zeros(rows)
        self.pool = SlotPool(count, table.stride_bytes)
        try:
            self._reader = ExpertReader(
                table, self.pool, lanes=lanes, paranoid=paranoid, direct=direct
            )
        except BaseException:
            self.pool.close()
            raise

    # --- what it is ---

    @property
    def slots(self) -> int:
        """Slots that may be used now."""
        return self._residency.limit

    @property
    def used(self) -> int:
        """Slots that hold an expert, or await one."""
        return self._residency.used

    @property
    def least(self) -> int:
        """Slots that are never given back: those of a token and of pinned experts."""
        return self.table.chosen + int(np.count_nonzero(self._residency.pinned))

    @property
    def holds_everything(self) -> bool:
        """Whether every expert has a place, so that nothing is ever given up."""
        return self._residency.limit >= self.table.total

    @property
    def direct(self) -> bool:
        """Whether reads go past the page cache."""
        return self._reader.direct

    @property
    def nbytes(self) -> int:
        """Bytes of slots and read buffers when all are in use."""
        return self._residency.limit * self.pool.slot_bytes + self._reader.buffer_bytes

    def stats(self) -> CacheStats:
        """What happened so far."""
        with self._change:
            rows = zip(
                self.table.layers,
                self._hits.tolist(),
                self._misses.tolist(),
                self._loads.tolist(),
                self._nbytes.tolist(),
                self._residency.evictions.tolist(),
                self._wait_s.tolist(),
                strict=True,
            )
            reader = self._reader.stats
            return CacheStats(
                tuple(LayerStats(entry.layer, *numbers) for entry, *numbers in rows),
                self._residency.limit,
                self._residency.used,
                reader.nbytes,
                reader.busy_s,
            )

    def resident(self, layer: int) -> Ids:
        """Experts of a layer that are in a slot now, i64 [n]."""
        with self._change:
            found: Ids = np.flatnonzero(self._residency.settled[self._row(layer)])
            return found

    # --- using experts ---

    def begin(
        self,
        layer: int,
        ids: NDArray[np.integer[Any]],
        *,
        cancel: CancelSignal | None = None,
    ) -> Ticket:
        """Ask for the experts `ids` ([T, K] of T tokens, or any list) of a layer.

        Returns at once, with the missing ones queued. Raises DeviceError when they do not fit at
        once (see `stream`), and leaves nothing half done.
        """
        row = self._checked_row(layer, ids)
        with self._change:
            values, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
            unique = values.astype(np.int64)
            if len(unique) > self.slots:
                raise DeviceError(
                    f"{len(unique)} experts are needed at once and there are {self.slots} slots",
                    "process the layer in smaller groups",
                )
            if not self.holds_everything:
                self._residency.policy.touch(row, unique, counts, _tokens(ids))
            ticket = self._ticket(row, unique, inverse.reshape(ids.shape), cancel)
            self._let_go_ahead(row)
            return ticket

    def acquire(
        self,
        layer: int,
        ids: NDArray[np.integer[Any]],
        *,
        cancel: CancelSignal | None = None,
    ) -> Ticket:
        """`begin` and wait for everything."""
        ticket = self.begin(layer, ids, cancel=cancel)
        try:
            ticket.wait()
        except BaseException:
            ticket.release()
            raise
        return ticket

    def stream(
        self,
        layer: int,
        ids: NDArray[np.integer[Any]],
        group: int,
        *,
        then: int | None = None,
        cancel: CancelSignal | None = None,
    ) -> Generator[ExpertGroup, None, None]:
        """All experts `ids` of a layer, at most `group` at a time, each once.

        A group's slots are good until the next one is asked for. Resident experts come first,
        while the first reads run; of the others at most two groups are in slots or on their way,
        taken from the experts worth least, so a prefill leaves the favourites where they are.
        When all of them are on their way, two groups of the layer `then`, which runs next and
        wants nearly everything, are read ahead. Close the generator when leaving early. Raises as
        `Ticket.wait`.
        """
        if group < 1:
            raise UsageError(f"groups of {group} experts")
        row = self._checked_row(layer, ids)
        here: deque[Ticket] = deque()
        coming: deque[Ticket] = deque()
        current: Ticket | None = None
        try:
            with self._change:
                values, counts = np.unique(ids, return_counts=True)
                unique = values.astype(np.int64)
                if not self.holds_everything:
                    self._residency.policy.touch(row, unique, counts, _tokens(ids))
                found = self._residency.slot_of[row, unique] >= 0
                ready = self._residency.settled[row, unique]
                for part in (unique[ready], unique[found & ~ready]):
                    for start in range(0, len(part), group):
                        here.append(self._plain_ticket(row, part[start : start + group], cancel))
                self._let_go_ahead(row)
            missing = unique[~found]
            while here or coming or len(missing):
                with self._change:
                    while len(missing) and len(coming) < 2:
                        room = self._make_room(1, cancel)
                        step = min(group, len(missing), room)
                        if not step and (here or coming):
                            break
                        coming.append(self._plain_ticket(row, missing[: max(step, 1)], cancel))
                        missing = missing[max(step, 1) :]
                    if then is not None and not len(missing):
                        self._expect_most(self._row(then), 2 * group)
                        then = None
                current = here.popleft() if here else coming.popleft()
                current.wait()
                yield ExpertGroup(current.ids, current.slots)
                current.release()
                current = None
        finally:
            for ticket in (current, *here, *coming):
                if ticket is not None:
                    ticket.release()

    def expect(
        self, layer: int, ids: NDArray[np.integer[Any]], guess: GuessRecord | None = None
    ) -> None:
        """A layer that runs soon will probably want `ids`, likeliest first: whenever hardly
        anything else is being read, the next of them is. They stay until the layer runs; then what
        it does not want is not read any further, and `guess` is told which came true.

        What was expected before and not begun is forgotten. An error shows only when the expert is
        really asked for.
        """
        with self._change:
            row = self._row(layer)
            self._check_ids(ids)
            self._expected = deque((row, e) for e in dict.fromkeys(ids.reshape(-1).tolist()))
            self._guess = guess
            self._read_expected()

    def _expect_most(self, row: int, count: int) -> None:
        """Expect the `count` most valuable experts of a layer that are not there."""
        value = self._residency.policy.value()[row]
        value[self._residency.slot_of[row] >= 0] = -np.inf
        order = np.argsort(-value, kind="stable")[:count].tolist()
        self._expected = deque((row, e) for e in order if self._residency.slot_of[row, e] < 0)
        self._guess = None
        self._read_expected()

    def _read_expected(self) -> None:
        """Begin to read what is expected while flash has little to do. The lock is held."""
        r = self._residency
        if self._shrinking:
            return
        while self._expected and len(self._reads) < _READS_BEFORE_EXPECTED and r.available():
            row, expert = self._expected.popleft()
            if r.slot_of[row, expert] < 0 and (row, expert) not in self._spoiled:
                one = np.array([expert])
                r.claim(row, one)
                r.hold(row, one)
                self._ahead.setdefault(row, set()).add(expert)
                self._queue(row, one, ahead=True)

    def warm_up(self) -> int:
        """Begin to fill free slots, pinned experts first, then the most valuable ones. Returns how
        many will be read, at once.

        The reads go behind all others, few at a time, and end when the slots are full: no pass
        waits for more than the one or two that run. An error is logged, and shows when the expert
        is asked for.
        """
        with self._change:
            self._check_open()
            r = self._residency
            value = r.policy.value()
            value[r.pinned] = np.inf
            value[r.slot_of >= 0] = -np.inf
            count = min(r.free, int((r.slot_of < 0).sum()))
            order = np.argsort(-value, axis=None, kind="stable")[:count]
            pairs = zip(*(n.tolist() for n in np.divmod(order, self.table.experts)), strict=True)
            self._warming = deque(pairs)
            self._read_warm()
            return count

    def warm(self, cancel: threading.Event | None = None) -> int:
        """`warm_up` and wait until nothing more will be read; returns how many were. Raises
        Cancelled."""
        count = self.warm_up()
        with self._change:
            while (self._warming or self._warm_reads) and not self._closed:
                self._sleep(cancel)
        return count

    def _read_warm(self) -> None:
        """Keep a few reads of `warm_up` in the queue while slots are free. The lock is held."""
        r = self._residency
        while self._warming and len(self._warm_reads) < _WARM_READS:
            if not r.free:
                self._warming.clear()
                return
            row, expert = self._warming.popleft()
            if r.slot_of[row, expert] < 0:
                one = np.array([expert])
                r.claim(row, one)
                self._warm_reads.add((row, expert))
                self._queue(row, one, ahead=True)

    def pin(self, layer: int, ids: NDArray[np.integer[Any]]) -> None:
        """Never give up these experts once they are read (`warm` reads them now).

        Raises DeviceError when too few slots would be left for a token.
        """
        with self._change:
            row = self._row(layer)
            wanted = np.unique(ids).astype(np.int64)
            self._check_ids(wanted)
            pinned = int(np.count_nonzero(self._residency.pinned))
            pinned += int(np.count_nonzero(~self._residency.pinned[row, wanted]))
            if not self.holds_everything and pinned + self.table.chosen > self.slots:
                raise DeviceError(
                    f"{pinned} pinned experts leave {self.slots - pinned} of {self.slots} slots, "
                    f"a token needs {self.table.chosen}",
                    "pin fewer experts",
                )
            self._residency.pin(row, wanted)

    # --- memory pressure ---

    def release(self, count: int, *, timeout_s: float = 1.0) -> int:
        """Give the memory of up to `count` slots back, least valuable experts first.

        Waits up to `timeout_s` for the layer in use, and reads for no layer, to finish. Returns
        how many slots were given up: never the ones a token needs at least, nor those of pinned
        experts.
        """
        with self._change:
            self._check_open()
            r = self._residency

            def idle() -> bool:
                self._drop_ahead()
                return self._closed or not (self._tickets or self._reads)

            self._shrinking += 1  # or else reads ahead would reach from every layer into the next
            try:
                if not self._change.wait_for(idle, timeout_s):
                    return 0
            finally:
                self._shrinking -= 1
            self._check_open()
            count = min(count, r.limit - self.least)
            if count <= 0:
                return 0
            given, moves = r.shrink(count)
            for source, target in moves:
                self.pool.copy(source, target)
            self.pool.discard(r.limit, given)
            return given

    def grow(self, count: int) -> int:
        """Use up to `count` slots given up before again; returns how many. They are empty."""
        with self._change:
            self._check_open()
            return self._residency.grow(max(count, 0))

    # --- inside ---

    def _row(self, layer: int) -> int:
        self._check_open()
        row = self._row_of.get(layer)
        if row is None:
            raise UsageError(f"layer {layer} has no routed experts")
        return row

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("the expert cache is closed")
        self._reader.check_process()

    def _check_ids(self, ids: NDArray[np.integer[Any]]) -> None:
        if not ids.size or int(ids.min()) < 0 or int(ids.max()) >= self.table.experts:
            raise UsageError(f"expert ids must be some of 0..{self.table.experts - 1}")

    def _checked_row(self, layer: int, ids: NDArray[np.integer[Any]]) -> int:
        row = self._row(layer)
        self._check_ids(ids)
        return row

    def _plain_ticket(self, row: int, ids: Ids, cancel: CancelSignal | None) -> Ticket:
        return self._ticket(row, ids, np.arange(len(ids)), cancel)

    def _make_room(self, wanted: int, cancel: CancelSignal | None) -> int:
        """Try to make `wanted` slots claimable; returns how many are. What was read ahead, and is
        not held by a ticket, gives way."""
        self._check_open()
        r = self._residency
        if wanted > r.available():
            self._drop_ahead()
        # Reads that a cancelled or failed pass left running keep their slots until they end.
        while wanted > r.available() and any(not r.held_by_anyone(*key) for key in self._reads):
            self._sleep(cancel)
            self._check_open()
        return r.available()

    def _sleep(self, cancel: CancelSignal | None) -> None:
        """Wait for a change. Raises Cancelled."""
        if cancel is not None and cancel.is_set():
            raise Cancelled("cancelled while waiting for experts")
        self._change.wait(None if cancel is None else _CANCEL_POLL_S)

    def _ticket(
        self, row: int, ids: Ids, inverse: NDArray[np.int64], cancel: CancelSignal | None
    ) -> Ticket:
        """Hold what is there, claim and queue the rest. The lock is held."""
        self._check_open()
        r = self._residency
        while True:
            slots = r.slot_of[row, ids]
            missing = slots < 0
            present, wanted = ids[~missing], ids[missing]
            r.hold(row, present)
            try:
                if len(wanted):
                    self._make_room(len(wanted), cancel)
                gone = r.slot_of[row, present] < 0
                came = r.slot_of[row, wanted] >= 0
                if not gone.any() and not came.any():
                    slots[missing] = r.claim(row, wanted)
                    break
            except BaseException:
                r.unhold(row, present[r.slot_of[row, present] >= 0])
                raise
            # While this waited for room, a read left over from an earlier pass failed, or one to
            # warm up was begun.
            r.unhold(row, present[~gone])
        r.hold(row, wanted)
        resident = r.settled[row, ids]
        ticket = Ticket(self, row, ids, slots, resident, slots[inverse], cancel)
        self._tickets += 1
        hits = int(np.count_nonzero(resident))
        self._hits[row] += hits
        self._misses[row] += len(ids) - hits
        if hits < len(ids):
            for expert in ticket._pending:
                self._waiting.setdefault((row, expert), []).append(ticket)
            for expert in ids[~missing & ~resident].tolist():
                ticket._joined.add(expert)
                self._reader.hurry(self._reads[row, expert])
            if missing.any():
                self._queue(row, ids[missing], ahead=False)
        return ticket

    def _queue(self, row: int, ids: Ids, *, ahead: bool) -> None:
        for expert in ids.tolist():
            slot = int(self._residency.slot_of[row, expert])
            self._reads[row, expert] = self._reader.read(
                row, expert, slot, self._finished, ahead=ahead
            )

    def _finished(self, read: ExpertRead, error: MimoEdgeError | None) -> None:
        """A lane reports a read."""
        key = (read.row, read.expert)
        with self._change:
            self._reads.pop(key, None)
            warm = key in self._warm_reads
            self._warm_reads.discard(key)
            self._nbytes[read.row] += read.nbytes
            tickets = self._waiting.pop(key, [])
            joined = [ticket for ticket in tickets if read.expert in ticket._joined]
            if error is None:
                self._spoiled.discard(key)
                self._loads[read.row] += 1
                self._residency.settle(read.row, np.array([read.expert]))
            elif joined and not self._closed:
                # Left over from a pass that ended, or read ahead: its failure is not news of
                # whoever came later and found it under way. They get a read of their own.
                for ticket in joined:
                    ticket._joined.discard(read.expert)
                self._waiting[key] = joined
                self._queue(read.row, np.array([read.expert]), ahead=False)
                for ticket in tickets:
                    if ticket not in joined:  # it goes on holding the expert until released
                        del ticket._pending[read.expert]
                        ticket._error = ticket._error or error
                self._change.notify_all()
                return
            else:
                self._residency.drop(*key)
                ahead = read.expert in self._ahead.get(read.row, ())
                if ahead:
                    self._ahead[read.row].discard(read.expert)
                if (ahead or warm) and not tickets and not isinstance(error, Cancelled):
                    _log.warning("reading ahead failed: %s", error)
                    self._spoiled.add(key)  # not again on a guess
            for ticket in tickets:
                position = ticket._pending.pop(read.expert)
                if error is None:
                    ticket._arrived.append(position)
                else:
                    ticket._lost.add(read.expert)
                    ticket._error = ticket._error or error
            if not self._closed:
                self._read_warm()
                self._read_expected()
            self._change.notify_all()

    def _wait(self, ticket: Ticket, *, everything: bool) -> list[int]:
        """Wait for one more arrival or for all; the positions that arrived meanwhile."""
        with self._change:
            start = time.perf_counter()
            try:
                while True:
                    if not ticket._open:
                        raise UsageError("the ticket was released")
                    if ticket._error is not None:
                        raise ticket._error
                    if not ticket._pending or (ticket._arrived and not everything):
                        arrived, ticket._arrived = ticket._arrived, []
                        return arrived
                    if self._closed:
                        raise UsageError("the expert cache was closed")
                    self._sleep(ticket._cancel)
            finally:
                self._wait_s[ticket.row] += time.perf_counter() - start

    def _release(self, ticket: Ticket) -> None:
        with self._change:
            if not ticket._open:
                return
            ticket._open = False
            self._tickets -= 1
            row = ticket.row
            held = [e for e in ticket.ids.tolist() if e not in ticket._lost]
            self._residency.unhold(row, np.array(held, np.int64))
            for expert in ticket._pending:
                self._waiting[row, expert].remove(ticket)
                if not self._waiting[row, expert]:
                    del self._waiting[row, expert]
                self._abandon(row, expert)
            self._change.notify_all()

    def _abandon(self, row: int, expert: int) -> None:
        """Drop a read nobody holds, or what has not begun of it."""
        read = self._reads.get((row, expert))
        if read is None or self._residency.held_by_anyone(row, expert):
            return
        if self._reader.drop(read):
            del self._reads[row, expert]
            self._warm_reads.discard((row, expert))
            self._residency.drop(row, expert)
        else:
            self._reader.stop(read)

    def _let_go_ahead(self, row: int) -> None:
        """The layer runs and holds what it wants: what was read ahead for it needs no more
        protection, and what it does not want need not come."""
        if self._expected and self._expected[0][0] == row:
            self._expected.clear()
        for expert in self._ahead.pop(row, ()):
            self._residency.unhold(row, np.array([expert]))
            if self._guess is not None:
                self._guess.note(self._residency.held_by_anyone(row, expert))
            self._abandon(row, expert)

    def _drop_ahead(self) -> None:
        """Slots are short: stop protecting, and reading, what was read ahead or to warm up."""
        self._warming.clear()
        self._expected.clear()
        for key in list(self._warm_reads):
            self._abandon(*key)
        for row in list(self._ahead):
            for expert in self._ahead.pop(row):
                self._residency.unhold(row, np.array([expert]))
                self._abandon(row, expert)

    def close(self) -> None:
        """Stop reading, give the memory back. Twice is harmless; waiting callers get an error. In a
        forked process nothing happens: memory and threads are its parent's."""
        if self._reader.forked:
            return
        with self._change:
            if self._closed:
                return
            self._closed = True
            self._change.notify_all()
        self._reader.close()
        self.pool.close()

    def __enter__(self) -> ExpertCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _tokens(ids: NDArray[np.integer[Any]]) -> int:
    return ids.shape[0] if ids.ndim == 2 else 1
