"""Requests to a server, made on an event loop of their own and waited for in any thread.

A blocking socket cannot be given up from another thread in every phase (a name that is looked up,
a connection that is made); a task can. Whoever waits looks at his `Cancel` and his end meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import suppress
from typing import Any

import httpx

from mimo_edge.cancel import Cancel
from mimo_edge.errors import (
    BackendError,
    Cancelled,
    MimoEdgeError,
    RemoteProtocolError,
    UsageError,
)
from mimo_edge.remote.address import Connection, base_url, check_key
from mimo_edge.remote.events import EventReader
from mimo_edge.remote.faults import of_status, of_transport, wait_before_retry

# How often somebody who waits looks whether he still wants to.
_POLL_S = 0.02
# Events that may wait for their reader; then the connection is read no further.
_AHEAD = 64
_MAX_ERROR_BYTES = 64 << 10
_MAX_JSON_BYTES = 8 << 20

_Emit = Callable[[str], Awaitable[None]]


class Late(Exception):
    """The time a caller gave is over."""


class Wire:
    """A server at `url`. Raises UsageError on an address or key that is none."""

    def __init__(self, url: str, api_key: str | None, connection: Connection) -> None:
        self.url = base_url(url)
        check_key(api_key)
        self._connection = connection
        headers = {"user-agent": "mimo-edge"}
        if api_key is not None:
            headers["authorization"] = f"Bearer {api_key.strip()}"
        self._headers = headers
        self._tls = connection.tls()
        self._pid = os.getpid()
        self._closed = False
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="mimo-remote", daemon=True
        )
        self._thread.start()

    def get(self, path: str, cancel: Cancel, end: float | None = None) -> dict[str, Any]:
        """The JSON object at `path`. Raises RemoteError, Cancelled, and Late at `end`, monotonic
        seconds."""
        events = self._exchange(lambda emit: self._get(path, emit), cancel, end)
        for text in events:
            with suppress(ValueError, RecursionError):
                value = json.loads(text)
                if isinstance(value, dict):
                    return value
        raise RemoteProtocolError(f"{self.url}{path} is no JSON object")

    def stream(
        self, path: str, body: Mapping[str, Any], cancel: Cancel, end: float | None = None
    ) -> Iterator[str]:
        """The data of the events a POST of `body` is answered with. Errors as `get`; leaving the
        iterator ends the request."""
        content = json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
        return self._exchange(lambda emit: self._post(path, content, emit), cancel, end)

    def check_open(self) -> None:
        """Raises UsageError once closed, BackendError in a forked process."""
        if self._closed:
            raise UsageError("the connection is closed")
        if os.getpid() != self._pid:
            raise BackendError(
                "this process was forked from the one that made the connection",
                "threads do not survive fork: connect after forking",
            )

    def close(self) -> None:
        """End every request and the connections. Calling it twice is harmless."""
        with self._lock:
            if self._closed or os.getpid() != self._pid:
                self._closed = True
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._end_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # --- the caller's side ----------------------------------------------------------------

    def _exchange(
        self,
        work: Callable[[_Emit], Coroutine[Any, Any, None]],
        cancel: Cancel,
        end: float | None,
    ) -> Iterator[str]:
        self.check_open()
        taken: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        places = asyncio.Semaphore(_AHEAD)

        async def emit(text: str) -> None:
            await places.acquire()
            taken.put(text)

        async def run() -> None:
            try:
                await work(emit)
                taken.put(None)
            except asyncio.CancelledError:
                taken.put(Cancelled("the connection was closed"))
                raise
            except Exception as error:  # raised where it is waited for
                taken.put(error)

        with self._lock:
            self.check_open()
            task = asyncio.run_coroutine_threadsafe(run(), self._loop)
        try:
            while True:
                if cancel.is_set():
                    raise Cancelled("cancelled")
                wait = _POLL_S if end is None else min(_POLL_S, end - time.monotonic())
                if wait <= 0:
                    raise Late
                try:
                    event = taken.get(timeout=wait)
                except queue.Empty:
                    continue
                if event is None:
                    return
                if isinstance(event, BaseException):
                    raise event
                with suppress(RuntimeError):  # closed meanwhile: what came before is still good
                    self._loop.call_soon_threadsafe(places.release)
                yield event
        finally:
            task.cancel()

    # --- the loop's side ------------------------------------------------------------------

    def _client(self) -> httpx.AsyncClient:
        """A client for one attempt. A pool of kept connections would lose those whose request was
        cancelled between connecting and sending: they stay open and are never used."""
        return httpx.AsyncClient(
            headers=self._headers,
            timeout=httpx.Timeout(self._connection.silence_s, connect=self._connection.connect_s),
            verify=self._tls,
            # Nothing outside the call decides where prompts and the key go.
            trust_env=False,
            follow_redirects=False,
        )

    async def _get(self, path: str, emit: _Emit) -> None:
        async def attempt() -> None:
            async with self._client() as client, client.stream("GET", self.url + path) as response:
                if response.status_code != 200:
                    raise await self._refused(response)
                await emit((await self._read(response, _MAX_JSON_BYTES)).decode("utf-8", "replace"))

        await self._tried(attempt, lambda: False)

    async def _post(self, path: str, content: bytes, emit: _Emit) -> None:
        came = False

        async def attempt() -> None:
            nonlocal came
            reader = EventReader()
            headers = {"content-type": "application/json", "accept": "text/event-stream"}
            async with (
                self._client() as client,
                client.stream(
                    "POST", self.url + path, content=content, headers=headers
                ) as response,
            ):
                if response.status_code != 200:
                    raise await self._refused(response)
                kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
                if kind != "text/event-stream":
                    raise RemoteProtocolError(
                        f"{self.url}{path} answers {kind[:80] or 'nothing'!r}, not an event stream",
                        "is it an OpenAI-compatible server?",
                    )
                async for data in response.aiter_bytes():
                    for event in reader.feed(data):
                        came = True
                        await emit(event)

        await self._tried(attempt, lambda: came)

    async def _tried(
        self, attempt: Callable[[], Awaitable[None]], came: Callable[[], bool]
    ) -> None:
        """An attempt, and others while nothing of the answer `came`."""
        number = 0
        while True:
            error: MimoEdgeError
            try:
                await attempt()
                return
            except httpx.HTTPError as fault:
                error = of_transport(fault, self.url, self._connection)
                error.__cause__ = fault
            except MimoEdgeError as refused:
                error = refused
            wait = None if came() else wait_before_retry(error, number, self._connection)
            if wait is None:
                raise error
            await asyncio.sleep(wait)
            number += 1

    async def _refused(self, response: httpx.Response) -> MimoEdgeError:
        body = await self._read(response, _MAX_ERROR_BYTES, cut=True)
        return of_status(response.status_code, response.headers, body, self.url)

    async def _read(self, response: httpx.Response, most: int, *, cut: bool = False) -> bytes:
        body = bytearray()
        async for data in response.aiter_bytes():
            body += data
            if len(body) > most:
                if cut:
                    break
                raise RemoteProtocolError(f"{self.url} sent more than {most} bytes")
        return bytes(body[:most])

    async def _end_all(self) -> None:
        own = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not own]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
