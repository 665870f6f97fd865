"""Thousands of runtimes, sessions and cancelled answers leave nothing: no memory, descriptor,
thread or map. CI runs hundreds, `make test-slow` thousands."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from checkpoint_factory import write_checkpoint
from streamed import folder_in_memory, open_streamed

from mimo_edge.api import Runtime
from mimo_edge.budget import resident_bytes
from mimo_edge.errors import MimoEdgeError
from mimo_edge.export.pipeline import export_bundle

PROMPT = [5, 17, 3, 40, 2, 9, 33, 8] * 3
MIB = 1 << 20


class Held(NamedTuple):
    """What the process holds."""

    files: int
    threads: int
    maps: int
    rss: int


def held() -> Held:
    """After everything unreachable is gone."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    maps = Path("/proc/self/maps").read_text().splitlines()
    files = len(os.listdir("/proc/self/fd"))
    return Held(files, threading.active_count(), len(maps), resident(maps))


def resident(maps: list[str]) -> int:
    """What is resident; in an emulator, whose own memory is resident, too, and grows with what it
    translates, the size of all maps that can be written, without the stacks of threads, which are
    counted by themselves."""
    if "QEMU_CPU" not in os.environ:
        found = resident_bytes()
        assert found is not None
        return found
    ends = [line.split()[0].split("-") for line in maps if line.split()[1].startswith("rw")]
    sizes = [int(end, 16) - int(start, 16) for start, end in ends]
    return sum(size for size in sizes if size != 8 * MIB)


def check_flat(work: Callable[[int], None], warm_up: int, count: int, rss: int) -> None:
    """`work(n)` for n in 0..count-1 must leave what it left after `warm_up` of them."""
    for number in range(warm_up):
        work(number)
    # What leaks does so in every round; the allocator of a process full of other tests' memory may
    # take a few MiB more in one of them.
    for rounds_left in (2, 1, 0):
        before = held()
        for number in range(count):
            work(number)
        after = held()
        for _ in range(100):  # a thread that was told to end may need a moment
            if after.threads <= before.threads and after.files <= before.files:
                break
            time.sleep(0.05)
            after = held()
        assert after.files <= before.files, (before, after)
        assert after.threads <= before.threads, (before, after)
        # The allocator keeps arenas of its own; what leaks per round is far more in `count` times.
        assert after.maps <= before.maps + 16, (before, after)
        if after.rss <= before.rss + rss:
            return
        assert rounds_left, (before, after)


@pytest.fixture(scope="module")
def bundle() -> Iterator[Path]:
    with folder_in_memory() as folder:
        source, _ = write_checkpoint(folder / "source", "flash", tokenizer=False)
        export_bundle(source, folder / "bundle", recipe="q8_0").close()
        yield folder / "bundle"


COUNTS = [pytest.param(120, 3 * MIB), pytest.param(3000, 6 * MIB, marks=pytest.mark.slow)]


@pytest.mark.parametrize(
    ("count", "rss"),
    [pytest.param(45, 3 * MIB), pytest.param(2000, 6 * MIB, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("kind", ["resident", "streamed", "reference", "failing"])
def test_runtimes(bundle: Path, kind: str, count: int, rss: int) -> None:
    def work(number: int) -> None:
        if kind == "failing":
            for options in ({"ram": "60MiB"}, {"context": 1 << 20}, {"threads": 9999}):
                with pytest.raises(MimoEdgeError):
                    Runtime.open(bundle, backend="ggml", **options)
            return
        if kind == "streamed":
            runtime, _ = open_streamed(bundle, 4, 3, chunk=16)
        else:
            backend = "ggml" if kind == "resident" else kind
            runtime = Runtime.open(bundle, backend=backend, threads=1, context=64)
        session = runtime.session()
        stream = session.stream(PROMPT, max_tokens=4)
        if number % 3 == 0:
            next(stream)  # left in the middle
        elif number % 3 == 1:
            list(stream)
        if number % 2:
            runtime.close()  # or forgotten

    check_flat(work, 15, count, rss)


@pytest.mark.parametrize(("count", "rss"), COUNTS)
@pytest.mark.parametrize("slots", [None, 4])
def test_sessions(bundle: Path, slots: int | None, count: int, rss: int) -> None:
    runtime, _ = open_streamed(bundle, slots, 3, chunk=16)
    with runtime:

        def work(number: int) -> None:
            session = runtime.session()
            for turn in (PROMPT, [7, 8]):
                session.generate(turn, max_tokens=1 + number % 5)

        check_flat(work, 30, count, rss)


@pytest.mark.parametrize(("count", "rss"), COUNTS)
@pytest.mark.parametrize("slots", [None, 4])
def test_cancelled_answers(bundle: Path, slots: int | None, count: int, rss: int) -> None:
    """In every phase: prefill, decoding, waiting for experts."""
    runtime, experts = open_streamed(bundle, slots, 3, chunk=16)
    with runtime:
        session: Any = None

        def work(number: int) -> None:
            nonlocal session
            if session is None or number % 7 == 0:
                session = runtime.session()
            timer = threading.Timer((number % 40) * 2.5e-4, session.cancel)
            timer.start()
            session.generate([1 + number % 50] * 20, max_tokens=3)
            timer.join()

        check_flat(work, 60, count, rss)
        want = runtime.session().generate(PROMPT, max_tokens=4).token_ids
    if experts is not None:
        assert experts.cache._tickets == 0
        assert not experts.cache._waiting
    fresh, _ = open_streamed(bundle, None)
    with fresh:
        assert fresh.session().generate(PROMPT, max_tokens=4).token_ids == want
