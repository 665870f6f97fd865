"""What was done, and why: the newest events, and counts of all."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass
from typing import Any, Literal

_log = logging.getLogger(__name__)

Cause = Literal["temperature", "battery", "memory", "application", "sensor"]
# Of more, the oldest go: a run may last for weeks.
_KEPT = 100


@dataclass(frozen=True)
class Event:
    """`action` was taken at `time` (seconds since the epoch) because of `reading`."""

    time: float
    cause: Cause
    action: str
    reading: str


class EventLog:
    """Events of one runtime; from any thread. Every event also goes to the log."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=_KEPT)
        self._counts: Counter[Cause] = Counter()
        self._lock = threading.Lock()

    def add(self, cause: Cause, action: str, reading: str, *, relief: bool = False) -> None:
        """Note an action; `relief` says that it gives back what another took."""
        event = Event(time.time(), cause, action, reading)
        with self._lock:
            self._events.append(event)
            self._counts[cause] += 1
        _log.log(logging.INFO if relief else logging.WARNING, "%s: %s (%s)", cause, action, reading)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: counts by cause, and the newest events."""
        with self._lock:
            return {
                "counts": dict(self._counts),
                "events": [asdict(event) for event in self._events],
            }
