"""The expert cache over real files: contents, bounds, faults, fallback, leaks."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from expert_files import ExpertFile
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mimo_edge.errors import (
    BackendError,
    BundleError,
    Cancelled,
    DeviceError,
    IntegrityError,
    MimoEdgeError,
    UsageError,
)
from mimo_edge.experts import reader as reader_module
from mimo_edge.experts.cache import ExpertCache, Ticket
from mimo_edge.experts.guesses import GuessRecord
from mimo_edge.experts.reader import ExpertReader, part_bytes
from mimo_edge.experts.slots import SlotPool
from mimo_edge.flash_file import FlashFile

UNALIGNED = {"sizes": (1000, 3000, 5000), "start": 96}
LAYOUTS = {
    "aligned": {},
    "unaligned": UNALIGNED,
    "mixed formats": {"sizes": [(4096, 4096, 8192), (8192, 4096, 4096), (1000, 2000, 3000)]},
}


def slot_bytes(cache: ExpertCache, row: int, slot: int) -> list[bytes]:
    stacks = cache.table.layers[row].stacks
    found = []
    for kind, stack in enumerate(stacks):
        with cache.pool.view(slot, kind, stack.nbytes) as view:
            found.append(bytes(view))
    return found


def assert_content(
    cache: ExpertCache, file: ExpertFile, row: int, ids: object, slots: object
) -> None:
    pairs = zip(np.asarray(ids).ravel(), np.asarray(slots).ravel(), strict=True)
    for expert, slot in pairs:
        assert slot_bytes(cache, row, int(slot)) == file.expected(row, int(expert))


def test_file_system_of_the_tests_takes_direct_reads(tmp_path: Path) -> None:
    """Or else the tests below would test the fallback twice: say so."""
    path = tmp_path / "f"
    path.write_bytes(bytes(8192))
    file = FlashFile(path)
    direct = bool(file.alignment)
    file.close()
    if not direct:
        pytest.skip("the temporary folder is on a file system without O_DIRECT")


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_slots_hold_what_the_file_says(tmp_path: Path, layout: str, direct: bool) -> None:
    file = ExpertFile(tmp_path / "x", **LAYOUTS[layout])  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    with ExpertCache(file.table, 5, direct=direct) as cache:
        for step in range(60):
            row = step % 3
            ids = np.stack([rng.permutation(8)[:2] for _ in range(2)])
            with cache.acquire(row + 1, ids) as ticket:
                assert_content(cache, file, row, ids, ticket.slot_ids)
                assert ticket.slot_ids.shape == ids.shape
        stats = cache.stats().total()
        assert stats.evictions > 0
        assert stats.loads == stats.misses
        assert stats.hits > 0
        assert cache.stats().slots_used <= 5


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_stream_gives_every_expert_once(
    tmp_path: Path, layout: str, direct: bool, group: int
) -> None:
    file = ExpertFile(tmp_path / "x", **LAYOUTS[layout])  # type: ignore[arg-type]
    with ExpertCache(file.table, 4, direct=direct) as cache:
        for row in (0, 1, 2, 0):
            with cache.acquire(row + 1, np.array([[6, 7]])):
                pass
            seen: list[int] = []
            for ids, slots in cache.stream(row + 1, np.arange(16).reshape(8, 2) % 8, group):
                assert 1 <= len(ids) <= group
                assert_content(cache, file, row, ids, slots)
                seen += ids.tolist()
            assert sorted(seen) == list(range(8))
            assert set(seen[:2]) == {6, 7} or group == 1


def test_resident_experts_are_given_before_the_rest(tmp_path: Path) -> None:
    file = ExpertFile(tmp_path / "x")
    with ExpertCache(file.table, 8) as cache:
        cache.acquire(1, np.array([2, 5])).release()
        with cache.begin(1, np.array([1, 2, 5, 7])) as ticket:
            groups = list(ticket.groups())
            assert ticket.ids[groups[0]].tolist() == [2, 5]
            assert sorted(np.concatenate(groups).tolist()) == [0, 1, 2, 3]
            assert_content(cache, file, 0, ticket.ids, ticket.slots)
            assert ticket.resident.tolist() == [False, True, True, False]


def test_everything_fits_nothing_is_given_up(tmp_path: Path) -> None:
    file = ExpertFile(tmp_path / "x")
    with ExpertCache(file.table, 1000) as cache:
        assert cache.slots == 24
        assert cache.holds_everything
        for _ in range(2):
            for row in range(3):
                for e in range(8):
                    cache.acquire(row + 1, np.array([e])).release()
        total = cache.stats().total()
        assert (total.loads, total.hits, total.evictions) == (24, 24, 0)
        assert total.nbytes == file.table.nbytes


def test_warm_fills_free_slots_by_heat_and_pins_stay(tmp_path: Path) -> None:
    heat = {row: np.arange(8, dtype=np.float64) for row in range(3)}
    file = ExpertFile(tmp_path / "x", heat=heat)
    with ExpertCache(file.table, 7) as cache:
        cache.pin(2, np.array([0]))
        assert cache.warm() == 7
        assert cache.resident(1).tolist() == [6, 7]
        assert cache.resident(2).tolist() == [0, 6, 7]
        rng = np.random.default_rng(0)
        for step in range(90):
            cache.acquire(step % 3 + 1, rng.permutation(8)[:2]).release()
            assert 0 in cache.resident(2)
        with pytest.raises(DeviceError, match="pinned"):
            cache.pin(1, np.arange(5))


def until(condition: Callable[[], bool]) -> None:
    """Wait for something lanes do, or fail."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_what_a_layer_will_want_is_read_ahead_and_given_up_when_slots_are_short(
    tmp_path: Path,
) -> None:
    file = ExpertFile(tmp_path / "x")
    record = GuessRecord()
    with ExpertCache(file.table, 6) as cache:
        cache.expect(2, np.array([3, 0, 1]), record)
        until(lambda: cache.resident(2).tolist() == [0, 1, 3])
        with cache.acquire(1, np.array([0, 1, 2])) as ticket:
            assert_content(cache, file, 0, ticket.ids, ticket.slots)
        with cache.acquire(2, np.array([0, 1, 2])) as ticket:
            assert_content(cache, file, 1, ticket.ids, ticket.slots)
            assert ticket.resident.tolist() == [True, True, False]
        assert (record.guessed, record.right) == (3, 2)
        assert cache.stats().total().loads == 7
        cache.expect(3, np.arange(6), record)
        with cache.acquire(1, np.arange(5)) as ticket:
            assert_content(cache, file, 0, ticket.ids, ticket.slots)


