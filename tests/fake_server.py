"""A server on a socket that does what a test says, connection by connection, byte by byte."""

from __future__ import annotations

import json
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

Deed = Callable[["Visit"], None]

MODELS = {"object": "list", "data": [{"id": "fake", "max_model_len": 4000}]}


class Visit:
    """One connection: `request` is what the client sent, as (line, body)."""

    def __init__(self, connection: socket.socket, over: threading.Event) -> None:
        self.connection = connection
        self.over = over

    def request(self) -> tuple[str, bytes]:
        raw = b""
        while b"\r\n\r\n" not in raw:
            got = self.connection.recv(65536)
            if not got:
                raise ConnectionError
            raw += got
        head, _, body = raw.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        length = next(
            (int(x.split(":")[1]) for x in lines if x.lower().startswith("content-length:")), 0
        )
        while len(body) < length:
            body += self.connection.recv(65536)
        return lines[0], body

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def head(self, status: str = "200 OK", **headers: str) -> None:
        lines = [f"HTTP/1.1 {status}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.send(("\r\n".join(lines) + "\r\n\r\n").encode())

    def whole(self, status: str, body: bytes, **headers: str) -> None:
        headers.setdefault("content_type", "application/json")
        self.head(status, content_length=str(len(body)), connection="close", **headers)
        self.send(body)

    def events(self, *events: Any, done: bool = True) -> None:
        """An event stream that ends with the connection."""
        self.head(content_type="text/event-stream", connection="close")
        for event in events:
            self.event(event)
        if done:
            self.event("[DONE]")

    def event(self, event: Any) -> None:
        text = event if isinstance(event, str) else json.dumps(event)
        self.send(f"data: {text}\n\n".encode())

    def reset(self) -> None:
        """End the connection with RST."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def wait(self) -> None:
        """Say nothing until the test is over."""
        self.over.wait()


class FakeServer:
    """Does the next of `deeds` on each connection; after the last, the last again. Requests are
    kept in `seen`. `first` is sent before anything was asked."""

    def __init__(
        self, deeds: Sequence[Deed], tls: ssl.SSLContext | None = None, first: bytes = b""
    ) -> None:
        self.deeds = list(deeds)
        self._first = first
        self.seen: list[tuple[str, bytes]] = []
        self.visits = 0
        self._tls = tls
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"

    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(body) for line, body in self.seen if line.startswith("POST")]

    def run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._visited, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _visited(self, connection: socket.socket) -> None:
        with suppress(OSError, ConnectionError), connection:
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
            with connection:
                connection.sendall(self._first)
                visit = Visit(connection, self._over)
                line, body = visit.request()
                self.seen.append((line, body))
                if line.startswith("GET"):
                    visit.whole("200 OK", json.dumps(MODELS).encode())
                    return
                deed = self.deeds[min(self.visits, len(self.deeds) - 1)]
                self.visits += 1
                deed(visit)

    def close(self) -> None:
        self._over.set()
        # A thread in accept is not woken by close.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()


@contextmanager
def faking(
    *deeds: Deed, tls: ssl.SSLContext | None = None, first: bytes = b""
) -> Iterator[FakeServer]:
    server = FakeServer(deeds, tls, first)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join(30)
        assert not thread.is_alive()


def delta(reason: str | None = None, **parts: Any) -> dict[str, Any]:
    """A chunk of a streamed answer."""
    return {"choices": [{"index": 0, "delta": parts, "finish_reason": reason}]}


USAGE = {
    "choices": [],
    "usage": {
        "prompt_tokens": 9,
        "completion_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 4},
    },
}


def hello(visit: Visit) -> None:
    """A good answer."""
    visit.events(
        delta(role="assistant", content=""),
        delta(content="Hello "),
        delta(content="there."),
        delta("stop"),
        USAGE,
    )
