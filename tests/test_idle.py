"""Caches of conversations that wait: their bound, what is put away, and what comes back."""

from __future__ import annotations

import gc
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from fake_backend import FakeBackend
from test_ggml_backend import packed

from mimo_edge.api import Runtime
from mimo_edge.budget import Budget, Line
from mimo_edge.chat_template import ChatTemplate
from mimo_edge.errors import UsageError
from mimo_edge.model_source import Model
from mimo_edge.runtimes.base import Backend
from mimo_edge.runtimes.ggml.backend import GgmlBackend
from mimo_edge.runtimes.reference import ReferenceBackend
from mimo_edge.session import Session
from mimo_edge.snapshots.store import SnapshotStore

V2 = tiny.tiny_config(head_dim=32, v_head_dim=32, eos_token_ids=())
MODELS: dict[str, Callable[[], Backend]] = {
    "reference": lambda: ReferenceBackend(tiny.random_weights(V2)),
    "ggml": lambda: GgmlBackend(packed(V2, "Q8_0"), threads=1, kv_type="q8_0"),
}
# As long as a window and more; each begins otherwise.
TURNS = [[[n + 1, n + 5, n + 3, 2] * (4 + n), [n + 9] * 3, [n, n + 2] * 5] for n in range(5)]
TOKENS = 15


def opened(
    backend: Backend,
    store: Path | None = None,
    idle_bytes: int | None = None,
    draft: Any = 0,
    limit: int = 1 << 24,
    **model: Any,
) -> Runtime:
    made = Model("m", backend, None, ChatTemplate(), frozenset(), identity=lambda: "w", **model)
    folder = None if store is None else SnapshotStore(store, limit)
    return Runtime(made, 300, draft, store=folder, idle_bytes=idle_bytes)


def answer(session: Session, ids: list[int], number: int) -> tuple[int, ...]:
    options: dict[str, Any] = {"temperature": 1.5, "seed": number} if number % 2 else {}
    return session.generate(ids, max_tokens=TOKENS, **options).token_ids


def talk(session: Session, turn: int, number: int) -> tuple[int, ...]:
    return answer(session, TURNS[number][turn], number)


def alone(backend: Backend, draft: Any = 0) -> list[list[tuple[int, ...]]]:
    found = []
    for number in range(len(TURNS)):
        session = opened(backend, draft=draft).session()
        found.append([talk(session, turn, number) for turn in range(3)])
    return found


def in_turn(runtime: Runtime) -> list[list[tuple[int, ...]]]:
    """All sessions by turns, so that each is idle while the others speak."""
    sessions = [runtime.session() for _ in TURNS]
    found: list[list[tuple[int, ...]]] = [[] for _ in TURNS]
    for turn in range(3):
        for number, session in enumerate(sessions):
            found[number].append(talk(session, turn, number))
            limit = runtime.engine.idle.limit_bytes
            if limit is not None:
                assert runtime.engine.idle.nbytes() - session._sequence.nbytes() <= limit
    return found


@pytest.fixture(scope="module", params=list(MODELS))
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    made = MODELS[request.param]()
    yield made
    made.close()


@pytest.mark.parametrize("draft", [0, 3, "auto"])
def test_what_was_put_away_comes_back_as_it_was(
    backend: Backend, tmp_path: Path, draft: Any
) -> None:
    want = alone(backend, draft)
    for share in (0, 2.5):
        one = opened(backend, draft=draft).session()
        talk(one, 0, 0)
        limit = int(share * one._sequence.nbytes())
        runtime = opened(backend, tmp_path / "s", limit, draft)
        assert in_turn(runtime) == want
        idle = runtime.stats()["idle"]
        assert idle["restored"] > 0
        assert 0 <= idle["put_away"] - idle["restored"] <= len(TURNS)
        assert (idle["recomputed"], idle["dropped"]) == (0, 0)
        assert idle["limit_bytes"] == limit


def test_no_bound_keeps_everything(backend: Backend) -> None:
    runtime = opened(backend)
    found = in_turn(runtime)
    assert found == alone(backend)
    idle = runtime.stats()["idle"]
    assert (idle["put_away"], idle["limit_bytes"]) == (0, None)


def test_without_a_place_tokens_are_processed_again(backend: Backend) -> None:
    runtime = opened(backend, idle_bytes=0)
    found = in_turn(runtime)
    # All tokens in one pass are rounded otherwise than step by step: the answers are those to one
    # prompt of all that was said.
    for number, answers in enumerate(found):
        said: list[int] = []
        for turn, tokens in enumerate(answers):
            said += TURNS[number][turn]
            assert answer(opened(backend).session(), said, number) == tokens
            said += tokens
    assert [[len(turn) for turn in one] for one in found] == [[TOKENS] * 3] * len(TURNS)
    if backend.name == "reference":
        assert found == alone(backend)
    idle = runtime.stats()["idle"]
    assert idle["dropped"] == idle["put_away"] > 0
    assert (idle["restored"], idle["recomputed"]) == (0, 10)
    assert idle["recomputed_tokens"] > 10 * TOKENS


