"""Server-sent events from bytes.

Source: the event stream format of the HTML standard, section 9.2.6; fields other than `data` carry
nothing here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from mimo_edge.errors import RemoteProtocolError

# A whole tool call may come as one event, with a long text as its argument; nothing else is long.
MAX_EVENT_BYTES = 1 << 20

_LINE_END = re.compile(rb"\r\n|\n|\r")


class EventReader:
    """The data of events, from bytes cut anywhere. Raises RemoteProtocolError on an event beyond
    `limit` bytes or one that is not UTF-8."""

    def __init__(self, limit: int = MAX_EVENT_BYTES) -> None:
        self._limit = limit
        self._line = bytearray()
        self._data: list[bytes] = []
        self._size = 0
        self._after_cr = False  # a line feed that comes next belongs to the line that ended

    def feed(self, chunk: bytes) -> Iterator[str]:
        """Events that ended with these bytes; the good ones before a bad one as well."""
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
            self._after_cr = False
        if chunk:
            self._after_cr = chunk.endswith(b"\r")
        at = 0
        for end in _LINE_END.finditer(chunk):
            self._grow(chunk[at : end.start()])
            event = self._end_line()
            at = end.end()
            if event is not None:
                yield event
        self._grow(chunk[at:])

    def _grow(self, part: bytes) -> None:
        self._line += part
        if self._size + len(self._line) > self._limit:
            raise RemoteProtocolError(f"the server sent an event of more than {self._limit} bytes")

    def _end_line(self) -> str | None:
        line = bytes(self._line)
        self._line.clear()
        if not line:
            data, self._data, self._size = self._data, [], 0
            return _text(b"\n".join(data)) if data else None
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
            self._size += len(line)
        return None


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise RemoteProtocolError(
            f"the server sent an event that is not UTF-8: byte {error.start}"
        ) from None
