"""Refused requests, as OpenAI's clients expect to hear of them."""

from __future__ import annotations

from typing import Any

from mimo_edge.errors import (
    ConstraintError,
    ContextLengthError,
    MimoEdgeError,
    TokenizerError,
    UsageError,
)

_MAX_MESSAGE = 1000
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """An error answer: HTTP `status`, and the body {"error": {message, type, param, code}}."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= _MAX_MESSAGE else f"{message[:_MAX_MESSAGE]}..."
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = _TYPES.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def refusal_of(error: MimoEdgeError, *, asked: bool, param: str | None = None) -> Refusal:
    """The answer to a typed error. `asked` says that it was raised while a request was being read:
    then a wrong call is the client's, later it is ours."""
    if asked and isinstance(error, ContextLengthError):
        return Refusal(400, str(error), param=param, code="context_length_exceeded")
    if isinstance(error, ConstraintError):  # also what shows while an answer is written
        return Refusal(400, str(error), param=param, code="unsupported")
    if asked and isinstance(error, (UsageError, TokenizerError)):
        return Refusal(400, str(error), param=param)
    return Refusal(500, f"{type(error).__name__}: {error}")
