"""Stopping work: within a layer, during a read, while waiting for a turn, by Ctrl-C; and that
everything can be used afterwards, with the results it would have had anyway."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from checkpoint_factory import write_bundle, write_checkpoint
from fake_backend import FakeBackend
from stopping import SlowDisk, stopped_after
from streamed import open_streamed

from mimo_edge.cancel import Cancel, check_cancel
from mimo_edge.cli.interrupts import cancelled_by_interrupts
from mimo_edge.engine import Engine, Sequence
from mimo_edge.errors import BundleError, Cancelled
from mimo_edge.export.pipeline import export_bundle
from mimo_edge.runtimes.ggml.backend import GgmlBackend
from mimo_edge.runtimes.ggml.raw import PackedTensors
from mimo_edge.runtimes.reference import ReferenceBackend
from mimo_edge.sampling import Sampler, SamplingParams
from mimo_edge.session import Session
from mimo_edge.units import even_part

PROMPT = [5, 17, 3, 40, 2, 9, 33, 8] * 5
COUNT = 6
# Far more than any of this takes, far less than a read that hangs: nothing is timed closely.
PROMPTLY_S = 20


def test_a_cancel_is_a_flag_for_python_and_c() -> None:
    cancel = Cancel()
    check_cancel(cancel)
    check_cancel(None)
    assert not cancel.is_set()
    assert bytes(cancel.flag).split(b"\0")[0] == b""
    cancel.set()
    assert cancel.is_set()
    assert bytes(cancel.flag).split(b"\0")[0] != b""
    with pytest.raises(Cancelled):
        check_cancel(cancel)
    cancel.clear()
    check_cancel(cancel)


# --- within a layer -------------------------------------------------------------------------


def chunk_ends(total: int, most: int) -> list[int]:
    """Where a prompt of `total` tokens may stop: 0 and the ends of its parts."""
    ends = [0]
    while ends[-1] < total:
        ends.append(ends[-1] + even_part(total - ends[-1], most))
    return ends


def greedy() -> Sampler:
    return Sampler(SamplingParams())


def tokens_of(
    engine: Engine, sequence: Sequence, prompt: list[int], count: int, cancel: Cancel | None = None
) -> tuple[list[int], str | None]:
    generation = engine.generate(sequence, prompt, greedy(), max_tokens=count, cancel=cancel)
    return [t for step in generation for t in step], generation.finish_reason


MAKERS = {"v2": tiny.tiny_config, "7b": tiny.tiny_mimo7b_config}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("draft", [0, 1])
def test_an_answer_cancelled_after_any_operation_goes_on_where_it_was(
    name: str, draft: int
) -> None:
    """Prefill, drafts and verifies, stopped at hundreds of places each. What was processed is not
    processed again: also after a long chunk that had overwritten rows."""
    config = MAKERS[name]()
    backend = GgmlBackend(
        PackedTensors.pack(tiny.random_weights(config, 3), lambda name: "F32"), threads=1
    )
    engine = Engine(backend, 200, draft, prefill_chunk=16)
    plain = engine.sequence()
    first, _ = tokens_of(engine, plain, PROMPT, COUNT)
    history = PROMPT + first + [7, 8, 9] * 4
    with stopped_after(backend, 1 << 60, Cancel()) as counted:
        second, _ = tokens_of(engine, plain, history, COUNT, Cancel())

    def check(sequence: Sequence, prompt: list[int], want: list[int], operations: int) -> bool:
        cancel, whole = Cancel(), list(sequence.tokens)
        with stopped_after(backend, operations, cancel):
            out, reason = tokens_of(engine, sequence, prompt, COUNT, cancel)
        assert out == want[: len(out)]
        kept = list(sequence.tokens)
        assert kept[: len(whole)] == whole
        assert kept == (prompt + out)[: len(kept)]
        assert len(kept) >= len(prompt) + len(out) - 1 or (
            not out and len(kept) - len(whole) in chunk_ends(len(prompt) - len(whole), 16)
        )
        generation = engine.generate(sequence, prompt + out, greedy(), max_tokens=COUNT)
        rest = [t for step in generation for t in step]
        assert (out + rest)[:COUNT] == want
        assert generation.stats.reused_tokens == min(len(kept), len(prompt + out) - 1)
        return reason == "cancelled"

    stops = 0
    for operations in np.linspace(1, counted(), 40).astype(int).tolist():
        sequence = engine.sequence()
        stops += check(sequence, PROMPT, first, operations)
        sequence = engine.sequence()
        assert tokens_of(engine, sequence, PROMPT, COUNT)[0] == first
        stops += check(sequence, history, second, operations)
    assert stops >= 60
    engine.close()


@pytest.mark.parametrize("draft", [0, 3])
def test_the_reference_stops_between_layers(draft: int, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = ReferenceBackend(tiny.random_weights(tiny.tiny_config(), 3))
    engine = Engine(backend, 200, draft, prefill_chunk=16)
    want, _ = tokens_of(engine, engine.sequence(), PROMPT, 6)
    whole, cancel, blocks = ReferenceBackend._block, Cancel(), 0

    for stop_at in range(1, 40):
        blocks = 0

        def counting(self: ReferenceBackend, *args: Any, **options: Any) -> Any:
            nonlocal blocks
            blocks += 1
            if blocks == stop_at:  # noqa: B023 (called in this round only)
                cancel.set()
            assert blocks <= stop_at or not cancel.is_set()  # noqa: B023
            return whole(self, *args, **options)

        sequence = engine.sequence()
        monkeypatch.setattr(ReferenceBackend, "_block", counting)
        out, reason = tokens_of(engine, sequence, PROMPT, 6, cancel)
        monkeypatch.undo()
        cancel.clear()
        assert out == want[: len(out)]
        if reason != "cancelled":
            break
        rest, _ = tokens_of(engine, sequence, PROMPT + out, 6 - len(out))
        assert out + rest == want
    assert stop_at > 20


class Failing(FakeBackend):
    """Fails in the middle of a step."""

    error: Exception | None = None
    at = 0

    def forward(self, token_ids: Any, cache: Any, **options: Any) -> Any:
        if self.error is not None:
            self.at -= 1
            if self.at < 0:
                error, self.error = self.error, None
                raise error
        return super().forward(token_ids, cache, **options)


@pytest.mark.parametrize("error", [BundleError("a read"), Cancelled("now")])
@pytest.mark.parametrize("draft", [0, 3])
@pytest.mark.parametrize("at", range(6))
def test_a_typed_error_leaves_the_sequence_at_its_last_token(
    error: Exception, draft: int, at: int
) -> None:
    backend = Failing(tiny.tiny_config())
    engine = Engine(backend, 200, draft, prefill_chunk=16)
    want, _ = tokens_of(engine, engine.sequence(), PROMPT, 20)
    sequence = engine.sequence()
    backend.error, backend.at = error, at
    generation = engine.generate(sequence, PROMPT, greedy(), max_tokens=20)
    out: list[int] = []
    try:
        for step in generation:
            out += step
    except BundleError:
        assert isinstance(error, BundleError)
    else:
        assert generation.finish_reason == "cancelled"
    assert out == want[: len(out)]
    assert sequence.tokens == (
        PROMPT + out[:-1] if out else PROMPT[: chunk_ends(len(PROMPT), 16)[at]]
    )
    kept = len(sequence.tokens)
    generation = engine.generate(sequence, PROMPT + out, greedy(), max_tokens=20 - len(out))
    assert out + [t for step in generation for t in step] == want
    assert generation.stats.reused_tokens == kept


# --- during a read --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cancel")
    source, _ = write_checkpoint(folder / "source", "flash", tokenizer=False)
    export_bundle(source, folder / "bundle", recipe="f32").close()
    return folder / "bundle"


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowDisk]:
    made = SlowDisk(monkeypatch)
    yield made
    made.release()


def answer_of(path: Path, turns: list[list[int]], count: int) -> list[tuple[int, ...]]:
    runtime, _ = open_streamed(path, None)
    with runtime:
        session = runtime.session()
        return [session.generate(turn, max_tokens=count).token_ids for turn in turns]


def in_thread(work: Any, *args: Any, **options: Any) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work(*args, **options)))
    thread.start()
    return thread, found


@pytest.mark.parametrize("draft", [0, 3])
@pytest.mark.parametrize("when", ["prefill", "second prefill", "decode"])
def test_cancel_during_a_read_that_hangs(
    bundle: Path, disk: SlowDisk, draft: int, when: str
) -> None:
    runtime, _ = open_streamed(bundle, 4, draft, chunk=16)
    with runtime:
        session = runtime.session()
        turns: list[list[int]] = []
        if when != "prefill":
            turns.append(PROMPT)
            session.generate(PROMPT, max_tokens=4)
        last = [9, 8, 7] * 9 if when == "second prefill" else PROMPT
        stream = session.stream(last, max_tokens=9)
        said: list[int] = []
        if when == "decode":
            said += next(stream).token_ids
        disk.block()
        thread, found = in_thread(list, stream)
        assert disk.reached.wait(PROMPTLY_S)
        session.cancel()
        thread.join(PROMPTLY_S)
        assert not thread.is_alive()  # the disk still hangs
        assert found[0][-1].finish_reason == "cancelled"
        reply = session.last_reply
        assert reply is not None
        disk.release()
        more = session.generate([1, 2, 3], max_tokens=4).token_ids
        history = [*PROMPT] if turns else []
        oracle, _ = open_streamed(bundle, None)
        with oracle:
            other = oracle.session()
            if turns:
                history += other.generate(PROMPT, max_tokens=4).token_ids
            fresh = oracle.session()
            whole = [*history, *last, *reply.token_ids, 1, 2, 3]
            assert more == fresh.generate(whole, max_tokens=4).token_ids


def test_closing_does_not_wait_for_a_disk_that_hangs(bundle: Path, disk: SlowDisk) -> None:
    before = threading.active_count()
    files = len(os.listdir("/proc/self/fd"))
    runtime, _ = open_streamed(bundle, 4)
    session = runtime.session()
    disk.block()
    thread, found = in_thread(session.generate, PROMPT)
    assert disk.reached.wait(PROMPTLY_S)
    session.cancel()
    thread.join(PROMPTLY_S)
    assert found[0].finish_reason == "cancelled"
    closing, _ = in_thread(runtime.close)
    closing.join(PROMPTLY_S)
    assert not closing.is_alive()
    disk.release()  # the lanes come back, find that they are not wanted, and tidy up
    for _ in range(1000):
        if (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (before, files):
            break
        time.sleep(0.01)
    assert threading.active_count() == before
    assert len(os.listdir("/proc/self/fd")) == files


def test_a_cancelled_task_does_not_wait_for_the_disk(bundle: Path, disk: SlowDisk) -> None:
    runtime, _ = open_streamed(bundle, 4)

    async def go() -> Session:
        session = runtime.session()

        async def consume() -> None:
            async for _ in session.astream(PROMPT):
                pass

        task = asyncio.create_task(consume())
        await asyncio.to_thread(disk.reached.wait, PROMPTLY_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, PROMPTLY_S)
        return session

    with runtime:
        disk.block()
        session = asyncio.run(go())
        disk.release()
        want = answer_of(bundle, [[*PROMPT, 7]], 5)[0]  # the prompt stays, unanswered
        assert session.generate([7], max_tokens=5).token_ids == want


def test_who_waits_for_his_turn_can_be_cancelled(bundle: Path, disk: SlowDisk) -> None:
    runtime, _ = open_streamed(bundle, 4)
    with runtime:
        one, two = runtime.session(), runtime.session()
        disk.block()
        first, first_reply = in_thread(one.generate, PROMPT, max_tokens=3)
        assert disk.reached.wait(PROMPTLY_S)
        second, second_reply = in_thread(two.generate, PROMPT, max_tokens=3)
        time.sleep(0.05)
        two.cancel()
        second.join(PROMPTLY_S)
        assert second_reply[0].finish_reason == "cancelled"
        assert first.is_alive()
        disk.release()
        first.join(PROMPTLY_S)
        want = answer_of(bundle, [PROMPT], 3)[0]
        assert first_reply[0].token_ids == want  # one's cancel is not the other's
        assert two.generate(PROMPT, max_tokens=3).token_ids == want


# --- Ctrl-C ---------------------------------------------------------------------------------

# The command, with reads of experts that hang once it says so.
SLOW_COMMAND = """
import sys, threading, time
from mimo_edge.flash_file import FlashFile
whole = FlashFile._preadv
after, seen = int(sys.argv.pop(1)), 0
def preadv(self, targets, offset):
    global seen
    if threading.current_thread().name.startswith("mimo-expert-lane"):
        seen += 1
        if seen == after:
            sys.stderr.write("HANGS\\n")
            sys.stderr.flush()
        if seen >= after:
            time.sleep(600)
    return whole(self, targets, offset)