def test_the_one_used_longest_ago_goes_first() -> None:
    runtime = opened(FakeBackend(V2), idle_bytes=3 * 8 * 40)
    sessions = [runtime.session() for _ in range(4)]
    for number, session in enumerate(sessions):
        session.generate([number] * 30, max_tokens=2)  # 31 rows of 8 bytes each
    sessions[0].generate([1], max_tokens=1)
    runtime.session().generate([9] * 30, max_tokens=1)
    held = [session._sequence.cache is not None for session in sessions]
    assert held == [True, False, True, True]


def test_a_stream_between_two_pieces_may_be_put_away(backend: Backend, tmp_path: Path) -> None:
    """Also without a place for it: it then computes its tokens again in the middle of an answer."""
    want = alone(backend)
    for store in (tmp_path / "s", None):
        runtime = opened(backend, store, 0)
        streams = [
            runtime.session().stream(
                TURNS[n][0],
                max_tokens=TOKENS,
                temperature=1.5 if n % 2 else 0,
                seed=n,
            )
            for n in range(3)
        ]
        found: list[list[int]] = [[] for _ in streams]
        for _ in range(TOKENS):
            for number, stream in enumerate(streams):
                found[number] += next(stream).token_ids
        assert [tuple(one) for one in found] == [one[0] for one in want[:3]]
        stats = runtime.stats()["idle"]
        assert (stats["restored"] if store else stats["recomputed"]) >= 3 * (TOKENS - 1)