def test_a_wrong_guess_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its queued parts are dropped, the slot is free again when the running one ends, and who asks
    for the expert meanwhile gets it."""
    file = ExpertFile(tmp_path / "x")
    go, parts = threading.Event(), []
    whole = FlashFile.read

    def slow(self: FlashFile, offset: int, targets: Any, bounce: Any = None) -> int:
        parts.append(offset)
        assert go.wait(20)
        return whole(self, offset, targets, bounce)

    with ExpertCache(file.table, 6, lanes=2) as cache:
        monkeypatch.setattr(FlashFile, "read", slow)
        monkeypatch.setattr(reader_module, "COALESCE_BYTES", 0)
        cache.expect(2, np.array([5, 6]))
        until(lambda: len(parts) == 2)
        with cache.begin(2, np.array([1])) as ticket:
            again = cache.begin(2, np.array([5]))  # begun, stopped, wanted after all
            go.set()
            ticket.wait()
            assert_content(cache, file, 1, ticket.ids, ticket.slots)
            again.wait()
            assert_content(cache, file, 1, again.ids, again.slots)
            again.release()
        until(lambda: not cache._reads)
        # 5: a part for each lane as a guess, then all three; 6: not one; 1: three
        assert len(parts) == 2 + 3 + 3
        assert cache.resident(2).tolist() == [1, 5]
        assert cache._residency.used == 2
        with cache.acquire(2, np.array([6])) as ticket:
            assert_content(cache, file, 1, ticket.ids, ticket.slots)


@pytest.mark.parametrize("start", [4096, 4096 + 100])
def test_large_matrices_are_read_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int
) -> None:
    """By all lanes, aligned or not; a part that fails is the expert's error, and a wrong guess is
    given up between two parts of a matrix."""
    monkeypatch.setattr(reader_module, "PART_BYTES", 10_000)
    monkeypatch.setattr(reader_module, "_PART_UNIT", 4096)
    monkeypatch.setattr(reader_module, "COALESCE_BYTES", 0)
    assert [part_bytes(n) for n in (9_999, 10_000, 10_001, 40_960)] == [9_999, 10_000, 8192, 8192]
    file = ExpertFile(tmp_path / "x", sizes=(12_288, 20_481, 40_960), start=start)
    first = file.table.layers[1].stacks[2].offset + 3 * 40_960  # down of expert 3
    go, offsets, bad = threading.Event(), list[int](), set[int]()
    whole = FlashFile.read

    def read(self: FlashFile, offset: int, targets: Any, bounce: Any = None) -> int:
        offsets.append(offset)
        assert go.wait(20)
        if offset in bad:
            raise BundleError("no such block")
        return whole(self, offset, targets, bounce)

    monkeypatch.setattr(FlashFile, "read", read)
    with ExpertCache(file.table, 6, lanes=2) as cache:
        go.set()
        with cache.acquire(2, np.array([3, 4])) as ticket:
            assert_content(cache, file, 1, ticket.ids, ticket.slots)
        assert len(offsets) == 2 * (2 + 3 + 5)
        assert set(range(first, first + 40_960, 8192)) < set(offsets)
        bad.add(file.table.layers[0].stacks[2].offset + 16_384)
        with pytest.raises(BundleError, match=r"layer 1, expert 0 \(down\): no such block"):
            cache.acquire(1, np.array([0]))
        bad.clear()
        with cache.acquire(1, np.array([0])) as ticket:
            assert_content(cache, file, 0, ticket.ids, ticket.slots)
        go.clear()
        offsets.clear()
        cache.expect(3, np.array([7]))
        until(lambda: len(offsets) == 2)
        with cache.begin(3, np.array([1])) as ticket:
            go.set()
            ticket.wait()
            assert_content(cache, file, 2, ticket.ids, ticket.slots)
        until(lambda: not cache._reads)
        assert len(offsets) == 2 + 10
        assert cache.resident(3).tolist() == [1]


def test_an_expert_that_warming_up_begins_while_a_pass_waits_for_room_has_one_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`trim` warms up from another thread while a pass waits for a slot that a read left over from
    an earlier pass still has."""
    heat = {row: np.full(8, 1.0) for row in range(3)}
    heat[1][5] = 99.0
    file = ExpertFile(tmp_path / "x", heat=heat)
    go, late, whole = threading.Event(), threading.Event(), FlashFile.read
    warm = {stack.offset + 5 * stack.nbytes for stack in file.table.layers[1].stacks}

    def slow(self: FlashFile, offset: int, targets: Any, bounce: Any = None) -> int:
        assert (late if offset in warm else go).wait(20)
        return whole(self, offset, targets, bounce)

    found: list[Ticket] = []
    with ExpertCache(file.table, 5, lanes=8) as cache:
        held = cache.acquire(1, np.array([1, 2]))
        monkeypatch.setattr(FlashFile, "read", slow)
        left_over = cache.begin(1, np.array([0, 3]))
        until(lambda: all(read._started for read in cache._reads.values()))
        left_over.release()
        waiting = threading.Thread(target=lambda: found.append(cache.begin(2, np.array([5, 6]))))
        asleep, sleep = threading.Event(), ExpertCache._sleep

        def slept(self: ExpertCache, cancel: Any) -> None:
            asleep.set()
            sleep(self, cancel)

        monkeypatch.setattr(ExpertCache, "_sleep", slept)
        waiting.start()
        assert asleep.wait(20)
        assert cache.warm_up() == 1
        assert cache._residency.slot_of[1, 5] >= 0
        go.set()
        waiting.join(20)
        owners = [cache._residency.owner(slot) for slot in range(5)]
        assert owners.count((1, 5)) == 1
        late.set()
        with found[0] as ticket:
            ticket.wait()
            assert_content(cache, file, 1, ticket.ids, ticket.slots)
        held.release()


