"""Eviction policies, bookkeeping, traces and the simulator, without a file of weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_edge.errors import BundleError, DeviceError, UsageError
from mimo_edge.experts.baselines import BeladyPolicy, LruPolicy
from mimo_edge.experts.policy import FrequencyPolicy
from mimo_edge.experts.residency import Residency
from mimo_edge.experts.simulate import (
    POLICIES,
    cyclic_trace,
    distinct,
    frequency_maker,
    replay,
    synthetic_trace,
)
from mimo_edge.experts.trace import (
    Phase,
    Route,
    Trace,
    TraceHeader,
    TraceWriter,
    read_trace,
    write_trace,
)

ROWS, EXPERTS, CHOSEN = 8, 32, 4


def ids(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(values, np.int64)


# --- hit rates ---


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_cyclic_routes_lru_hits_nothing_and_ours_reaches_belady(share: float) -> None:
    trace = cyclic_trace(ROWS, CHOSEN, 40, EXPERTS)
    slots = int(ROWS * CHOSEN * share)
    skip = 20 * ROWS
    rates = {name: replay(trace, slots, name, skip=skip).hit_rate for name in POLICIES}
    assert rates["lru"] == 0
    # The running layer's own experts need slots, so a few less than `slots` are useful.
    assert rates["ours"] >= rates["belady"] - 0.02
    assert rates["belady"] >= (slots - CHOSEN) / (ROWS * CHOSEN)


SYNTHETIC = {
    "uniform": synthetic_trace(ROWS, EXPERTS, CHOSEN, 200),
    "repeats": synthetic_trace(ROWS, EXPERTS, CHOSEN, 200, repeat=0.3),
    "skewed": synthetic_trace(ROWS, EXPERTS, CHOSEN, 200, skew=1.0),
    "all": synthetic_trace(ROWS, EXPERTS, CHOSEN, 200, skew=0.7, repeat=0.2, drift=10),
}


@pytest.mark.parametrize("name", SYNTHETIC)
@pytest.mark.parametrize("slots", [16, 64, 128])
def test_ours_is_never_below_lru_nor_above_belady(name: str, slots: int) -> None:
    """12,800 requests: two standard deviations of a rate are below 0.01."""
    trace, skip = SYNTHETIC[name], 100 * ROWS
    lru, ours, belady = (
        replay(trace, slots, policy, skip=skip).hit_rate for policy in ("lru", "ours", "belady")
    )
    assert ours >= lru - 0.01
    assert belady >= ours


def test_ours_learns_what_kind_of_routes_it_sees() -> None:
    """Favourites: as good as counting them. Repeats: clearly better than counting."""
    skip = 100 * ROWS
    ours, lfu, lru = (
        replay(SYNTHETIC["skewed"], 64, policy, skip=skip).hit_rate
        for policy in ("ours", "lfu", "lru")
    )
    assert ours >= lfu - 0.01
    assert ours > lru + 0.1
    ours, lfu = (
        replay(SYNTHETIC["repeats"], 64, policy, skip=skip).hit_rate for policy in ("ours", "lfu")
    )
    assert ours > lfu + 0.05


def test_heat_helps_from_the_first_token() -> None:
    trace = synthetic_trace(ROWS, EXPERTS, CHOSEN, 60, skew=1.2, seed=3)
    heat = {row: np.zeros(EXPERTS) for row in range(ROWS)}
    for route in synthetic_trace(ROWS, EXPERTS, CHOSEN, 200, skew=1.2, seed=3).routes:
        heat[route.row][route.ids.ravel()] += 1
    cold = replay(trace, 64, "ours").hit_rate
    warm = replay(trace, 64, "warm", {"warm": frequency_maker(heat)}).hit_rate
    assert warm > cold + 0.03


def test_every_expert_is_loaded_once_when_all_fit() -> None:
    trace = SYNTHETIC["all"]
    for policy in POLICIES:
        result = replay(trace, ROWS * EXPERTS, policy)
        used = {(r.row, int(e)) for r in trace.routes for e in r.ids.ravel()}
        assert result.evictions == 0
        assert result.requests - result.hits == len(used)


def test_belady_against_exhaustive_search() -> None:
    """The least misses any choice of victims can reach, found by trying all of them."""
    rng = np.random.default_rng(1)
    for _ in range(15):
        steps = [(int(rng.integers(2)), np.sort(rng.permutation(4)[:2])) for _ in range(9)]
        states: dict[frozenset[tuple[int, int]], int] = {frozenset(): 0}
        for row, wanted in steps:
            need = {(row, int(e)) for e in wanted}
            after: dict[frozenset[tuple[int, int]], int] = {}
            for state, misses in states.items():
                missing = need - state
                gone = max(0, len(state) + len(missing) - 4)
                pool = sorted(state - need)
                for mask in range(1 << len(pool)):
                    if mask.bit_count() == gone:
                        out = {pool[i] for i in range(len(pool)) if mask >> i & 1}
                        key = frozenset((state - out) | missing)
                        cost = misses + len(missing)
                        after[key] = min(cost, after.get(key, cost))
            states = after
        header = TraceHeader((0, 1), 4, 2)
        trace = Trace(header, tuple(Route(Phase.DECODE, row, e[None]) for row, e in steps))
        result = replay(trace, 4, "belady")
        assert result.requests - result.hits == min(states.values())


def test_belady_refuses_another_run() -> None:
    policy = BeladyPolicy(2, 4, [(0, ids(1, 2))])
    with pytest.raises(UsageError):
        policy.touch(0, ids(1, 3), ids(1, 1), 1)


def test_a_prefill_tells_the_decode_after_it() -> None:
    policy = FrequencyPolicy(1, 8, 2)
    route = np.array([[0, 1]] * 30 + [[2, 3]] * 10)
    policy.touch(0, *distinct(route), len(route))
    value = policy.value()[0]
    assert value[0] == value[1] > value[2] == value[3] > value[4]


@pytest.mark.parametrize(
    "bad",
    [
        lambda: FrequencyPolicy(0, 8, 2),
        lambda: FrequencyPolicy(2, 8, 9),
        lambda: FrequencyPolicy(2, 8, 2, heat={0: np.ones(7)}),
        lambda: FrequencyPolicy(2, 8, 2, heat={2: np.ones(8)}),
        lambda: replay(SYNTHETIC["all"], CHOSEN - 1, "ours"),
        lambda: replay(SYNTHETIC["all"], 64, "unknown"),
        lambda: synthetic_trace(1, 8, 2, 3, repeat=2.0),
        lambda: Residency(1, 8, 0, LruPolicy(1, 8)),
    ],
)
def test_nonsense_is_refused(bad: object) -> None:
    assert callable(bad)
    with pytest.raises(UsageError):
        bad()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_victims_are_evictable_distinct_and_of_lowest_value(data: st.DataObject) -> None:
    rows, experts = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 8))
    policy = FrequencyPolicy(rows, experts, 1, floor=data.draw(st.integers(0, 3)))
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    for _ in range(20):
        row = int(rng.integers(rows))
        used = np.unique(rng.integers(experts, size=2))
        policy.touch(row, used, np.ones(len(used), np.int64), 1)
    evictable = rng.random((rows, experts)) < 0.6
    total = int(evictable.sum())
    if not total:
        return
    count = data.draw(st.integers(1, total))
    held = evictable.sum(axis=1) + rng.integers(0, 2, rows)
    pairs = policy.victims(int(rng.integers(rows)), count, evictable, held)
    assert pairs.shape == (count, 2)
    assert len({tuple(p) for p in pairs.tolist()}) == count
    assert all(evictable[r, e] for r, e in pairs)
    left = held - np.bincount(pairs[:, 0], minlength=rows)
    spare = np.maximum(held - policy.floor, 0)
    spare = np.minimum(spare, evictable.sum(axis=1))
    if spare.sum() >= count:  # no layer goes below the floor while others have more
        assert all(left >= np.minimum(held, policy.floor))
    for r in {int(r) for r, _ in pairs}:  # inside a layer the least useful go first
        gone = [int(e) for rr, e in pairs if rr == r]
        stays = [e for e in range(experts) if evictable[r, e] and e not in gone]
        if stays:
            value = policy.value()[r]
            assert max(value[gone]) <= min(value[stays]) + 1e-12


# --- bookkeeping ---


def test_claiming_more_than_there_is_changes_nothing() -> None:
    r = Residency(2, 8, 4, LruPolicy(2, 8))
    r.claim(0, ids(0, 1, 2))
    r.hold(0, ids(0, 1, 2))
    with pytest.raises(DeviceError, match="2 experts are needed at once and 1 of 4"):
        r.claim(1, ids(5, 6))
    assert (r.slot_of[1] == -1).all()
    assert r.used == 3


def test_shrinking_keeps_the_most_valuable_and_moves_them() -> None:
    policy = LruPolicy(1, 8)
    r = Residency(1, 8, 6, policy)
    for e in (0, 1, 2, 3, 4, 5):
        r.claim(0, ids(e))
        r.settle(0, ids(e))
    for e in (0, 1, 2, 4, 5, 3):
        policy.touch(0, ids(e), ids(1), 1)
    before = r.slot_of[0].copy()
    given, moves = r.shrink(3)
    assert given == 3
    assert r.limit == 3
    assert set(np.flatnonzero(r.slot_of[0] >= 0)) == {3, 4, 5}
    for source, target in moves:
        owner = r.owner(target)
        assert owner is not None
        assert before[owner[1]] == source
    assert sorted(int(s) for s in r.slot_of[0] if s >= 0) == [0, 1, 2]
    assert r.grow(10) == 3
    assert r.limit == 6
    assert sorted(r.claim(0, ids(6, 7, 0)).tolist()) == [3, 4, 5]


def test_shrinking_stops_at_experts_in_use() -> None:
    r = Residency(1, 8, 6, LruPolicy(1, 8))
    slots = r.claim(0, ids(0, 1, 2, 3, 4))
    r.hold(0, ids(int(np.argmax(slots))))
    r.settle(0, ids(0, 1, 2, 3, 4))
    given, _ = r.shrink(5)
    assert given == 1  # the held one is in slot 4, only slot 5 was free
    assert r.limit == 5


# --- traces ---

HEADER = TraceHeader((1, 2, 5), 300, 3, "test")


def routes() -> list[Route]:
    rng = np.random.default_rng(0)
    return [Route(Phase(i % 3), i % 3, rng.integers(0, 300, (1 + i % 4, 3))) for i in range(20)]


def test_trace_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "t.routes"
    write_trace(path, HEADER, routes())
    trace = read_trace(path)
    assert trace.header == HEADER
    assert len(trace.routes) == 20
    for read, written in zip(trace.routes, routes(), strict=True):
        assert (read.phase, read.row) == (written.phase, written.row)
        assert (read.ids == written.ids).all()
    assert all(r.phase == Phase.DECODE for r in trace.only(Phase.DECODE).routes)


def test_trace_cut_anywhere_is_refused_or_whole(tmp_path: Path) -> None:
    path = tmp_path / "t.routes"
    write_trace(path, HEADER, routes()[:5])
    data = path.read_bytes()
    start = data.index(b"\n") + 1
    whole = {start}
    for route in routes()[:5]:
        whole.add(max(whole) + 8 + 2 * route.ids.size)
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        if cut in whole:
            assert len(read_trace(path).routes) == sorted(whole).index(cut)
        else:
            with pytest.raises(BundleError):
                read_trace(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h | {"format": "other"},
        lambda h: h | {"version": 2},
        lambda h: h | {"layers": [2, 1, 5]},
        lambda h: h | {"layers": []},
        lambda h: h | {"experts": "300"},
        lambda h: h | {"experts": 2},
        lambda h: h | {"experts": 10},  # ids pass the end
        lambda h: h | {"layers": [1]},  # rows pass the end
        lambda h: {},
    ],
)
def test_damaged_traces_are_refused(tmp_path: Path, change: object) -> None:
    assert callable(change)
    path = tmp_path / "t.routes"
    write_trace(path, HEADER, routes())
    head, _, rest = path.read_bytes().partition(b"\n")
    path.write_bytes(json.dumps(change(json.loads(head))).encode() + b"\n" + rest)
    with pytest.raises(BundleError):
        read_trace(path)


def test_writer_refuses_what_does_not_belong(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t", HEADER) as writer:
        for layer, bad in [
            (3, np.zeros((1, 3), np.int64)),
            (1, np.zeros((1, 2), np.int64)),
            (1, np.zeros((0, 3), np.int64)),
            (1, np.full((1, 3), 300)),
            (1, np.full((1, 3), -1)),
        ]:
            with pytest.raises(UsageError):
                writer.route(Phase.DECODE, layer, bad)
    with pytest.raises(UsageError):
        writer.route(Phase.DECODE, 1, np.zeros((1, 3), np.int64))
    assert read_trace(tmp_path / "t").routes == ()
    with pytest.raises(BundleError):
        TraceWriter(tmp_path / "none" / "t", HEADER)


def test_the_first_tokens_of_a_trace_end_with_a_whole_pass() -> None:
    trace = synthetic_trace(3, 8, 2, 10)
    assert trace.first(4).tokens == 4
    assert len(trace.first(4).routes) == 12
    assert trace.first(99) == trace


def test_a_warm_cache_hits_what_heat_promises() -> None:
    """Every expert fits: with everything read before, nothing is missed."""
    trace = SYNTHETIC["skewed"]
    assert replay(trace, ROWS * EXPERTS, "ours", warm=True).hit_rate == 1
    heat = {row: np.zeros(EXPERTS) for row in range(ROWS)}
    for route in trace.routes:
        heat[route.row][route.ids.ravel()] += 1
    makers = {"heat": frequency_maker(heat)}
    cold, warm = (
        replay(trace.first(5), 64, "heat", makers, warm=warm).hit_rate for warm in (False, True)
    )
    assert warm > cold + 0.1


def test_prefetch_of_what_the_last_token_used_counts_its_reads() -> None:
    """The same experts every token, half of them in slots: every guess is right, and saves no
    read; uniform routes: guesses are reads on top."""
    cyclic = cyclic_trace(ROWS, CHOSEN, 40, EXPERTS)
    slots = ROWS * CHOSEN // 2
    plain, ahead = (replay(cyclic, slots, "ours", ahead=n) for n in (0, CHOSEN))
    assert plain.ahead == 0
    assert ahead.hits > plain.hits
    uniform = SYNTHETIC["uniform"]
    plain, ahead = (replay(uniform, 32, "ours", ahead=n) for n in (0, 2))
    assert plain.reads == plain.requests - plain.hits
    assert ahead.ahead > 0
    assert ahead.reads > plain.reads
    assert ahead.requests == plain.requests


def tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = Path(__file__).resolve().parent.parent / "tools" / "simulate_policies.py"
    return subprocess.run(
        [sys.executable, str(path), *arguments], capture_output=True, text=True, check=False
    )


def test_the_table_generator(tmp_path: Path) -> None:
    path = tmp_path / "t.routes"
    trace = synthetic_trace(4, 16, 2, 30, skew=1.0)
    write_trace(path, trace.header, trace.routes)
    result = tool(str(path), "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)["t.routes"]
    assert [(r["policy"], r["slots"]) for r in found] == [
        (policy, slots) for slots in (4, 8, 16, 32) for policy in POLICIES
    ]
    for entry in found:
        replayed = replay(trace, entry["slots"], entry["policy"], skip=40)
        assert entry["hits"] == replayed.hits
    rates = " / ".join(f"{100 * entry['hit_rate']:.1f}" for entry in found[8:12])
    assert rates in tool(str(path)).stdout
    path.write_bytes(path.read_bytes()[:-1])
    failed = tool(str(path))
    assert failed.returncode == 1
    assert "truncated" in failed.stderr
    assert tool().returncode == 2