FlashFile._preadv = preadv
import mimo_edge.budget as budget
plan = budget.plan
def few_slots(config, tensors, context, *args, **options):  # a tiny model always fits
    lines = plan(config, tensors, context).lines
    return budget.Budget(lines, 1 << 30, context, 16, True, 4, 4096, 8)
budget.plan = few_slots
from mimo_edge.cli.main import app
app()
"""


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a tokenizer."""
    folder = tmp_path_factory.mktemp("spoken")
    return write_bundle(folder, "flash", recipe="f32")


def interrupted(
    command: list[str], until: bytes, presses: int = 1, delay_s: float = 0.05
) -> tuple[int, bytes, bytes]:
    """Exit code, output and errors of a command that gets Ctrl-C once it printed `until`."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if until in line:
            break
    for _ in range(presses):
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, b"".join(lines) + err


@pytest.mark.parametrize("after", [1, 600])
def test_an_interrupt_during_a_read_that_hangs(spoken: Path, after: int) -> None:
    """In prefill (the first read) and later, in the answer: what was said is printed."""
    command = [sys.executable, "-c", SLOW_COMMAND, str(after), "run", str(spoken), "-p", "hello"]
    command += ["--backend", "ggml", "--ram", "1GiB", "--json", "--threads", "1"]
    code, out, err = interrupted(command, b"HANGS")
    assert code == 130, err
    assert b"Traceback" not in err
    found = json.loads(out)
    assert found["finish_reason"] == "cancelled"
    assert (len(found["token_ids"]) > 0) == (after > 1)


# A model whose prefill is one call into C that takes seconds.
LONG_COMMAND = """
import sys
import tiny, tokenizers_made
import mimo_edge.api
from mimo_edge.chat_template import ChatTemplate
from mimo_edge.model_source import Model
from mimo_edge.runtimes.ggml.backend import GgmlBackend
from mimo_edge.runtimes.ggml.raw import PackedTensors
from mimo_edge.tokenizer import Tokenizer
class Loud(GgmlBackend):
    def forward(self, token_ids, cache, **options):
        sys.stderr.write(f"COMPUTES {len(token_ids)}\\n")
        sys.stderr.flush()
        return super().forward(token_ids, cache, **options)