class BadExpert:
    """Reads of expert 3 of layer 2 hang until `go`, and fail when `fails`."""

    def __init__(self, file: ExpertFile, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.begun, self.fails, self.tries = threading.Event(), threading.Event(), True, 0
        mine = {stack.offset + 3 * stack.nbytes for stack in file.table.layers[1].stacks}
        whole, bad = FlashFile.read, self

        def read(self: FlashFile, offset: int, targets: Any, bounce: Any = None) -> int:
            if offset in mine:
                bad.tries += 1
                bad.begun.set()
                assert bad.go.wait(20)
                if bad.fails:
                    raise BundleError("a bad block")
            return whole(self, offset, targets, bounce)

        monkeypatch.setattr(reader_module, "COALESCE_BYTES", 0)
        monkeypatch.setattr(FlashFile, "read", read)


def test_a_guessed_read_that_hangs_and_fails_is_no_news_of_a_pass_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = ExpertFile(tmp_path / "x")
    bad = BadExpert(file, monkeypatch)
    with ExpertCache(file.table, 6) as cache:
        cache.expect(2, np.array([3]))
        assert bad.begun.wait(20)
        for ids in ([1, 2], [4, 5], [0, 6]):  # while it hangs
            with cache.acquire(2, np.array(ids)) as ticket:
                assert_content(cache, file, 1, ticket.ids, ticket.slots)
        bad.go.set()
        until(lambda: not cache._reads)
        assert cache._residency.slot_of[1, 3] < 0
        cache.expect(2, np.array([3]))  # nothing was left out of it: it was tried once more
        until(lambda: not cache._reads and "layer 2, expert 3" in caplog.text)
        tries = bad.tries
        cache.expect(2, np.array([3]))  # not again on a guess
        assert not cache._reads
        assert bad.tries == tries
        with pytest.raises(BundleError, match=r"layer 2, expert 3.*bad block"):
            cache.acquire(2, np.array([2, 3]))
        bad.fails = False
        with cache.acquire(2, np.array([2, 3])) as ticket:
            assert_content(cache, file, 1, ticket.ids, ticket.slots)
        cache.acquire(1, np.arange(6)).release()
        cache.expect(2, np.array([3]))  # it was good: worth a guess again
        until(lambda: cache.resident(2).tolist() == [3])


def test_a_guessed_read_that_fails_is_done_again_for_who_wants_the_expert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ExpertFile(tmp_path / "x")
    bad = BadExpert(file, monkeypatch)
    with ExpertCache(file.table, 6, lanes=2) as cache:
        cache.expect(2, np.array([3]))
        assert bad.begun.wait(20)
        with cache.begin(2, np.array([3, 4])) as ticket:
            whole = reader_module._report

            def report(shared: Any, read: Any) -> None:
                bad.fails = bad.fails and read.error is None
                whole(shared, read)

            monkeypatch.setattr(reader_module, "_report", report)
            bad.go.set()
            ticket.wait()
            assert_content(cache, file, 1, ticket.ids, ticket.slots)


def test_closing_does_not_wait_for_a_guessed_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ExpertFile(tmp_path / "x")
    bad = BadExpert(file, monkeypatch)
    before = threading.active_count()
    monkeypatch.setattr(reader_module, "_CLOSE_WAIT_S", 0.01)
    with ExpertCache(file.table, 6) as cache:
        cache.expect(2, np.array([3, 4]))
        assert bad.begun.wait(20)
    with pytest.raises(UsageError, match="closed"):
        cache.expect(2, np.array([3]))
    assert threading.active_count() > before  # it hangs still
    bad.go.set()
    until(lambda: threading.active_count() == before)


def test_memory_is_given_back_between_layers_that_are_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits to shrink the cache is not kept waiting by ever new reads ahead."""
    file = ExpertFile(tmp_path / "x")
    bad = BadExpert(file, monkeypatch)
    given: list[int] = []
    with ExpertCache(file.table, 6) as cache:
        ticket = cache.acquire(1, np.array([0, 1]))
        cache.expect(2, np.array([3]))
        assert bad.begun.wait(20)
        shrinking = threading.Thread(target=lambda: given.append(cache.release(3, timeout_s=20)))
        shrinking.start()
        until(lambda: cache._shrinking > 0)
        cache.expect(2, np.array([5, 6]))
        assert set(cache._reads) == {(1, 3)}
        ticket.release()
        bad.go.set()
        shrinking.join(20)
        assert given == [3]
        with cache.acquire(2, np.array([5, 6])) as ticket:
            assert_content(cache, file, 1, ticket.ids, ticket.slots)


def test_the_next_layer_is_read_behind_a_long_pass(tmp_path: Path) -> None:
    heat = {row: np.arange(8, dtype=np.float64) for row in range(3)}
    file = ExpertFile(tmp_path / "x", heat=heat)
    with ExpertCache(file.table, 8) as cache:
        seen: list[int] = []
        for ids, slots in cache.stream(1, np.arange(8), 2, then=2):
            assert_content(cache, file, 0, ids, slots)
            seen += ids.tolist()
        assert sorted(seen) == list(range(8))
        until(lambda: cache.resident(2).tolist() == [4, 5, 6, 7])
        first = next(iter(cache.stream(2, np.arange(8), 4)))
        assert first.ids.tolist() == [4, 5, 6, 7]


def test_guesses_that_do_not_come_true_are_made_rarely() -> None:
    record = GuessRecord()
    assert record.worth(1)
    for _ in range(200):
        record.note(right=False)
    assert 0 < sum(record.worth(1) for _ in range(320)) <= 320 // 16
    for _ in range(200):
        record.note(right=True)
    assert (record.guessed, record.right) == (400, 200)


@pytest.mark.parametrize(("rows", "with_s", "without_s"), [(1, 0.9, 1.0), (4, 1.0, 0.9)])
def test_passes_guess_while_that_is_the_faster_way(
    rows: int, with_s: float, without_s: float
) -> None:
    """Times scatter by more than the ways differ; passes of another length prove nothing."""
    rng = np.random.default_rng(1)
    record = GuessRecord()

    def share(passes: int, times: dict[bool, float]) -> float:
        ways = []
        for _ in range(passes):
            record.timed(2, record.worth(2), rng.uniform(1, 2))
            ways.append(record.worth(rows))
            record.timed(rows, ways[-1], times[ways[-1]] * rng.uniform(0.9, 1.1))
        return sum(ways) / passes

    times = {True: with_s, False: without_s}
    assert share(32, times) == 0.5  # both are tried first
    better = share(640, times)
    assert better > 0.9 if with_s < without_s else better < 0.1
    # The disk or the processor changes: found out by the passes that still go the other way.
    share(1280, {True: without_s, False: with_s})
    after = share(640, {True: without_s, False: with_s})
    assert after < 0.1 if with_s < without_s else after > 0.9


def test_too_much_at_once_is_refused_and_nothing_is_held(tmp_path: Path) -> None:
    file = ExpertFile(tmp_path / "x")
    with ExpertCache(file.table, 4) as cache:
        with pytest.raises(DeviceError, match="5 experts are needed at once"):
            cache.begin(1, np.arange(5))
        with cache.acquire(1, np.arange(4)) as ticket:
            assert_content(cache, file, 0, ticket.ids, ticket.slots)
    with pytest.raises(DeviceError, match="1 expert slots"):
        ExpertCache(file.table, 1)


def test_wrong_calls(tmp_path: Path) -> None:
    file = ExpertFile(tmp_path / "x", checksums=False)
    cache = ExpertCache(file.table, 4)
    for layer, ids in [(0, [1]), (4, [1]), (1, [8]), (1, [-1]), (1, [])]:
        with pytest.raises(UsageError):
            cache.begin(layer, np.array(ids, np.int64))
    with pytest.raises(UsageError, match="paranoid"):
        ExpertCache(file.table, 4, paranoid=True)
    cache.close()
    cache.close()
    with pytest.raises(UsageError, match="closed"):
        cache.begin(1, np.array([1]))
    (tmp_path / "x").unlink()
    with pytest.raises(BundleError):
        ExpertCache(file.table, 4)


# --- against a naive model ---


class CacheMachine(RuleBasedStateMachine):
    """Any sequence of calls; the model is: a slot in use holds its expert's bytes, slots are
    bounded, what is held or pinned stays, what must fit fits."""

    folder: Path

    def __init__(self) -> None:
        super().__init__()
        self.file = ExpertFile(self.folder / "x", sizes=(512, 4096, 700))
        self.cache = ExpertCache(self.file.table, 8, lanes=2)
        self.open: list[Ticket] = []
        self.pinned: set[tuple[int, int]] = set()
        self.record = GuessRecord()
        self.asked = 0

    def held(self) -> set[tuple[int, int]]:
        return {(t.row, int(e)) for t in self.open for e in t.ids}

    @rule(row=st.integers(0, 2), ids=st.lists(st.integers(0, 7), min_size=1, max_size=5))
    def begin(self, row: int, ids: list[int]) -> None:
        kept = self.held() | self.pinned
        need = kept | {(row, e) for e in ids}
        # pinned experts neither there nor on their way take no slot
        absent = {p for p in self.pinned if self.cache._residency.slot_of[p] < 0}
        absent -= self.held() | {(row, e) for e in ids}
        try:
            ticket = self.cache.begin(row + 1, np.array(ids))
        except DeviceError:
            # the warm-up may have read one of them meanwhile
            absent = {p for p in absent if self.cache._residency.slot_of[p] < 0}
            assert len(need - absent) > self.cache.slots
            return
        self.asked += len(set(ids))
        self.open.append(ticket)

    # No precondition: what is open depends on when reads end, and the rules drawn must not.
    @rule(last=st.booleans(), wait=st.booleans())
    def finish(self, last: bool, wait: bool) -> None:
        if not self.open:
            return
        ticket = self.open.pop(-1 if last else 0)
        if wait:
            ticket.wait()
            assert_content(self.cache, self.file, ticket.row, ticket.ids, ticket.slots)
        ticket.release()

    @rule(row=st.integers(0, 2), group=st.integers(1, 4), leave=st.booleans())
    def stream(self, row: int, group: int, leave: bool) -> None:
        seen: list[int] = []
        groups = self.cache.stream(row + 1, np.arange(8), group)
        try:
            for ids, slots in groups:
                assert_content(self.cache, self.file, row, ids, slots)
                seen += ids.tolist()
                if leave:
                    break
            else:
                assert sorted(seen) == list(range(8))
        except DeviceError:
            assert len(self.held() | self.pinned) + 1 >= self.cache.slots
        finally:
            groups.close()

    @rule(row=st.integers(0, 2), ids=st.lists(st.integers(0, 7), min_size=1, max_size=5))
    def expect(self, row: int, ids: list[int]) -> None:
        self.cache.expect(row + 1, np.array(ids), self.record)
        assert self.record.right <= self.record.guessed

    @rule()
    def warm_up(self) -> None:
        assert self.cache.warm_up() <= self.cache.slots

    @rule(row=st.integers(0, 2), expert=st.integers(0, 7))
    def pin(self, row: int, expert: int) -> None:
        try:
            self.cache.pin(row + 1, np.array([expert]))
        except DeviceError:
            assert len(self.pinned) + 3 > self.cache.slots
        else:
            self.pinned.add((row, expert))

    @rule(count=st.integers(1, 4))
    def shrink(self, count: int) -> None:
        before = self.cache.slots
        given = self.cache.release(count, timeout_s=0)
        assert given <= count
        assert self.cache.slots == before - given
        if self.open:
            assert given == 0

    @rule(count=st.integers(1, 4))
    def grow(self, count: int) -> None:
        self.cache.grow(count)
        assert self.cache.slots <= 8

    @invariant()
    def whole(self) -> None:
        with self.cache._change:
            r = self.cache._residency
            slots = r.slot_of[r.slot_of >= 0].tolist()
            assert len(set(slots)) == len(slots) == r.used
            assert all(slot < r.limit for slot in slots)
            assert not (r.settled & (r.slot_of < 0)).any()
            for row, expert in np.argwhere(r.settled).tolist():
                slot = int(r.slot_of[row, expert])
                assert slot_bytes(self.cache, row, slot) == self.file.expected(row, expert)
            for row, expert in self.held():
                assert r.slot_of[row, expert] >= 0

    def teardown(self) -> None:
        for ticket in self.open:
            ticket.wait()
            assert_content(self.cache, self.file, ticket.row, ticket.ids, ticket.slots)
            ticket.release()
        self.cache.close()


def test_any_sequence_of_calls(tmp_path: Path) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    CacheMachine.folder = tmp_path
    run_state_machine_as_test(
        CacheMachine,
        settings=settings(
            max_examples=25,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


# --- faults ---


def fail_once(
    file: ExpertFile, cache: ExpertCache, kind: type[MimoEdgeError], *words: str, ids: object = 3
) -> None:
    """The next read of expert 3 of layer 2 fails with `kind` and is not marked as there."""
    ticket = cache.begin(2, np.atleast_1d(np.asarray(ids)))
    with ticket, pytest.raises(kind) as caught:
        ticket.wait()
    for word in (*words, "layer 2", "expert 3", str(file.path)):
        assert word in str(caught.value)
    assert 3 not in cache.resident(2)


def test_flipped_bit(tmp_path: Path) -> None:
    file = ExpertFile(tmp_path / "x")
    stack = file.table.layers[1].stacks[2]
    data = bytearray(file.path.read_bytes())
    data[stack.offset + 3 * stack.nbytes + 77] ^= 4
    file.path.write_bytes(data)
    with ExpertCache(file.table, 6) as cache:
        fail_once(file, cache, IntegrityError, "damaged", "CRC-32", ids=[2, 3])
        with cache.acquire(2, np.array([2, 4])) as ticket:
            assert_content(cache, file, 1, ticket.ids, ticket.slots)
        fail_once(file, cache, IntegrityError, "damaged")  # and again: it is not remembered as good


def test_checksums_are_taken_once_or_always(tmp_path: Path) -> None:
    file = ExpertFile(tmp_path / "x")
    for paranoid, expected in ((False, 3), (True, 9)):
        with ExpertCache(file.table, 2, paranoid=paranoid) as cache:
            for _ in range(3):
                for row in range(3):
                    cache.acquire(row + 1, np.array([1])).release()
                    cache.acquire(row + 1, np.array([1])).release()
            loads = cache.stats().total().loads
            checked = cache._reader.stats.checked
        assert checked == (loads if paranoid else 3)
        assert loads >= expected - 3


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("checksums", [True, False])
def test_truncated_while_running(tmp_path: Path, direct: bool, checksums: bool) -> None:
    file = ExpertFile(tmp_path / "x", checksums=checksums)
    with ExpertCache(file.table, 6, direct=direct) as cache:
        cache.acquire(1, np.array([0])).release()
        os.truncate(file.path, file.table.layers[1].stacks[0].offset)
        fail_once(file, cache, BundleError, "truncated")


def test_replaced_while_running(tmp_path: Path) -> None:
    file = ExpertFile(tmp_path / "x", checksums=False)
    with ExpertCache(file.table, 6) as cache:
        cache.acquire(1, np.array([0])).release()
        (tmp_path / "y").write_bytes(file.path.read_bytes())
        os.replace(tmp_path / "y", file.path)
        fail_once(file, cache, BundleError, "replaced")
        file.path.unlink()
        fail_once(file, cache, BundleError, "gone")


def test_rewritten_in_place_while_running(tmp_path: Path) -> None:
    file = ExpertFile(tmp_path / "x", checksums=False)
    with ExpertCache(file.table, 6) as cache:
        cache.acquire(1, np.array([0])).release()
        os.utime(file.path, ns=(1, 1))
        fail_once(file, cache, BundleError, "changed")


def test_a_repaired_file_works_again_and_is_checked_again(tmp_path: Path) -> None:
    """With checksums a changed file is opened anew: what it holds counts, not which file it is."""
    file = ExpertFile(tmp_path / "x")
    content = file.path.read_bytes()
    stack = file.table.layers[1].stacks[2]
    changed = bytearray(content)
    changed[stack.offset + 3 * stack.nbytes + 77] ^= 4
    damaged = bytes(changed)

    def in_place(data: bytes) -> None:
        file.path.write_bytes(data)

    def other_file(data: bytes) -> None:
        (tmp_path / "y").write_bytes(data)
        os.replace(tmp_path / "y", file.path)

    with ExpertCache(file.table, 2) as cache:

        def good(expert: int) -> None:
            with cache.acquire(2, np.array([expert])) as ticket:
                assert_content(cache, file, 1, ticket.ids, ticket.slots)
            cache.acquire(1, np.arange(2)).release()  # give it up again

        good(3)
        for write in (in_place, other_file):
            write(damaged)
            good(2)
            # It was checked once, but in the file as it was then.
            fail_once(file, cache, IntegrityError, "damaged", "changed while running")
            write(content)
            good(3)
            write(content[: stack.offset])
            what = "truncated" if write is in_place else "replaced"
            fail_once(file, cache, BundleError, what)
            write(content)
            good(3)
            file.path.unlink()
            fail_once(file, cache, BundleError, "gone")
            write(content)
            good(3)


def test_two_lanes_may_find_the_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second finds the file that the first has gone on with: it reads again, too."""
    file = ExpertFile(tmp_path / "x")
    whole, calls = FlashFile.check, 0

    def check(flash: FlashFile) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            os.utime(file.path, ns=(1, 1))
        elif calls == 2:  # between the lane's finding and what it does about it
            assert flash.refresh()
        whole(flash)

    with ExpertCache(file.table, 6, lanes=1) as cache:
        monkeypatch.setattr(FlashFile, "check", check)
        with cache.acquire(2, np.array([3])) as ticket:
            assert_content(cache, file, 1, ticket.ids, ticket.slots)
    assert calls >= 3


def test_a_change_of_the_working_directory_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = ExpertFile(Path("x"))
    with ExpertCache(file.table, 6) as cache:
        monkeypatch.chdir("/")
        cache.acquire(1, np.array([0])).release()


def test_a_read_that_fails_after_its_pass_ended_does_not_fail_the_next_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass is left while a read is under way; the next pass finds that read, which then fails."""
    file = ExpertFile(tmp_path / "x")
    whole = FlashFile._preadv
    begun, go_on = threading.Event(), threading.Event()

    def broken(self: FlashFile, targets: Sequence[memoryview], offset: int) -> int:
        begun.set()
        go_on.wait()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with ExpertCache(file.table, 6, lanes=1) as cache:
        monkeypatch.setattr(FlashFile, "_preadv", broken)
        left = cache.begin(2, np.array([3]))
        assert begun.wait(10)
        left.release()
        with cache.begin(2, np.array([3])) as ticket:
            assert not ticket.resident.any()
            monkeypatch.setattr(FlashFile, "_preadv", whole)
            go_on.set()
            ticket.wait()
            assert_content(cache, file, 1, ticket.ids, ticket.slots)


def test_a_read_shared_by_two_passes_fails_the_second_only_when_it_fails_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ExpertFile(tmp_path / "x")
    begun, go_on = threading.Event(), threading.Event()

    def broken(self: FlashFile, targets: Sequence[memoryview], offset: int) -> int:
        begun.set()
        go_on.wait()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with ExpertCache(file.table, 6, lanes=1) as cache:
        monkeypatch.setattr(FlashFile, "_preadv", broken)
        first = cache.begin(2, np.array([3]))
        assert begun.wait(10)
        second = cache.begin(2, np.array([3]))
        go_on.set()
        for ticket in (first, second):
            with ticket, pytest.raises(BundleError, match=r"layer 2, expert 3"):
                ticket.wait()
        monkeypatch.undo()
        with cache.acquire(2, np.array([3])) as ticket:
            assert_content(cache, file, 1, ticket.ids, ticket.slots)


def target_of(file: ExpertFile) -> int:
    stack = file.table.layers[1].stacks[1]
    return stack.offset + 3 * stack.nbytes


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("layout", ["aligned", "unaligned"])
def test_disk_error_and_short_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, direct: bool
) -> None:
    file = ExpertFile(tmp_path / "x", **LAYOUTS[layout])  # type: ignore[arg-type]
    real = FlashFile._preadv
    fault = ""

    def preadv(self: FlashFile, targets: Sequence[memoryview], offset: int) -> int:
        end = offset + sum(len(t) for t in targets)
        if offset <= target_of(file) < end:
            if fault == "EIO":
                raise OSError(errno.EIO, "Input/output error")
            if fault == "nothing":
                return 0
            if fault == "bug":
                raise ZeroDivisionError
        if fault == "short":  # half of what was asked for, which is no error
            unit = self.alignment or 1
            first = targets[0]
            return real(self, [first[: max(len(first) // 2 // unit * unit, unit)]], offset)
        return real(self, targets, offset)

    monkeypatch.setattr(FlashFile, "_preadv", preadv)
    with ExpertCache(file.table, 6, direct=direct) as cache:
        for fault, kind, word in (  # noqa: B007 (preadv reads it)
            ("EIO", BundleError, "Input/output error"),
            ("nothing", BundleError, "short read"),
            ("bug", BackendError, "ZeroDivisionError"),
        ):
            # Its neighbours in the file are read along with it, and must not suffer; unless a
            # direct read needs the bad block for them, too.
            alone = layout == "unaligned" and direct
            with pytest.raises(kind, match=word) as caught:
                cache.acquire(2, np.array([3] if alone else [2, 3, 4]))
            assert "layer 2, expert 3 (up)" in str(caught.value)
            if not alone:
                with cache.acquire(2, np.array([2, 4])) as ticket:
                    assert_content(cache, file, 1, ticket.ids, ticket.slots)
            assert 3 not in cache.resident(2)
            cache.acquire(1, np.arange(6)).release()  # give them up again
        fault = "short"
        for row in range(3):
            with cache.acquire(row + 1, np.array([3, 4, 7])) as ticket:
                assert_content(cache, file, row, ticket.ids, ticket.slots)


def test_error_in_a_stream_leaves_the_cache_usable(tmp_path: Path) -> None:
    file = ExpertFile(tmp_path / "x")
    stack = file.table.layers[1].stacks[0]
    data = bytearray(file.path.read_bytes())
    data[stack.offset + 3 * stack.nbytes] ^= 1
    file.path.write_bytes(data)
    with ExpertCache(file.table, 4) as cache:
        groups = cache.stream(2, np.arange(8), 2)
        with pytest.raises(IntegrityError, match="expert 3"):
            list(groups)
        with cache.acquire(1, np.arange(4)) as ticket:
            assert_content(cache, file, 0, ticket.ids, ticket.slots)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Reads hang until the event is set."""
    go, real = threading.Event(), FlashFile._preadv

    def preadv(self: FlashFile, targets: Sequence[memoryview], offset: int) -> int:
        go.wait(20)
        return real(self, targets, offset)

    monkeypatch.setattr(FlashFile, "_preadv", preadv)
    yield go
    go.set()


def test_cancel_stops_a_waiting_caller(tmp_path: Path, slow_disk: threading.Event) -> None:
    file = ExpertFile(tmp_path / "x")
    cancel = threading.Event()
    with ExpertCache(file.table, 4, lanes=1) as cache:
        threading.Timer(0.05, cancel.set).start()
        start = time.monotonic()
        with pytest.raises(Cancelled):
            cache.acquire(1, np.arange(4), cancel=cancel)
        # the reads of all four slots are running (as one): nothing to do but wait, or not
        with pytest.raises(Cancelled):
            next(iter(cache.stream(2, np.arange(3), 1, cancel=cancel)))
        with pytest.raises(Cancelled):
            cache.begin(2, np.arange(3), cancel=cancel)
        assert time.monotonic() - start < 10
        slow_disk.set()
        # the slots of reads that were running come back
        with cache.acquire(3, np.arange(4)) as ticket:
            assert_content(cache, file, 2, ticket.ids, ticket.slots)


def test_close_wakes_a_waiting_caller(tmp_path: Path, slow_disk: threading.Event) -> None:
    file = ExpertFile(tmp_path / "x")
    cache = ExpertCache(file.table, 4)
    failures: list[BaseException] = []

    def wait() -> None:
        try:
            cache.acquire(1, np.array([1]))
        except MimoEdgeError as error:
            failures.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    threading.Timer(0.2, slow_disk.set).start()
    time.sleep(0.05)
    cache.close()
    thread.join(10)
    assert not thread.is_alive()
    assert len(failures) in (0, 1)  # closed first, or read just in time


def test_release_from_another_thread(tmp_path: Path) -> None:
    file = ExpertFile(tmp_path / "x")
    with ExpertCache(file.table, 24) as cache:
        stop, given = threading.Event(), []

        def press() -> None:
            while not stop.is_set():
                given.append(cache.release(5))
                cache.grow(5)

        thread = threading.Thread(target=press)
        thread.start()
        rng = np.random.default_rng(0)
        for step in range(300):
            row, ids = step % 3, rng.permutation(8)[:4]
            with cache.acquire(row + 1, ids) as ticket:
                assert_content(cache, file, row, ids, ticket.slot_ids)
        stop.set()
        thread.join()
        assert max(given) == 5


# --- memory ---


def resident_bytes(address: int, length: int) -> int:
    """Bytes of a mapping that are in RAM (mincore): of our own memory or of the page cache."""
    page = mmap.PAGESIZE
    pages = -(-length // page)
    vector = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), vector)
    assert result == 0, ctypes.get_errno()
    return page * sum(v & 1 for v in vector)


