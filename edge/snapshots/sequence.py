"""A sequence as a snapshot: tokens, the rows of every layer, and what the drafter knows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mimo_edge.cache_rows import CacheLayout, LayerRows
from mimo_edge.cancel import Cancel, check_cancel
from mimo_edge.engine import Engine
from mimo_edge.errors import CacheError, SnapshotMismatchError
from mimo_edge.sequence import Sequence
from mimo_edge.snapshots.file import Section, SnapshotFile, as_bytes, count, pairs
from mimo_edge.speculative import MAX_DRAFT, Drafter, DrafterState

TOKENS, HIDDEN = "tokens", "hidden"


@dataclass(frozen=True)
class Captured:
    """What a snapshot keeps of a sequence: a part of its header, and sections, which are views of
    the cache, valid until the sequence goes on."""

    state: dict[str, Any]
    sections: tuple[Section, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the sections."""
        return sum(section.nbytes for section in self.sections)


def capture(sequence: Sequence) -> Captured:
    """The state of a sequence between two of its steps; one without a cache is its tokens alone."""
    tokens = as_bytes(np.asarray(sequence.tokens, np.int64), "<i4")
    state: dict[str, Any] = {"tokens": len(sequence.tokens), "cache": None}
    sections = [Section(TOKENS, (tokens,))]
    if sequence.cache is None:
        return Captured(state, tuple(sections))
    rows: list[list[int]] = []
    for index, one in enumerate(sequence.cache.rows()):
        rows.append([one.first, len(one.keys)])
        sections.append(Section(f"layer.{index}", (_flat(one.keys), _flat(one.values))))
    drafter = None
    if sequence.drafter is not None:
        known = sequence.drafter.state()
        drafter = {"final": list(known.final), "hidden": len(known.hidden)}
        sections.append(Section(HIDDEN, (as_bytes(known.hidden, "<f4"),)))
    layout = sequence.cache.layout.to_json()
    state["cache"] = {"layout": layout, "rows": rows, "drafter": drafter}
    return Captured(state, tuple(sections))


def read_tokens(state: dict[str, Any], file: SnapshotFile) -> list[int]:
    """The tokens of a captured sequence. Raises SnapshotError."""
    tokens = file.read(TOKENS)
    if len(tokens) != 4 * count(state.get("tokens"), file, "the number of tokens"):
        file.fail(f"{len(tokens)} bytes of tokens")
    found: list[int] = tokens.view("<i4").tolist()
    return found


def place(
    engine: Engine,
    sequence: Sequence,
    state: dict[str, Any],
    file: SnapshotFile,
    cancel: Cancel | None = None,
) -> None:
    """Make an empty sequence what was captured. The caller has the turn.

    Raises SnapshotError (damage), SnapshotMismatchError (a cache of another layout),
    ContextLengthError, Cancelled between two layers; the sequence is then as it was.
    """
    tokens = read_tokens(state, file)
    vocab = engine.backend.config.vocab_size
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocab:
        file.fail(f"token ids outside the vocabulary of {vocab}")
    held = state.get("cache")
    if held is None:
        return
    if not isinstance(held, dict) or set(held) != {"layout", "rows", "drafter"}:
        file.fail("its cache is described otherwise")
    cache = engine.backend.new_cache(engine.context, MAX_DRAFT + 1)
    try:
        same_mtp = check_layout(held["layout"], cache.layout, file)
        rows = list(pairs(held["rows"], file, "rows"))
        try:
            cache.restore(len(tokens), _layer_rows(cache.layout, rows, same_mtp, file, cancel))
        except CacheError as error:
            # More tokens than the context is no damage, and keeps its own error.
            if type(error) is not CacheError:
                raise
            file.fail(error.message)
        drafter: Drafter | None = Drafter(engine.backend, cache)
        assert drafter is not None
        if held["drafter"] is not None and same_mtp:
            _resume(engine, drafter, len(tokens), held["drafter"], file)
        elif engine.draft != 0 and drafter.windowed:
            drafter.skip(len(tokens))
        else:
            drafter = None
    except BaseException:
        cache.close()
        raise
    sequence.tokens, sequence.cache, sequence.drafter = tokens, cache, drafter


def check_layout(stored: Any, layout: CacheLayout, file: SnapshotFile) -> bool:
    """Whether the MTP blocks are the same as well. Raises SnapshotMismatchError unless the decoder
    layers of a snapshot can be taken over by a cache of `layout`."""
    own = layout.to_json()
    if not isinstance(stored, dict) or set(stored) != set(own):
        file.fail("the layout of its cache is described otherwise")
    for key, name in (("scaled_values", "values"), ("layers", "layers")):
        if stored[key] != own[key]:
            raise SnapshotMismatchError(
                f"{file.path} holds a KV cache whose {name} are of another kind: "
                f"{_short(stored[key])}, here {_short(own[key])}",
                "open the model with the same backend and kv_type, or restore with recompute=True",
            )
    same: bool = stored["mtp"] == own["mtp"]
    return same


def _layer_rows(
    layout: CacheLayout,
    rows: list[tuple[int, int]],
    mtp: bool,
    file: SnapshotFile,
    cancel: Cancel | None,
) -> Iterator[LayerRows]:
    """Rows of every layer, read one after the other; without `mtp` its blocks get none."""
    for index, one in enumerate(layout.all):
        check_cancel(cancel)
        if index >= len(layout.layers) and not mtp:
            none = [np.empty((0, n), np.uint8) for n in (one.key_bytes, one.value_bytes)]
            yield LayerRows(0, *none)
            continue
        if index >= len(rows):
            file.fail(f"it lists rows of {len(rows)} layers")
        first, number = rows[index]
        name, keys = f"layer.{index}", number * one.key_bytes
        if file.size(name) != keys + number * one.value_bytes:
            file.fail(f"{number} rows in {file.size(name)} bytes of {name}")
        data = file.read(name)
        yield LayerRows(
            first,
            data[:keys].reshape(number, one.key_bytes),
            data[keys:].reshape(number, one.value_bytes),
        )


def _resume(engine: Engine, drafter: Drafter, length: int, stored: Any, file: SnapshotFile) -> None:
    if not isinstance(stored, dict) or set(stored) != {"final", "hidden"}:
        file.fail("its drafter is described otherwise")
    if not isinstance(stored["final"], list):
        file.fail("the final rows of its drafter are no list")
    final = tuple(count(value, file, "final rows") for value in stored["final"])
    width, number = engine.backend.config.hidden_size, count(stored["hidden"], file, "H rows")
    if file.size(HIDDEN) != 4 * width * number:
        file.fail(f"{number} H rows in {file.size(HIDDEN)} bytes")
    hidden = file.read(HIDDEN).view("<f4").reshape(number, width)
    try:
        drafter.resume(DrafterState(length, final, hidden))
    except ValueError as error:
        file.fail(str(error))


def _flat(rows: Any) -> Any:
    return np.ascontiguousarray(rows).reshape(-1)


def _short(value: Any) -> str:
    shown = str(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
