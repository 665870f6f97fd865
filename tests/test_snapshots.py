"""Beginnings of prompts processed once per device: found, bounded, shared, never trusted."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import scripted
import tiny
from fake_backend import FakeBackend
from test_ggml_backend import packed

from mimo_edge.api import Runtime
from mimo_edge.chat_template import ChatTemplate
from mimo_edge.errors import UsageError
from mimo_edge.model_source import Model
from mimo_edge.prompt_border import PromptBorders
from mimo_edge.reply import Reply
from mimo_edge.runtimes.base import Backend
from mimo_edge.runtimes.ggml.backend import GgmlBackend
from mimo_edge.runtimes.reference import ReferenceBackend
from mimo_edge.snapshots import store as store_module
from mimo_edge.snapshots.store import SnapshotStore

V2 = tiny.tiny_config(head_dim=32, v_head_dim=32, eos_token_ids=())
DENSE = tiny.tiny_mimo7b_config(head_dim=32, v_head_dim=32, eos_token_ids=())
MODELS: dict[str, Callable[[], Backend]] = {
    "reference": lambda: ReferenceBackend(tiny.random_weights(V2)),
    "ggml f16": lambda: GgmlBackend(packed(V2, "F16"), threads=1),
    "ggml q8_0": lambda: GgmlBackend(packed(V2, "Q8_0"), threads=1, kv_type="q8_0"),
    "ggml f16 7b": lambda: GgmlBackend(packed(DENSE, "F16"), threads=1),
}
PREFIX = [5, 17, 3, 40, 2, 9, 33, 8, 60, 61] * 6
LIMIT = 1 << 24


def opened(
    backend: Backend, folder: Path | None, draft: Any = 0, weights: str = "w", limit: int = LIMIT
) -> Runtime:
    model = Model("m", backend, None, ChatTemplate(), frozenset(), identity=lambda: weights)
    store = None if folder is None else SnapshotStore(folder, limit)
    runtime = Runtime(model, 300, draft, store=store)
    runtime.engine.prefill_chunk = 16
    return runtime


def ask(runtime: Runtime, rest: list[int], prefix: list[int] = PREFIX, **options: Any) -> Reply:
    return runtime.session().generate(
        [*prefix, *rest], prefix_tokens=len(prefix), max_tokens=20, **options
    )


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.snap"))


def stats(runtime: Runtime) -> dict[str, Any]:
    found: dict[str, Any] = runtime.stats()["snapshots"]
    return found


@pytest.fixture(scope="module", params=list(MODELS))
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    made = MODELS[request.param]()
    yield made
    made.close()


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("draft", [0, 1, 3])
def test_found_or_processed_the_answer_is_the_same(
    backend: Backend, tmp_path: Path, draft: int, sampled: bool
) -> None:
    if draft > backend.config.num_mtp_layers:
        return
    options: dict[str, Any] = {"temperature": 1.3, "seed": 4} if sampled else {}
    first = opened(backend, tmp_path, draft)
    for number, rest in enumerate(([7, 8], [9] * 30, [1])):
        processed = ask(opened(backend, tmp_path / str(number), draft), rest, **options)
        assert processed.stats.reused_tokens == 0
        found = ask(first, rest, **options)
        assert found.token_ids == processed.token_ids
        assert found.stats.reused_tokens == (len(PREFIX) if number else 0)
        again = opened(backend, tmp_path, draft)  # another start of the program
        reply = ask(again, rest, **options)
        assert reply.token_ids == processed.token_ids
        assert reply.stats.reused_tokens == len(PREFIX)
        assert stats(again)["hits"] == 1
        if draft:
            assert sum(reply.stats.drafted_by_depth) > 0
    assert stats(first)["hits"] == 2
    assert stats(first)["misses"] == stats(first)["written"] == 1
    assert stats(first)["reused_tokens"] == 2 * len(PREFIX)
    assert len(files(tmp_path)) == 1


def test_what_differs_is_not_found(tmp_path: Path) -> None:
    backend = FakeBackend(V2)
    ask(opened(backend, tmp_path, 2), [1])
    for runtime, prefix in (
        (opened(backend, tmp_path, 2), [*PREFIX[:-1], 4]),
        (opened(backend, tmp_path, 2), PREFIX[:-1]),
        (opened(backend, tmp_path, 2, weights="others"), PREFIX),
        (opened(backend, tmp_path, 0), PREFIX),  # without H rows
    ):
        assert ask(runtime, [1], prefix).stats.reused_tokens == 0
        assert stats(runtime)["hits"] == 0
    assert len(files(tmp_path)) == 5
    assert stats(opened(backend, tmp_path))["bytes"] == sum(
        path.stat().st_size for path in tmp_path.iterdir()
    )


def test_another_cache_type_is_not_found(tmp_path: Path) -> None:
    for number, kv_type in enumerate(("f16", "q8_0", "f16", "q8_0")):
        backend = GgmlBackend(packed(V2, "Q8_0"), threads=1, kv_type=kv_type)
        assert (ask(opened(backend, tmp_path), [1]).stats.reused_tokens > 0) == (number > 1)


def test_short_beginnings_and_later_turns_are_not_kept(tmp_path: Path) -> None:
    runtime = opened(FakeBackend(V2), tmp_path)
    ask(runtime, [1], PREFIX[:20])
    assert files(tmp_path) == []
    session = runtime.session()
    session.generate([*PREFIX, 1], prefix_tokens=len(PREFIX), max_tokens=2)
    session.generate([2], prefix_tokens=len(PREFIX), max_tokens=2)
    assert stats(runtime) | {"bytes": 0} == {
        "hits": 0,
        "misses": 1,
        "written": 1,
        "evicted": 0,
        "damaged": 0,
        "failed_writes": 0,
        "reused_tokens": 0,
        "bytes": 0,
        "limit_bytes": LIMIT,
    }
    for bad in (-1, True, "3", 1.5):
        with pytest.raises(UsageError, match="prefix_tokens"):
            session.stream([3], prefix_tokens=bad)  # type: ignore[arg-type]
    # a beginning that is all there is leaves no token to process
    assert session.generate([3], prefix_tokens=500, max_tokens=2).token_ids


# --- files that are not what they were ------------------------------------------------------


@pytest.mark.parametrize("place", [0, 9, 30, 200, -1, "cut", "empty", "folder", "foreign", "kind"])
def test_a_damaged_or_foreign_file_is_deleted_and_computed(
    tmp_path: Path, place: int | str, caplog: pytest.LogCaptureFixture
) -> None:
    backend = FakeBackend(V2)
    want = ask(opened(backend, None), [1]).token_ids
    ask(opened(backend, tmp_path, 2), [1])
    (path,) = files(tmp_path)
    data = bytearray(path.read_bytes())
    if place == "foreign":  # whole, of the same model, but of other tokens
        ask(opened(backend, tmp_path / "o", 2), [1], [n + 1 for n in PREFIX])
        shutil.copy(files(tmp_path / "o")[0], path)
    elif place == "kind":
        session = opened(backend, None, 2).session()
        session.generate(PREFIX, max_tokens=1)
        session.save(path)
    elif place == "folder":
        path.unlink()
        path.mkdir()
    else:
        if isinstance(place, int):
            data[place] ^= 8
        path.write_bytes(data[: {"cut": 100, "empty": 0}.get(str(place), len(data))])
    runtime = opened(backend, tmp_path, 2)
    reply = ask(runtime, [1])
    assert reply.token_ids == want
    assert reply.stats.reused_tokens == 0
    assert stats(runtime)["damaged"] == 1
    assert "computed again" in caplog.text
    if place != "folder":
        assert path.read_bytes() == bytes(data) if place == "cut" else path.stat().st_size > 200
        assert ask(opened(backend, tmp_path, 2), [1]).stats.reused_tokens == len(PREFIX)


def test_a_full_disk_only_costs_the_snapshot(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Any, header: bytes, sections: Any) -> None:
        file.write(header)
        raise OSError(28, os.strerror(28))

    backend = FakeBackend(V2)
    runtime = opened(backend, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "write", full)
        reply = ask(runtime, [1])
    assert reply.token_ids == ask(opened(backend, None), [1]).token_ids
    assert "No space left" in caplog.text
    assert stats(runtime)["failed_writes"] == 1
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    ask(runtime, [1])
    assert stats(runtime)["written"] == 1


# --- the bound ------------------------------------------------------------------------------


def prefix(number: int) -> list[int]:
    return [number + n % 40 for n in range(60)]


def test_the_one_used_longest_ago_is_deleted(tmp_path: Path) -> None:
    backend = FakeBackend(V2)
    ask(opened(backend, tmp_path), [1], prefix(0))
    size = files(tmp_path)[0].stat().st_size
    runtime = opened(backend, tmp_path, limit=3 * size + size // 2)
    for number in (1, 2):
        ask(runtime, [1], prefix(number))
    assert ask(runtime, [2], prefix(0)).stats.reused_tokens == 60  # used now
    ask(runtime, [1], prefix(3))
    assert len(files(tmp_path)) == 3
    assert stats(runtime)["evicted"] == 1
    assert stats(runtime)["bytes"] <= 3 * size + size // 2
    kept = [ask(runtime, [3], prefix(n)).stats.reused_tokens > 0 for n in (0, 2, 3)]
    assert kept == [True, True, True]
    assert ask(runtime, [3], prefix(1)).stats.reused_tokens == 0


def test_the_clock_is_set_back_by_decades(tmp_path: Path) -> None:
    """As on a board without a battery: what is used then is still what was used last."""
    backend = FakeBackend(V2)
    ask(opened(backend, tmp_path), [1], prefix(0))
    (first,) = files(tmp_path)
    size = first.stat().st_size
    runtime = opened(backend, tmp_path, limit=3 * size + size // 2)
    for number in (1, 2):
        ask(runtime, [1], prefix(number))
    order = sorted(files(tmp_path), key=lambda path: path.stat().st_mtime_ns)
    assert order[0] == first
    for later, path in enumerate(order):
        os.utime(path, (4e9 + later, 4e9 + later))
    assert ask(runtime, [2], prefix(0)).stats.reused_tokens == 60
    ask(runtime, [1], prefix(3))
    ask(runtime, [1], prefix(4))
    kept = [ask(runtime, [3], prefix(n)).stats.reused_tokens > 0 for n in (0, 3, 4)]
    assert kept == [True, True, True]


def test_larger_than_the_bound_is_not_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend = FakeBackend(V2)
    runtime = opened(backend, tmp_path, limit=300)
    ask(runtime, [1])
    assert files(tmp_path) == []
    assert "do not fit into 300" in caplog.text
    ask(opened(backend, tmp_path), [1])
    other = opened(backend, tmp_path, limit=300)
    assert ask(other, [1]).stats.reused_tokens > 0  # what is there may be used


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x" * 500)
    (tmp_path / "mine.snap").write_text("x" * 500)
    backend = FakeBackend(V2)
    ask(opened(backend, tmp_path / "o"), [1], prefix(0))
    size = files(tmp_path / "o")[0].stat().st_size
    shutil.rmtree(tmp_path / "o")
    runtime = opened(backend, tmp_path, limit=1000 + size)
    for number in range(3):
        ask(runtime, [1], prefix(number))
    assert {path.name for path in tmp_path.iterdir()} >= {"notes.txt", "mine.snap", ".lock"}
    assert stats(runtime)["evicted"] == 2


def test_what_killed_processes_left_is_deleted(tmp_path: Path) -> None:
    backend = FakeBackend(V2)
    alive = opened(backend, tmp_path)
    alive.engine.idle.limit_bytes = 0
    sessions = [alive.session(), alive.session()]
    for session in sessions:
        session.generate([1, 2, 3], max_tokens=2)
    (mine,) = tmp_path.glob("spill-*")
    left = [tmp_path / ".x.snap.1.2.tmp", tmp_path / "spill-old" / "a.idle", tmp_path / "spill-new"]
    left[1].parent.mkdir()
    left[2].mkdir()
    for path in left[:2]:
        path.write_bytes(b"x")
    (left[1].parent / ".lock").write_bytes(b"")
    os.utime(left[0], (0, 0))
    opened(backend, tmp_path)
    assert [path.exists() for path in left] == [False, False, True]  # it may get its lock yet
    os.utime(left[2], (0, 0))
    opened(backend, tmp_path)
    assert not left[2].exists()
    assert mine.exists()
    assert sessions[0].generate([4], max_tokens=1).stats.reused_tokens > 0


def test_a_folder_that_stays_locked_costs_only_the_snapshot(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_LOCK_TRIES", 2)
    runtime = opened(FakeBackend(V2), tmp_path)
    with (tmp_path / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ask(runtime, [1])
    assert "keeps the folder locked" in caplog.text
    assert stats(runtime)["failed_writes"] == 1
    ask(runtime, [1])
    assert stats(runtime)["written"] == 1


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="snapshots cannot be kept"):
            SnapshotStore(folder)
    for bad in (0, -1, True):
        with pytest.raises(UsageError, match="snapshot_bytes"):
            SnapshotStore(tmp_path / "s", bad)
    made = tmp_path / "a" / "b"
    SnapshotStore(made)
    assert made.stat().st_mode & 0o777 == 0o700


def test_files_are_nobody_elses(tmp_path: Path) -> None:
    ask(opened(FakeBackend(V2), tmp_path), [1])
    assert files(tmp_path)[0].stat().st_mode & 0o777 == 0o600


def test_several_processes_at_once(tmp_path: Path) -> None:
    """Each reads and writes the same few beginnings in a folder that has no room for all of them;
    every answer is right, and the bound is kept."""
    ask(opened(FakeBackend(V2), tmp_path), [1], prefix(0))
    limit = 3 * files(tmp_path)[0].stat().st_size
    script = (
        "import random, sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\n"
        "from test_snapshots import *\n"
        "rng = random.Random(int(sys.argv[3]))\n"
        "backend = FakeBackend(V2)\n"
        "runtime = opened(backend, Path(sys.argv[1]), limit=int(sys.argv[4]))\n"
        "want = {n: ask(opened(backend, None), [1], prefix(n)).token_ids for n in range(5)}\n"
        "for _ in range(150):\n"
        "    n = rng.randrange(5)\n"
        "    assert ask(runtime, [1], prefix(n)).token_ids == want[n]\n"
        "    assert runtime._store.nbytes <= int(sys.argv[4])\n"
        "found = stats(runtime)\n"
        "assert found['damaged'] == 0 and found['hits'] > 0 and found['evicted'] > 0, found\n"
    )
    here = str(Path(__file__).parent)
    running = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), here, str(n), str(limit)])
        for n in range(3)
    ]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    assert len(files(tmp_path)) <= 3
    assert list(tmp_path.glob(".*.tmp")) == []


# --- messages -------------------------------------------------------------------------------

TOOL = {
    "type": "function",
    "function": {
        "name": "dim",
        "description": "Dim the light in a room, by a number of steps, and say so when it is done.",
        "parameters": {"type": "object", "properties": {"room": {"type": "string"}}},
    },
}
SYSTEM = "You are the assistant of a house. Be brief, be kind, and do what you are told to."


def chat(folder: Path) -> Runtime:
    runtime, _ = scripted.runtime(["Hello.<|im_end|>", "Again.<|im_end|>"])
    model = replace(runtime._model, identity=lambda: "w")
    return Runtime(model, 2000, store=SnapshotStore(folder))


def test_system_text_and_tools_are_processed_once(tmp_path: Path) -> None:
    first = chat(tmp_path).session(SYSTEM, [TOOL]).generate("good morning")
    assert first.stats.reused_tokens == 0
    runtime = chat(tmp_path)
    with pytest.raises(UsageError, match="only with token ids"):
        runtime.session(SYSTEM).stream("good morning", prefix_tokens=3)
    tokenizer = runtime.tokenizer
    assert tokenizer is not None
    sizes = set()
    for text in ("turn it down", "", "\n\nplease", "<|im_start|>", "0", "x"):
        session = runtime.session(SYSTEM, [TOOL])
        reply = session.generate(text)
        assert reply.text == "Hello."
        sizes.add(reply.stats.reused_tokens)
        assert session.generate("more").text == "Again."
    (size,) = sizes
    ids = session._prepare("x")[1]
    assert tokenizer.decode(ids[:size]).endswith("</IMPORTANT><|im_end|><|im_start|>")
    # Twice each: the template writes the first answer otherwise than the model did, so the second
    # turn leaves what was processed, and goes on from the snapshot as well.
    assert stats(runtime)["hits"] == 12
    assert len(files(tmp_path)) == 1
    for session in (runtime.session("Else.", [TOOL]), runtime.session(SYSTEM)):
        assert session.generate("good morning").stats.reused_tokens == 0


def test_the_messages_of_a_server_come_with_the_prompt(tmp_path: Path) -> None:
    chat(tmp_path).session(SYSTEM, [TOOL]).generate("good morning")
    runtime = chat(tmp_path)
    pool = runtime.sequence_pool(2)
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "hello"}]
    for _ in range(2):
        session = runtime.session(tools=[TOOL], pool=pool)
        assert session.generate(messages).stats.reused_tokens > 100
        session.close()
    assert stats(runtime)["hits"] == 2


def test_a_template_that_wants_something_else_keeps_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    runtime = chat(tmp_path)
    assert runtime.tokenizer is not None
    picky = ChatTemplate("{{ raise_exception('no') if messages[-1].content in '0x' else 'a' }}")
    borders = PromptBorders(picky, runtime.tokenizer)
    assert borders.of([1, 2, 3], [{"role": "user", "content": "hello"}], [], None) == 0
    assert "not kept" in caplog.text