def cached_bytes(path: Path) -> int:
    """Bytes of a file in the page cache."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as view:
        pointer = (ctypes.c_char * len(view)).from_buffer(view)
        count = resident_bytes(ctypes.addressof(pointer), len(view))
        del pointer
        return count


def forget(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@pytest.mark.parametrize("direct", [True, False])
def test_the_page_cache_does_not_grow(tmp_path: Path, direct: bool) -> None:
    size = 256 << 10
    file = ExpertFile(tmp_path / "x", sizes=(size, size, size + 4096), checksums=False)
    forget(file.path)
    if cached_bytes(file.path) > 65536:
        pytest.skip("this file system keeps its files in memory")
    with ExpertCache(file.table, 6, direct=direct) as cache:
        for row in range(3):
            for _ in cache.stream(row + 1, np.arange(8), 2):
                pass
        assert cache.stats().total().nbytes >= file.table.nbytes > 18 << 20
        assert cached_bytes(file.path) <= 128 << 10


def test_released_memory_is_gone_and_comes_back(tmp_path: Path) -> None:
    size = 1 << 20
    file = ExpertFile(tmp_path / "x", sizes=(size, size, size), checksums=False)
    with ExpertCache(file.table, 12) as cache:

        def in_ram() -> int:
            return sum(
                resident_bytes(cache.pool.address(k), cache.pool.region_bytes(k)) for k in range(3)
            )

        cache.warm()
        full = in_ram()
        assert full >= 36 << 20
        assert cache.release(8) == 8
        # what a huge page at the border still holds may stay
        assert in_ram() <= (12 << 20) + 3 * (2 << 20)
        assert cache.release(8) == 2  # a token needs two
        assert cache.slots == 2
        with cache.acquire(1, np.array([0, 1])) as ticket:
            assert_content(cache, file, 0, ticket.ids, ticket.slots)
        assert cache.grow(100) == 10
        with cache.acquire(1, np.arange(8)) as ticket:
            assert_content(cache, file, 0, ticket.ids, ticket.slots)


def test_pool_geometry() -> None:
    pool = SlotPool(5, (4096, 5000, 1))
    page = mmap.PAGESIZE
    for kind in range(3):
        assert pool.address(kind) % page == 0
        assert pool.strides[kind] % page == 0
        for slot in range(5):
            with pool.view(slot, kind, 1) as view:
                view[0] = 16 * kind + slot
            read = ctypes.c_ubyte.from_address(pool.address(kind) + slot * pool.strides[kind])
            assert read.value == 16 * kind + slot
    with pytest.raises(UsageError):
        pool.view(5, 0, 1)
    with pytest.raises(UsageError):
        pool.view(0, 0, pool.strides[0] + 1)
    pool.close()
    pool.close()
    with pytest.raises(UsageError):
        pool.view(0, 0, 1)
    with pytest.raises(DeviceError):
        SlotPool(1 << 40, (1 << 30, 1, 1))


def test_file_system_without_direct_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """EINVAL at open or at the first read: buffered, and said once."""
    file = ExpertFile(tmp_path / "x")
    real_open, real_preadv = os.open, os.preadv

    def refuse_open(path: object, flags: int, *rest: object) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *rest)  # type: ignore[arg-type]

    direct: set[int] = set()

    def remember_open(path: object, flags: int, *rest: object) -> int:
        fd = real_open(path, flags, *rest)  # type: ignore[arg-type]
        (direct.add if flags & os.O_DIRECT else direct.discard)(fd)
        return fd

    def refuse_preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if fd in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_preadv(fd, buffers, offset)

    for replacements in (
        {"open": refuse_open},
        {"open": remember_open, "preadv": refuse_preadv},
    ):
        caplog.clear()
        with monkeypatch.context() as patch:
            for name, function in replacements.items():
                patch.setattr(os, name, function)
            with ExpertCache(file.table, 6) as cache:
                assert not cache.direct
                for row in range(3):
                    with cache.acquire(row + 1, np.arange(4)) as ticket:
                        assert_content(cache, file, row, ticket.ids, ticket.slots)
        assert [r for r in caplog.messages if "page cache" in r] == [caplog.messages[0]]


def test_tmpfs(tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK):
        pytest.skip("there is no tmpfs to write to")
    path = shm / f"mimo-edge-test-{os.getpid()}"
    try:
        file = ExpertFile(path, sizes=(1000, 3000, 5000))
        with ExpertCache(file.table, 6) as cache, cache.acquire(1, np.arange(4)) as ticket:
            assert_content(cache, file, 0, ticket.ids, ticket.slots)
    finally:
        path.unlink(missing_ok=True)


# --- life and death ---


@pytest.mark.parametrize("cycles", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_open_and_close_leak_nothing(tmp_path: Path, cycles: int) -> None:
    file = ExpertFile(tmp_path / "x", **UNALIGNED)  # type: ignore[arg-type]

    def cycle(count: int) -> tuple[int, int, int]:
        for number in range(count):
            cache = ExpertCache(file.table, 4, lanes=2)
            ticket = cache.begin(1, np.array([number % 8]))
            if number % 2:
                ticket.wait()
                ticket.release()
            cache.close()
        del cache, ticket
        gc.collect()
        maps = len(Path("/proc/self/maps").read_text().splitlines())
        return len(os.listdir("/proc/self/fd")), threading.active_count(), maps

    cycle(20)
    before = cycle(1)
    after = cycle(cycles)
    assert after[:2] == before[:2]
    assert after[2] <= before[2] + 20


def test_a_forgotten_reader_ends(tmp_path: Path) -> None:
    file = ExpertFile(tmp_path / "x")
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    pool = SlotPool(2, file.table.stride_bytes)
    reader = ExpertReader(file.table, pool)
    assert threading.active_count() > before[0]
    del reader
    gc.collect()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before
    pool.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_is_refused(tmp_path: Path) -> None:
    file = ExpertFile(tmp_path / "x")
    with ExpertCache(file.table, 4) as cache:
        cache.acquire(1, np.array([1])).release()
        child = os.fork()
        if not child:
            code = 1
            try:
                cache.begin(1, np.array([1]))
            except BackendError:
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        cache.acquire(1, np.array([2])).release()
