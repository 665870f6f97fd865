"""Every error mimo-edge raises on purpose.

MimoEdgeError
├── UsageError             wrong call: bad argument, unknown name
│   └── ConstraintError    a schema, regular expression or tool that cannot be enforced
├── ConfigError            a model or run configuration we refuse
├── CheckpointError        a Hugging Face checkpoint that is damaged, incomplete or inconsistent
├── QuantError             data that cannot be quantised or dequantised (NaN scale, bad shape)
├── ExportError            an export that could not finish (disk full, output in the way)
├── BundleError            a bundle or GGUF that is damaged, incomplete or not ours
│   └── IntegrityError     bytes whose checksum differs from the manifest
├── TokenizerError         missing or damaged tokenizer or chat template
├── DeviceError            does not fit the device or profile
├── BackendError           a backend that is missing, unsupported or failed
│   └── ProviderError      an execution provider (NPU) that is missing, refused nodes or crashed
├── CacheError             a KV cache asked for what it no longer holds
│   └── ContextLengthError more tokens than the context holds
├── SnapshotError          a saved session or snapshot that is damaged or cannot be written
│   └── SnapshotMismatchError  one of another model, cache format or version
├── GenerationError        a generation that cannot go on (NaN logits)
├── RemoteError            a server that answers in our stead did not
│   ├── RemoteConnectError   no connection: refused, unknown name, TLS
│   ├── RemoteTimeoutError   silent for too long
│   ├── RemoteStatusError    it refused: an HTTP status that is no answer
│   ├── RemoteBrokenError    the connection ended before the answer did
│   └── RemoteProtocolError  what it sent is not an answer
└── Cancelled              work given up half-way because the caller asked for it

A message says what happened with numbers; `hint` says what to do instead.
"""

from __future__ import annotations


class MimoEdgeError(Exception):
    """Base of all typed errors. `hint` (may be empty) tells the user what to do instead."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}: {self.hint}" if self.hint else self.message


class UsageError(MimoEdgeError):
    """A wrong call: bad argument, unknown name."""

    exit_code = 2


class ConstraintError(UsageError):
    """A schema, regular expression or tool that cannot be enforced while answering."""


class ConfigError(MimoEdgeError):
    """A model or run configuration we refuse."""


class CheckpointError(MimoEdgeError):
    """A checkpoint that is damaged, incomplete or inconsistent."""


class QuantError(MimoEdgeError):
    """Data that cannot be quantised or dequantised."""


class ExportError(MimoEdgeError):
    """An export that could not finish; nothing that looks whole was left behind."""


class BundleError(MimoEdgeError):
    """A bundle or GGUF that is damaged, incomplete or not ours."""


class IntegrityError(BundleError):
    """Bytes whose checksum differs from the manifest."""


class TokenizerError(MimoEdgeError):
    """A missing or damaged tokenizer or chat template."""


class DeviceError(MimoEdgeError):
    """Something that does not fit the device or profile."""


class BackendError(MimoEdgeError):
    """A backend that is missing, unsupported or failed."""


class ProviderError(BackendError):
    """An execution provider (an NPU's) that is missing, refused part of a model, or crashed."""


class CacheError(MimoEdgeError):
    """A KV cache asked for rows it no longer holds."""


class ContextLengthError(CacheError):
    """More tokens than the context holds."""


class SnapshotError(MimoEdgeError):
    """A saved session or snapshot that is damaged, incomplete, or cannot be read or written."""


class SnapshotMismatchError(SnapshotError):
    """A snapshot that is whole, but of another model, cache format, backend or version."""


class GenerationError(MimoEdgeError):
    """A generation that cannot go on."""


class RemoteError(MimoEdgeError):
    """A server that answers in our stead did not."""


class RemoteConnectError(RemoteError):
    """No connection to the server: refused, unknown name, TLS."""


class RemoteTimeoutError(RemoteError):
    """The server was silent for too long."""


class RemoteStatusError(RemoteError):
    """The server refused. `status` is the HTTP status, `code` the reason it names, if any, and
    `retry_after_s` how long it asks to wait."""

    def __init__(
        self,
        message: str,
        hint: str = "",
        *,
        status: int,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, hint)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s


class RemoteBrokenError(RemoteError):
    """The connection ended before the answer did."""


class RemoteProtocolError(RemoteError):
    """What the server sent is not an answer."""


class Cancelled(MimoEdgeError):
    """Work given up half-way because the caller asked for it."""

    exit_code = 130
