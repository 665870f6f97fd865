"""Many sessions on one runtime, in turn and from threads: each gives what it gives alone."""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_factory import write_checkpoint
from streamed import folder_in_memory, open_streamed

from mimo_edge.api import Runtime
from mimo_edge.export.pipeline import export_bundle
from mimo_edge.reply import Piece

# What each session is asked, turn by turn; some prompts are longer than a chunk and the window.
TURNS = [
    [[5, 17, 3, 40, 2, 9, 33, 8] * 6, [7, 8], [1, 2, 3] * 9],
    [[11], [12] * 20, [13, 14]],
    [[60, 61, 62] * 11, [63], [64, 65]],
    [[20, 21], [22], [23] * 33],
    [[5, 17, 3, 40, 2, 9, 33, 8] * 6, [9, 9], [4] * 3],  # begins as the first
]
# A quarter of the sessions samples.
OPTIONS: list[dict[str, Any]] = [{}, {}, {}, {"temperature": 1.5, "seed": 7}, {}]
COUNT = 6
SLOTS = (None, 4)


@pytest.fixture(scope="module")
def bundles() -> Iterator[dict[str, Path]]:
    made = {}
    with folder_in_memory() as folder:
        for kind in ("flash", "mimo7b"):
            source, _ = write_checkpoint(folder / f"{kind}-source", kind, tokenizer=False)
            made[kind] = folder / kind
            export_bundle(source, made[kind], recipe="f32").close()
        yield made


def opened(path: Path, slots: int | None, draft: Any) -> Runtime:
    return open_streamed(path, slots, draft, chunk=16)[0]


def conversation(runtime: Runtime, number: int) -> Iterator[Piece]:
    """All turns of session `number`, piece by piece."""
    session = runtime.session()
    for turn in TURNS[number]:
        yield from session.stream(turn, max_tokens=COUNT, **OPTIONS[number])


@functools.cache
def alone(path: Path, slots: int | None, draft: Any) -> list[list[int]]:
    found = []
    for number in range(len(TURNS)):
        with opened(path, slots, draft) as runtime:
            found.append([t for piece in conversation(runtime, number) for t in piece.token_ids])
    return found


CASES = [("flash", slots, draft) for slots in SLOTS for draft in (0, 3, "auto")] + [
    ("mimo7b", None, 0),
    ("mimo7b", None, 1),
]


@pytest.mark.parametrize(("kind", "slots", "draft"), CASES)
def test_sessions_in_turn(
    bundles: dict[str, Path], kind: str, slots: int | None, draft: Any
) -> None:
    want = alone(bundles[kind], slots, draft)
    order = random.Random(0)
    with opened(bundles[kind], slots, draft) as runtime:
        running = {number: conversation(runtime, number) for number in range(len(TURNS))}
        found: list[list[int]] = [[] for _ in TURNS]
        while running:
            number = order.choice(list(running))
            piece = next(running[number], None)
            if piece is None:
                del running[number]
            else:
                found[number] += piece.token_ids
    assert found == want


@pytest.mark.parametrize(("kind", "slots", "draft"), CASES)
def test_sessions_from_many_threads(
    bundles: dict[str, Path], kind: str, slots: int | None, draft: Any
) -> None:
    """Twice as many threads as prompts, and others that start and are cancelled all the time."""
    want = alone(bundles[kind], slots, draft)
    over = threading.Event()
    found: dict[int, list[int]] = {}
    errors: list[BaseException] = []
    with opened(bundles[kind], slots, draft) as runtime:

        def talk(number: int) -> None:
            try:
                pieces = conversation(runtime, number % len(TURNS))
                found[number] = [t for piece in pieces for t in piece.token_ids]
            except BaseException as error:
                errors.append(error)

        def disturb(seed: int) -> None:
            rng = random.Random(seed)
            try:
                while not over.is_set():
                    session = runtime.session()
                    timer = threading.Timer(rng.random() * 0.02, session.cancel)
                    timer.start()
                    session.generate([rng.randrange(60) for _ in range(rng.randrange(1, 40))])
                    timer.cancel()
                    timer.join()
            except BaseException as error:
                errors.append(error)

        talkers = [threading.Thread(target=talk, args=(n,)) for n in range(2 * len(TURNS))]
        disturbers = [threading.Thread(target=disturb, args=(n,)) for n in range(2)]
        for thread in (*talkers, *disturbers):
            thread.start()
        for thread in talkers:
            thread.join()
        over.set()
        for thread in disturbers:
            thread.join()
    assert not errors
    assert [found[n] for n in range(2 * len(TURNS))] == want + want


@pytest.mark.parametrize("draft", [0, 3])
def test_resident_and_streamed_say_the_same(bundles: dict[str, Path], draft: Any) -> None:
    assert alone(bundles["flash"], None, draft) == alone(bundles["flash"], 4, draft)
