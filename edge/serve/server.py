"""From options to a listening server."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from mimo_edge.api import Runtime
from mimo_edge.errors import BackendError, UsageError
from mimo_edge.serve.limits import Limits

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8080
# Connections beyond are answered 503 at once; far more than requests that wait or run.
_SPARE_CONNECTIONS = 256
# Answers are told to end as soon as the server should stop; who still reads then has this long.
_GRACE_S = 5
_BACKLOG = 128


def check_extra() -> None:
    """Raises BackendError when what the extra `serve` installs is missing."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise BackendError(
            f"the server needs {error.name}", "pip install 'mimo-edge[serve]'"
        ) from None


def check_exposure(address: str, api_key: str | None, no_auth: bool) -> bool:
    """Whether `address` is this machine's own. Raises UsageError when it is not and neither a key
    is asked nor `no_auth` said, and on a key nobody could send."""
    if api_key is not None:
        if not api_key.strip() or not api_key.isascii() or not api_key.isprintable():
            raise UsageError("the API key is empty or not printable ASCII")
        if no_auth:
            raise UsageError("an API key and --no-auth", "give one of them")
    local = ipaddress.ip_address(address.partition("%")[0]).is_loopback
    if not local and api_key is None and not no_auth:
        raise UsageError(
            f"{address} can be reached from other machines, and no API key is asked",
            "give --api-key, or say --no-auth",
        )
    return local


def bind(host: str, port: int, api_key: str | None, no_auth: bool) -> tuple[socket.socket, bool]:
    """A listening socket, whose clients wait until the server runs, and whether only this machine
    reaches it; port 0 takes a free one. Raises UsageError."""
    if not 0 <= port <= 65535:
        raise UsageError(f"port {port}", "use 0 to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"no address {host!r}: {error}") from None
    family, kind, protocol, _, address = found[0]
    local = check_exposure(str(address[0]), api_key, no_auth)
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        raise UsageError(
            f"cannot listen on {host} port {port}: {error.strerror}", "use another --port"
        ) from None
    return bound, local


def url_of(bound: socket.socket) -> str:
    """Where a client finds the server."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(
    runtime: Runtime,
    *,
    limits: Limits | None = None,
    api_key: str | None = None,
    local: bool = True,
    aliases: tuple[str, ...] = (),
    thinking: bool | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> Any:
    """A uvicorn server of `runtime`: `run(sockets=[bound])` serves until it is told to stop by a
    signal, or by `should_exit` from another thread."""
    check_extra()
    import uvicorn

    from mimo_edge.serve.app import Service

    limits = limits or Limits()
    service = Service(
        runtime,
        limits=limits,
        api_key=api_key,
        local=local,
        aliases=aliases,
        thinking=thinking,
        tools=tools,
        stopping=lambda: bool(server.should_exit),
    )
    config = uvicorn.Config(
        service.app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=limits.concurrent + limits.queued + _SPARE_CONNECTIONS,
        timeout_graceful_shutdown=_GRACE_S,
    )
    server = uvicorn.Server(config)
    return server
