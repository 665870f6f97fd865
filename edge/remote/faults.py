"""What goes wrong on a network, as typed errors, and what of it is worth another try."""

from __future__ import annotations

import email.utils
import json
import ssl
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from mimo_edge.errors import (
    ContextLengthError,
    MimoEdgeError,
    RemoteBrokenError,
    RemoteConnectError,
    RemoteError,
    RemoteProtocolError,
    RemoteStatusError,
    RemoteTimeoutError,
)

if TYPE_CHECKING:
    import httpx

    from mimo_edge.remote.address import Connection

# The server, or a proxy before it, says that it could not look at the request now.
_BUSY = frozenset({429, 502, 503, 504})
_SHOWN = 300
# What httpx says when the other side hung up, as against bytes that are no HTTP.
_HUNG_UP = ("peer closed connection", "server disconnected")


def of_transport(error: httpx.HTTPError, url: str, connection: Connection) -> RemoteError:
    """The typed error of what httpx raised."""
    import httpx

    reason = str(error) or type(error).__name__
    if isinstance(error, httpx.ConnectTimeout):
        return RemoteConnectError(f"no connection to {url} within {connection.connect_s:g} seconds")
    if isinstance(error, httpx.ConnectError):
        if any(isinstance(cause, ssl.SSLError) for cause in _causes(error)):
            return _Untrusted(f"no TLS connection to {url}: {reason}", "name its CA in ca_file")
        return RemoteConnectError(f"no connection to {url}: {reason}")
    if isinstance(error, httpx.TimeoutException):
        return RemoteTimeoutError(
            f"{url} was silent for {connection.silence_s:g} seconds",
            "a larger silence_s waits longer",
        )
    if isinstance(error, httpx.RemoteProtocolError):
        if not reason.lower().startswith(_HUNG_UP):
            return RemoteProtocolError(f"{url} does not speak HTTP: {reason}")
        return RemoteBrokenError(f"{url} closed the connection before the answer ended")
    if isinstance(error, httpx.DecodingError):
        return RemoteProtocolError(f"{url} sent what cannot be decompressed: {reason}")
    return RemoteBrokenError(f"the connection to {url} broke: {reason}")


class _Untrusted(RemoteConnectError):
    """TLS failed: it will fail again."""


def of_status(status: int, headers: Mapping[str, str], body: bytes, url: str) -> MimoEdgeError:
    """The typed error of a status other than 200."""
    message, code = _reason(body)
    text = f"{url} answers {status}" + (f": {message}" if message else "")
    if code == "context_length_exceeded":
        return ContextLengthError(text, "use a shorter prompt or another server")
    hint = ""
    if 300 <= status < 400:
        hint = f"it points to {headers.get('location', 'nowhere')[:_SHOWN]}: give that address"
    elif status in (401, 403):
        hint = "give its api_key"
    elif status == 404 and not message:
        hint = "is the path of the API right? usually it ends in /v1"
    return RemoteStatusError(
        text, hint, status=status, code=code, retry_after_s=_retry_after(headers)
    )


def wait_before_retry(error: MimoEdgeError, attempt: int, connection: Connection) -> float | None:
    """Seconds to wait before attempt number `attempt` + 2; None when there is to be none.

    Only for requests of whose answer nothing came.
    """
    if attempt >= connection.retries or isinstance(error, _Untrusted):
        return None
    # Not silence: what did not come within minutes will not come within as many again.
    usual = float(0.25 * 2**attempt)
    if isinstance(error, (RemoteConnectError, RemoteBrokenError)):
        return usual
    if isinstance(error, RemoteStatusError) and error.status in _BUSY:
        wait = usual if error.retry_after_s is None else error.retry_after_s
        return wait if wait <= connection.retry_wait_s else None
    return None


def _reason(body: bytes) -> tuple[str, str | None]:
    """Message and code of an error body: OpenAI's form, FastAPI's, or the text itself."""
    text = body.decode("utf-8", "replace")
    code = None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        inner = value.get("error", value)
        if isinstance(inner, dict):
            code = inner.get("code") if isinstance(inner.get("code"), str) else None
            inner = inner.get("message", inner.get("detail", ""))
        text = inner if isinstance(inner, str) else json.dumps(inner)
    elif text.lstrip().startswith("<"):
        text = ""  # a page of a proxy
    text = " ".join(text.split())
    return (text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."), code


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds a server asks to wait: a number of them, or a date."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        when = email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return max(0.0, when - time.time())


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
