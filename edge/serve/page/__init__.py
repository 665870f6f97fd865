"""The chat page at /: three files, nothing from elsewhere."""

from __future__ import annotations

from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

# What the page may do: run its own script, look as its own style says, talk to its own server.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
PATHS = frozenset(_FILES)
"""Asked for without a key: a browser sends none before the page can ask for it."""


def routes() -> list[Route]:
    """The page's files."""
    folder = resources.files(__package__)
    return [
        _route(path, folder.joinpath(name).read_bytes(), kind)
        for path, (name, kind) in _FILES.items()
    ]


def _route(path: str, content: bytes, kind: str) -> Route:
    async def answer(request: Request) -> Response:
        return Response(content, headers=HEADERS, media_type=kind)

    return Route(path, answer)
