"""A real server on a free port, in a thread of the test.

Tests that import this are skipped where what they need is not installed.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("httpx", reason="needs the extra dev")

import httpx
from scripted import Scripted
from scripted import runtime as scripted_runtime

from mimo_edge.api import Runtime
from mimo_edge.serve.limits import Limits
from mimo_edge.serve.server import bind, make_server, url_of


class Served:
    """A running server: `client` talks to it, `runtime` and `backend` are its own."""

    def __init__(self, url: str, runtime: Runtime, server: Any) -> None:
        self.url = url
        self.runtime = runtime
        self.server = server
        self.client = httpx.Client(base_url=url, timeout=60)

    def chat(self, **body: Any) -> httpx.Response:
        body.setdefault("messages", [{"role": "user", "content": "hello"}])
        return self.client.post("/v1/chat/completions", json=body)

    def post(self, data: bytes, path: str = "/v1/chat/completions") -> httpx.Response:
        headers = {"content-type": "application/json"}
        return self.client.post(path, content=data, headers=headers)

    def metric(self, name: str) -> float:
        for line in self.client.get("/metrics").text.splitlines():
            if line.rpartition(" ")[0] == f"mimo_edge_{name}":
                return float(line.rpartition(" ")[2])
        raise AssertionError(name)

    def settled(self) -> None:
        """Wait until nothing runs and nothing waits."""
        until(lambda: self.metric("requests_running") == 0 and self.metric("requests_queued") == 0)

    def raw(self) -> socket.socket:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return socket.create_connection((host, int(port)), timeout=60)


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


@contextmanager
def serving(runtime: Runtime, **options: Any) -> Iterator[Served]:
    """Serve `runtime`, which is closed in the end, as `mimo-edge serve` does."""
    bound, local = bind("127.0.0.1", 0, options.get("api_key"), False)
    with runtime, bound:
        server = make_server(runtime, local=local, **options)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        served = Served(url_of(bound), runtime, server)
        try:
            with served.client:
                yield served
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


@contextmanager
def scripted(
    answers: list[str], limits: Limits | None = None, thinking: bool | None = None, **options: Any
) -> Iterator[tuple[Served, Scripted]]:
    """A server whose model says `answers`."""
    runtime, backend = scripted_runtime(answers, **options)
    with serving(runtime, limits=limits, thinking=thinking) as served:
        yield served, backend


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, which must end with [DONE]."""
    lines = [line for line in response.iter_lines() if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
