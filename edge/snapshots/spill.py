"""Idle conversations on disk."""

from __future__ import annotations

import logging

from mimo_edge.engine import Engine
from mimo_edge.errors import SnapshotError
from mimo_edge.sequence import Sequence
from mimo_edge.snapshots.file import SnapshotFile, encode_header
from mimo_edge.snapshots.sequence import capture, place
from mimo_edge.snapshots.store import SnapshotStore, Spilled

_log = logging.getLogger(__name__)

KIND = "idle"


class SpillToDisk:
    """Puts idle sequences of `engine` into `store`."""

    def __init__(self, engine: Engine, store: SnapshotStore) -> None:
        self._engine = engine
        self._store = store

    def put(self, sequence: Sequence) -> SpilledSequence | None:
        """Write a sequence; None when the disk does not take it."""
        captured = capture(sequence)
        # It is read by this process alone, so no name of the model is needed.
        header = encode_header(KIND, "", captured.state, captured.sections)
        spilled = self._store.spill(header, captured.sections)
        return None if spilled is None else SpilledSequence(self._engine, self._store, spilled)


class SpilledSequence:
    """A sequence in a file."""

    def __init__(self, engine: Engine, store: SnapshotStore, spilled: Spilled) -> None:
        self._engine = engine
        self._store = store
        self._spilled = spilled

    def restore(self, sequence: Sequence) -> bool:
        """Bring it back; False when the file is gone or damaged."""
        fresh = self._engine.sequence()
        try:
            with SnapshotFile(self._spilled.path) as file:
                place(self._engine, fresh, file.state, file)
            if fresh.tokens != sequence.tokens:
                raise SnapshotError(f"{self._spilled.path} holds other tokens")
        except SnapshotError as error:
            _log.warning("%s; %d tokens are processed again", error, len(sequence.tokens))
            self._store.stats.damaged += 1
            return False
        finally:
            self.discard()
        sequence.take_over(fresh)
        return True

    def discard(self) -> None:
        """Delete the file."""
        self._spilled.discard()
