"""Where a server is, and what is asked of a connection to it."""

from __future__ import annotations

import math
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from mimo_edge.errors import BackendError, UsageError


@dataclass(frozen=True)
class Connection:
    """How a server is reached. Raises UsageError.

    `connect_s` bounds the making of a connection, `silence_s` the time between two signs of life
    (a server that reads a long prompt says nothing meanwhile). A request that failed before
    anything of its answer came is sent `retries` times more, after a wait that doubles or that the
    server asks for; one longer than `retry_wait_s` is an error instead. `ca_file` holds
    certificates (PEM) to trust instead of the system's.
    """

    connect_s: float = 10.0
    silence_s: float = 120.0
    retries: int = 2
    retry_wait_s: float = 30.0
    ca_file: str | Path | None = None

    def __post_init__(self) -> None:
        for name in ("connect_s", "silence_s", "retry_wait_s"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value <= 0:
                raise UsageError(f"{name} = {value!r}", "use a number of seconds above 0")
        if isinstance(self.retries, bool) or not isinstance(self.retries, int) or self.retries < 0:
            raise UsageError(f"retries = {self.retries!r}", "use 0 or more")

    def tls(self) -> ssl.SSLContext:
        """The certificates that are trusted. Raises UsageError when `ca_file` holds none."""
        try:
            return ssl.create_default_context(
                cafile=None if self.ca_file is None else str(self.ca_file)
            )
        except (OSError, ssl.SSLError) as error:
            raise UsageError(f"no certificates in {self.ca_file}: {error}") from None


def base_url(url: str) -> str:
    """The address of the API: "/v1" is added where there is no path. Raises UsageError."""
    hint = "write for instance http://192.168.1.2:8080"
    if not isinstance(url, str):
        raise UsageError(f"url = {url!r}", hint)
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"url {url!r}: {error}", hint) from None
    if parts.scheme not in ("http", "https") or not host or port == 0:
        raise UsageError(f"url {url!r} is no http or https address", hint)
    if parts.username is not None or parts.query or parts.fragment:
        raise UsageError(f"url {url!r} has more than host, port and path", "give the key apart")
    path = parts.path.rstrip("/")
    # A gateway may have the API below a path of its own; then it is written out.
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def check_key(api_key: str | None) -> None:
    """Raises UsageError on a key no header can carry."""
    if api_key is None:
        return
    if not api_key.strip() or not api_key.isascii() or not api_key.isprintable():
        raise UsageError("the API key is empty or not printable ASCII")


def check_extra() -> None:
    """Raises BackendError when what the extra `remote` installs is missing."""
    try:
        import httpx  # noqa: F401
    except ImportError:
        raise BackendError(
            "answers from another machine need httpx", "pip install 'mimo-edge[remote]'"
        ) from None
