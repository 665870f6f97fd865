"""The server as an ASGI application: routes, who may ask, and what happens when a client leaves."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mimo_edge.api import Runtime
from mimo_edge.machine import rss_bytes
from mimo_edge.reply import Reply
from mimo_edge.serve.answers import KEEP_ALIVE, Answer, to_json
from mimo_edge.serve.body import parse_json
from mimo_edge.serve.calls import Call, read_chat, read_completion
from mimo_edge.serve.limits import Limits
from mimo_edge.serve.metrics import CONTENT_TYPE, Metrics
from mimo_edge.serve.openapi import description
from mimo_edge.serve.page import PATHS, routes
from mimo_edge.serve.refusal import Refusal
from mimo_edge.serve.response_events import ResponseAnswer
from mimo_edge.serve.responses import read_response
from mimo_edge.serve.work import Job, Workshop

Reader = Callable[[Mapping[str, Any], tuple[str, ...]], Call]

# How often a server asks whether it should stop.
_STOP_POLL_S = 0.1
_JSON = "application/json"
# Asked for without a key.
_OPEN = PATHS | {"/health", "/openapi.json"}


class Service:
    """One runtime behind OpenAI's API; `app` is the ASGI application.

    `api_key` is asked of everything but /health, /openapi.json and the files of the chat page,
    which offers `tools`. `local` says that only this machine can connect: requests must then name
    it in their Host header, so that no web page reaches the server through a name of its own.
    `aliases` are further names of the model. `stopping` is polled; once it is true, running answers
    end.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        limits: Limits | None = None,
        api_key: str | None = None,
        local: bool = True,
        aliases: tuple[str, ...] = (),
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        stopping: Callable[[], bool] | None = None,
    ) -> None:
        self.runtime = runtime
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self.models = (runtime.name, *aliases)
        self.workshop = Workshop(runtime, self.limits, thinking)
        self._key = None if api_key is None else api_key.encode()
        self._local = local
        self._tools = list(tools)
        self._stopping = stopping
        self._since = int(time.time())
        inner = Starlette(
            routes=[
                *routes(),
                Route("/stats", self._stats),
                Route("/tools.json", self._page_tools),
                Route("/health", self._health),
                Route("/metrics", self._metrics),
                Route("/v1/models", self._list_models),
                Route("/v1/models/{name:path}", self._one_model),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/v1/responses", self._respond, methods=["POST"]),
                Route("/openapi.json", self._openapi),
            ],
            exception_handlers={
                Refusal: _refused,
                HTTPException: _http_error,
                Exception: _bug,
            },
            lifespan=self._lifespan,
        )
        self.app: ASGIApp = _Front(inner, self)

    def admit(self, scope: Scope) -> None:
        """Whether this request may be looked at. Raises Refusal 401 or 403."""
        headers = dict(scope["headers"])
        if self._local and not _names_this_machine(headers.get(b"host", b"")):
            raise Refusal(403, "the Host header does not name this machine", code="wrong_host")
        if self._key is None or scope["path"] in _OPEN:
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        # compare_digest takes the same time wherever the keys differ.
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
            raise Refusal(
                401,
                "a valid API key is needed: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def count(self, text: str) -> int:
        """Tokens of a text."""
        tokenizer = self.runtime.tokenizer
        return 0 if tokenizer is None else len(tokenizer.encode(text))

    # --- routes -------------------------------------------------------------------------

    async def _health(self, request: Request) -> Response:
        closing = self.workshop.closing
        body = {"status": "closing" if closing else "ok", "model": self.runtime.name}
        return _json(body, 503 if closing else 200)

    async def _metrics(self, request: Request) -> Response:
        text = await asyncio.to_thread(self.metrics.text, self.workshop)
        return Response(text.encode(), media_type=CONTENT_TYPE)

    async def _stats(self, request: Request) -> Response:
        stats = await asyncio.to_thread(self.runtime.stats)
        gate = self.workshop.gate
        now = {
            "resident_bytes": rss_bytes(),
            "requests_running": gate.running,
            "requests_queued": gate.waiting,
        }
        return _json({**stats, **now})

    async def _page_tools(self, request: Request) -> Response:
        return _json({"tools": self._tools})

    async def _list_models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model(name) for name in self.models]})

    async def _one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self.models:
            raise Refusal(404, f"the model {name[:80]!r} is not here", code="model_not_found")
        return _json(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._since,
            "owned_by": "mimo-edge",
            "context_length": self.runtime.context,
        }

    async def _chat(self, request: Request) -> ASGIApp:
        return await self._called(request, read_chat)

    async def _complete(self, request: Request) -> ASGIApp:
        return await self._called(request, read_completion)

    async def _respond(self, request: Request) -> ASGIApp:
        return await self._called(request, read_response)

    async def _openapi(self, request: Request) -> Response:
        return _json(description(self._key is not None))

    async def _called(self, request: Request, reader: Reader) -> ASGIApp:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != _JSON:
            # Not only order: a web page may send text to any address unasked, but not JSON.
            raise Refusal(415, f"the content type is {kind[:80]!r}, not {_JSON!r}")
        raw = await self._body(request)
        # In a thread: a hostile body may take a while.
        call = await asyncio.to_thread(lambda: reader(parse_json(raw), self.models))
        return _Answering(self, call)

    async def _body(self, request: Request) -> bytes:
        most = self.limits.body_bytes
        too_large = Refusal(413, f"the body is larger than {most} bytes", code="body_too_large")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > most:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_wait_s):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise too_large
                    parts.append(part)
        except TimeoutError:
            raise Refusal(
                408, f"the body did not come within {self.limits.body_wait_s:g} seconds"
            ) from None
        except ClientDisconnect:
            self.metrics.abandoned += 1
            raise Refusal(400, "the client went away") from None  # nobody hears it
        return b"".join(parts)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        watch = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watch.cancel()
            await self.workshop.close()

    async def _watch(self) -> None:
        if self._stopping is None:
            return
        while not self._stopping():
            await asyncio.sleep(_STOP_POLL_S)
        await self.workshop.close()


