"""Running generations: a bounded number at a time, each in a thread, their pieces on the loop.

The event loop never waits for the model. A request that is given up, by its client or because the
server closes, cancels its generation, which stops within a layer; its place is free when the thread
has ended, not before.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

from mimo_edge.api import Runtime
from mimo_edge.engine import GenerationStats
from mimo_edge.errors import MimoEdgeError
from mimo_edge.reply import Piece, Prompt, Reply
from mimo_edge.serve.calls import Call
from mimo_edge.serve.limits import Limits
from mimo_edge.serve.refusal import Refusal, refusal_of
from mimo_edge.session import Session

log = logging.getLogger("mimo_edge.serve")


class Gate:
    """Places for `concurrent` requests and a queue of `queued`, in order of arrival."""

    def __init__(self, concurrent: int, queued: int, wait_s: float) -> None:
        self.running = 0
        self.waiting = 0
        self._concurrent = concurrent
        self._queued = queued
        self._wait_s = wait_s
        self._places = asyncio.Semaphore(concurrent)

    async def enter(self) -> None:
        """Wait for a place. Raises Refusal 429 when the queue is full, 503 after waiting long."""
        if self._places.locked() and self.waiting >= self._queued:
            raise Refusal(
                429,
                f"{self.running} requests run and {self.waiting} wait: try again later",
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        self.waiting += 1
        try:
            async with asyncio.timeout(self._wait_s):
                await self._places.acquire()
        except TimeoutError:
            raise Refusal(
                503,
                f"no place became free within {self._wait_s:g} seconds",
                code="queue_timeout",
                headers={"Retry-After": "5"},
            ) from None
        finally:
            self.waiting -= 1
        self.running += 1

    def leave(self) -> None:
        """Free a place."""
        self.running -= 1
        self._places.release()


@dataclass(frozen=True)
class _Started:
    """The request was found good: what comes now are pieces."""


@dataclass(frozen=True)
class _Failed:
    refusal: Refusal


_Event = _Started | Piece | Reply | _Failed


class Job:
    """One generation: `run` in a thread, everything else on the event loop.

    `start` first, then `pieces`; `reply` is there when they have ended.
    """

    def __init__(self, workshop: Workshop, call: Call) -> None:
        self._workshop = workshop
        self._call = call
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        self._session: Session | None = None
        self._given_up = False
        self._why = Refusal(503, "the request was given up")
        self.reply: Reply | None = None

    def cancel(self, why: Refusal | None = None) -> None:
        """Stop the generation within a layer; `why` is what the client is told, if it is there."""
        self._why = why or self._why
        self._given_up = True
        if self._session is not None:
            self._session.cancel()

    @property
    def progress(self) -> GenerationStats | None:
        """What the generation has done up to now."""
        return None if self._session is None else self._session.progress

    async def start(self) -> None:
        """Wait until the prompt is read. Raises Refusal."""
        event = await self._events.get()
        if isinstance(event, _Failed):
            raise event.refusal

    async def pieces(self, keep_alive_s: float) -> AsyncIterator[Piece | None]:
        """The answer as it comes; None whenever nothing came for a while. Raises Refusal."""
        while True:
            try:
                async with asyncio.timeout(keep_alive_s):
                    event = await self._events.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(event, _Failed):
                raise event.refusal
            if isinstance(event, Reply):
                if event.finish_reason == "cancelled":
                    raise self._why
                self.reply = event
                return
            assert isinstance(event, Piece)
            yield event

    def run(self) -> None:
        """The whole generation, in the calling thread. Never raises."""
        asked = True
        try:
            session, prompt = self._prepare()
            self._session = session
            try:
                pieces = session.stream(
                    prompt,
                    **self._call.options,
                    max_prompt_tokens=self._workshop.limits.prompt_tokens,
                )
                asked = False
                # `stream` takes back what was asked of the session before.
                if self._given_up:
                    session.cancel()
                self._tell(_Started())
                for piece in pieces:
                    self._tell(piece)
                reply = session.last_reply
                assert reply is not None
            finally:
                session.close()
            self._tell(reply)
        except Refusal as refusal:
            self._tell(_Failed(refusal))
        except MimoEdgeError as error:
            found = refusal_of(error, asked=asked)
            if found.status >= 500:
                log.error("generation failed: %s", error)
            self._tell(_Failed(found))
        except Exception:
            log.exception("generation failed")
            self._tell(_Failed(Refusal(500, "an internal error; the server's log has it")))

    def _prepare(self) -> tuple[Session, Prompt]:
        call, runtime = self._call, self._workshop.runtime
        thinking = self._workshop.thinking if call.thinking is None else call.thinking
        session = runtime.session(
            tools=call.tools, enable_thinking=thinking, pool=self._workshop.pool
        )
        if isinstance(call.prompt, str):
            if runtime.tokenizer is None:
                raise Refusal(400, f"{runtime.name} has no tokenizer", param="prompt")
            return session, runtime.tokenizer.encode(call.prompt)
        return session, call.prompt

    def _tell(self, event: _Event) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)


class Workshop:
    """The places where generations of one runtime run. Made and used on one event loop."""

    def __init__(self, runtime: Runtime, limits: Limits, thinking: bool | None = None) -> None:
        self.runtime = runtime
        self.limits = limits
        self.thinking = thinking
        self.pool = runtime.sequence_pool(limits.conversations)
        self.gate = Gate(limits.concurrent, limits.queued, limits.queue_wait_s)
        self.closing = False
        self._threads = ThreadPoolExecutor(limits.concurrent, thread_name_prefix="mimo-serve")
        self._jobs: dict[asyncio.Future[None], Job] = {}

    @asynccontextmanager
    async def job(self, call: Call) -> AsyncIterator[Job]:
        """A running generation, cancelled when this is left before its end. Raises Refusal."""
        self._check_open()
        await self.gate.enter()
        try:
            self._check_open()
            job = Job(self, call)
            future = asyncio.get_running_loop().run_in_executor(self._threads, job.run)
        except BaseException:
            self.gate.leave()
            raise
        self._jobs[future] = job
        future.add_done_callback(self._ended)
        try:
            yield job
        finally:
            job.cancel()

    async def close(self) -> None:
        """Take nothing more, cancel what runs, and wait until it has ended."""
        self.closing = True
        for job in self._jobs.values():
            job.cancel(_closing())
        while self._jobs:
            await asyncio.wait(list(self._jobs))
            await asyncio.sleep(0)  # their callbacks
        self._threads.shutdown()
        self.pool.clear()

    def _check_open(self) -> None:
        if self.closing:
            raise _closing()

    def _ended(self, future: asyncio.Future[None]) -> None:
        del self._jobs[future]
        self.gate.leave()
        if not future.cancelled() and (error := future.exception()) is not None:
            log.error("a worker ended with %r", error)


def _closing() -> Refusal:
    return Refusal(503, "the server is closing", code="closing")