def test_from_threads(tmp_path: Path) -> None:
    backend = FakeBackend(V2)
    want = alone(backend, 2)
    runtime = opened(backend, tmp_path / "s", 400, 2)
    errors: list[BaseException] = []
    all_here = threading.Barrier(8)  # so that eight conversations are open where two have room

    def work(number: int) -> None:
        try:
            for _ in range(3):
                session = runtime.session()
                answers = []
                for turn in range(3):
                    answers.append(talk(session, turn, number))
                    all_here.wait(120)
                assert answers == want[number]
        except BaseException as error:
            errors.append(error)
            all_here.abort()

    threads = [threading.Thread(target=work, args=(n % 5,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors
    assert runtime.stats()["idle"]["restored"] > 0


# --- disks that fail ------------------------------------------------------------------------


def spilled(folder: Path) -> list[Path]:
    return sorted(folder.glob("spill-*/*.idle"))


def two(runtime: Runtime) -> tuple[Session, Session]:
    """Two sessions, of which the first was put away."""
    one, other = runtime.session(), runtime.session()
    talk(one, 0, 0)
    talk(other, 0, 1)
    return one, other


def test_a_full_disk_costs_time_and_no_conversation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = FakeBackend(V2)
    runtime = opened(backend, tmp_path / "s", 0)

    def full(*args: Any, **options: Any) -> Any:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("mimo_edge.snapshots.store.write", full)
    one, _ = two(runtime)
    assert spilled(tmp_path / "s") == []
    assert "No space left" in caplog.text
    assert "will be processed again" in caplog.text
    assert talk(one, 1, 0) == alone(backend)[0][1]
    stats = runtime.stats()
    assert (stats["idle"]["dropped"], stats["idle"]["recomputed"]) == (2, 1)
    assert stats["snapshots"]["failed_writes"] == 2


@pytest.mark.parametrize("damage", ["gone", "cut", "bit", "folder"])
def test_a_damaged_file_is_computed_again(tmp_path: Path, damage: str) -> None:
    backend = FakeBackend(V2)
    runtime = opened(backend, tmp_path / "s", 0, 2)
    one, _ = two(runtime)
    (path,) = spilled(tmp_path / "s")
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "folder":
        shutil.rmtree(tmp_path / "s")
    else:
        data[-30] ^= 1
        path.write_bytes(data[:-5] if damage == "cut" else data)
    assert talk(one, 1, 0) == alone(backend, 2)[0][1]
    assert runtime.stats()["idle"]["recomputed"] == 1
    assert talk(one, 2, 0) == alone(backend, 2)[0][2]


def test_the_bound_on_the_disk_is_kept(tmp_path: Path) -> None:
    """Room for two: the third is dropped, since nobody may delete what the others still need."""
    backend = FakeBackend(V2)
    first = opened(backend, tmp_path / "a", 0)
    kept = two(first)
    (path,) = spilled(tmp_path / "a")
    limit = 2 * path.stat().st_size + 2000
    del kept
    runtime = opened(backend, tmp_path / "b", 0, limit=limit)
    assert in_turn(runtime) == alone(backend)
    stats = runtime.stats()
    assert stats["idle"]["dropped"] > 0
    assert stats["idle"]["restored"] > 0
    assert stats["snapshots"]["bytes"] <= limit


def test_files_go_with_their_sessions_and_their_runtime(tmp_path: Path) -> None:
    runtime = opened(FakeBackend(V2), tmp_path / "s", 0)
    sessions = [*two(runtime), runtime.session()]
    talk(sessions[2], 0, 2)
    assert len(spilled(tmp_path / "s")) == 2
    del sessions[0]
    gc.collect()
    assert len(spilled(tmp_path / "s")) == 1
    runtime.close()
    runtime.close()
    assert list((tmp_path / "s").glob("spill-*")) == []


def test_a_session_that_is_away_can_be_saved(tmp_path: Path) -> None:
    backend = FakeBackend(V2)
    want = alone(backend)
    for store in (tmp_path / "s", None):
        runtime = opened(backend, store, 0)
        one, _ = two(runtime)
        assert one._sequence.cache is None
        one.save(tmp_path / "file")
        restored = opened(backend).restore(tmp_path / "file")
        assert talk(restored, 1, 0) == want[0][1]
        assert talk(one, 1, 0) == want[0][1]


def test_another_prompt_needs_nothing_back(tmp_path: Path) -> None:
    """Sequences of a server's pool: what is put away is not read for a prompt that does not go on
    from it."""
    backend = FakeBackend(V2)
    runtime = opened(backend, tmp_path / "s", 0)
    one, _ = two(runtime)
    one._sequence.adopt([90, 91], drafting=False)
    assert runtime.stats()["idle"]["restored"] == 0
    assert len(spilled(tmp_path / "s")) == 0
    assert one._sequence.tokens == []


def test_pools_put_away_too(tmp_path: Path) -> None:
    backend = FakeBackend(V2)
    runtime = opened(backend, tmp_path / "s", 0)
    pool = runtime.sequence_pool(4)
    history: list[list[int]] = []
    for number in range(3):
        session = runtime.session(pool=pool)
        history.append([*TURNS[number][0], *talk(session, 0, number)])
        session.close()
    assert pool.idle == 3
    assert runtime.stats()["idle"]["away"] == 2
    session = runtime.session(pool=pool)
    reply = session.generate([*history[0], 7], max_tokens=2)
    assert reply.stats.reused_tokens == len(history[0]) - 1
    assert runtime.stats()["idle"]["restored"] == 1


# --- the bound itself -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ram", "reserved", "idle", "room"),
    [
        (None, 0, None, None),
        (None, 70, 70, None),
        (1000, 0, 0, 1),
        (1200, 0, 200, 2),
        (1300, 260, 300, 3),
    ],
)
def test_the_plan_says_what_is_left(
    ram: int | None, reserved: int, idle: int | None, room: int | None
) -> None:
    lines = [Line("weights", 870), Line("KV cache", 100), Line("graphs", 30)]
    if reserved:
        lines.append(Line("idle sessions", reserved))
    budget = Budget(tuple(lines), ram, 200, 16, False)
    assert (budget.idle_bytes, budget.conversations) == (idle, room)
    runtime = opened(FakeBackend(V2), budget=budget)
    assert runtime.engine.idle.limit_bytes == idle


def test_reserved_memory_is_a_line_of_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from make_random_model import write_model

    # Whatever the tests before left in this process.
    monkeypatch.setattr("mimo_edge.budget.resident_bytes", lambda: 150 << 20)
    path = tmp_path / "m.gguf"
    write_model(path, V2, experts="Q8_0", dense="Q8_0", head="Q8_0")
    with Runtime.open(path, ram="400MiB", idle_bytes="9MiB", context=128, threads=1) as runtime:
        budget = runtime.stats()["budget"]
        assert budget["lines"]["idle sessions"] == 9 << 20
        limit = runtime.engine.idle.limit_bytes
        assert limit == (9 << 20) + (400 << 20) - budget["total"]
        assert any("idle sessions" in line for line in runtime.memory_plan())
    with Runtime.open(path, idle_bytes=0, context=128, threads=1) as runtime:
        assert runtime.engine.idle.limit_bytes == 0
    with Runtime.open(path, context=128, threads=1) as runtime:
        assert runtime.engine.idle.limit_bytes is None
    for bad in (-1, "much", True):
        with pytest.raises(UsageError):
            Runtime.open(path, idle_bytes=bad)


def test_random_use_stays_within_the_bound(tmp_path: Path) -> None:
    backend = FakeBackend(V2)
    runtime = opened(backend, tmp_path / "s", 2000)
    rng = random.Random(3)
    sessions: list[tuple[Session, Session]] = []
    for _ in range(120):
        if not sessions or rng.random() < 0.2:
            sessions.append((runtime.session(), opened(backend).session()))
        index = rng.randrange(len(sessions))
        ours, theirs = sessions[index]
        prompt = [rng.randrange(90) for _ in range(rng.randrange(1, 12))]
        count = rng.randrange(1, 6)
        if len(ours._sequence.tokens) > 250:
            continue
        assert (
            ours.generate(prompt, max_tokens=count).token_ids
            == theirs.generate(prompt, max_tokens=count).token_ids
        )
        assert runtime.engine.idle.nbytes() - ours._sequence.nbytes() <= 2000
        if rng.random() < 0.1:
            del sessions[index]