tokenizer = Tokenizer.from_gguf(tokenizers_made.gguf_metadata())
config = tiny.tiny_config(vocab_size=tokenizer.size, eos_token_ids=(), num_mtp_layers=0,
                          hidden_size=1024, intermediate_size=8192)
backend = Loud(PackedTensors.pack(tiny.random_weights(config), lambda name: "F32"), threads=1,
               chunk=4096)
model = Model("slow", backend, tokenizer, ChatTemplate(), frozenset())
mimo_edge.api.open_model = lambda *args, **options: model
mimo_edge.api.PREFILL_CHUNK = 4096
from mimo_edge.cli.main import app
app()
"""


def test_an_interrupt_during_a_long_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own handler runs when the computation is over, and then there would be a token."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    command = [sys.executable, "-c", LONG_COMMAND, "run", "x", "-p", "word " * 800, "--json"]
    code, out, err = interrupted(command, b"COMPUTES", delay_s=0.3)
    assert code == 130, err
    assert b"Traceback" not in err
    assert err.count(b"COMPUTES") == 1
    found = json.loads(out)
    assert (found["finish_reason"], found["token_ids"]) == ("cancelled", [])


def test_a_second_interrupt_does_not_wait(spoken: Path) -> None:
    """Also when cancelling does not help: the output hangs."""
    code = """
import sys, time
from mimo_edge.cli.interrupts import cancelled_by_interrupts
with cancelled_by_interrupts(lambda: None):
    sys.stderr.write("HANGS\\n")
    sys.stderr.flush()
    while True:
        time.sleep(600)
"""
    status, _, err = interrupted([sys.executable, "-c", code], b"HANGS", presses=2)
    assert status == -signal.SIGINT or b"KeyboardInterrupt" in err


def test_interrupts_are_as_before_afterwards() -> None:
    before = signal.getsignal(signal.SIGINT), signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before[1])
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    cancelled = threading.Event()
    with cancelled_by_interrupts(cancelled.set) as seen:
        assert not seen
        signal.raise_signal(signal.SIGINT)
        assert cancelled.wait(PROMPTLY_S)
        assert seen.count == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    found: list[bool] = []

    def elsewhere() -> None:
        with cancelled_by_interrupts(cancelled.set) as seen:
            found.append(bool(seen))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [False]
    after = signal.getsignal(signal.SIGINT), signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(after[1])
    assert after == before
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, files)
