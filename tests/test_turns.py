"""The queue for the model: in order, round robin, without starvation, and left when cancelled."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import tiny
from fake_backend import FakeBackend

from mimo_edge.api import Runtime
from mimo_edge.cancel import Cancel
from mimo_edge.chat_template import ChatTemplate
from mimo_edge.errors import Cancelled
from mimo_edge.model_source import Model
from mimo_edge.turns import TurnQueue


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.0005)


def run(*works: Callable[[], None]) -> None:
    """All of them, each in a thread of its own."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


class TestQueue:
    def test_turns_come_in_the_order_in_which_they_were_asked_for(self) -> None:
        queue, order = TurnQueue(), []

        def take(number: int) -> None:
            with queue.turn():
                order.append(number)

        threads = [threading.Thread(target=take, args=(n,)) for n in range(20)]
        with queue.turn():
            for number, thread in enumerate(threads):
                thread.start()
                until(lambda n=number: queue.waiting == n + 1)  # type: ignore[misc]
        for thread in threads:
            thread.join(60)
        assert order == list(range(20))
        assert not queue.held

    def test_who_comes_back_at_once_stands_behind_who_waits(self) -> None:
        """A lock would be taken again by the thread that has just given it back."""
        queue, order = TurnQueue(), []

        def other() -> None:
            with queue.turn():
                order.append("other")

        with queue.turn():
            thread = threading.Thread(target=other)
            thread.start()
            until(lambda: queue.waiting == 1)
        with queue.turn():
            order.append("again")
        thread.join(60)
        assert order == ["other", "again"]

    def test_the_holder_may_ask_again(self) -> None:
        queue = TurnQueue()
        with queue.turn(), queue.turn():
            assert queue.held
        assert not queue.held

    def test_a_turn_that_is_given_up_while_waiting(self) -> None:
        queue, cancel, ended = TurnQueue(), Cancel(), []

        def wait() -> None:
            with pytest.raises(Cancelled), queue.turn(cancel):
                raise AssertionError
            ended.append(True)

        with queue.turn():
            thread = threading.Thread(target=wait)
            thread.start()
            until(lambda: queue.waiting == 1)
            cancel.set()
            thread.join(60)
            assert ended
            assert queue.waiting == 0
        with queue.turn():
            pass

    def test_errors_give_the_turn_back(self) -> None:
        queue = TurnQueue()
        for error in (ValueError, KeyboardInterrupt, GeneratorExit):
            with pytest.raises(error), queue.turn():
                raise error
            assert not queue.held

    def test_one_at_a_time_whatever_happens(self) -> None:
        queue, inside, most = TurnQueue(), [0], [0]

        def work(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(100):
                cancel = Cancel()
                if rng.random() < 0.3:
                    threading.Timer(rng.random() * 0.002, cancel.set).start()
                try:
                    with queue.turn(cancel):
                        inside[0] += 1
                        most[0] = max(most[0], inside[0])
                        if rng.random() < 0.1:
                            time.sleep(0.001)
                        inside[0] -= 1
                except Cancelled:
                    pass

        run(*(partial(work, n) for n in range(6)))
        assert (most, inside) == ([1], [0])
        assert not queue.held
        assert queue.waiting == 0


def opened(chunk: int = 8, **options: Any) -> Runtime:
    backend = FakeBackend(tiny.tiny_config(eos_token_ids=()), **options)
    runtime = Runtime(Model("fake", backend, None, ChatTemplate(), frozenset()), 400, 0)
    runtime.engine.prefill_chunk = chunk
    return runtime


PROMPTS = [[n, n + 1, n + 2] * (1 + n) for n in range(5)]


def alone(prompt: list[int], tokens: int) -> tuple[int, ...]:
    return opened().session().generate(prompt, max_tokens=tokens).token_ids


class TestGenerations:
    def test_each_step_of_one_waits_for_a_step_of_every_other(self) -> None:
        """Strictly round robin while all want to go on: each model call waits here until all
        others stand in the queue, so there is no luck in the order."""
        tokens, order = 12, []
        left = dict.fromkeys(range(4), tokens)
        runtime: Runtime

        def on_call(kind: str, rows: int) -> None:
            name = int(threading.current_thread().name)
            others = sum(left[n] > 0 for n in left) - 1
            until(lambda: runtime.engine.queue.waiting >= others)
            order.append(name)
            left[name] -= 1

        runtime = opened(chunk=400, on_call=on_call)
        found: dict[int, tuple[int, ...]] = {}

        def talk(name: int) -> None:
            found[name] = runtime.session().generate(PROMPTS[name], max_tokens=tokens).token_ids

        threads = [threading.Thread(target=talk, args=(n,), name=str(n)) for n in left]
        with runtime.engine.queue.turn():
            for thread in threads:
                thread.start()
            until(lambda: runtime.engine.queue.waiting == 4)
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        for start in range(0, 4 * tokens, 4):
            assert sorted(order[start : start + 4]) == [0, 1, 2, 3]
        assert found == {n: alone(PROMPTS[n], tokens) for n in left}

    def test_a_long_prompt_lets_others_in_between_its_chunks(self) -> None:
        calls: list[tuple[str, int]] = []
        runtime: Runtime
        waits = [False]

        def on_call(kind: str, rows: int) -> None:
            name = threading.current_thread().name
            if name == "long" and waits[0]:
                until(lambda: runtime.engine.queue.waiting == 1 or not short.is_alive())
            calls.append((name, rows))

        runtime = opened(chunk=8, on_call=on_call)
        stream = runtime.session().stream([1, 2], max_tokens=30)
        next(stream)
        waits[0] = True
        short = threading.Thread(target=lambda: list(stream), name="short")
        long = threading.Thread(
            target=lambda: runtime.session().generate([5] * 200, max_tokens=1), name="long"
        )
        with runtime.engine.queue.turn():
            short.start()
            long.start()
            until(lambda: runtime.engine.queue.waiting == 2)
        short.join(60)
        long.join(60)
        chunks = [i for i, (name, rows) in enumerate(calls) if name == "long" and rows > 1]
        assert len(chunks) == 25
        between = [calls[i + 1 : j] for i, j in pairwise(chunks)]
        assert all([name for name, _ in steps] == ["short"] for steps in between)

    def test_cancelled_while_it_waits_for_its_first_turn(self) -> None:
        runtime = opened()
        session = runtime.session()
        replies: list[Any] = []
        thread = threading.Thread(target=lambda: replies.append(session.generate([1, 2, 3])))
        with runtime.engine.queue.turn():
            thread.start()
            until(lambda: runtime.engine.queue.waiting == 1)
            assert runtime.stats()["queue"] == {"waiting": 1}
            session.cancel()
            thread.join(60)  # although somebody else has the turn
            assert not thread.is_alive()
        assert replies[0].finish_reason == "cancelled"
        assert replies[0].token_ids == ()
        assert session.generate([1, 2, 3], max_tokens=4).token_ids == alone([1, 2, 3], 4)

    def test_from_asyncio(self) -> None:
        """Many tasks at once, some cancelled while they wait: each of the others says what it says
        alone."""
        runtime = opened()

        async def talk(number: int) -> list[int]:
            found: list[int] = []
            session = runtime.session()
            async for piece in session.astream(PROMPTS[number % 5], max_tokens=20):
                found += piece.token_ids
            return found

        async def main() -> list[Any]:
            tasks = [asyncio.create_task(talk(n)) for n in range(15)]
            await asyncio.sleep(0.005)
            for task in tasks[10:]:
                task.cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

        found = asyncio.run(main())
        for number in range(10):
            assert tuple(found[number]) == alone(PROMPTS[number % 5], 20)
        assert all(isinstance(one, (asyncio.CancelledError, list)) for one in found[10:])
        assert runtime.engine.queue.waiting == 0
        assert not runtime.engine.queue.held

    def test_closing_waits_for_its_turn(self) -> None:
        runtime = opened()
        closed = threading.Thread(target=runtime.close)
        with runtime.engine.queue.turn():
            closed.start()
            until(lambda: runtime.engine.queue.waiting == 1)
            assert not runtime.engine.closed
        closed.join(60)
        assert runtime.engine.closed
