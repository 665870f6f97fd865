"""Beginnings of prompts that are processed once per device: system text and tools.

A sliding ring cannot be rewound, so what was processed is kept where prompts part: at the end of
the system and tools block. A snapshot is found by what it is: the hash of the model's identity, the
layout of the cache and the tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence as Ids

import numpy as np

from mimo_edge.cancel import Cancel
from mimo_edge.engine import Engine
from mimo_edge.errors import SnapshotError
from mimo_edge.sequence import Sequence
from mimo_edge.snapshots.file import as_bytes, encode_header
from mimo_edge.snapshots.sequence import capture, place
from mimo_edge.snapshots.store import SnapshotStore

KIND = "prefix"
# Fewer tokens are processed about as fast as a file is opened and read.
MIN_TOKENS = 32


class PrefixSnapshots:
    """Beginnings of prompts of the model called `model`, in `store`. Used by whoever has the turn
    of the engine."""

    def __init__(self, store: SnapshotStore, model: str) -> None:
        self.store = store
        self._model = model
        self.reused_tokens = 0

    def wanted(self, border: int) -> bool:
        """Whether a beginning of that many tokens is worth keeping."""
        return border >= MIN_TOKENS

    def load(
        self,
        engine: Engine,
        sequence: Sequence,
        prefix: Ids[int],
        drafting: bool,
        cancel: Cancel | None = None,
    ) -> bool:
        """Make `sequence` what it is after `prefix`, if that is kept; else it is as it was. Raises
        Cancelled."""
        key = self._key(engine, prefix, drafting)
        found = self.store.open(key)
        if found is None:
            return False
        fresh = engine.sequence()
        with found:
            try:
                if found.kind != KIND or found.model != self._model:
                    raise SnapshotError(f"{found.path} is a {found.kind} of another model")
                place(engine, fresh, found.state, found, cancel)
                if fresh.tokens != list(prefix) or (fresh.drafter is None) == drafting:
                    fresh.reset()
                    raise SnapshotError(f"{found.path} holds other tokens")
            except SnapshotError as error:
                self.store.damaged(key, error)
                self.store.stats.misses += 1
                return False
        sequence.take_over(fresh)
        self.store.stats.hits += 1
        self.reused_tokens += len(prefix)
        return True

    def keep(self, engine: Engine, sequence: Sequence) -> None:
        """Write what `sequence` is now."""
        key = self._key(engine, sequence.tokens, sequence.drafter is not None)
        captured = capture(sequence)
        header = encode_header(KIND, self._model, captured.state, captured.sections)
        self.store.keep(key, header, captured.sections)

    def _key(self, engine: Engine, tokens: Ids[int], drafting: bool) -> str:
        about = {
            "model": self._model,
            "backend": engine.backend.name,  # rows of each are rounded otherwise
            "layout": engine.layout.to_json(),
            "drafting": drafting,
        }
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        digest.update(as_bytes(np.asarray(tokens, np.int64), "<i4").data)
        return digest.hexdigest()