class _Front:
    """Before and after every request: admission, and its status counted by route."""

    def __init__(self, app: Starlette, service: Service) -> None:
        self._app = app
        self._service = service
        self._routes = {route.path for route in app.routes if isinstance(route, Route)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._service.admit(scope)
        except Refusal as refusal:
            await _error(refusal)(scope, receive, counted)
        else:
            await self._app(scope, receive, counted)
        finally:
            # Paths nobody has here share one label: a client must not be able to make new ones.
            path = scope["path"]
            if path.startswith("/v1/models/"):
                path = "/v1/models"
            route = path if path in self._routes else "other"
            if status:
                self._service.metrics.requests[route, status] += 1


class _Answering:
    """Runs a call and sends its answer; given up as soon as the client is gone."""

    def __init__(self, service: Service, call: Call) -> None:
        self._service = service
        self._call = call
        self._answer: Answer | ResponseAnswer = Answer(call, service.runtime.tokenizer)
        if call.kind == "response":
            self._answer = ResponseAnswer(call, service.count)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._work(scope, receive, send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self._service.metrics.abandoned += 1
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
            await asyncio.wait({work, gone})
        if not work.cancelled():
            work.result()

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._service.workshop.job(self._call) as job:
                await job.start()
                if self._call.stream:
                    await self._stream(job, send)
                    return
                reply = await self._reply(job)
        except Refusal as refusal:
            await _error(refusal)(scope, receive, send)
            return
        await _json(self._answer.whole(reply))(scope, receive, send)

    async def _reply(self, job: Job) -> Reply:
        async for piece in job.pieces(self._service.limits.keep_alive_s):
            if piece is not None:
                self._answer.see(piece)
        assert job.reply is not None
        return job.reply

    async def _stream(self, job: Job, send: Send) -> None:
        async def say(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # a proxy in between must not collect
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            for data in self._answer.first():
                await say(data)
            async for piece in job.pieces(self._service.limits.keep_alive_s):
                if piece is None:
                    await say(KEEP_ALIVE)
                    continue
                for data in self._answer.chunks(piece, job.progress):
                    await say(data)
            assert job.reply is not None
            for data in self._answer.last(job.reply):
                await say(data)
        except Refusal as refusal:  # too late for a status
            await say(self._answer.error(refusal))
        await say(b"", more=False)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _names_this_machine(host: bytes) -> bool:
    """Whether a Host header is localhost or a loopback address, with any port."""
    try:
        name = host.decode("ascii").strip().lower()
    except UnicodeDecodeError:
        return False
    if name.startswith("["):
        name = name[1:].partition("]")[0]
    elif name.count(":") == 1:
        name = name.partition(":")[0]
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _json(body: Mapping[str, Any], status: int = 200) -> Response:
    return Response(to_json(body), status, media_type=_JSON)


def _error(refusal: Refusal) -> Response:
    headers = dict(refusal.headers)
    return Response(to_json(refusal.body()), refusal.status, headers=headers, media_type=_JSON)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _error(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method[:20]} {request.url.path[:80]}: {error.detail}"
    return _error(Refusal(error.status_code, what, headers=dict(error.headers or {})))


async def _bug(request: Request, error: Exception) -> Response:
    # The framework logs it after this.
    return _error(Refusal(500, "an internal error; the server's log has it"))
